"""`attlas serve` as a process: it starts, answers with a real engine, and ends without losing a request."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from openai import OpenAI
from typer.testing import CliRunner

from attlas.cli.app import app
from attlas.errors import OptionError
from attlas.serve.options import Limits, ServeOptions
from attlas.serve.run import keys_of


@dataclass
class Process:
    """A server in a process of its own; `said` is its line of JSON."""

    process: subprocess.Popen[str]
    said: dict[str, Any]

    @property
    def url(self) -> str:
        return str(self.said["url"])

    def ask(self, tokens: int, **more: Any) -> httpx.Response:
        body = {"prompt": "once", "max_tokens": tokens, "ignore_eos": True, **more}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def stats(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/v1/engine").json()["stats"]

    def running(self) -> int:
        return int(self.stats()["running"])


@contextlib.contextmanager
def process(*options: str, **environment: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "attlas", "serve", "--max-len", "1024", "--json", *options]
    command += [] if "--port" in options else ["--port", "0"]
    made = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    try:
        assert made.stdout is not None
        line = made.stdout.readline()
        assert line, made.communicate()[1]
        found = Process(made, json.loads(line))
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{found.url}/health")
                break
            assert time.monotonic() < end, "the server does not answer"
            time.sleep(0.02)
        yield found
    finally:
        if made.poll() is None:
            made.kill()
        made.wait(10)


def test_sigterm_loses_no_admitted_request_and_refuses_new_ones():
    with process("--max-running", "5") as server, ThreadPoolExecutor(11) as pool:
        whole = [pool.submit(server.ask, 607, seed=i) for i in range(6)]
        streamed = [pool.submit(server.ask, 607, seed=i, stream=True) for i in range(3)]
        end, refused = time.monotonic() + 20, None
        while (stats := server.stats())["running"] + stats["waiting"] < 9:
            assert time.monotonic() < end
        os.kill(server.process.pid, signal.SIGTERM)
        while refused is None or refused.status_code != 503:
            refused = server.ask(1)
            assert time.monotonic() < end
        assert refused.json()["error"]["code"] == "draining" and int(refused.headers["Retry-After"]) > 0
        assert httpx.get(f"{server.url}/health").status_code == 503
        done = [request.result() for request in whole]
        assert [r.status_code for r in done] == [200] * 6
        assert [r.json()["usage"]["completion_tokens"] for r in done] == [607] * 6
        for request, other in zip(streamed, done, strict=False):
            text, reason = joined(request.result().text)
            assert (text, reason) == (other.json()["choices"][0]["text"], "length")
        assert server.process.wait(30) == 0
        assert server.process.stderr is not None and "Traceback" not in server.process.stderr.read()


def joined(stream: str) -> tuple[str, str]:
    """The whole text of a stream that came to its end, and why it ended."""
    events = stream.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]
    return "".join(c["text"] for c in choices), choices[-1]["finish_reason"]


def test_after_a_kill_it_starts_again_on_the_same_port_and_answers_as_before():
    with process() as server:
        port, want = server.url.rpartition(":")[2], server.ask(23, seed=3).json()["choices"]
        body = {"prompt": "once", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert [next(lines) for _ in range(6)][4].startswith("data: {")
            os.kill(server.process.pid, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):  # the client is told that this is not the end
                for _ in lines:
                    pass
        assert server.process.wait(10) == -signal.SIGKILL
    with process("--port", port) as again:
        assert again.url == server.url and again.stats()["running"] == 0
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: again.ask(23, seed=3).json()["choices"], range(4)))
        assert answers == [want] * 4


def test_what_takes_longer_than_the_drain_is_told():
    with process("--drain-seconds", "0.2") as server, ThreadPoolExecutor(2) as pool:
        slow = pool.submit(server.ask, 1000)
        while not server.running():
            time.sleep(0.01)
        os.kill(server.process.pid, signal.SIGTERM)
        assert slow.result().status_code == 503 and slow.result().json()["error"]["code"] == "draining"
        assert server.process.wait(30) == 0


def test_a_second_signal_ends_it_at_once():
    with process("--drain-seconds", "60") as server, ThreadPoolExecutor(2) as pool:
        slow = pool.submit(lambda: contextlib.suppress(httpx.TransportError).__enter__() or server.ask(1000, n=16))
        while not server.running():
            time.sleep(0.01)
        start = time.monotonic()
        for _ in range(2):
            os.kill(server.process.pid, signal.SIGINT)
            time.sleep(0.2)
        server.process.wait(20)
        assert time.monotonic() - start < 15
        slow.exception()


def test_keys_come_from_the_environment_and_the_client_gets_reproducible_answers():
    with process("--name", "noise", ATTLAS_API_KEY="one, two") as server:
        assert server.said["keys"] == 2 and httpx.get(f"{server.url}/health").status_code == 401
        clients = [OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in ("one", "two")]
        asked: dict[str, Any] = {"model": "noise", "prompt": "once upon a time", "max_tokens": 23, "seed": 5, "temperature": 0.7}
        texts = [client.completions.create(**asked).choices[0].text for client in clients * 2]
        assert len(set(texts)) == 1
        cached = [client.completions.create(**asked).usage.prompt_tokens_details.cached_tokens for client in clients]
        chat = clients[0].chat.completions.create(model="noise", messages=[{"role": "user", "content": "hi"}], max_tokens=3, n=3)
        assert len(chat.choices) == 3 and cached == [0, 0]  # 16 tokens: the last is always computed, so no page is whole


def test_a_taken_port_and_other_mistakes_are_sentences():
    with process() as server:
        port = server.url.rpartition(":")[2]
        for arguments, words in (
            (("--port", port), "cannot listen"),
            (("--host", "0.0.0.0"), "--without-keys"),
            (("--model", "no/such/folder", "--port", "0"), "does not exist"),
            (("--dtype", "float31", "--port", "0"), "float32"),
            (("--api-key", " ", "--port", "0"), "empty"),
            (("--max-running", "0", "--port", "0"), "max_running"),
        ):
            done = CliRunner().invoke(app, ["serve", *arguments])
            assert done.exit_code == 2 and words in done.stderr and "Traceback" not in done.stderr, (arguments, done.output)


def test_options(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATTLAS_API_KEY", " a,,b ")
    assert keys_of(ServeOptions(api_key=("c",))) == ("c", "a", "b")
    monkeypatch.delenv("ATTLAS_API_KEY")
    assert keys_of(ServeOptions()) == ()
    for host in ("127.0.0.1", "::1", "localhost", "127.0.0.53"):
        ServeOptions(host=host).check_reach(())
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org"):
        with pytest.raises(OptionError, match="reached from other machines"):
            ServeOptions(host=host).check_reach(())
        ServeOptions(host=host).check_reach(("key",))
        ServeOptions(host=host, without_keys=True).check_reach(())
    options = ServeOptions(max_queue=3, max_body_mib=0.5, request_seconds=7, max_answers=2)
    assert options.limits() == Limits(queue=3, body=524288, seconds=7, answers=2)
    with pytest.raises(OptionError, match="seconds"):
        Limits(seconds=0)
    with pytest.raises(OptionError, match="port"):
        ServeOptions(port=70000)


def test_threads_are_not_left_behind():
    assert not [t for t in threading.enumerate() if t.name == "attlas-engine"]
