"""What a prefix cache costs that never finds anything: by the clock around its calls, and as the difference of engines."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

from attlas.lab.serve_load import Asked, drive, random_prompt
from attlas.lab.serve_rows import Row, Sizes, Tick, bar
from attlas.lab.serve_subject import Subject

REQUESTS, PROMPT, NEW = 2, 64, 8  # of one round: short rounds, so that one is done before the machine changes its mind
ROUNDS, SECONDS = 40, 45.0  # rounds for each repeat, and when no more begin
CALLS = ("match", "admit", "reserve", "commit", "release")  # of a cache manager: where sharing costs something


class Clock:
    """Seconds that have been spent inside a cache's calls; a call within a call counts once."""

    def __init__(self, cache: Any) -> None:
        self.seconds, self._depth = 0.0, 0
        for name in CALLS:
            setattr(cache, name, partial(self._timed, getattr(cache, name)))

    def _timed(self, call: Callable[..., Any], *given: Any, **named: Any) -> Any:
        self._depth += 1
        start = perf_counter()
        try:
            return call(*given, **named)
        finally:
            self._depth -= 1
            if not self._depth:
                self.seconds += perf_counter() - start


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and an interval that holds the true one 95 times out of 100: by ranks, whatever the distribution."""
    ordered, n = sorted(values), len(values)
    out = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2, ordered[out], ordered[n - 1 - out]


def no_hits(served: Subject, sizes: Sizes, tick: Tick) -> Row:
    """Engines with and without prefix caching answer the same prompts in turns; every prompt differs from the first token on, and
    the pages of the past fill the pool, so that new ones have to be won back from it. There are two without: as far as those
    differ from each other, a difference says nothing."""
    rng = random.Random(11)
    kinds = {"off": False, "on": True, "also off": False}
    engines = {name: served.engine(rows=REQUESTS, tokens=PROMPT + NEW, prefix_caching=on) for name, on in kinds.items()}
    clocks = {name: Clock(engine.cache) for name, engine in engines.items()}

    def turns(shift: int) -> dict[str, float]:
        asked = [Asked(random_prompt(rng, served.vocabulary, PROMPT), NEW) for _ in range(REQUESTS)]
        names = list(engines)
        return {name: drive(engines[name], asked).seconds for name in names[shift % 3 :] + names[: shift % 3]}

    for turn in range(3):  # warm, and the pool is full
        turns(turn)
    for clock in clocks.values():
        clock.seconds = 0.0
    rounds: list[dict[str, float]] = []
    start, most = perf_counter(), ROUNDS * sizes.repeats
    while len(rounds) < most and (perf_counter() - start < SECONDS or not rounds):
        rounds.append(turns(len(rounds)))
        tick(max(len(rounds) / most, (perf_counter() - start) / SECONDS))
    assert engines["on"].stats().cached_tokens == 0, "a prompt was found in the cache after all"
    inside = {name: clocks[name].seconds / sum(r[name] for r in rounds) for name in ("on", "off")}
    apart, low, high = middle([2 * r["on"] / (r["off"] + r["also off"]) - 1 for r in rounds])
    return {
        "rounds": len(rounds),
        "calls": inside,
        "cost": inside["on"] - inside["off"],
        "difference": {"median": apart, "low": low, "high": high},
        "control": middle([r["also off"] / r["off"] - 1 for r in rounds])[0],
        "bars": [bar("cost", inside["on"] - inside["off"], most=0.01), bar("difference, low end", low, most=0.01)],
    }
