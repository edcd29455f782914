"""Random schedules of requests that come, fork, give way, are aborted and finish: nothing leaks, and nobody's tokens change."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from attlas.engine.engine import Engine
from attlas.engine.options import EngineOptions
from attlas.engine.request import SamplingParams
from attlas.models.config import language_model
from attlas.models.transformer import Transformer
from engine_models import lively, prompt

VOCAB = 23
MIXERS: dict[str, tuple[Any, ...]] = {
    "full": ("causal",),
    "window and full": (("sliding-window", {"window": 5}), "causal"),
    "state": (("mamba2", {"num_heads": 2, "state_dim": 3, "num_groups": 1}), "causal"),
}


@cache
def model(name: str) -> Transformer:
    return lively(Transformer(language_model(VOCAB, 8, len(MIXERS[name]), 2, mixers=MIXERS[name], hidden=7)))


def wish(r: random.Random) -> tuple[tuple[int, ...], SamplingParams]:
    """One of few beginnings, so that prefixes are shared, and any rules."""
    tokens = [t % VOCAB for t in prompt(29, seed=r.randrange(3))][: r.randint(1, 29)]
    return tuple(tokens), SamplingParams(
        max_tokens=r.randint(1, 9),
        temperature=r.choice((0.0, 0.8)),
        top_k=r.choice((0, 5)),
        frequency_penalty=r.choice((0.0, 0.0, 0.5)),
        seed=r.randrange(4),
        n=r.choice((1, 1, 2, 3)),
        stop_token_ids=r.choice(((), (r.randrange(VOCAB),))),
    )


@cache
def alone(name: str, tokens: tuple[int, ...], params: SamplingParams) -> dict[int, list[int]]:
    """The answers that a request gets in an engine of its own."""
    made = Engine(model(name), options=EngineOptions(max_len=48, page_size=8, batch_invariant=True))
    made.add("a", tokens, params)
    found: dict[int, list[int]] = {}
    while made.has_work():
        for o in made.step():
            found.setdefault(o.index, []).extend(o.token_ids)
    return found


@dataclass
class Books:
    """What has been asked for, and what has come back."""

    asked: dict[str, tuple[tuple[int, ...], SamplingParams]] = field(default_factory=dict)
    got: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    ended: dict[tuple[str, int], str] = field(default_factory=dict)

    def take(self, outputs: list[Any]) -> None:
        for o in outputs:
            key = o.request_id, o.index
            assert key not in self.ended, f"{key} goes on after its end"
            self.got.setdefault(key, []).extend(o.token_ids)
            if o.finish_reason:
                self.ended[key] = o.finish_reason


def schedule(seed: int) -> Engine:
    r = random.Random(seed)
    name = r.choice(list(MIXERS))
    swap = r.random() < 0.4
    options = EngineOptions(
        max_len=48,
        page_size=8,
        pages=r.choice({"full": (6, 8, 14), "window and full": (12, 14, 20), "state": (6, 9)}[name]),
        max_running=r.choice((1, 3, 6)),
        max_batched_tokens=r.choice((3, 8, 64)),
        prefix_caching=r.random() < 0.7,
        preemption="swap" if swap else "recompute",
        swap_bytes=r.choice((2000, 1 << 20)) if swap else 0,
        speculative=r.choice((0, 3)) if name != "state" else 0,
        batch_invariant=name != "state",
    )
    made, books, count = Engine(model(name), options=options), Books(), 0
    for _ in range(r.randint(5, 25)):
        if r.random() < 0.5:
            books.asked[str(count)] = tokens, params = wish(r)
            made.add(str(count), tokens, params, priority=r.randrange(2), salt=r.choice(("", "", "x")))
            count += 1
        if count and r.random() < 0.15:
            victim = str(r.randrange(count))
            alive = any((victim, i) not in books.ended for i in range(books.asked[victim][1].n))
            assert made.abort(victim) == alive
            made.cache.check()
        books.take(made.step())
        made.cache.check()
    steps = 0
    while made.has_work():
        books.take(made.step())
        made.cache.check()
        steps += 1
        assert steps < 3000, "no end"
    stats = made.cache.stats()
    assert stats.used == stats.swapped == 0 and stats.free_rows == options.max_running
    assert set(books.ended) == {(k, i) for k, (_, p) in books.asked.items() for i in range(p.n)}
    if options.batch_invariant:
        for (key, i), tokens in books.got.items():
            want = alone(name, *books.asked[key])[i]
            assert tokens == (want if books.ended[key, i] != "abort" else want[: len(tokens)]), (seed, key, i)
    return made


def test_random_schedules():
    made = [schedule(seed) for seed in range(200)]
    assert sum(m.stats().preemptions for m in made) > 20
    assert sum(m.stats().cached_tokens for m in made) > 500
    assert sum(m.stats().accepted for m in made) > 50


@pytest.mark.heavy
def test_many_random_schedules():
    for seed in range(200, 10_200):
        schedule(seed)
