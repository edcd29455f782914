"""Random schedules of requests that come, fork, give way, are aborted and finish: nothing leaks, and nobody's tokens change.

`python tests/test_engine_fuzz.py FIRST END` runs the schedules of the seeds FIRST ... END - 1 and says what happened in them.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import permutations
from typing import Any

import pytest
import torch

from attlas.engine.engine import Engine
from attlas.engine.options import EngineOptions
from attlas.engine.request import SamplingParams
from attlas.engine.scheduler import HELD_BACK
from attlas.models.config import language_model
from attlas.models.transformer import Transformer
from engine_models import lively, prompt

VOCAB = 23
WINDOW = ("sliding-window", {"window": 5})
STATE = ("mamba2", {"num_heads": 2, "state_dim": 3, "num_groups": 1})
LATENT = ("multi-head-latent", {"kv_lora_rank": 3, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 5})
MIXERS: dict[str, tuple[Any, ...]] = {
    "full": ("causal",),
    "window and full": (WINDOW, "causal"),
    "state": (STATE, "causal"),
    "latent and window": (LATENT, WINDOW),
    "sinks and latent": (("streaming", {"window": 7, "sinks": 2}), LATENT),
    "lookahead": ("castle",),
    "lookahead and window": (("castle-swl", {"window": 3}), WINDOW),
    "lookahead and state": ("castle", STATE),
    "groups": (("memory-compressed", {"factor": 3}), "causal"),
}
# Sums over tokens cannot be taken back, so these speculate with nothing; and they share no prefixes.
SUMS = frozenset(("state", "lookahead", "lookahead and window", "lookahead and state", "groups"))
TABLES = {name: 1 if name in ("full", "state", "lookahead", "lookahead and state") else 2 for name in MIXERS}


# In fp64 no rounding decides about a token, so whatever a schedule does must leave every answer as it is; in fp32 the compiled
# forward runs, where it promises the same ("invariant") and where it does not ("fast": only the accounts are compared).
MODES = ("fp64", "fp64", "invariant", "fast")
RULES = [(0.0, 0, 0.0, 0), (0.0, 0, 0.5, 0), (0.8, 0, 0.0, 1), (0.8, 5, 0.5, 2)]  # temperature, top_k, frequency penalty, seed


@cache
def model(name: str, dtype: torch.dtype) -> Transformer:
    config = language_model(VOCAB, 8, len(MIXERS[name]), 2, mixers=MIXERS[name], hidden=7)
    return lively(Transformer(config, dtype=dtype))


def wish(r: random.Random) -> tuple[tuple[int, ...], SamplingParams]:
    """One of few beginnings, so that prefixes are shared, and any rules."""
    tokens = [t % VOCAB for t in prompt(29, seed=r.randrange(3))][: r.choice((1, 7, 8, 17, 29))]
    temperature, top_k, frequency, seed = r.choice(RULES)
    return tuple(tokens), SamplingParams(
        max_tokens=r.randint(1, 9),
        temperature=temperature,
        top_k=top_k,
        frequency_penalty=frequency,
        seed=seed,
        n=r.choice((1, 1, 2, 3)),
        stop_token_ids=r.choice(((), (r.randrange(VOCAB),))),
    )


@cache
def whole(
    name: str, dtype: torch.dtype, kv_dtype: str | None, tokens: tuple[int, ...], params: SamplingParams
) -> list[list[int]]:
    """The answers that a request gets in an engine of its own."""
    options = EngineOptions(max_len=48, page_size=8, batch_invariant=dtype == torch.float32, kv_dtype=kv_dtype)
    made = Engine(model(name, dtype), options=options)
    made.add("a", tokens, params)
    found: list[list[int]] = [[] for _ in range(params.n)]
    while made.has_work():
        for o in made.step():
            found[o.index] += o.token_ids
    return found


def alone(
    dtype: torch.dtype, name: str, kv_dtype: str | None, tokens: tuple[int, ...], params: SamplingParams
) -> list[list[int]]:
    """The same, from answers without a stop token and of full length, which many requests begin with."""
    longest = whole(name, dtype, kv_dtype, tokens, replace(params, max_tokens=9, n=3, stop_token_ids=()))
    cut = [answer[: params.max_tokens] for answer in longest]
    return [a[: min((a.index(t) + 1 for t in params.stop_token_ids if t in a), default=len(a))] for a in cut]


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


def drawn_options(r: random.Random, name: str, mode: str) -> EngineOptions:
    swap = r.random() < 0.4
    return EngineOptions(
        max_len=48,
        page_size=8,
        pages=TABLES[name] * r.choice((6, 8, 11)),
        max_running=r.choice((1, 3, 6)),
        max_batched_tokens=r.choice((3, 8, 64)),
        prefix_caching=r.random() < 0.7,
        preemption="swap" if swap else "recompute",
        swap_bytes=r.choice((2000, 1 << 20)) if swap else 0,
        speculative=0 if name in SUMS else r.choice((0, 3)),
        batch_invariant=mode == "invariant",
        cascade=mode != "invariant" and r.random() < 0.5,
        kv_dtype=r.choice((None, None, "int8")) if mode != "fast" else None,
    )


@dataclass
class Run:
    """One engine under a random schedule."""

    random: random.Random
    made: Engine
    books: Books = field(default_factory=Books)
    steps: int = 0
    pushed: int = 0

    def step(self) -> None:
        self.books.take(self.made.step())
        self.check()
        assert_nothing_is_computed_twice(self.made)
        self.steps += 1
        assert self.steps < 3000, "no end"

    def check(self) -> None:
        self.made.cache.check()
        stats = self.made.cache.stats()
        assert stats.free + stats.used + stats.cached == stats.total == self.made.options.pages

    def submit(self) -> None:
        r, name = self.random, str(len(self.books.asked))
        self.books.asked[name] = tokens, params = wish(r)
        self.made.add(name, tokens, params, priority=r.randrange(2), salt=r.choice(("", "", "x")))

    def cancel(self) -> None:
        """Whatever it held is free at once, but what others share."""
        if not self.books.asked:
            return
        victim = self.random.choice(list(self.books.asked))
        alive = any((victim, i) not in self.books.ended for i in range(self.books.asked[victim][1].n))
        assert self.made.abort(victim) == alive
        assert all(s.request_id != victim for s in (*self.made.scheduler.running, *self.made.scheduler.waiting))
        self.check()

    def preempt(self) -> None:
        if self.made.scheduler.running:
            self.made.scheduler.preempt(self.random.choice(self.made.scheduler.running))
            self.pushed += 1
            self.check()

    def go(self) -> None:
        r = self.random
        for _ in range(r.randint(5, 25)):
            for action, share in ((self.submit, 0.5), (self.cancel, 0.15), (self.preempt, 0.1)):
                if r.random() < share:
                    action()
            self.step()
        while self.made.has_work():
            self.step()


def assert_nothing_is_computed_twice(made: Engine) -> None:
    """No two running sequences have the same pages still to compute (one that was swapped in had them when it left)."""
    size, running = made.cache.page_size, made.scheduler.running
    if not made.cache.prefix_caching or made.options.preemption == "swap":
        return
    for a, b in permutations(running, 2):
        if a.salt == b.salt and b.held_back < HELD_BACK:
            most = min(len(a.prompt), len(b.prompt) - 1) // size  # answers may come to agree later, which nobody can know before
            common = max(n for n in range(most + 1) if a.tokens[: n * size] == b.tokens[: n * size]) * size
            assert max(a.computed, b.computed) >= common


def schedule(seed: int) -> Run:
    r = random.Random(seed)
    name = r.choice(list(MIXERS))
    mode = r.choice(MODES) if name in ("full", "window and full") else "fp64"
    dtype, options = torch.float64 if mode == "fp64" else torch.float32, drawn_options(r, name, mode)
    run = Run(r, Engine(model(name, dtype), options=options))
    run.go()
    stats, books = run.made.cache.stats(), run.books
    assert stats.used == stats.swapped == stats.swap_bytes == 0 and stats.free_rows == options.max_running
    assert set(books.ended) == {(k, i) for k, (_, p) in books.asked.items() for i in range(p.n)}
    for (key, i), tokens in books.got.items() if mode != "fast" else ():
        want = alone(dtype, name, options.kv_dtype, *books.asked[key])[i]
        assert tokens == (want if books.ended[key, i] != "abort" else want[: len(tokens)]), (seed, key, i)
    return run


def told(runs: Iterable[Run]) -> Counter[str]:
    """What happened in some schedules, in numbers."""
    seen = Counter[str]()
    for run in runs:
        stats = run.made.stats()
        seen.update(schedules=1, steps=stats.steps, requests=len(run.books.asked), pushed=run.pushed)
        seen.update(preemptions=stats.preemptions, cached=stats.cached_tokens, accepted=stats.accepted, **stats.finished)
    return seen


def test_random_schedules():
    seen = told(map(schedule, range(40)))
    assert min(seen["preemptions"] - seen["pushed"], seen["pushed"], seen["accepted"], seen["abort"], seen["stop"]) > 5
    assert seen["cached"] > 50


@pytest.mark.heavy
def test_many_random_schedules():
    for seed in range(40, 10_040):
        schedule(seed)


if __name__ == "__main__":
    print(dict(told(map(schedule, range(int(sys.argv[1]), int(sys.argv[2]))))))
