"""The tables of the report, as HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from attlas.lab import units
from attlas.lab.figure_parts import Style
from attlas.lab.marks import mark
from attlas.lab.measure import fit_power_law
from attlas.lab.results import OPERATIONS, Results

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """key of the row, heading and what stands below it, how a value is written, whether small or large is best (None: neither),
    and whether a bar shows the value as a share of the largest."""

    key: str
    heading: str
    below: str
    tell: Callable[[Row], str]
    best: str | None = None
    bar: bool = False


def summary(results: Results, style: Style) -> str:
    """Everything in one sortable table."""
    rows = results.rows()
    length = f"at {rows[0]['length']:,}" if rows and rows[0]["length"] else ""
    held = next((f"layer at {r['cache_length']:,}" for r in rows if r["cache_length"]), "")
    columns = [
        Column("bits_per_byte", "Bits", "per byte", lambda r: units.fixed(r["bits_per_byte"]), "min"),
        Column("bits_to_causal", "to causal", "± over windows", _gap),
        Column("recall", "Recall", "queries", lambda r: units.percent(r["recall"]), "max", True),
        Column(
            "train_tokens_per_second", "Training", "tokens/s", lambda r: units.count(r["train_tokens_per_second"]), "max", True
        ),
        Column("prefill_seconds", "Prefill", length, _timed("prefill"), "min", True),
        Column("train_seconds", "Train step", length, _timed("train"), "min", True),
        Column("decode_seconds", "Decode", f"a token {length}", _timed("decode"), "min", True),
        Column("train_peak_bytes", "Peak memory", length, lambda r: units.nbytes(r["train_peak_bytes"]), "min", True),
        Column("cache_bytes", "Cache", held, lambda r: units.nbytes(r["cache_bytes"]), "min", True),
        Column("parameters", "Weights", "model", lambda r: units.count(r["parameters"])),
    ]
    shown = [c for c in columns if any(r.get(c.key) is not None for r in rows)]
    caption = "× compares with causal in the same run; bold is best in the column"
    return table(rows, shown, caption, style)


def _rate(r: Row) -> str:
    return units.count(r["train_tokens_per_second"])


def _gap(r: Row) -> str:
    gap, error = r["bits_to_causal"], r["bits_to_causal_error"]
    if gap is None or r["mechanism"] == "causal":
        return units.DASH
    return units.signed(gap) + (f" <small>±{error:.3f}</small>" if error is not None else "")


def _timed(what: str) -> Callable[[Row], str]:
    def tell(r: Row) -> str:
        seconds, ratio = r[f"{what}_seconds"], r[f"{what}_to_causal"]
        if seconds is None:
            return units.DASH
        return units.seconds(seconds) + (f" <small>{units.times(ratio)}</small>" if ratio is not None else "")

    return tell


def exponents(results: Results, style: Style) -> str:
    """Fitted growth of every operation, and from which length a mechanism beats causal."""
    rows = [r for r in results.rows() if r["prefill_exponent"] is not None]
    if not rows:
        return ""
    laws = {(r["mechanism"], w): fit_power_law(*results.series(r["mechanism"], w)) for r in rows for w in OPERATIONS}

    def grows(what: str) -> Callable[[Row], str]:
        def tell(r: Row) -> str:
            law = laws[r["mechanism"], what]
            if law is None:
                return units.DASH
            error = f" <small>±{law.error:.2f}</small>" if law.points > 2 else ""
            return f"n<sup>{f'{law.exponent:.2f}'.replace('-', '−')}</sup>{error}"

        return tell

    columns = [Column(f"{what}_exponent", what.capitalize(), "grows as", grows(what)) for what in OPERATIONS]
    columns += [
        Column("prefill_of_gemm", "Prefill", "of the GEMM rate", lambda r: units.percent(r["prefill_of_gemm"], 0), bar=True),
        Column("faster_than_causal_from", "Beats causal", "prefill, from", lambda r: units.count(r["faster_than_causal_from"])),
        Column("longest_length", "Timed up to", "tokens", lambda r: units.count(r["longest_length"])),
    ]
    return table(rows, columns, "Fits through the four longest lengths; ± is the standard error of the exponent", style)


def table(rows: Sequence[Row], columns: Sequence[Column], caption: str, style: Style) -> str:
    """A sortable table with one row per mechanism."""

    def head(c: Column) -> str:
        button = f'<button type="button"><span>{escape(c.heading)}</span><small>{escape(c.below)}</small></button>'
        return f'<th scope="col" aria-sort="none">{button}</th>'

    heads = "".join(map(head, columns))
    bounds = {c.key: [r[c.key] for r in rows if r.get(c.key) is not None] for c in columns}
    body = []
    for r in rows:
        name = escape(r["mechanism"])
        cells = "".join(_cell(r, c, bounds[c.key]) for c in columns)
        title = f'<th scope="row" data-v="{name}"><span>{mark(r["mechanism"], style)}{name}</span></th>'
        body.append(f'<tr data-label="{name}">{title}{cells}</tr>')
    first = '<th scope="col" aria-sort="none"><button type="button"><span>Mechanism</span></button></th>'
    unseen = f'<caption class="unseen">{escape(caption)}</caption>'
    inner = f"{unseen}<thead><tr>{first}{heads}</tr></thead><tbody>{''.join(body)}</tbody>"
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table class="sortable">{inner}</table></div>'
    return f'{scroll}<p class="hint under" aria-hidden="true">{escape(caption)}</p>'


def _cell(r: Row, c: Column, values: list[float]) -> str:
    value = r.get(c.key)
    if value is None:
        return f'<td data-v="">{c.tell(r)}</td>'
    best = c.best is not None and len(set(values)) > 1 and value == (min(values) if c.best == "min" else max(values))
    share = f' style="--f:{100 * value / max(values):.1f}%"' if c.bar and max(values) > 0 else ""
    return f'<td data-v="{value}"{" class=best" if best else ""}{share}>{c.tell(r)}</td>'
