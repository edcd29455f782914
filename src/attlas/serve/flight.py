"""One request on its way through the engine."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from attlas.engine.request import Output, SamplingParams


@dataclass(frozen=True)
class Job:
    """One prompt to be continued, in one cache namespace. Its n answers are the choices `first` ... `first + n - 1`."""

    prompt: Sequence[int]
    params: SamplingParams
    salt: str = ""
    first: int = 0


@dataclass
class Times:
    """Seconds of the monotonic clock: arrival, admission of the first prompt, first token of any answer, newest token of each
    choice; and tokens so far. Kept by the engine's thread."""

    arrival: float
    admitted: float | None = None
    first: float | None = None
    newest: dict[int, float] = field(default_factory=dict)
    tokens: int = 0


class Flight:
    """The jobs of one HTTP request, and their outputs in the order in which they come.

    Made, read and failed on the event loop's thread; the engine's thread reaches it through `loop.call_soon_threadsafe` alone.
    `tokens` counts new tokens of all choices, `cached` prompt tokens found in the cache, by job; `open` holds the choices that go
    on, as the engine's thread knows it.
    """

    def __init__(self, jobs: Sequence[Job], *, owner: str, arrival: float) -> None:
        self.id = uuid.uuid4().hex
        self.loop = asyncio.get_running_loop()
        self.jobs = tuple(jobs)
        self.owner = owner
        self.times = Times(arrival)
        self.open = {job.first + i for job in self.jobs for i in range(job.params.n)}
        self.size = len(self.open)
        self.tokens = 0
        self.cached: dict[int, int] = {}
        self._admitted: asyncio.Future[None] = self.loop.create_future()
        self._queue: asyncio.Queue[tuple[int, Output] | BaseException] = asyncio.Queue()

    @property
    def prompt_tokens(self) -> int:
        return sum(len(job.prompt) for job in self.jobs)

    @property
    def cached_tokens(self) -> int:
        return sum(self.cached.values())

    async def admitted(self) -> None:
        """Wait until the engine has taken every job; raises what it refused them with."""
        await asyncio.shield(self._admitted)

    async def parts(self) -> AsyncIterator[tuple[int, Output]]:
        """(choice, output) until every choice is finished; raises what the flight failed with."""
        left = {job.first + i for job in self.jobs for i in range(job.params.n)}
        while left:
            part = await self._queue.get()
            if isinstance(part, BaseException):
                raise part
            choice, output = part
            self.tokens += len(output.token_ids)
            if output.finish_reason is not None:
                left.discard(choice)
            yield part

    def take(self, parts: Sequence[tuple[int, Output]]) -> None:
        for choice, output in parts:
            job = next(i for i, job in enumerate(self.jobs) if job.first <= choice < job.first + job.params.n)
            self.cached[job] = max(self.cached.get(job, 0), output.cached_tokens)
            self._queue.put_nowait((choice, output))

    def accept(self) -> None:
        if not self._admitted.done():
            self._admitted.set_result(None)

    def fail(self, error: BaseException) -> None:
        """End the flight with an error, whether it has been admitted or not."""
        if not self._admitted.done():
            self._admitted.set_exception(error)
            self._admitted.exception()  # somebody may have stopped waiting: that is no news for the log
        self._queue.put_nowait(error)
