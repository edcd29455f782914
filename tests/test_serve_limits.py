"""Keys, limits, time-outs, clients that go, and errors: the engine goes on after any of them."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from attlas.serve import security
from attlas.serve.options import Limits
from serving import CONTEXT, NAME, FakeEngine, Live, live

KEYS = ("first key", "schlüssel")


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as made:
        yield made


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
    with live(keys=KEYS) as made:
        yield made


def works(server: Live, **headers: str) -> None:
    """The engine goes on."""
    done = server.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4}, headers=headers)
    assert done.status_code == 200 and done.json()["choices"][0]["text"] == "abca", done.text


def refused(done: httpx.Response, status: int, param: str | None, code: str | None = None) -> str:
    """The message of an error of the right form."""
    assert done.status_code == status, done.text
    error = done.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param, error
    assert code is None or error["code"] == code
    return str(error["message"])


# ---- keys


def routes(server: Live) -> list[tuple[str, str]]:
    found = [(method, route.path) for route in server.app.routes for method in sorted(getattr(route, "methods", ()) or ())]
    assert len(found) >= 11
    return [*found, ("GET", "/no/such/route"), ("DELETE", "/v1/models"), ("OPTIONS", "/v1/completions")]


BASIC = {"Authorization": "Basic " + base64.b64encode(b"user:wrong").decode()}


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "first key"}, {"Authorization": "Bearer"}, BASIC]
)
def test_every_route_wants_a_key(locked: Live, headers: dict[str, str]):
    for method, path in routes(locked):
        done = httpx.request(method, locked.url + path, headers=headers)
        assert done.status_code == 401, (method, path, done.text)
        assert method == "HEAD" or done.json()["error"]["code"] == "invalid_api_key"


def test_every_key_opens_every_route(locked: Live):
    for key in KEYS:
        for scheme in (f"Bearer {key}", "Basic " + base64.b64encode(f"x:{key}".encode()).decode()):
            for method, path in routes(locked):
                done = httpx.request(method, locked.url + path, headers={"Authorization": scheme.encode()})
                assert done.status_code != 401, (method, path)


def test_two_authorization_headers_are_none(locked: Live):
    both = [("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {KEYS[0]}")]
    assert httpx.get(locked.url + "/health", headers=both).status_code == 401


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, int]] = []
    original = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        seen.append((len(a), len(b)))
        return original(a, b)

    monkeypatch.setattr(security.hmac, "compare_digest", compare)
    keys = security.Keys(["a", "bb", "ccc"])
    owners = [keys.owner(b"Bearer " + key) for key in (b"a", b"ccc", b"no", b"")]
    assert seen == [(32, 32)] * 12, "each of the keys, whole, whatever came"
    assert owners[0] and owners[1] and owners[0] != owners[1] and owners[2:] == [None, None]


def test_each_key_has_a_cache_of_its_own(locked: Live):
    locked.engine.salts.clear()
    for key in KEYS:
        for salt in (None, "x"):
            body = {"prompt": "abc", "max_tokens": 1, "cache_salt": salt}
            assert locked.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}".encode()}).is_success
    assert len(set(locked.engine.salts)) == 4
    assert not any(key in salt for key in KEYS for salt in locked.engine.salts)


def test_the_official_client_sends_its_key(locked: Live):
    assert locked.client(KEYS[0]).completions.create(model=NAME, prompt="ab", max_tokens=1).choices[0].text == "a"
    with pytest.raises(openai.AuthenticationError):
        locked.client("wrong").completions.create(model=NAME, prompt="ab", max_tokens=1)


# ---- what is wrong with a request


FORMAT = {"type": "json_schema"}
DEEP: dict[str, Any] = {}
for _ in range(64):
    DEEP = {"not": DEEP}
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "prompt longer than the context": ({"prompt": "x" * CONTEXT}, "prompt", "maximum context length"),
    "answer longer than the context": ({"max_tokens": CONTEXT - 2}, "max_tokens", "room for"),
    "empty prompt": ({"prompt": ""}, "prompt", "empty"),
    "no prompts": ({"prompt": []}, "prompt", "empty"),
    "an empty one among prompts": ({"prompt": ["a", ""]}, "prompt", "empty"),
    "token outside the vocabulary": ({"prompt": [3, 257]}, "prompt", "vocabulary"),
    "negative token": ({"prompt": [-1]}, "prompt", "prompt"),
    "prompt of another type": ({"prompt": {"a": 1}}, "prompt", "prompt"),
    "temperature below 0": ({"temperature": -0.1}, "temperature", "at least 0"),
    "temperature as text": ({"temperature": "0.5"}, "temperature", "number"),
    "top_p above 1": ({"top_p": 1.5}, "top_p", "at most 1"),
    "top_p 0": ({"top_p": 0}, "top_p", "above 0"),
    "min_p above 1": ({"min_p": 2}, "min_p", "at most 1"),
    "n 0": ({"n": 0}, "n", "at least 1"),
    "n too large": ({"n": 17}, "n", "at most 16"),
    "n huge": ({"n": 10**30}, "n", "at most 16"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens", "at least 1"),
    "max_tokens huge": ({"max_tokens": 10**400}, "max_tokens", "room for"),
    "seed huge": ({"seed": 10**400}, "seed", "integer"),
    "penalty above 2": ({"presence_penalty": 2.5}, "presence_penalty", "at most 2"),
    "penalty below -2": ({"frequency_penalty": -2.5}, "frequency_penalty", "at least -2"),
    "too many stops": ({"stop": ["x"] * 17}, "stop", "at most 16"),
    "empty stop": ({"stop": [""]}, "stop", "1 to 256"),
    "too many logprobs": ({"logprobs": 21}, "logprobs", "0 to 20"),
    "bias of an unknown token": ({"logit_bias": {"257": 1}}, "logit_bias", "vocabulary"),
    "bias of no token": ({"logit_bias": {"a": 1}}, "logit_bias", "token id"),
    "bias too large": ({"logit_bias": {"3": 101}}, "logit_bias", "-100 and 100"),
    "too many prompts": ({"prompt": ["a"] * 65}, "prompt", "at most 64"),
    "schema missing": ({"response_format": FORMAT}, "response_format", "json_schema.schema"),
    "schema nested too deep": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": DEEP}}},
        "response_format",
        "64",
    ),
    "unknown format": ({"response_format": {"type": "xml"}}, "response_format", "json_object"),
    "stream options without stream": ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    "what would change the answer": ({"suffix": "end"}, "suffix", "not ignored"),
    "best_of another than n": ({"best_of": 3}, "best_of", "not ignored"),
    "mistyped field": ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    "what the engine refuses": ({"prompt": [0]}, None, "does not say zero"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parameters_are_named(server: Live, case: str):
    body, param, words = BAD[case]
    for stream in (False, True) if "stream_options" not in body else (False,):
        assert words in refused(server.post("/v1/completions", json={"prompt": "abc", "stream": stream, **body}), 400, param)
    works(server)


CHAT = {"messages": [{"role": "user", "content": "hello"}]}
BAD_CHAT: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": ({"messages": []}, "messages", "at least 1"),
    "unknown role": ({"messages": [{"role": "king", "content": "x"}]}, "messages", "messages.0.role"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", "messages.0"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "not ignored"),
    "reasoning": ({"reasoning_effort": "high"}, "reasoning_effort", "not ignored"),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    "too long": ({"messages": [{"role": "user", "content": "x" * CONTEXT}]}, "messages", "maximum context length"),
}


@pytest.mark.parametrize("case", BAD_CHAT)
def test_bad_chats_are_named(server: Live, case: str):
    body, param, words = BAD_CHAT[case]
    assert words in refused(server.post("/v1/chat/completions", json={**CHAT, **body}), 400, param)
    works(server)


def test_missing_fields_and_unknown_models(server: Live):
    assert "prompt" in refused(server.post("/v1/completions", json={}), 400, "prompt", "missing_parameter")
    assert "messages" in refused(server.post("/v1/chat/completions", json={}), 400, "messages", "missing_parameter")
    assert NAME in refused(server.ask(model="gpt-9"), 404, "model", "model_not_found")
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        server.client().completions.create(model="gpt-9", prompt="x")


BODIES = {
    "malformed": b'{"prompt": "abc',
    "bad UTF-8": b'{"prompt": "\xff\xfe"}',
    "nothing": b"",
    "no object": b"[1, 2]",
    "null": b"null",
    "too deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "too many digits": b'{"prompt": "abc", "seed": ' + b"9" * 10_000 + b"}",
    "infinity": b'{"prompt": "abc", "temperature": 1e999}',
    "nan": b'{"prompt": "abc", "temperature": NaN}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "half a surrogate pair as a name": b'{"prompt": "a", "\\ud800": 1}',
    "zero bytes": b"\x00" * 100,
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_make_no_sense(server: Live, case: str):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        done = server.post(path, content=BODIES[case], headers={"Content-Type": "application/json"})
        assert done.status_code == 400 and done.json()["error"]["message"], done.text
    works(server)


def test_a_body_must_say_that_it_is_json(server: Live):
    done = server.post("/v1/completions", content=b'{"prompt": "abc"}', headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in refused(done, 400, None)


def test_paths_and_methods_that_are_not_there(server: Live):
    assert "/v2" in refused(server.get("/v2"), 404, None)
    assert "GET" in refused(server.get("/v1/completions"), 405, None)


# ---- how much, how many, how long


def test_large_bodies_are_refused_announced_or_not():
    with live(limits=Limits(body=10_000)) as server:
        refused(server.ask(prompt="x" * 10_000), 413, None, "body_too_large")

        def pieces() -> Iterator[bytes]:
            for _ in range(23):
                yield b" " * 1000

        done = server.post("/v1/completions", content=pieces(), headers={"Content-Type": "application/json"})
        refused(done, 413, None, "body_too_large")
        works(server)


def test_a_body_that_does_not_come_is_not_waited_for():
    with live(limits=Limits(body_seconds=0.2)) as server:
        with server.sent("/v1/completions", b"{", length=100) as line:
            assert line.recv(4096).startswith(b"HTTP/1.1 408")
        works(server)


def test_huge_headers_do_not_reach_the_application(server: Live):
    with server.line() as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 100_000)
        assert line.recv(4096).startswith(b"HTTP/1.1 400")
    works(server)


def test_a_full_queue_says_when_to_come_again():
    engine = FakeEngine(rows=2)
    engine.go.clear()
    with live(engine, limits=Limits(queue=3)) as server, ThreadPoolExecutor(5) as pool:
        running = [pool.submit(server.ask, max_tokens=2) for _ in range(5)]
        while server.app.service.worker.held < 5:
            time.sleep(0.002)
        for stream in (False, True):
            done = server.ask(stream=stream)
            refused(done, 429, None, "queue_full")
            assert 1 <= int(done.headers["Retry-After"]) <= 60
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model=NAME, prompt="abc")
        engine.go.set()
        assert [r.result().json()["choices"][0]["text"] for r in running] == ["ab"] * 5
        works(server)
        assert 'vllm:requests_refused_total{engine="0",model_name="parrot",status="429"} 3.0' in server.get("/metrics").text
        assert "never fit" not in refused(server.ask(n=6), 400, "n")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_may_not_take_for_ever(stream: bool):
    with live(FakeEngine(seconds=0.01), limits=Limits(seconds=0.3)) as server:
        done = server.ask(max_tokens=200, stream=stream)
        if stream:
            assert json.loads(done.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
        else:
            refused(done, 408, None, "request_timeout")
            assert done.headers["x-should-retry"] == "false"
        server.until_idle()
        works(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_takes_its_request_with_it(stream: bool):
    engine = FakeEngine(seconds=0.01)
    with live(engine) as server:
        for read in (0, 1) if stream else (0,):
            body = json.dumps({"prompt": "abc", "max_tokens": 200, "n": 3, "stream": stream}).encode()
            with server.sent("/v1/completions", body) as line:
                while server.app.service.worker.held < 3:
                    time.sleep(0.002)
                if read:
                    assert line.recv(100).startswith(b"HTTP/1.1 200")
            server.until_idle(2.0)  # at the pace of the engine the answers would take longer
        assert engine.counts["abort"] == (6 if stream else 3)
        assert server.app.service.flights == {}
        works(server)


# ---- a broken engine


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_step_is_one_500_and_the_next_request_works(stream: bool):
    with live(FakeEngine(broken=1)) as server:
        done = server.ask(stream=stream)
        error = json.loads(done.text.removeprefix("data: ")) if stream else done.json()
        assert error["error"]["code"] == "engine_error" and (stream or done.status_code == 500)
        works(server)
        assert server.get("/health").json() == {"status": "ok"}


def test_an_engine_that_stays_broken_makes_the_server_unhealthy():
    with live(FakeEngine(broken=10**6)) as server:
        assert [server.ask().status_code for _ in range(3)] == [500] * 3
        refused(server.ask(), 503, None, "unhealthy")
        refused(server.get("/health"), 503, None, "unhealthy")
        refused(server.get("/v1/engine"), 503, None, "unhealthy")
        assert server.get("/metrics").status_code == 200
