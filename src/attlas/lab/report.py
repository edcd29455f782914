"""One HTML file that holds a whole comparison: words, tables, interactive plots, and the library that draws them. No network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from attlas._version import __version__
from attlas.catalogue.index import card
from attlas.errors import AttlasError
from attlas.lab import prose, report_tables, units
from attlas.lab.figure_parts import Style
from attlas.lab.figures import SPEEDS, all_figures
from attlas.lab.marks import mark
from attlas.lab.results import Results
from attlas.masks import draw

CELLS = 32  # of a picture, each way
NO_MASK = {"scan": "a running state, no mask", "long_conv": "a long convolution, no mask"}  # by the op's module
LOGO = (
    '<svg viewBox="0 0 24 24" aria-hidden="true"><g fill="currentColor">'
    + "".join(
        f'<rect x="{3 + 5 * j}" y="{3 + 5 * i}" width="4" height="4" rx="1" opacity="{1 if i - 1 <= j <= i else 0.22}"/>'
        for i in range(4)
        for j in range(4)
    )
    + "</g></svg>"
)


def asset(name: str) -> str:
    return (files("attlas.lab") / "assets" / name).read_text(encoding="utf-8")


def render(results: Results) -> str:
    """The report as HTML. Works on results that are not complete: what has not been measured is left out."""
    from plotly.offline import get_plotlyjs

    figures, style = all_figures(results), Style(list(results.mechanisms))
    return Template(asset("report.html")).substitute(
        title=escape(prose.title(results)),
        lede=escape(prose.lede(results)),
        facts=_facts(results),
        notices=_notices(results),
        headlines="".join(_headline(h, style) for h in prose.headlines(results)),
        chips="".join(_chip(label, style) for label in results.mechanisms),
        sections="\n".join(_sections(results, figures, style)),
        footer=_footer(results),
        logo=LOGO,
        css=asset("report.css"),
        js=asset("report.js"),
        plotly=get_plotlyjs(),
        # "</" would end the script element early.
        figures=json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("</", "<\\/"),
    )


# ---------------------------------------------------------------------------------------------------- top


def _facts(results: Results) -> str:
    machine = results.plan["machine"]
    where = (
        machine["accelerator"] or f"{machine['cpu']}, {machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}"
    )
    facts = [("Machine", where), ("Software", f"attlas {__version__}, torch {machine['torch']}")]
    limits = results.limits()
    if limits:
        facts.append(("This machine's limits", f"{limits['gemm_float32'] / 1e9:,.0f} GFLOP/s, {limits['copy'] / 1e9:.1f} GB/s"))
    weights = [m["parameters"] for m in results.mechanisms.values() if m["parameters"]]
    if weights:
        low, high = min(weights), max(weights)
        facts.append(("Weights", f"{low:,}" if low == high else f"{low:,} to {high:,}"))
    facts.append(("Measured in", f"{results.seconds / 60:.1f} minutes"))
    return "".join(f"<li>{escape(k)} <b>{escape(v)}</b></li>" for k, v in facts)


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def _notices(results: Results) -> str:
    out = []
    if not results.complete:
        out.append(
            f"<b>Not finished.</b> Some trials are missing; <code>{escape(results.command)}</code> goes on where it stopped."
        )
    for label, why in results.red().items():
        out.append(f"<b>Red gate: {escape(label)}.</b> {escape(why)}. It was neither trained nor timed.")
    for stage, what, why in results.failures():
        if stage != "gate":
            out.append(f"<b>{escape(stage)}, {escape(what)}</b> did not finish: {escape(why)}.")
    return "".join(f'<p class="notice">{text}</p>' for text in out)


def say(text: str) -> str:
    """Escaped words in which a percent sign stays with its number."""
    return escape(text).replace(" %", "\u00a0%")


def _headline(h: prose.Headline, style: Style) -> str:
    return (
        f'<div class="headline"><div class="q">{escape(h.question)}</div>'
        f'<div class="big num">{say(h.big)} <small>{escape(h.unit)}</small></div>'
        f'<div class="who">{mark(h.label, style)}{escape(h.label)}</div><div class="note">{say(h.note)}</div></div>'
    )


def _chip(label: str, style: Style) -> str:
    name = escape(label)
    tip = "Click: show or hide. Alt-click: only this one, and causal."
    attributes = f'type="button" aria-pressed="true" data-label="{name}" title="{tip}"'
    return f'<button class="chip" {attributes}>{mark(label, style)}{name}</button>'


# ---------------------------------------------------------------------------------------------------- sections


def _sections(results: Results, figures: dict[str, Any], style: Style) -> list[str]:
    out = [
        _section(
            "Summary",
            "Side by side",
            "Click a column to sort. Bars compare within a column.",
            report_tables.summary(results, style),
        )
    ]
    chosen = [key for key in SPEEDS if f"quality-{key}" in figures]
    if chosen:
        names = {"train": "training", "prefill": "prefill", "decode": "decode"}
        switch = [(names[key], f"quality-{key}") for key in chosen]
        panel = _panel("Quality against speed", figures, switch, "tall", "up and to the right is better; area = cache")
        words = "Bits per byte say how well a model predicts held-out text: each tenth less is about 7 % less surprise."
        out.append(_section("Trade-off", "What quality costs", words, _plots([panel], one=True)))
    text = [
        _panel("Learning", figures, [("bits", "curves"), ("to causal", "curves-gap")]),
        _panel("Along the context", figures, [("", "positions")], hint="lower on the right = makes use of more context"),
    ]
    words = "The same bytes in the same order for all, so the ups and downs of the text cancel in the difference to causal."
    out += _maybe("Language", "Learning to predict bytes", words, text)
    recall = [
        _panel("Queries answered", figures, [("", "recall")], hint="stopped at 99 %"),
        _panel("On the way", figures, [("", "recall-curves")], hint="held-out accuracy while training"),
    ]
    words = "Keys and values are shown once; later each key is asked for. A mechanism needs to find one exact token far back."
    out += _maybe("Recall", "Finding what was said", words, recall)
    out += _speed(results, figures, style)
    held = [_panel("Cache of one layer", figures, [("", "cache")], "tall", "markers: real caches; lines: formula")]
    out += _maybe("Memory", "What decoding has to keep", "Bytes that one sequence holds in one layer.", held, one=True)
    out.append(_section("Catalogue", "The mechanisms", "", _gallery(results, style)))
    out.append(_words(results))
    return out


def _section(eyebrow: str, heading: str, words: str, body: str) -> str:
    lede = f'<p class="lede">{say(words)}</p>' if words else ""
    return f'<section><div class="eyebrow">{escape(eyebrow)}</div><h2>{escape(heading)}</h2>{lede}{body}</section>'


def _maybe(eyebrow: str, heading: str, words: str, panels: Sequence[str], *, one: bool = False) -> list[str]:
    """A section of panels, left out when no panel has data."""
    kept = [p for p in panels if p]
    return [_section(eyebrow, heading, words, _plots(kept, one=one or len(kept) == 1))] if kept else []


def _plots(panels: Sequence[str], *, one: bool = False) -> str:
    return f'<div class="plots{" one" if one else ""}">{"".join(panels)}</div>'


def _panel(title: str, figures: dict[str, Any], shown: list[tuple[str, str]], size: str = "", hint: str = "") -> str:
    """A titled plot; several (name, figure) pairs make a switch. Empty when there is no data."""
    shown = [(name, key) for name, key in shown if key in figures]
    if not shown:
        return ""
    first = shown[0][1]
    switch = ""
    if len(shown) > 1:
        buttons = "".join(
            f'<button type="button" aria-pressed="{str(key == first).lower()}" data-show="{key}">{escape(name)}</button>'
            for name, key in shown
        )
        switch = f'<span class="switch" role="group" aria-label="What is shown" data-plot="plot-{first}">{buttons}</span>'
    note = f'<span class="hint">{escape(hint)}</span>' if hint else ""
    plot = (
        f'<div class="plot {size}" id="plot-{first}" data-figure="{first}" role="img" '
        f'aria-label="{escape(figures[first]["alt"])}"></div>'
    )
    return f'<figure class="panel"><figcaption><h3>{escape(title)}</h3>{switch}{note}</figcaption>{plot}</figure>'


def _speed(results: Results, figures: dict[str, Any], style: Style) -> list[str]:
    panels = [
        _panel("Prefill", figures, [("", "time-prefill")], hint="all tokens at once, into a cache"),
        _panel("Training step", figures, [("", "time-train")], hint="forward and backward"),
        _panel("Decoding", figures, [("", "time-decode")], hint="one token behind n cached ones"),
        _panel("Memory of a training step", figures, [("", "time-train_peak")], hint="most that tensors held at once"),
    ]
    if not any(panels):
        return []
    words = "Straight lines on these axes are power laws; dotted lines grow as n and n². The table gives the fitted exponents."
    body = _plots([p for p in panels if p]) + report_tables.exponents(results, style)
    return [_section("Speed", "Time against length", words, body)]


def _gallery(results: Results, style: Style) -> str:
    return '<div class="gallery">' + "".join(_mechanism(results, label, style) for label in results.mechanisms) + "</div>"


def _mechanism(results: Results, label: str, style: Style) -> str:
    m, red = results.mechanisms[label], results.red().get(label)
    told = m["card"]
    gate = f'<span class="tag red">red gate</span> {escape(red)}' if red else '<span class="tag">gate green</span>'
    facts = [
        ("Time", told.get("time")), ("Memory", told.get("memory")), ("Cache", told.get("cache")),
        ("Used by", ", ".join(told.get("used_by", ()))), ("Source", told.get("paper")),
    ]  # fmt: skip
    if m["parameters"]:
        widths = ", ".join(f"{stage} {width}" for stage, width in m["hidden"].items())
        facts.append(("Weights", f"{m['parameters']:,} (feed-forward width: {widths})"))
    rows = "".join(f"<dt>{k}</dt><dd>{say(str(v))}</dd>" for k, v in facts if v)
    caveats = "".join(f"<li>{say(c)}</li>" for c in told.get("caveats", ()))
    return (
        f'<article class="mech" style="--own:var(--{style.colour(label)[1:]})" data-label="{escape(label)}">'
        f'<div class="head"><div><h3>{mark(label, style)} {escape(label)}</h3><p>{say(told.get("summary", ""))}</p></div>'
        f'<div class="pic">{_picture(results, label)}</div></div>'
        f'<div class="formula">{escape(told.get("formula", ""))}</div>'
        f'<div class="built">{gate} <code>{escape(m["call"])}</code></div>{f"<ul>{caveats}</ul>" if caveats else ""}'
        f"<details><summary>Costs, users, source</summary><dl>{rows}</dl></details></article>"
    )


def _picture(results: Results, label: str) -> str:
    """The mechanism's mask over the context of this comparison, as a small picture: queries down, keys across."""
    m, options = results.mechanisms[label], results.options
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in m["options"].items()}
    try:
        mask = card(m["name"]).build(options["layer_dim"], **given).describe_mask()
    except AttlasError:  # an option that is no plain value cannot be read back from stored results
        mask = card(m["name"]).pattern
    if mask is None:
        return f"<span>{NO_MASK.get(m['card'].get('op', '').partition(':')[0].rpartition('.')[2], 'no fixed mask')}</span>"
    context = options["context"]
    cells = draw.pattern(mask, context, context, CELLS, CELLS)
    squares = "".join(_runs(i, row) for i, row in enumerate(cells))
    words = escape(f"pattern of {label} over {context} tokens: queries down, keys across")
    shape = f'viewBox="0 0 {CELLS} {CELLS}" fill="var(--own)" shape-rendering="crispEdges"'
    return f'<svg {shape} role="img" aria-label="{words}">{squares}</svg>'


