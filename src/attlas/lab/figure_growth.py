"""Time over length as a page of its own: one plot for the forward pass, one for training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from attlas.lab import units
from attlas.lab.figure_parts import Figure, Style, extremes, figure, layout, length_axis, value_axis
from attlas.lab.figures import slopes_of
from attlas.lab.report import asset

TITLES = {"forward": "time of a forward pass", "training": "time of forward and backward"}


def growth(rows: Sequence[Mapping[str, Any]], what: str) -> Figure | None:
    """Medians against length on log axes, quartiles as bars, with faint lines that grow as n and as n^2. what: one of TITLES."""
    style = Style([row["name"] for row in rows])
    data: list[dict[str, Any]] = []
    slopes: dict[str, float] = {}
    for row in rows:
        label, times, exponent = row["name"], row[what]["seconds"], row[what]["exponent"]
        grows = "" if exponent is None else f"<br>grows as n<sup>{exponent:.2f}</sup>"
        slopes |= {} if exponent is None else {label: exponent}
        values = [t["median"] for t in times]
        spread = {"array": [t["high"] - t["median"] for t in times], "arrayminus": [t["median"] - t["low"] for t in times]}
        data.append(
            style.trace(
                label, x=list(row["lengths"]), y=values, mode="lines+markers", line=style.line(label, 1.8),
                marker=style.marker(label), customdata=[units.seconds(v) for v in values],
                error_y={"type": "data", **spread, "color": style.colour(label), "thickness": 1, "width": 2},
                hovertemplate=f"<b>{label}</b><br>%{{x:,}} tokens<br>%{{customdata}}{grows}<extra></extra>",
            )
            | {"showlegend": True}
        )  # fmt: skip
    guides, notes = slopes_of(data)
    alt = f"{TITLES[what].capitalize()} against length."
    if slopes:
        alt += f" Fitted exponents {extremes(slopes, lambda v: f'{v:.2f}')}."
    y = value_axis(TITLES[what], [v for t in data + guides for v in t["y"]], units.short_seconds)
    x = length_axis([n for t in data for n in t["x"]])
    return figure(guides + data, layout(x, y, annotations=notes), alt)


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Both plots as one HTML page that needs nothing beside itself. Needs plotly."""
    return sheet("Time over length", {what: growth(rows, what) for what in TITLES})


def sheet(title: str, figures: Mapping[str, Figure | None]) -> str:
    """Figures below each other as one HTML page that needs nothing beside itself. Needs plotly."""
    from plotly.offline import get_plotlyjs

    css = asset("report.css")
    colours = dict(re.findall(r"--([\w-]+):\s*([^;]+);", css[: css.index("@media")]))
    found = {name: _resolved(made, colours) for name, made in figures.items() if made is not None}
    boxes = "".join(
        f'<figure><div id="{name}" style="height:640px" role="img" aria-label="{escape(f["alt"])}"></div></figure>'
        for name, f in found.items()
    )
    draw = "".join(
        f"Plotly.newPlot({json.dumps(name)},{json.dumps(f['data'])},{json.dumps(f['layout'])},{{responsive:true}});"
        for name, f in found.items()
    ).replace("</", "<\\/")
    return (
        f'<!doctype html><html lang="en" data-theme="light"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{css}</style><script>{get_plotlyjs()}</script><main>{boxes}</main><script>{draw}</script></html>"
    )


def _resolved(value: Any, colours: Mapping[str, str]) -> Any:
    """The same with names of colours ("@ink") replaced by those of the light page."""
    if isinstance(value, str):
        return colours[value[1:]] if value.startswith("@") else value
    if isinstance(value, Mapping):
        return {k: _resolved(v, colours) for k, v in value.items()}
    return [_resolved(v, colours) for v in value] if isinstance(value, list | tuple) else value
