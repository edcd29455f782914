"""The engine's thread: hand-overs, places, and what happens when a step raises."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from attlas.engine.engine import Engine
from attlas.engine.options import EngineOptions
from attlas.engine.request import Output, SamplingParams
from attlas.errors import OptionError
from attlas.serve.flight import Flight, Job
from attlas.serve.worker import Busy, EngineFailed, Unhealthy, Worker
from engine_models import small
from serving import FakeEngine


@asynccontextmanager
async def working(engine: Any, capacity: int = 23, *, start: bool = True) -> AsyncIterator[Worker]:
    """A worker; with start=False the test starts it, so that what it submits before is in one step."""
    worker = Worker(engine, capacity=capacity)
    if start:
        worker.start()
    try:
        yield worker
    finally:
        if isinstance(engine, FakeEngine):
            engine.go.set()
        await asyncio.to_thread(worker.stop)


def job(*prompt: int, tokens: int = 5, n: int = 1, first: int = 0) -> Job:
    return Job(prompt, SamplingParams(max_tokens=tokens, n=n), first=first)


async def answer(flight: Flight) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    async for choice, output in flight.parts():
        found.setdefault(choice, []).extend(output.token_ids)
    return found


async def empty(worker: Worker) -> None:
    for _ in range(2000):
        if not worker.held:
            return
        await asyncio.sleep(0.002)
    raise AssertionError(f"{worker.held} sequences are left")


def test_many_requests_at_once_get_their_own_answers():
    async def main() -> None:
        async with working(FakeEngine(rows=3)) as worker:
            flights = [worker.submit([job(7, i + 1, tokens=2 + i % 5)]) for i in range(23)]
            for i, found in enumerate(await asyncio.gather(*map(answer, flights))):
                assert found == {0: ([7, i + 1] * 3)[: 2 + i % 5]}
            assert worker.held == 0 and not worker.engine.has_work()

    asyncio.run(main())


def test_jobs_of_one_flight_number_their_choices_on():
    async def main() -> None:
        async with working(FakeEngine()) as worker:
            flight = worker.submit([job(3, tokens=2, n=2), job(5, tokens=1, n=3, first=2)])
            assert await answer(flight) == {0: [3, 3], 1: [3, 3], 2: [5], 3: [5], 4: [5]}
            assert flight.tokens == 7 and flight.prompt_tokens == 2

    asyncio.run(main())


def test_two_event_loops_share_one_worker():
    engine = FakeEngine(seconds=0.001)
    worker = Worker(engine, capacity=23)
    worker.start()
    found = {}

    def loop(i: int) -> None:
        async def main() -> None:
            found[i] = await answer(worker.submit([job(i, tokens=11)]))

        asyncio.run(main())

    threads = [threading.Thread(target=loop, args=(i,)) for i in (2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    worker.stop()
    assert found == {i: {0: [i] * 11} for i in (2, 3, 5)}


def test_a_full_engine_is_busy_until_a_place_is_free():
    async def main() -> None:
        engine = FakeEngine(rows=2)
        engine.go.clear()
        async with working(engine, capacity=5) as worker:
            first = worker.submit([job(2, n=3)])
            second = worker.submit([job(3, n=2)])
            with pytest.raises(Busy) as busy:
                worker.submit([job(5)])
            assert 1 <= busy.value.seconds <= 60
            worker.abort(first)
            engine.go.set()
            assert len(await answer(second)) == 2
            await empty(worker)
            assert await answer(worker.submit([job(5, tokens=2)])) == {0: [5, 5]}

    asyncio.run(main())


def test_a_refused_job_takes_the_others_of_its_flight_with_it():
    async def main() -> None:
        async with working(FakeEngine()) as worker:
            flight = worker.submit([job(3), job(0, first=1)])
            with pytest.raises(OptionError, match="does not say zero"):
                await flight.admitted()
            await empty(worker)
            assert await worker.ask(lambda engine: [p.request_id for p in (*engine.running, *engine.waiting)]) == []

    asyncio.run(main())


def test_abort_frees_the_place_and_is_harmless_afterwards():
    async def main() -> None:
        engine = FakeEngine(seconds=0.001)
        async with working(engine) as worker:
            flight = worker.submit([job(3, tokens=10**6)])
            await flight.admitted()
            await flight.parts().__anext__()
            for _ in range(3):
                worker.abort(flight)
            await empty(worker)
            assert engine.running == [] and worker.engine.counts["abort"] == 1

    asyncio.run(main())


class Watched(Engine):
    """Calls `during` inside of its seventh step, and counts at the start of each step the tokens that lie in pages of rows."""

    during: Callable[[], None]

    def __init__(self) -> None:
        super().__init__(small(), options=EngineOptions(max_len=64, page_size=8, prefix_caching=False))
        self.held: list[tuple[int, int]] = []

    def step(self) -> list[Output]:
        stats = self.cache.stats()
        self.held.append((stats.used, stats.rows - stats.free_rows))
        if len(self.held) == 7:
            self.during()
        return super().step()


def test_the_pages_of_a_cancelled_request_are_free_when_the_step_in_progress_is_over():
    async def main() -> None:
        engine = Watched()
        async with working(engine, start=False) as worker:
            gone, stays = worker.submit([job(*range(29), tokens=30, n=2)]), worker.submit([job(7, 5, 3, tokens=13)])
            engine.during = lambda: worker.abort(gone)
            worker.start()
            assert len((await answer(stays))[0]) == 13
            assert engine.held[6] == (4 + 2 + 2, 3)  # 34 tokens twice, of which four pages of the prompt are shared; 8 tokens
            assert engine.held[7] == (2, 1)
            await empty(worker)

    asyncio.run(main())


def test_a_step_that_raises_fails_those_in_flight_once_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture):
    async def main() -> None:
        async with working(FakeEngine(broken=1), start=False) as worker:
            flights = [worker.submit([job(i)]) for i in (2, 3, 5)]
            worker.start()
            for flight in flights:
                with pytest.raises(EngineFailed, match="a wire came loose"):
                    await answer(flight)
                assert flight._queue.empty()
            assert worker.problem is None and worker.held == 0
            assert await answer(worker.submit([job(7, tokens=2)])) == {0: [7, 7]}
            assert worker.failures == 0

    asyncio.run(main())
    assert "a wire came loose" in caplog.text


def test_an_engine_that_keeps_raising_is_given_up():
    async def main() -> None:
        async with working(FakeEngine(broken=10**6)) as worker:
            for _ in range(worker.failures_allowed):
                with pytest.raises(EngineFailed):
                    await answer(worker.submit([job(2)]))
            with pytest.raises(Unhealthy, match="3 times in a row"):
                worker.submit([job(2)])
            with pytest.raises(Unhealthy):
                await worker.ask(lambda engine: engine.stats())

    asyncio.run(main())


class Stuck(FakeEngine):
    """Never lets go of what it has."""

    def abort(self, request_id: str) -> bool:
        return False


def test_an_engine_that_cannot_let_go_is_given_up_and_all_who_wait_are_told():
    async def main() -> None:
        async with working(Stuck(broken=1), start=False) as worker:
            flights = [worker.submit([job(i)]) for i in (2, 3)]
            worker.start()
            for flight in flights:
                with pytest.raises(EngineFailed):
                    await answer(flight)
            assert worker.problem is not None and "still has work" in worker.problem

    asyncio.run(main())


class Forgetful(FakeEngine):
    """Loses what it was given."""

    def has_work(self) -> bool:
        return False


def test_requests_that_an_engine_forgets_are_failed():
    async def main() -> None:
        async with working(Forgetful()) as worker:
            with pytest.raises(EngineFailed, match="no work"):
                await answer(worker.submit([job(2)]))

    asyncio.run(main())


def test_what_waits_when_the_worker_stops_is_told():
    async def main() -> None:
        engine = FakeEngine(seconds=0.01)
        async with working(engine) as worker:
            flight = worker.submit([job(2, tokens=10**6)])
            await flight.admitted()
            await asyncio.to_thread(worker.stop)
            with pytest.raises(EngineFailed, match="stopping"):
                await answer(flight)
            with pytest.raises(Unhealthy):
                worker.submit([job(2)])

    asyncio.run(main())


def test_a_question_is_asked_on_the_engines_thread_and_its_error_comes_back():
    async def main() -> None:
        async with working(FakeEngine()) as worker:
            assert await worker.ask(lambda _: threading.current_thread().name) == "attlas-engine"
            with pytest.raises(ZeroDivisionError):
                await worker.ask(lambda _: 1 // 0)

    asyncio.run(main())
