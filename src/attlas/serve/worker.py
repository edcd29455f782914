"""The engine in a thread of its own; requests go in and outputs come out through thread-safe hand-overs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from attlas.engine.request import EngineStats, Output, SamplingParams
from attlas.errors import AttlasError
from attlas.serve.flight import Flight, Job

log = logging.getLogger("attlas.serve")

T = TypeVar("T")
LONGEST_RETRY = 60  # seconds
FRESH = 0.02  # seconds: statistics are not counted more often, since that takes time from the steps


class EngineLike(Protocol):
    """What the server needs of an engine."""

    def add(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, *, salt: str = "", priority: int = 0
    ) -> None: ...

    def abort(self, request_id: str) -> bool: ...

    def step(self) -> list[Output]: ...

    def has_work(self) -> bool: ...

    def stats(self) -> EngineStats: ...


class Observer:
    """Is told, on the engine's thread, what happens to requests. Seconds of the monotonic clock."""

    def on_output(self, flight: Flight, choice: int, output: Output, now: float) -> None:
        """A step added to a choice."""

    def on_lost(self, flight: Flight, reason: str) -> None:
        """A request ended early: "abort" or "error"."""


class Busy(Exception):
    """More sequences are in the engine than may wait; `seconds` until a place is likely to be free."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"full; try again in {seconds} s")
        self.seconds = seconds


class Unhealthy(Exception):
    """The engine has failed for good; the process has to be started again."""


class EngineFailed(Exception):
    """A step raised while this request was in flight."""


class Worker:
    """Runs `engine` in one thread.

    capacity          sequences that may be in the engine at once, running or waiting
    failures_allowed  steps in a row that may raise before the engine counts as broken

    A step that raises fails the requests that are in flight, once each; the engine goes on with the next ones. It is given up
    when it keeps raising, or when it still has work after everything in it has been aborted.
    """

    def __init__(self, engine: EngineLike, *, capacity: int, observer: Observer | None = None, failures_allowed: int = 3) -> None:
        self.engine, self.capacity, self.observer = engine, capacity, observer or Observer()
        self.failures_allowed, self.failures = failures_allowed, 0
        self.problem: str | None = None
        self.stats, self._counted = engine.stats(), 0.0
        self.held = 0  # sequences in the engine or on their way there
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._flights: dict[str, tuple[Flight, Job]] = {}  # engine's thread only
        self._finished: deque[float] = deque(maxlen=64)
        self._thread = threading.Thread(target=self._run, name="attlas-engine", daemon=True)

    # ---- from the event loop

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> None:
        """Let the step in progress finish, and end the thread; what is still in flight fails."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def submit(self, jobs: Sequence[Job], *, owner: str = "", arrival: float | None = None) -> Flight:
        """Send jobs to the engine, all or none. Raises Busy or Unhealthy."""
        flight = Flight(jobs, owner=owner, arrival=time.monotonic() if arrival is None else arrival)
        with self._wake:
            if self.problem is not None:
                raise Unhealthy(self.problem)
            if self._stopping:
                raise Unhealthy("the server is stopping")
            if self.held + flight.size > self.capacity:
                raise Busy(self._retry_after())
            self.held += flight.size
            self._inbox.append(lambda: self._add(flight))
            self._wake.notify()
        return flight

    def abort(self, flight: Flight) -> None:
        """Take a flight out of the engine; nothing happens where it has finished."""
        with contextlib.suppress(Unhealthy):  # an engine that is gone holds nothing
            self._post(lambda: self._drop(flight, "abort"))

    async def ask(self, question: Callable[[Any], T]) -> T:
        """What `question(engine)` returns, asked between two steps on the engine's thread."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def settle(error: Exception | None, value: Any) -> None:
            if answer.cancelled():
                return
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

        def command() -> None:
            try:
                error, value = None, question(self.engine)
            except Exception as raised:
                error, value = raised, None
            _on_loop(loop, settle, error, value)

        self._post(command)
        return await answer

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self.problem is not None or not self._thread.is_alive():
                raise Unhealthy(self.problem or "the engine's thread has ended")
            self._inbox.append(command)
            self._wake.notify()

    def _retry_after(self) -> int:
        """Seconds in which one sequence has lately finished."""
        times = list(self._finished)
        if len(times) < 2:
            return 1
        return max(1, min(LONGEST_RETRY, math.ceil((times[-1] - times[0]) / (len(times) - 1))))

    # ---- on the engine's thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            reason = "the server is stopping"
        except BaseException as error:  # the thread ends here whatever it was
            log.exception("the engine's thread failed")
            reason = f"the engine's thread failed: {type(error).__name__}"
        self._break(reason)

    def _turn(self) -> bool:
        with self._wake:
            while not (self._inbox or self._stopping or self._flights or self.engine.has_work()):
                self._wake.wait()
            if self._stopping:
                return False
            commands = list(self._inbox)
            self._inbox.clear()
        for command in commands:
            command()
        if self.engine.has_work():
            self._step()  # and with it newer statistics
        elif self._flights:
            self._fail_all(RuntimeError("the engine has no work, and requests that are not finished"))
        return self.problem is None

    def _add(self, flight: Flight) -> None:
        try:
            for number, job in enumerate(flight.jobs):
                request_id = f"{flight.id}-{number}"
                self.engine.add(request_id, job.prompt, job.params, salt=job.salt)
                self._flights[request_id] = (flight, job)
        except Exception as error:
            told: Exception = error
            if not isinstance(error, AttlasError | Unhealthy):
                log.exception("a request could not be added")
                told = EngineFailed(f"{type(error).__name__}: {error}")
            self._drop(flight, "error")
            _on_loop(flight.loop, flight.fail, told)
        else:
            _on_loop(flight.loop, flight.accept)

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except Exception as error:
            log.exception("a step failed")
            self._fail_all(error)
            return
        self.failures = 0
        now = time.monotonic()
        if now - self._counted > FRESH or not self.engine.has_work():
            self._counted, self.stats = now, self.engine.stats()
        self._deliver(outputs, now)

    def _deliver(self, outputs: Sequence[Output], now: float) -> None:
        parts: dict[Flight, list[tuple[int, Output]]] = {}
        for output in outputs:
            if output.request_id not in self._flights:
                continue  # aborted in the meantime
            flight, job = self._flights[output.request_id]
            choice = job.first + output.index
            parts.setdefault(flight, []).append((choice, output))
            self.observer.on_output(flight, choice, output, now)
            if output.finish_reason is not None:
                self._finish(flight, choice, now)
        for flight, found in parts.items():
            _on_loop(flight.loop, flight.take, found)

    def _finish(self, flight: Flight, choice: int, now: float) -> None:
        if choice in flight.open:
            flight.open.discard(choice)
            with self._wake:
                self.held -= 1
                self._finished.append(now)
        for number, job in enumerate(flight.jobs):
            if not any(job.first + i in flight.open for i in range(job.params.n)):
                self._flights.pop(f"{flight.id}-{number}", None)

    def _drop(self, flight: Flight, reason: str) -> None:
        """Abort what is left of a flight and give its places back."""
        for number in range(len(flight.jobs)):
            if self._flights.pop(f"{flight.id}-{number}", None) is not None:
                self.engine.abort(f"{flight.id}-{number}")
        if flight.open:
            with self._wake:
                self.held -= len(flight.open)
            flight.open.clear()
            self.observer.on_lost(flight, reason)

    def _fail_all(self, error: Exception) -> None:
        self.failures += 1
        failed = {flight for flight, _ in self._flights.values()}
        released = [self._let_go(flight) for flight in failed]
        if not all(released):
            self.failures = self.failures_allowed
        if not self._settled():
            self._break("the engine still has work after all of it was aborted")
        elif self.failures >= self.failures_allowed:
            self._break(f"the engine failed {self.failures} times in a row")
        for flight in failed:
            _on_loop(flight.loop, flight.fail, EngineFailed(f"{type(error).__name__}: {error}"))

    def _let_go(self, flight: Flight) -> bool:
        try:
            self._drop(flight, "error")
        except Exception:
            log.exception("a request could not be aborted after a failed step")
            return False
        return True

    def _settled(self) -> bool:
        """Let the engine report what was aborted; whether nothing is left then."""
        try:
            self.engine.step()
            return not self.engine.has_work()
        except Exception:
            log.exception("a step failed after everything was aborted")
            return False

    def _break(self, reason: str) -> None:
        """Nothing runs any more: fail what waits, and refuse what comes."""
        with self._wake:
            self.problem = self.problem or reason
            waiting, self._inbox = list(self._inbox), deque()
        if not self._stopping:
            log.critical("%s", reason)
        for flight in {flight for flight, _ in self._flights.values()}:
            _on_loop(flight.loop, flight.fail, EngineFailed(reason))
        self._flights.clear()
        self.engine = _Gone(reason)
        for command in waiting:  # each meets the engine that is gone, and tells its own waiter
            command()


class _Gone:
    """Stands in for an engine that may not be used any more."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> Any:
        raise Unhealthy(self.reason)


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:  # the loop is closed: nobody waits there any more
        log.debug("a loop was closed before its answer came")
