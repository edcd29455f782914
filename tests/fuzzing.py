"""Hostile requests by the thousand, straight into the application, with a real engine on a small random model behind it.

`python tests/fuzzing.py COUNT SEED` runs that many and says how each kind was answered.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from typing import Any

from attlas.engine.engine import Engine
from attlas.engine.options import EngineOptions
from attlas.serve.app import Server, create_app
from attlas.serve.load import byte_tokenizer, random_model
from attlas.serve.options import Limits
from attlas.serve.service import Served, Service

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
AT_ONCE = 24

TEMPLATES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "once upon", "max_tokens": 5},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
    "/tokenize": {"prompt": "once"},
    "/detokenize": {"tokens": [65, 66]},
}
FIELDS = (
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stream",
    "stream_options", "stop", "seed", "echo", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "logprobs", "top_logprobs", "response_format", "stop_token_ids", "ignore_eos", "cache_salt", "tools", "tool_choice", "user",
    "best_of", "suffix", "tokens", "add_generation_prompt", "metadata", "unknown", "role", "content",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.0, 0.5, 1.0, 1e-9, 1e-300, 1e300, -1e300, 2**31, 2**63, 2**64, -(2**63), 10**40,
    10**4000, "", " ", "a", "0", "auto", "none", "text", "x" * 300, "x" * 5000, "\u0000", "\ud800", "\U0001f600" * 9,
    "e\u0301" * 50, "<end>",
    [], [[]], [0], [257], [-1], [2**40], [1, "a"], ["a", 1], ["a", "b"], [[65], [66]], [None], ["", ""], [65] * 300, ["x"] * 70,
    {}, {"a": 1}, {"65": 5}, {"65": -100}, {"256": 100}, {"1e3": 1}, {"-1": 1}, {"9" * 5000: 1}, {"include_usage": True},
    {"include_usage": "yes"}, {"type": "json_object"}, {"type": "text"}, {"type": "json_schema"}, {"type": "xml"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "string", "maxLength": 3}}},
    {"type": "json_schema", "json_schema": {"schema": {"enum": [1, "a", None]}}},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": {"$ref": "#"}, "minItems": 10**9}}},
    {"type": "json_schema", "json_schema": {"schema": {"allOf": [{"not": {}}]}}},
    {"type": "json_schema", "json_schema": {"schema": {"type": 7}}},
    {"type": "json_schema", "json_schema": {"schema": {"pattern": "(a+)+$", "type": "string"}}},
    [{"role": "user", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": None}], [{"content": "x"}],
    [{"role": "tool", "content": "x", "tool_call_id": "1"}], [{"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
    [{"role": "user", "content": "{{7*7}}"}], "parrot", "user",
)  # fmt: skip


def hostile_body(rng: random.Random) -> tuple[str, str, bytes]:
    """(kind, path, body): a valid request with some of its fields replaced, or bytes that are hardly a request."""
    path = rng.choice(PATHS)
    body = dict(TEMPLATES[path])
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 5))):
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
    if rng.random() < 0.05:
        body.pop(next(iter(body)))
    raw = json.dumps(body).encode()
    kind = rng.choice(("fields",) * 6 + ("cut", "flipped", "bytes", "nested", "number"))
    if kind == "cut":
        raw = raw[: rng.randrange(len(raw) + 1)]
    elif kind == "flipped":
        mixed = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            mixed[rng.randrange(len(mixed))] = rng.randrange(256)
        raw = bytes(mixed)
    elif kind == "bytes":
        raw = rng.randbytes(rng.choice((0, 1, 3, 50, 2000)))
    elif kind == "nested":
        depth = rng.choice((10, 500, 20_000))
        name = rng.choice((b"metadata", b"response_format", b"prompt", b"logit_bias"))
        inner = b"[" * depth + b"]" * depth
        if name == b"response_format":
            inner = b'{"type": "json_schema", "json_schema": {"schema": ' + b'{"not": ' * depth + b"{}" + b"}" * depth + b"}}"
        raw = raw.rstrip(b"}") + b', "' + name + b'": ' + inner + b"}"
    elif kind == "number":
        digits = rng.choice((b"9" * 400, b"9" * 6000, b"1e400", b"-1e400", b"NaN", b"Infinity", b"-0", b"1.5e-400", b"0x1"))
        raw = raw.rstrip(b"}") + b', "' + rng.choice(FIELDS).encode() + b'": ' + digits + b"}"
    return kind, path, raw


def small_server() -> Server:
    model, tokenizer = random_model(), byte_tokenizer()
    engine = Engine(model, tokenizer, options=EngineOptions(max_running=7, max_batched_tokens=64, pages=40, max_len=64))
    served = Served("parrot", engine, tokenizer, engine.max_len, model.config.vocab_size, 7)
    return create_app(Service(served, Limits(seconds=60, answers=4, prompts=5, queue=100)))


async def call(app: Server, path: str, body: bytes, *, goes: bool = False) -> tuple[int, bytes]:
    """The status and the body of the answer; (0, b"") when the client goes before there is one."""
    status, found = 0, b""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop()
        if not goes:
            await asyncio.Event().wait()
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, found
        status = message.get("status", status)
        found += message.get("body", b"")

    headers = [(b"content-type", b"application/json"), (b"host", b"x")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
        "raw_path": path.encode(), "query_string": b"", "headers": headers, "scheme": "http",
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    await app(scope, receive, send)
    return status, found


async def storm(count: int, seed: int) -> Counter[tuple[str, int]]:
    """Send `count` hostile requests, some of whose clients go; afterwards everything must be as before."""
    app, rng, seen = small_server(), random.Random(seed), Counter[tuple[str, int]]()
    service = app.service
    service.worker.start()
    asked = json.dumps({"prompt": "once upon a time", "max_tokens": 11, "temperature": 0, "ignore_eos": True}).encode()
    before = json.loads((await call(app, PATHS[0], asked))[1])["choices"]
    bodies = (hostile_body(rng) for _ in range(count))

    async def client() -> None:
        for kind, path, body in bodies:
            goes = rng.random() < 0.03
            status, answer = await call(app, path, body, goes=goes)
            shown = f"{kind} {path} {body[:600]!r} -> {status} {answer[:300]!r}"
            assert status < 500 or status == 503, shown
            if 400 <= status < 499:
                assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}, shown
            assert b"engine_error" not in answer, shown
            seen[kind, status] += 1

    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    while service.worker.held:
        await asyncio.sleep(0.01)
    assert json.loads((await call(app, PATHS[0], asked))[1])["choices"] == before, "an answer has changed"
    assert service.worker.problem is None and not service.flights
    await service.worker.ask(lambda engine: engine.cache.check())
    stats = await service.worker.ask(lambda engine: engine.cache.stats())
    assert stats.used == 0 and stats.free_rows == stats.rows, f"pages or rows are leaked: {stats}"
    service.worker.stop()
    return seen


if __name__ == "__main__":
    how_many, first = int(sys.argv[1]), int(sys.argv[2])
    told = asyncio.run(storm(how_many, first))
    print(f"{sum(told.values())} requests, seed {first}: none crashed, leaked or met a 5xx but 503")
    for (kind, status), number in sorted(told.items()):
        print(f"{kind:8} {status or 'gone':>4} {number}")
