"""Rows of the serving bench: one request, many against static batches, a shared prefix, requests that are cancelled."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

from attlas.engine.engine import Engine
from attlas.lab.measure import Timing, time_interleaved
from attlas.lab.serve_load import Asked, drive, greedy, random_prompt
from attlas.lab.serve_subject import Subject, tiny

PATIENCE = 60.0  # seconds that a peer may take for a row; beyond, a part of it is measured and scaled up
TOGETHER, PART = 32, 8  # prompts of one static batch, and of one that stands for all


@dataclass(frozen=True)
class Sizes:
    """How much is asked for; see `bench_serve.run`."""

    requests: int
    prefix: int
    sharers: int
    rates: tuple[float, ...]
    seconds: float
    scale: float
    cancels: int
    repeats: int


Row = dict[str, Any]
Tick = Callable[[float], None]
Measure = Callable[[Subject, Sizes, Tick], Row]


def bar(what: str, value: float, *, least: float | None = None, most: float | None = None) -> Row:
    """What is wanted of a value, and whether it is so. `most` itself is too much."""
    met = (least is None or value >= least) and (most is None or value < most)
    return {"what": what, "value": value, "least": least, "most": most, "met": met}


def medians(times: Mapping[str, Timing]) -> dict[str, float]:
    return {name: timing.median for name, timing in times.items()}


def over(seconds: Mapping[str, float]) -> dict[str, float]:
    """How many times as long as attlas the others take."""
    return {f"over {name}": value / seconds["attlas"] for name, value in seconds.items() if name != "attlas"}


def best(ratios: Mapping[str, float], word: str) -> list[float]:
    """The ratio to the fastest of those whose name holds a word; none where there is no such peer."""
    return sorted(value for name, value in ratios.items() if word in name)[:1]


def decode_one(served: Subject, sizes: Sizes, tick: Tick) -> Row:
    """Seconds a token of one request behind a prompt of 128 tokens: the time of 1 and of 65 new tokens, and the difference."""
    rng, new = random.Random(1), 64
    prompt = random_prompt(rng, served.vocabulary, 128)
    engine = served.engine(rows=1, tokens=256)
    thunks: dict[str, Callable[[], object]] = {}
    with served.llama.peers(1, 256) as peers:
        for n in (1, new + 1):
            thunks[f"attlas {n}"] = partial(drive, engine, [Asked(prompt, n)])
            thunks[f"transformers {n}"] = partial(served.generate, [prompt], n)
            for peer in peers:
                thunks[f"{peer.name} {n}"] = partial(peer.answer, [Asked(prompt, n)])
        seconds = medians(time_interleaved(thunks, 2 * sizes.repeats, min_sample=0, max_seconds=60))
    tick(1.0)
    names = [name.removesuffix(" 1") for name in thunks if name.endswith(" 1")]
    per_token = {name: (seconds[f"{name} {new + 1}"] - seconds[f"{name} 1"]) / new for name in names}
    ratios = over(per_token)
    bars = [bar("transformers", ratios["over transformers"], least=2.0)]
    first = {name: seconds[f"{name} 1"] for name in names}
    return {"seconds_per_token": per_token, "seconds_to_first": first, "bars": bars, **ratios}


def batch(served: Subject, sizes: Sizes, tick: Tick) -> Row:
    """Requests of mixed lengths, all there at once: useful tokens a second; a static batch waits for its longest."""
    rng = random.Random(2)
    asked = [
        Asked(random_prompt(rng, served.vocabulary, rng.randint(32, 256)), rng.randint(16, 160)) for _ in range(sizes.requests)
    ]
    longest, prompts = max(a.tokens for a in asked), [a.prompt for a in asked]
    engine = served.engine(rows=sizes.requests, tokens=256 + 160)
    drive(engine, [Asked(prompts[0], 2)])
    served.generate(prompts[:1], 2)
    tick(0.1)
    with served.llama.peers(sizes.requests, 256 + 160) as peers:
        thunks: dict[str, Callable[[], object]] = {
            "attlas": partial(drive, engine, asked),
            "transformers": partial(served.generate, prompts, longest),
        }
        thunks |= {peer.name: partial(peer.answer, asked) for peer in peers}
        seconds = medians(time_interleaved(thunks, sizes.repeats, warmup=0, min_sample=0, max_seconds=1.5 * PATIENCE))
    tokens, ratios = sum(a.tokens for a in asked), over(seconds)
    bars = [bar("transformers", ratios["over transformers"], least=3.5)]
    bars += [bar("llama.cpp", value, least=1.0) for value in best(ratios, "llama.cpp")]
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds["attlas"], "bars": bars, **ratios}


def static_batches(served: Subject, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, int]:
    """Seconds that transformers takes for all prompts in batches of TOGETHER, and how many of them were run: where all would take
    longer than PATIENCE, one batch of PART stands for them."""

    def timed(few: Sequence[Sequence[int]]) -> float:
        start = perf_counter()
        served.generate(few, tokens)
        return perf_counter() - start

    served.generate(prompts[:1], 2)
    scaled = timed(prompts[:PART]) * len(prompts) / min(PART, len(prompts))
    if scaled > PATIENCE:
        return scaled, PART
    return sum(timed(prompts[i : i + TOGETHER]) for i in range(0, len(prompts), TOGETHER)), len(prompts)


def shared_prefix(served: Subject, sizes: Sizes, tick: Tick) -> Row:
    """Requests that begin alike, end to end: beside transformers, which computes every prompt, and beside the engine without
    sharing; prompt tokens computed; and the wait for the first token behind a known prefix and behind a new one."""
    rng, new = random.Random(3), 8
    common = random_prompt(rng, served.vocabulary, sizes.prefix)
    asked = [Asked(common + random_prompt(rng, served.vocabulary, rng.randint(17, 31)), new) for _ in range(sizes.sharers)]
    tokens = sizes.prefix + 31 + new
    plain = drive(served.engine(rows=32, tokens=tokens), asked[:PART], lambda share: tick(share / 4))
    engine = served.engine(rows=32, tokens=tokens, prefix_caching=True)
    run = drive(engine, asked, lambda share: tick((1 + share) / 4))
    stats = engine.stats()
    differ = sum(r.tokens != w.tokens for r, w in zip(run.records, plain.records, strict=False))
    assert not differ or served.dtype.itemsize < 4, "an answer behind a shared prefix differs"
    misses, hits = first_tokens(served, engine, rng, sizes)
    tick(0.6)
    theirs, measured = static_batches(served, [a.prompt for a in asked], new)
    seconds = {"attlas": run.seconds, "transformers": theirs, "not sharing": plain.seconds * len(asked) / len(plain.records)}
    computed = stats.prompt_tokens - stats.cached_tokens
    least = sum(len(a.prompt) for a in asked) - (len(asked) - 1) * sizes.prefix
    ratios = over(seconds)
    return {
        "seconds": seconds,
        "measured": {"transformers": measured, "not sharing": len(plain.records)},
        "requests": len(asked),
        "answers_differ": differ,
        "prompt_tokens": stats.prompt_tokens,
        "computed": computed,
        "least_to_compute": least,
        "first_token": {"miss": misses, "hit": hits},
        "miss_over_hit": misses / hits,
        "bars": [
            bar("transformers", ratios["over transformers"], least=6.0),
            bar("prefixes computed beyond one", (computed - least) / sizes.prefix, most=1 / 16),  # pages end where they end
            bar("miss over hit", misses / hits, least=10.0),
        ],
        **ratios,
    }


def first_tokens(served: Subject, engine: Engine, rng: random.Random, sizes: Sizes) -> tuple[float, float]:
    """Median seconds to the first token: of a prompt whose prefix nobody had, and of the next one that has it."""
    waits: tuple[list[float], list[float]] = ([], [])
    for turn in range(2 * sizes.repeats):
        fresh = random_prompt(rng, served.vocabulary, sizes.prefix)
        for found in waits:
            asked = Asked((*fresh, 5 + turn, *random_prompt(rng, served.vocabulary, 16)), 1)
            found.append(drive(engine, [asked]).records[0].first)
    return Timing.of(waits[0]).median, Timing.of(waits[1]).median


def cancelled(served: Subject, sizes: Sizes, tick: Tick) -> Row:
    """Pages that are still held after many requests were cancelled at random moments (on a small model: the book-keeping is the
    same)."""
    small, rng, done, number = tiny(), random.Random(13), 0, 0
    engine = small.engine(rows=7, tokens=96, prefix_caching=True)
    alive: list[str] = []
    while done < sizes.cancels:
        while len(alive) < 11:
            shared = tuple(range(5, 5 + 16 * rng.randint(0, 3)))
            engine.add(f"c{number}", shared + random_prompt(rng, small.vocabulary, rng.randint(1, 23)), greedy(23))
            alive.append(f"c{number}")
            number += 1
        for _ in range(rng.randint(0, 3)):
            if alive and engine.abort(alive.pop(rng.randrange(len(alive)))):
                done += 1
        ended = {o.request_id for o in engine.step() if o.finish_reason is not None}
        alive = [name for name in alive if name not in ended]
        tick(done / sizes.cancels)
    for name in alive:
        engine.abort(name)
    while engine.has_work():
        engine.step()
    engine.cache.check()
    stats = engine.cache.stats()
    leaked, rows = stats.used, stats.rows - stats.free_rows
    bars = [bar("pages and rows leaked", leaked + rows, most=1)]
    return {"cancelled": done, "leaked": leaked, "leaked_rows": rows, "hits": stats.hits, "bars": bars}
