"""The plots of the report as plotly figures in plain data.

Colours are names of the page's palette ("@c3", "@ink"), which the page resolves for its light or dark scheme; so one figure
serves both, and one mechanism has one colour and one symbol everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attlas.lab import units
from attlas.lab.figure_parts import Figure, Style, axis, extremes, figure, layout, length_axis, place_labels, value_axis
from attlas.lab.measure import fit_power_law
from attlas.lab.options import REFERENCE
from attlas.lab.results import OPERATIONS, Results, best_rate


def all_figures(results: Results) -> dict[str, Figure]:
    """id -> {data, layout, alt}; figures without data are left out. `alt` says in words what is to be seen."""
    style = Style(list(results.mechanisms))
    found: dict[str, Figure | None] = {
        **{f"quality-{key}": quality(results, style, key) for key in SPEEDS},
        "curves": curves(results, style),
        "curves-gap": curves_to_reference(results, style),
        "positions": positions(results, style),
        "recall": recall_bars(results, style),
        "recall-curves": recall_curves(results, style),
        **{f"time-{what}": against_length(results, style, what) for what in (*OPERATIONS, "train_peak")},
        "cache": cache(results, style),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


# ---------------------------------------------------------------------------------------------------- quality


SPEEDS = {
    "train": ("train_tokens_per_second", "training tokens per second (whole model)"),
    "prefill": ("prefill_seconds", "prefill tokens per second (one layer)"),
    "decode": ("decode_seconds", "decoded tokens per second (one layer)"),
}


def quality(results: Results, style: Style, key: str) -> Figure | None:
    """Bits per byte against a speed; the area of a marker grows with the cache."""
    column, title = SPEEDS[key]
    rows = [r for r in results.rows() if r["bits_per_byte"] is not None and r[column] is not None]
    if len(rows) < 2:
        return None
    length = rows[0]["length"]
    rate = {
        r["mechanism"]: r[column] if key == "train" else (length if key == "prefill" else 1) / r[column] for r in rows
    }  # fmt: skip
    biggest = max((r["cache_bytes"] or 0 for r in rows), default=0) or 1
    sizes = {r["mechanism"]: 11 + 26 * math.sqrt((r["cache_bytes"] or 0) / biggest) for r in rows}
    spots = {r["mechanism"]: (rate[r["mechanism"]], r["bits_per_byte"]) for r in rows}
    places = place_labels(spots, sizes, log_x=key != "train")
    data = []
    for r in rows:
        label, held, size = r["mechanism"], r["cache_bytes"], sizes[r["mechanism"]]
        bits = r["bits_per_byte"]
        spread = {"type": "data", "array": [r["bits_high"] - bits], "arrayminus": [bits - r["bits_low"]]}
        hover = f"<b>{label}</b><br>{bits:.3f} bits per byte<br>{rate[label]:,.0f} tokens/s<br>cache {units.nbytes(held)}"
        data.append(
            style.trace(
                label, x=[rate[label]], y=[bits], mode="markers+text", text=[label], textposition=places[label],
                textfont={"color": "@ink", "size": 12}, hovertemplate=hover + "<extra></extra>", cliponaxis=False,
                marker={**style.marker(label, size), "opacity": 0.85, "line": {"color": "@card", "width": 1.5}},
                error_y={**spread, "color": style.colour(label), "thickness": 1.2, "width": 3,
                         "visible": r["bits_high"] > r["bits_low"]},
            )
        )  # fmt: skip
    where = f" at {length:,} tokens" if key != "train" and length else ""
    alt = f"Bits per byte {extremes({r['mechanism']: r['bits_per_byte'] for r in rows}, lambda v: f'{v:.3f}')}; "
    alt += f"speed {extremes(rate, lambda v: f'{v:,.0f} tokens/s')}."
    x = axis(title + where, log=key != "train", range=_padded([rate[k] for k in rate], log=key != "train"))
    y = axis("bits per byte on held-out files", range=_padded([r["bits_per_byte"] for r in rows], fraction=0.22)[::-1])
    return figure(data, layout(x, y), alt)


def _padded(values: Sequence[float], *, log: bool = False, fraction: float = 0.14) -> list[float]:
    """Bounds of an axis with room for labels on both sides."""
    values = [math.log10(v) for v in values] if log else list(values)
    low, high = min(values), max(values)
    pad = max(fraction * (high - low), 0.01 * abs(high), 1e-9)
    return [low - pad, high + pad]


def curves(results: Results, style: Style) -> Figure | None:
    """Training loss in bits against bytes seen, mean over seeds, with simple predictors for comparison."""
    found = {label: _curve(results, label) for label in results.mechanisms}
    data = []
    for label, (xs, ys) in found.items():
        if xs:
            hover = f"<b>{label}</b><br>%{{x:,.0f}} bytes seen<br>%{{y:.3f}} bits per byte<extra></extra>"
            data.append(style.trace(label, x=xs, y=ys, mode="lines", line=style.line(label, 1.6), hovertemplate=hover))
    if not data:
        return None
    shapes, notes = _yardsticks(results)
    # The first tenth falls steeply and is the same for all; it would squeeze what differs into a few pixels.
    late = [y for t in data for y in t["y"][len(t["y"]) // 10 :]]
    y = axis("bits per byte, training", range=[min(late) - 0.08, max(late) + 0.08])
    last = {t["meta"]: t["y"][-1] for t in data}
    alt = f"Training curves; the last points lie {extremes(last, lambda v: f'{v:.3f} bits per byte')}."
    x = axis("bytes seen in training", rangemode="tozero")
    return figure(data, layout(x, y, shapes=shapes, annotations=notes), alt)


def curves_to_reference(results: Results, style: Style) -> Figure | None:
    """Training loss minus that of `causal` on the same batches: what the batches have in common cancels."""
    _, base = _curve(results, REFERENCE) if REFERENCE in results.mechanisms else ([], [])
    data = []
    for label in results.mechanisms:
        xs, ys = _curve(results, label)
        if not ys or len(ys) != len(base) or label == REFERENCE:
            continue
        gaps = [y - b for y, b in zip(ys, base, strict=True)]
        hover = f"<b>{label}</b><br>%{{x:,.0f}} bytes seen<br>%{{y:+.3f}} bits to causal<extra></extra>"
        data.append(style.trace(label, x=xs, y=gaps, mode="lines", line=style.line(label), hovertemplate=hover))
    if not data:
        return None
    zero = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0, "layer": "below"}
    look = {"line": {"color": style.colour(REFERENCE), "width": 2}}
    late = [y for t in data for y in t["y"][len(t["y"]) // 10 :]]
    y = axis("bits per byte minus those of causal", range=[min(0.0, *late) - 0.03, max(0.0, *late) + 0.03])
    last = {t["meta"]: t["y"][-1] for t in data}
    alt = f"Training loss minus that of causal; the last points lie {extremes(last, lambda v: f'{v:+.3f} bits per byte')}."
    return figure(data, layout(axis("bytes seen in training", rangemode="tozero"), y, shapes=[{**zero, **look}]), alt)


POINTS = 30


def _curve(results: Results, label: str) -> tuple[list[float], list[float]]:
    """Bytes seen and training bits at the best learning rate: means over seeds and over neighbouring points."""
    runs = [r["curve"] for r in best_rate(results.outcomes("text", label), "bits", min)[0]]
    if not runs:
        return [], []
    size = max(1, math.ceil(len(runs[0]) / POINTS))
    means = [sum(run[i][1] for run in runs) / len(runs) for i in range(len(runs[0]))]
    blocks = [means[i : i + size] for i in range(0, len(means), size)]
    ends = [runs[0][min(i + size, len(means)) - 1][0] for i in range(0, len(means), size)]
    return ends, [sum(b) / len(b) for b in blocks]


def _yardsticks(results: Results) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    corpus = results.plan.get("corpus") or {}
    shapes, notes = [], []
    for key, text in (("unigram_bits", "byte frequencies"), ("bigram_bits", "pairs of bytes")):
        level = corpus.get(key)
        if level is None:
            continue
        line = {"color": "@muted", "width": 1, "dash": "dot"}
        shapes.append(
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level, "line": line, "layer": "below"}
        )
        notes.append(
            {"xref": "paper", "x": 1, "y": level, "text": f"{text} {level:.2f}", "showarrow": False, "xanchor": "right",
             "yanchor": "bottom", "font": {"color": "@muted", "size": 11}}
        )  # fmt: skip
    return shapes, notes


def positions(results: Results, style: Style) -> Figure | None:
    """Bits per byte of each eighth of the context: what more context is worth to each mechanism."""
    data = []
    gains: dict[str, float] = {}
    for label in results.mechanisms:
        runs = [r["by_position"] for r in best_rate(results.outcomes("text", label), "bits", min)[0]]
        if not runs:
            continue
        xs = [(a + b) / 2 for a, b, _ in runs[0]]
        ys = [sum(run[i][2] for run in runs) / len(runs) for i in range(len(xs))]
        gains[label] = ys[-1] - ys[0]
        hover = f"<b>{label}</b><br>around byte %{{x:.0f}} of the context<br>%{{y:.3f}} bits per byte<extra></extra>"
        data.append(
            style.trace(
                label,
                x=xs,
                y=ys,
                mode="lines+markers",
                line=style.line(label, 1.6),
                marker=style.marker(label),
                hovertemplate=hover,
            )
        )
    if not data:
        return None
    change = extremes(gains, lambda v: f"{v:+.3f}")
    alt = f"Bits per byte along the context; from the first to the last eighth they change by {change.removeprefix('from ')}."
    return figure(data, layout(axis("place in the context (bytes)", rangemode="tozero"), axis("bits per byte, held out")), alt)


# ---------------------------------------------------------------------------------------------------- recall


def recall_bars(results: Results, style: Style) -> Figure | None:
    rows = [r for r in results.rows() if r["recall"] is not None]
    if not rows:
        return None
    rows.sort(key=lambda r: r["recall"])
    data = []
    for r in rows:
        label = r["mechanism"]
        hover = f"<b>{label}</b><br>{r['recall']:.1%} of queries answered<br>after {r['recall_steps']:,} steps<extra></extra>"
        data.append(
            style.trace(
                label, type="bar", orientation="h", x=[r["recall"]], y=[label], hovertemplate=hover, text=[f"{r['recall']:.1%}"],
                textposition="outside", cliponaxis=False, textfont={"color": "@ink"}, marker={"color": style.colour(label)},
                error_x={"type": "data", "array": [r["recall_high"] - r["recall"]], "arrayminus": [r["recall"] - r["recall_low"]],
                         "color": "@muted", "thickness": 1.2, "width": 3,
                         "visible": r["recall_high"] - r["recall_low"] > 0.005},
            )
        )  # fmt: skip
    alt = f"Recall accuracy {extremes({r['mechanism']: r['recall'] for r in rows}, lambda v: f'{v:.0%}')}."
    x = axis("queries answered", range=[0, 1.13], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1])
    y = axis("", tickfont={"color": "@ink", "size": 12.5}, ticks="", showgrid=False)
    return figure(data, layout(x, y, bargap=0.32), alt)


def recall_curves(results: Results, style: Style) -> Figure | None:
    data = []
    needed: dict[str, float] = {}
    for label in results.mechanisms:
        for r in best_rate(results.outcomes("recall", label), "accuracy", max)[0]:
            needed[label] = max(needed.get(label, 0), r["steps"])
            xs, ys = [0, *(c[0] for c in r["curve"])], [0.0, *(c[1] for c in r["curve"])]
            hover = f"<b>{label}</b>, seed {r['seed']}<br>step %{{x:,}}<br>%{{y:.1%}}<extra></extra>"
            data.append(style.trace(label, x=xs, y=ys, mode="lines", line=style.line(label), hovertemplate=hover))
    if not data:
        return None
    alt = f"Recall accuracy over training; runs end {extremes(needed, lambda v: f'at step {v:,.0f}')}."
    y = axis("queries answered", range=[-0.02, 1.05], tickformat=".0%", tickvals=[0, 0.25, 0.5, 0.75, 1])
    return figure(data, layout(axis("training steps", rangemode="tozero"), y), alt)


# ---------------------------------------------------------------------------------------------------- length


TITLES = {
    "prefill": "time of a prefill",
    "train": "time of forward and backward",
    "decode": "time of one token",
    "train_peak": "peak of tensors held",
}


def against_length(results: Results, style: Style, what: str) -> Figure | None:
    """Medians against length on log axes, quartiles as bars, and faint lines that grow as n and as n^2."""
    data: list[dict[str, Any]] = []
    slopes: dict[str, float] = {}
    tell = units.nbytes if what == "train_peak" else units.seconds
    for label in _timed(results):
        lengths, values = results.series(label, what)
        if not lengths:
            continue
        law = fit_power_law(lengths, values)
        grows = f"<br>grows as n<sup>{law.exponent:.2f}</sup>" if law else ""
        if law:
            slopes[label] = law.exponent
        hover = f"<b>{label}</b><br>%{{x:,}} tokens<br>%{{customdata}}{grows}<extra></extra>"
        look = {"mode": "lines+markers", "line": style.line(label, 1.8), "marker": style.marker(label)}
        told = {"customdata": [tell(v) for v in values], "hovertemplate": hover}
        data.append(style.trace(label, x=lengths, y=values, **look, **told, **_quartiles(results, label, what, style)))
    if not data:
        return None
    guides, notes = slopes_of(data) if what != "decode" else ([], [])
    alt = f"{TITLES[what].capitalize()} against length."
    if slopes:
        alt += f" Fitted exponents {extremes(slopes, lambda v: f'{v:.2f}')}."
    values = [y for t in data + guides for y in t["y"]]
    if what == "train_peak":
        y = value_axis(TITLES[what], values, units.nbytes, base=2)
    else:
        y = value_axis(TITLES[what], values, units.short_seconds)
    x = length_axis([n for t in data for n in t["x"]])
    return figure(guides + data, layout(x, y, annotations=notes), alt)


def _timed(results: Results) -> list[str]:
    """The mechanisms, and `causal` before them when it was timed for reference only."""
    return list(results.mechanisms) if REFERENCE in results.mechanisms else [REFERENCE, *results.mechanisms]


def _quartiles(results: Results, label: str, what: str, style: Style) -> dict[str, Any]:
    if what not in OPERATIONS:
        return {}
    rows = [v[what] for v in results.layers(label).values()]
    bars = {
        "type": "data", "array": [t["high"] - t["median"] for t in rows], "arrayminus": [t["median"] - t["low"] for t in rows],
        "color": style.colour(label), "thickness": 1, "width": 2,
    }  # fmt: skip
    return {"error_y": bars}


def slopes_of(data: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of slope 1 and 2 that start below the data of the shortest length, and their names."""
    start, end = min(t["x"][0] for t in data), max(t["x"][-1] for t in data)
    floor = 0.55 * min(t["y"][0] for t in data)
    top = max(max(t["y"]) for t in data)
    guides, notes = [], []
    for power in (1, 2):
        stop = min(end, start * (top / floor) ** (1 / power))
        if stop <= start:
            continue
        y = floor * (stop / start) ** power
        look = {"mode": "lines", "hoverinfo": "skip", "showlegend": False, "line": {"color": "@muted", "width": 1, "dash": "dot"}}
        guides.append({"x": [start, stop], "y": [floor, y], **look})
        place = {"x": math.log10(stop), "y": math.log10(y), "xanchor": "right", "yanchor": "bottom" if power == 2 else "top"}
        text = {"text": "n" if power == 1 else "n²", "showarrow": False, "font": {"color": "@muted", "size": 11}}
        notes.append({**place, **text})
    return guides, notes


