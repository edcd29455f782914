"""A server to talk to, with an engine of a few lines behind it: its answers repeat the prompt; a test can hold or break it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
from openai import OpenAI

from attlas.engine.detokenizer import Detokenizer
from attlas.engine.request import EngineStats, Output, SamplingParams, TokenLogprobs
from attlas.errors import OptionError
from attlas.serve.app import Server, create_app
from attlas.serve.load import byte_tokenizer
from attlas.serve.options import Limits
from attlas.serve.run import DrainingServer, bind, configuration
from attlas.serve.service import Served, Service

NAME, CONTEXT, VOCABULARY = "parrot", 211, 257


@dataclass
class Parrot:
    """One answer on its way."""

    request_id: str
    index: int
    prompt: tuple[int, ...]
    params: SamplingParams
    detokenizer: Detokenizer
    said: int = 0
    admitted: float | None = None


@dataclass
class FakeEngine:
    """Answers with the prompt, over and over; a token a step for up to `rows` answers at once.

    go      cleared: a step waits until it is set again
    broken  how many of the next steps raise
    salts   of all requests so far
    """

    rows: int = 5
    go: threading.Event = field(default_factory=threading.Event)
    broken: int = 0
    seconds: float = 0.0
    salts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.go.set()
        self.tokenizer = byte_tokenizer()
        self.running: list[Parrot] = []
        self.waiting: deque[Parrot] = deque()
        self.queued: list[Output] = []
        self.counts: Counter[str] = Counter()
        self.cache = None

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams, *, salt: str = "", priority: int = 0) -> None:
        if prompt[0] == 0:
            raise OptionError("Engine.add: this parrot does not say zero")
        self.salts.append(salt)
        self.counts["prompt"] += len(prompt)
        for index in range(params.n):
            self.waiting.append(Parrot(request_id, index, tuple(prompt), params, Detokenizer(self.tokenizer, params.stop)))

    def abort(self, request_id: str) -> bool:
        gone = [p for p in (*self.running, *self.waiting) if p.request_id == request_id]
        self.queued += [Output(p.request_id, p.index, finish_reason="abort") for p in gone]
        self.running = [p for p in self.running if p not in gone]
        self.waiting = deque(p for p in self.waiting if p not in gone)
        self.counts["abort"] += len(gone)
        return bool(gone)

    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.queued)

    def step(self) -> list[Output]:
        outputs, self.queued = self.queued, []
        if not (self.running or self.waiting):
            return outputs
        assert self.go.wait(30), "nobody let the engine go on"
        time.sleep(self.seconds)
        if self.broken:
            self.broken -= 1
            raise RuntimeError("a wire came loose")
        while self.waiting and len(self.running) < self.rows:
            self.running.append(self.waiting.popleft())
            self.running[-1].admitted = time.monotonic()
        for parrot in list(self.running):
            outputs.append(self.say(parrot))
            if outputs[-1].finish_reason:
                self.running.remove(parrot)
                self.counts[outputs[-1].finish_reason] += 1
        return outputs

    def say(self, parrot: Parrot) -> Output:
        token = parrot.prompt[parrot.said % len(parrot.prompt)]
        parrot.said += 1
        self.counts["generated"] += 1
        text, reason = parrot.detokenizer.add(token), None
        if parrot.detokenizer.stopped:
            reason = "stop"
        elif parrot.said == parrot.params.max_tokens:
            text, reason = text + parrot.detokenizer.flush(), "length"
        wanted = parrot.params.logprobs
        top = tuple((token + i, -0.5 - i) for i in range(wanted or 0))
        logs = None if wanted is None else (TokenLogprobs(token, -0.5, top),)
        told = parrot.params.prompt_logprobs is not None and parrot.said == 1
        asked = tuple(TokenLogprobs(t, -0.25, ()) for t in parrot.prompt[1:]) if told else None
        size = len(parrot.prompt)
        return Output(parrot.request_id, parrot.index, (token,), text, logs, reason, size, 3, asked, parrot.admitted)  # type: ignore[arg-type]

    def stats(self) -> EngineStats:
        finished = {reason: self.counts[reason] for reason in ("stop", "length", "abort")}
        pool = SimpleNamespace(used=len(self.running), total=self.rows, waste=0.25)
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            prompt_tokens=self.counts["prompt"],
            generated_tokens=self.counts["generated"],
            finished=finished,
            cache=pool,
        )


@dataclass
class Live:
    """A server that listens; `engine` is what it was given."""

    url: str
    app: Server
    engine: Any

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60, **options)

    def ask(self, **body: Any) -> httpx.Response:
        return self.post("/v1/completions", json={"prompt": "abc", **body})

    def line(self) -> socket.socket:
        """A connection."""
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=30)

    @contextlib.contextmanager
    def sent(self, path: str, body: bytes, *, length: int | None = None) -> Iterator[socket.socket]:
        """A connection on which a POST has been sent; `length` is what it says of its body."""
        told = f"Content-Type: application/json\r\nContent-Length: {len(body) if length is None else length}"
        with self.line() as made:
            made.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{told}\r\n\r\n".encode() + body)
            yield made

    def until_idle(self, seconds: float = 10.0) -> None:
        """Wait until nothing is in the engine."""
        end = time.monotonic() + seconds
        while self.app.service.worker.held or self.engine.has_work():
            assert time.monotonic() < end, f"{self.app.service.worker.held} sequences stay in the engine"
            time.sleep(0.005)


@contextlib.contextmanager
def live(
    engine: Any = None,
    *,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    served: Served | None = None,
) -> Iterator[Live]:
    """A server in a thread of this process, on a free port."""
    engine = served.engine if served is not None else engine or FakeEngine()
    served = served or Served(NAME, engine, engine.tokenizer, CONTEXT, VOCABULARY, engine.rows)
    app = create_app(Service(served, limits or Limits()), keys, origins, hosts)
    server = DrainingServer(configuration(app, "critical"), app, 5.0)
    bound = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        end = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < end and thread.is_alive(), "the server does not start"
            time.sleep(0.005)
        yield Live(f"http://127.0.0.1:{bound.getsockname()[1]}", app, engine)
    finally:
        if isinstance(engine, FakeEngine):
            engine.go.set()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server does not end"
