"""What clients of other servers send and expect: messages sent back as they came, browsers, load balancers, evaluation tools, and
clients that do not read."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from attlas.errors import OptionError
from attlas.serve.connection import Connection
from attlas.serve.load import byte_tokenizer
from attlas.serve.options import Limits, ServeOptions
from attlas.serve.security import Gate, Stalled, impatient
from attlas.serve.spelling import Place, Spelling
from serving import NAME, FakeEngine, Live, live

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as made:
        yield made


def message(done: httpx.Response, status: int = 400, param: str | None = "messages") -> str:
    assert done.status_code == status and done.json()["error"]["param"] == param, done.text
    return str(done.json()["error"]["message"])


# ---- messages


def test_an_answer_can_be_sent_back_as_it_came(server: Live):
    client: OpenAI = server.client()
    said = client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=3).choices[0].message
    for form in (said, said.model_dump()):  # the second names every field that a message can have
        done = client.chat.completions.create(model=NAME, messages=[*HELLO, form, *HELLO], max_tokens=34)  # type: ignore[list-item]
        assert done.choices[0].message.content == f"user: hello\nassistant: {said.content}\nuser: h"


@pytest.mark.parametrize(
    "extra",
    [{"tool_calls": [{"id": "1"}]}, {"function_call": {"name": "f"}}, {"reasoning": "so"}, {"contents": None}, {"x": 0}],
    ids=str,
)
def test_a_field_of_a_message_that_would_be_lost_is_named(server: Live, extra: dict[str, Any]):
    told = message(server.post("/v1/chat/completions", json={"messages": [{**HELLO[0], **extra}]}))
    assert f"'{next(iter(extra))}' in a message is not supported" in told and "messages.0" in told


def test_a_picture_is_refused_in_one_sentence(server: Live):
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    told = message(server.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]}))
    assert told.endswith("a part of type 'image_url' is not supported; this server reads text") and "valid" not in told[13:]


def test_a_choice_among_no_tools_is_no_choice(server: Live):
    body = {"messages": HELLO, "max_tokens": 2, "tools": [], "tool_choice": "auto"}
    assert server.post("/v1/chat/completions", json=body).status_code == 200


def test_a_schema_that_cannot_be_used_is_the_response_formats_fault():
    from attlas.errors import OptionError as Refusal
    from attlas.serve.errors import refused

    for text in ("SamplingParams: json_schema cannot be used: x", "SamplingParams: json_schema is not a JSON schema: x"):
        assert refused(Refusal(text)).param == "response_format"
    assert refused(Refusal("Engine.add: no")).param is None and refused(Refusal("SamplingParams: n=0; no")).param == "n"


PATTERNS: list[Any] = [{"type": "string", "pattern": f".*{i}.*"} for i in range(11)]
CHAIN = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}", **part} for i, part in enumerate(PATTERNS)}
JOINED = ({"allOf": PATTERNS}, {"items": {"allOf": PATTERNS}}, {"$defs": {**CHAIN, "a11": True}, "$ref": "#/$defs/a0"})


@pytest.mark.parametrize("schema", JOINED, ids=["allOf", "items", "chain"])
def test_patterns_whose_intersection_would_hold_the_engine_up_are_refused(server: Live, schema: Any):
    body = {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    assert "joins patterns" in message(server.post("/v1/chat/completions", json=body), param="response_format")


def test_patterns_beside_each_other_are_taken(server: Live):
    for schema in ({"properties": dict(zip("abcdefghijk", PATTERNS, strict=True))}, {"allOf": PATTERNS[:10]}):
        body = {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}, "max_tokens": 2}
        assert server.post("/v1/chat/completions", json=body).status_code == 200


# ---- evaluation tools: log probabilities of given texts


def test_a_prompt_alone_with_its_logprobs(server: Live):
    for stream in (False, True):
        asked = {"max_tokens": 0, "echo": True, "logprobs": 1, "stream": stream}
        text = server.ask(**asked, **({"stream_options": {"include_usage": True}} if stream else {})).text
        parts = (
            [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")] if stream else [json.loads(text)]
        )
        choice = parts[0]["choices"][0]
        assert choice["text"] == "abc" and choice["finish_reason"] == "length"
        assert choice["logprobs"]["tokens"] == list("abc") and choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.25]
        assert parts[-1]["usage"]["completion_tokens"] == 0 and parts[-1]["usage"]["total_tokens"] == 3
        assert sum(len(part["choices"]) for part in parts) == 1
    assert "echo=true" in message(server.ask(max_tokens=0), param="max_tokens")


def test_the_token_that_stands_there_is_always_among_its_logprobs(server: Live):
    logs = server.ask(max_tokens=2, echo=True, logprobs=0).json()["choices"][0]["logprobs"]
    assert logs["top_logprobs"] == [None, {"b": -0.25}, {"c": -0.25}, {"a": -0.5}, {"b": -0.5}]


def test_parts_of_a_character_have_their_own_bytes_and_names(server: Live):
    sign = "é\U0001f600"
    asked = {"messages": HELLO, "max_tokens": 1}
    prompt = server.post("/tokenize", json={"prompt": sign + "x"}).json()["tokens"]
    done = server.ask(prompt=prompt, max_tokens=7, logprobs=0).json()["choices"][0]
    assert done["text"] == sign + "x" and done["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 1, 2]
    assert done["logprobs"]["tokens"] == [*(f"bytes:\\x{b:02x}" for b in sign.encode()), "x"]
    text = server.ask(prompt=prompt, max_tokens=7, logprobs=0, stream=True).text
    parts = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]
    assert [x for p in parts for x in (p["logprobs"] or {}).get("text_offset", ())] == [0, 0, 1, 1, 1, 1, 2]
    spelling = Spelling(byte_tokenizer())
    assert [spelling.bytes(i) for i in prompt] == [bytes([b]) for b in (sign + "x").encode()]
    assert spelling.text(prompt[0]) == "\\xc3" and spelling.bytes(256) is None and spelling.text(256) == "<end>"
    chat = server.post("/v1/chat/completions", json={**asked, "logprobs": True, "top_logprobs": 1}).json()["choices"][0]
    assert chat["logprobs"]["content"][0]["bytes"] == [ord("u")]


def test_all_bytes_are_spelled():
    tokenizer = byte_tokenizer()
    spelling, ids = Spelling(tokenizer), tokenizer.encode("é".join(map(chr, range(256))))
    assert b"".join(spelling.bytes(i) or b"" for i in ids).decode() == "é".join(map(chr, range(256)))


class SentencePiece:
    """Decodes a text's first blank away, as SentencePiece does."""

    words = ("\u2581the", "\u2581", "\u2581\u2581", "cat", "<0xE2>", "</s>")

    def token(self, id: int) -> str:
        return self.words[id]

    def decode(self, ids: list[int]) -> str:
        said = "".join({4: "\ufffd", 5: ""}.get(i, self.words[i]) for i in ids).replace("\u2581", " ")
        return said[1:] if said.startswith(" ") else said