def cache(results: Results, style: Style) -> Figure | None:
    """Bytes of one layer's cache: lines are the formula, markers are real caches."""
    data: list[dict[str, Any]] = []
    ends: dict[str, float] = {}
    for label in results.mechanisms:
        for r in results.outcomes("cache", label):
            ends[label] = r["formula"][-1][1]
            hover = f"<b>{label}</b><br>%{{x:,}} tokens<br>%{{customdata}}"
            for points, look, said in (
                (r["formula"], {"mode": "lines", "line": style.line(label, 1.6)}, "formula"),
                (
                    [(s["length"], s["measured"]) for s in r["sizes"]],
                    {"mode": "markers", "marker": style.marker(label, 8)},
                    "measured",
                ),
            ):
                xs, ys = [n for n, _ in points], [b for _, b in points]
                told = {"customdata": [units.nbytes(b) for b in ys], "hovertemplate": f"{hover} ({said})<extra></extra>"}
                data.append(style.trace(label, x=xs, y=ys, **look, **told))
    if not data:
        return None
    seen = [x for t in data for x in t["x"]]
    alt = f"Cache of one layer at {max(seen):,} tokens {extremes(ends, units.nbytes)}."
    y = value_axis("cache of one layer", [v for t in data for v in t["y"]], units.nbytes, base=2)
    return figure(data, layout(length_axis(seen), y), alt)
