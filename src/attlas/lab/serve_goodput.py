"""Goodput: conversations with Poisson arrivals, at rates up to and past what the engine can bear.

Source of the term: DistServe, Zhong et al. 2024, arXiv 2401.09670: requests a second that keep a promise about latency.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from attlas.engine.engine import Engine
from attlas.lab.serve_load import Record, Run, conversations, drive, poisson, quantile
from attlas.lab.serve_rows import Row, Sizes, Tick, bar
from attlas.lab.serve_subject import Subject

TTFT_SLO, TPOT_SLO = 2.0, 0.25  # seconds to the first token, seconds a token after it
KEPT = 0.9  # share of requests for which a rate counts as served
ROWS, CHUNK = 32, 256  # sequences at once, and tokens of a step: a long prompt holds the answers of others up no longer than that
FIRST = (0.6, 1.2)  # rates to begin with, as shares of the one of requests that are all there at once
STEP, MOST = 1.5, 7  # the factor from one rate to the next, and how many rates at most
FEWEST = 5  # requests at a rate


def goodput(served: Subject, sizes: Sizes, tick: Tick) -> Row:
    """A table over rates: the share of requests that keeps the promise, and how many a second. Where no rates are given they
    begin at the one at which requests that are all there at once are answered, and rise until too few keep the promise."""
    longest = 2048 if sizes.scale >= 0.5 else 512
    turns = 1 + (len(sizes.rates) or MOST)
    full = None
    if not sizes.rates:
        at_once = conversations(ROWS, served.vocabulary, seed=3, longest=longest, scale=sizes.scale)
        full = ROWS / drive(_engine(served, longest), at_once, partial(_part, tick, 0, turns)).seconds
    table: list[Row] = []
    for rate in sizes.rates if full is None else _rising(full, table):
        count = max(FEWEST, round(rate * sizes.seconds))
        talks = conversations(count, served.vocabulary, seed=5, longest=longest, scale=sizes.scale)
        part = partial(_part, tick, len(table) + 1, turns)
        table.append({"rate": rate, **promise(drive(_engine(served, longest), poisson(talks, rate, seed=7), part), rate)})
    waste, served_rates = max(r["waste"] for r in table), [r["rate"] for r in table if r["kept"] >= KEPT]
    return {
        "slo": {"first_token": TTFT_SLO, "per_token": TPOT_SLO},
        "at_once": full,
        "rates": table,
        "highest_kept": max(served_rates, default=None),
        "past_saturation": table[-1]["kept"] < KEPT,
        "waste": waste,
        "bars": [bar("waste", waste, most=0.04)],
    }


def _rising(full: float, table: Sequence[Row]) -> Iterator[float]:
    """Rates below and above `full`, and then higher ones for as long as the last row of the table keeps the promise."""
    for share in FIRST:
        yield full * share
    while len(table) < MOST and table[-1]["kept"] >= KEPT:
        yield STEP * table[-1]["rate"]


def _engine(served: Subject, longest: int) -> Engine:
    return served.engine(rows=ROWS, tokens=longest, prefix_caching=True, batched=CHUNK)


def _part(tick: Tick, turn: int, turns: int, share: float) -> None:
    tick((turn + share) / turns)


def kept(record: Record) -> bool:
    return record.first <= TTFT_SLO and record.per_token <= TPOT_SLO


def promise(run: Run, rate: float) -> Row:
    """Of one rate: quantiles of the waits, the share that keeps the promise, and arrivals a second that do."""
    share = sum(map(kept, run.records)) / len(run.records)
    return {
        "requests": len(run.records),
        "first_token_p50": quantile([r.first for r in run.records], 0.5),
        "first_token_p99": quantile([r.first for r in run.records], 0.99),
        "per_token_p99": quantile([r.per_token for r in run.records], 0.99),
        "kept": share,
        "goodput": share * rate,
        "tokens_per_second": run.tokens / run.seconds,
        "waste": run.waste,
    }
