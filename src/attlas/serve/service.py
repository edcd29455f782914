"""What the routes share: the model that is served, its tokenizer, the engine's thread, and the way of one request through it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request

from attlas.errors import AttlasError
from attlas.serve import errors
from attlas.serve.errors import ApiError, Disconnected, invalid
from attlas.serve.flight import Flight, Job
from attlas.serve.metrics import Metrics
from attlas.serve.options import Limits
from attlas.serve.parameters import in_vocabulary
from attlas.serve.security import OWNER
from attlas.serve.spelling import Spelling
from attlas.serve.worker import Busy, EngineFailed, EngineLike, Unhealthy, Worker


class TokenizerLike(Protocol):
    """What the server needs of a tokenizer. Called from several threads at once."""

    def encode(self, text: str, *, special: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def chat_text(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str: ...

    def fewest_tokens(self, text: str) -> int: ...

    def token(self, id: int) -> str: ...


@dataclass(frozen=True)
class Served:
    """The model behind a server. max_running: sequences that the engine runs at once."""

    name: str
    engine: EngineLike
    tokenizer: TokenizerLike
    max_len: int
    vocab_size: int
    max_running: int


class TimedOut(Exception):
    """A request took longer than it may."""


class Service:
    """Requests of one server, from the tokens of their prompts to the outputs of the engine."""

    def __init__(self, served: Served, limits: Limits) -> None:
        self.served, self.limits, self.tokenizer = served, limits, served.tokenizer
        self.tokenizer.fewest_tokens("")  # reads the vocabulary, before anybody waits
        self.spelling = Spelling(served.tokenizer)
        self.metrics = Metrics(served.name)
        self.worker = Worker(served.engine, capacity=served.max_running + limits.queue, observer=self.metrics)
        self.metrics.worker = self.worker
        self.started = int(time.time())
        self.flights: dict[str, Flight] = {}
        self._watches: dict[str, tuple[asyncio.Task[None], asyncio.TimerHandle]] = {}

    # ---- before the engine

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.served.name:
            message = f"The model {name[:128]!r} does not exist; this server has {self.served.name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode(self, text: str, param: str, *, special: bool = True) -> list[int]:
        """Token ids of a text, made off the event loop: a long text takes a while. `special`: with the token that begins a text,
        where the model has one."""
        try:
            return await asyncio.to_thread(self.tokenizer.encode, text, special=special)
        except UnicodeError:
            raise invalid(f"{param} is not valid Unicode text", param, "invalid_value") from None

    async def chat_text(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        try:
            return await asyncio.to_thread(self.tokenizer.chat_text, messages, add_generation_prompt=add_generation_prompt)
        except AttlasError as error:
            raise invalid(str(error)[: errors.LONGEST_MESSAGE], "messages", "invalid_value") from None

    def check_length(self, text: str, param: str) -> None:
        """Refuse a prompt that cannot fit however it is cut into tokens, which takes seconds for a text of megabytes."""
        fewest = self.tokenizer.fewest_tokens(text)
        if fewest >= self.served.max_len:
            raise self._too_long(f"at least {fewest}", param)

    def _too_long(self, tokens: str, param: str) -> ApiError:
        message = (
            f"The prompt has {tokens} tokens. This model's maximum context length here is {self.served.max_len} tokens, at least "
            "one of which is for the answer."
        )
        return invalid(message, param, "context_length_exceeded")

    def room(self, prompts: Sequence[Sequence[int]], param: str) -> int:
        """Tokens that fit behind the longest prompt. Refuses prompts that are empty, too long or of unknown tokens."""
        if not prompts or not all(prompts):
            raise invalid(f"The {param} is empty: give at least one token.", param, "empty_prompt")
        longest, most = max(map(len, prompts)), self.served.max_len
        if longest >= most:
            raise self._too_long(str(longest), param)
        for ids in prompts:
            in_vocabulary(ids, self.served.vocab_size, param)
        return most - longest

    # ---- through the engine

    async def launch(self, request: Request, jobs: Sequence[Job], arrival: float) -> Flight:
        """Send jobs to the engine and wait until it has taken them. From here on the flight fails when the client goes or time is
        up, until `land` is called."""
        if (size := sum(job.params.n for job in jobs)) > self.worker.capacity:
            raise invalid(
                f"The request asks for {size} answers in all; at most {self.worker.capacity} fit here.", "n", "invalid_value"
            )
        owner = request.scope.get(OWNER, "")
        try:
            flight = self.worker.submit(jobs, owner=owner, arrival=arrival)
        except (Busy, Unhealthy) as error:
            raise self.api_error(error) from None
        self.flights[flight.id] = flight
        timer = flight.loop.call_later(arrival + self.limits.seconds - time.monotonic(), flight.fail, TimedOut())
        self._watches[flight.id] = (flight.loop.create_task(self._watch(request, flight)), timer)
        try:
            await flight.admitted()
        except Exception as error:
            self.land(flight)
            raise self.api_error(error) from None
        except BaseException:
            self.land(flight)
            raise
        return flight

    async def _watch(self, request: Request, flight: Flight) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        flight.fail(Disconnected())

    def land(self, flight: Flight) -> None:
        """The request is over, however it went: nothing of it stays in the engine."""
        watch, timer = self._watches.pop(flight.id)
        watch.cancel()
        timer.cancel()
        self.flights.pop(flight.id, None)
        self.worker.abort(flight)

    def api_error(self, error: Exception) -> ApiError:
        """What a client is told; raises the error itself where that is not foreseen."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, AttlasError):
            return errors.refused(error)
        if isinstance(error, Busy):
            return errors.overloaded(error.seconds)
        if isinstance(error, Unhealthy):
            return errors.unavailable(f"The engine is not running: {error}.", "unhealthy")
        if isinstance(error, TimedOut):
            return errors.timed_out(self.limits.seconds)
        if isinstance(error, EngineFailed):
            return errors.failed()
        raise error

    def salt(self, request: Request, cache_salt: str | None) -> str:
        """The cache namespace of a request: that of its key, and within it the one that the request names."""
        return f"{request.scope.get(OWNER, '')}\0{cache_salt or ''}"