def _runs(i: int, row: Sequence[float]) -> str:
    """Row i of a picture: neighbouring cells of equal density are one rectangle."""
    out, start = [], 0
    for j in range(1, len(row) + 1):
        if j == len(row) or row[j] != row[start]:
            if row[start] > 0:
                out.append(f'<rect x="{start}" y="{i}" width="{j - start}" height="1" opacity="{0.15 + 0.85 * row[start]:.2f}"/>')
            start = j
    return "".join(out)


# ---------------------------------------------------------------------------------------------------- words


def _words(results: Results) -> str:
    how = "".join(f"<li>{say(text)}</li>" for text in prose.method(results))
    not_shown = "".join(f"<li>{say(text)}</li>" for text in prose.limits(results))
    machine = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in stamp(results))
    again = f"<h3>Again</h3><pre>{escape(results.command)}</pre>"
    body = (
        f'<div class="cols"><div><h3>How it was measured</h3><ul>{how}</ul></div>'
        f"<div><h3>What it does not show</h3><ul>{not_shown}</ul></div>"
        f'<div><h3>Machine</h3><dl class="stamp">{machine}</dl></div><div>{again}</div></div>'
    )
    return _section("Method", "How far to trust this", "", body)


def stamp(results: Results) -> list[tuple[str, str]]:
    """The machine and the software, as pairs of words."""
    m, limits = results.plan["machine"], results.limits()
    out = [
        ("Processor", f"{m['cpu']} ({m['isa']})"),
        ("Cores", f"{m['cores']}; {_threads(m['threads'])} in timings, {results.plan.get('workers', 1)} trainings side by side"),
        ("Memory", units.nbytes(m["memory"])),
        ("Accelerator", m["accelerator"] or "none used"),
        ("System", f"{m['system']}, Python {m['python']}, torch {m['torch']}"),
    ]
    if limits:
        gemm = f"{limits['gemm_float32'] / 1e9:,.1f} GFLOP/s in float32, {limits['gemm_bfloat16'] / 1e9:,.1f} in bfloat16"
        out += [("Matrix product", gemm), ("Copy", f"{limits['copy'] / 1e9:.1f} GB/s, read plus written")]
    return out


def _footer(results: Results) -> str:
    names = "results.json, results.csv and trials.jsonl"
    return escape(
        f"Made by attlas {__version__} from what was measured; nothing here was typed by hand. The numbers are in {names}."
    )