def test_a_first_blank_is_part_of_its_token():
    spelling, place = Spelling(SentencePiece()), Place()
    assert [spelling.bytes(i) for i in range(6)] == [b" the", b" ", b"  ", b"cat", b"\xe2", None]
    assert [spelling.text(i, "bytes:") for i in (0, 4, 5)] == [" the", "bytes:\\xe2", "</s>"]
    for i in (0, 5, 3):
        place.pass_by(spelling.bytes(i))
    assert place.at == len(" thecat")


def test_tokenize_takes_what_vllms_clients_send(server: Live):
    told = server.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False, "return_token_strs": True}).json()
    assert told["count"] == 2 and told["token_strs"] == ["a", "b"]


# ---- load balancers and browsers


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/", "/v1/engine"])
def test_head_is_get_without_a_body(server: Live, path: str):
    head, get = httpx.head(server.url + path), server.get(path)
    assert head.status_code == get.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_head_wants_a_key_too():
    with live(keys=("a key",)) as locked:
        assert httpx.head(locked.url + "/health").status_code == 401


PREFLIGHT = {
    "Origin": "http://localhost:3000",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


def test_a_browser_is_allowed_only_where_that_was_asked_for(server: Live):
    assert "access-control-allow-origin" not in server.get("/v1/models", headers=PREFLIGHT).headers
    with live(keys=("a key",), origins=("http://localhost:3000",)) as locked:
        asked = httpx.options(locked.url + "/v1/chat/completions", headers=PREFLIGHT)
        assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == PREFLIGHT["Origin"]
        assert "x-stainless-lang" in asked.headers["access-control-allow-headers"]
        refused = locked.get("/v1/models", headers={"Origin": PREFLIGHT["Origin"]})
        assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == PREFLIGHT["Origin"]
        other = httpx.options(locked.url + "/v1/chat/completions", headers={**PREFLIGHT, "Origin": "http://evil.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


# ---- how much is inside, and who does not read


def test_bodies_that_are_on_their_way_are_counted_and_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("attlas.serve.app.BEING_READ", 2)
    with live(FakeEngine(rows=1), limits=Limits(queue=0)) as server:
        lines = []
        for _ in range(3):  # 1 + 0 + 2 may be inside
            made = server.line()
            made.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
            )
            lines.append(made)
        end = time.monotonic() + 10
        while server.app.gate.inside < 3:
            assert time.monotonic() < end
            time.sleep(0.005)
        full = server.ask()
        assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full" and int(full.headers["Retry-After"]) > 0
        assert server.get("/health").status_code == 200
        for made in lines:
            made.close()
        while server.app.gate.inside:
            assert time.monotonic() < end
            time.sleep(0.005)
        assert server.ask().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_read_is_let_go(stream: bool):
    engine = FakeEngine()
    with live(engine, limits=Limits(stall=0.3, seconds=60)) as server:
        body = json.dumps({"prompt": "abc", "n": 16, "max_tokens": 200, "logprobs": 20, "stream": stream}).encode()
        with socket.socket() as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            made.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            made.sendall(head.encode() + b"\r\n\r\n" + body)
            end = time.monotonic() + 30
            while not server.app.gate.inside:
                assert time.monotonic() < end
            while server.app.gate.inside:
                assert time.monotonic() < end, "the request stays inside"
                time.sleep(0.01)
        server.until_idle()
        assert not server.app.service.flights and server.ask(max_tokens=4).json()["choices"][0]["text"] == "abca"


def test_waiting_for_a_reader_ends_and_other_cancellations_go_through():
    async def sent(seconds: float, cancel: bool) -> str:
        async def send(_: Any) -> None:
            await asyncio.sleep(5)

        task = asyncio.ensure_future(impatient(send, seconds)({}))
        if cancel:
            await asyncio.sleep(0)
            task.cancel()
        try:
            await task
        except Stalled:
            return "stalled"
        except asyncio.CancelledError:
            return "cancelled"
        return "sent"

    assert asyncio.run(sent(0.01, False)) == "stalled"
    assert asyncio.run(sent(30, True)) == "cancelled"


def test_the_gate_says_why_nobody_comes_in():
    seen: list[int] = []

    async def app(*_: Any) -> None:
        raise AssertionError("let in")

    async def ask(gate: Gate) -> int:
        told: list[Any] = []

        async def send(part: Any) -> None:
            told.append(part)

        await gate({"type": "http", "method": "POST", "headers": []}, None, send)  # type: ignore[arg-type]
        return int(told[0]["status"])

    async def both() -> list[int]:
        gate = Gate(app, 0, 1.0, seen.append)
        first = await ask(gate)
        gate.closed = True
        return [first, await ask(gate)]

    assert asyncio.run(both()) == [429, 503] == seen


# ---- options


def test_options_of_the_cache_reach_the_engine():
    made = ServeOptions(preemption="swap", swap_mib=3.5, kv_dtype="int8").engine()
    assert made.swap_bytes == 3.5 * 2**20 and made.kv_dtype == "int8" and made.preemption == "swap"
    assert ServeOptions().engine().swap_bytes == 0


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"log_level": "loud"}, "--log-level loud"),
        ({"kv_dtype": "int7"}, "did you mean 'int8'"),
        ({"allow_origin": ("localhost:3000",)}, "http://localhost:3000"),
        ({"swap_mib": 0.0}, "--swap-mib"),
        ({"cache_mib": float("nan")}, "--cache-mib"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(wrong: dict[str, Any], words: str):
    with pytest.raises(OptionError, match=words):
        ServeOptions(**wrong)


# ---- who may call, and how long a connection may be silent


def test_a_server_without_keys_answers_to_its_own_names_only():
    with live(hosts=("box",)) as server:
        for name in ("localhost", "127.0.0.1:8000", "[::1]:80", "box:1", "BOX", "a.localhost", "10.0.0.7"):
            assert server.get("/v1/models", headers={"Host": name}).status_code == 200, name
        for name in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil", "box.evil", ""):
            done = server.get("/v1/engine", headers={"Host": name})
            assert done.status_code == 403 and "--allow-host" in message(done, 403, None), name
            assert server.post("/v1/completions", json={"prompt": "a"}, headers={"Host": name}).status_code == 403


def test_names_are_checked_where_only_the_address_protects():
    assert ServeOptions(allow_host=("box",)).hosts(()) == ("box",) and ServeOptions().hosts(()) == ()
    assert ServeOptions().hosts(("a key",)) is None and ServeOptions(host="0.0.0.0").hosts(()) is None


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["first", "second"])
@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHo"], ids=["nothing", "part"])
def test_a_connection_that_does_not_ask_is_closed(monkeypatch: pytest.MonkeyPatch, before: bytes, sent: bytes):
    monkeypatch.setattr(Connection, "header_seconds", 0.3)
    monkeypatch.setattr("attlas.serve.run.KEEP_ALIVE", 1)
    with live() as server, server.line() as silent, server.sent("/v1/completions", b"{", length=9) as slow:
        if before:
            silent.sendall(before)
            assert b"200 OK" in silent.recv(4096)
        began = time.monotonic()
        silent.sendall(sent)
        silent.settimeout(10)
        while silent.recv(4096):
            pass
        assert 0.2 < time.monotonic() - began < 8
        slow.sendall(b'"prompt":')  # a body has a time of its own
        assert b"400" in slow.recv(4096)


def test_a_connection_is_kept_between_requests(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Connection, "header_seconds", 0.2)
    with live() as server, httpx.Client(base_url=server.url) as client:
        client.get("/health")
        time.sleep(0.5)
        assert client.get("/health").status_code == 200
        stream = client.build_request("POST", "/v1/completions", json={"prompt": "abc", "max_tokens": 3})
        assert client.send(stream).status_code == 200
