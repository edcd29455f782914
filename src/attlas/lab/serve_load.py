"""Load for an engine: requests that arrive at given times, and what each of them had to wait for. Seconds, tokens."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from attlas.engine.engine import Engine
from attlas.engine.request import SamplingParams

# Means of ShareGPT conversations as Kwon et al. 2023 (arXiv 2309.06180, section 6.1) measured them; the spread is a lognormal's.
MEAN_PROMPT, MEAN_ANSWER, SIGMA = 161, 338, 0.8


@dataclass(frozen=True)
class Asked:
    """A request: its prompt, how many tokens are wanted, and when it arrives (seconds after the start)."""

    prompt: tuple[int, ...]
    tokens: int
    arrival: float = 0.0


@dataclass
class Record:
    """What became of a request; times count from its arrival."""

    asked: Asked
    tokens: list[int] = field(default_factory=list)
    first: float = math.nan
    last: float = math.nan
    cached: int = 0

    @property
    def per_token(self) -> float:
        """Seconds between tokens after the first."""
        return (self.last - self.first) / (len(self.tokens) - 1) if len(self.tokens) > 1 else 0.0


@dataclass
class Run:
    """All records, the seconds from the first arrival to the last token, and the mean waste of used pages over the steps."""

    records: list[Record]
    seconds: float
    waste: float

    @property
    def tokens(self) -> int:
        return sum(len(r.tokens) for r in self.records)


def drive(engine: Engine, requests: Sequence[Asked], tick: Callable[[float], None] = lambda _: None) -> Run:
    """Give the engine each request when its time has come, greedy and without an end token, until all are answered. `tick` is
    told the share of tokens that are there."""
    records = {f"r{i}": Record(asked) for i, asked in enumerate(requests)}
    pending = deque(sorted(records.items(), key=lambda item: item[1].asked.arrival))
    slots = empty = 0.0
    wanted, got = sum(asked.tokens for asked in requests), 0
    start = time.perf_counter()
    while pending or engine.has_work():
        now = time.perf_counter() - start
        while pending and pending[0][1].asked.arrival <= now:
            name, record = pending.popleft()
            engine.add(name, record.asked.prompt, greedy(record.asked.tokens))
        if not engine.has_work():
            time.sleep(max(0.0, pending[0][1].asked.arrival - now))
            continue
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            got += len(output.token_ids)
            _note(records[output.request_id], output, now)
        used = engine.cache.stats()
        slots, empty = slots + used.used, empty + used.used * used.waste
        tick(got / max(1, wanted))
    seconds = time.perf_counter() - start
    return Run(list(records.values()), seconds, empty / slots if slots else 0.0)


def _note(record: Record, output: Any, now: float) -> None:
    if output.token_ids and not record.tokens:
        record.first = now - record.asked.arrival
    record.tokens += output.token_ids
    record.cached = max(record.cached, output.cached_tokens)
    record.last = now - record.asked.arrival


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)


def random_prompt(rng: random.Random, vocabulary: int, length: int) -> tuple[int, ...]:
    """Tokens that nothing else begins with, in all likelihood."""
    return tuple(rng.randrange(3, vocabulary) for _ in range(length))


def conversations(count: int, vocabulary: int, *, seed: int, longest: int, scale: float = 1.0) -> list[Asked]:
    """Requests of lognormal lengths whose means are those of ShareGPT, times `scale`."""
    rng = random.Random(seed)

    def length(mean: float) -> int:
        drawn = rng.lognormvariate(math.log(mean * scale) - SIGMA**2 / 2, SIGMA)
        return max(4, min(longest // 2, round(drawn)))

    return [Asked(random_prompt(rng, vocabulary, length(MEAN_PROMPT)), length(MEAN_ANSWER)) for _ in range(count)]


def poisson(requests: Sequence[Asked], rate: float, seed: int) -> list[Asked]:
    """The requests with independent gaps between arrivals, `rate` a second on average."""
    rng, now, found = random.Random(seed), 0.0, []
    for asked in requests:
        found.append(Asked(asked.prompt, asked.tokens, now))
        now += rng.expovariate(rate)
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan
