"""Goodput and waiting over the rate of arrivals, as a page of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attlas.lab import units
from attlas.lab.figure_growth import sheet
from attlas.lab.figure_parts import Figure, Style, axis, extremes, figure, layout, value_axis


def kept(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Arrivals a second that keep the promise over arrivals a second; on the dotted line all of them do."""
    style = Style([row["dtype"] for row in rows])
    data: list[dict[str, Any]] = []
    highest = max(r["rate"] for row in rows for r in row["rates"])
    for row in rows:
        x, y = [r["rate"] for r in row["rates"]], [r["goodput"] for r in row["rates"]]
        hover = f"<b>{row['dtype']}</b><br>%{{x:.2f}} requests/s<br>%{{y:.2f}} of them in time<extra></extra>"
        data.append(_trace(style, row["dtype"], x=x, y=y, hovertemplate=hover))
    every = {"x": [0, highest], "y": [0, highest], "mode": "lines", "hoverinfo": "skip", "showlegend": False}
    data.append(every | {"line": {"color": "@muted", "width": 1, "dash": "dot"}})
    best = {row["dtype"]: max(r["goodput"] for r in row["rates"]) for row in rows}
    alt = f"Requests answered in time over requests that arrive; at most {extremes(best, lambda v: f'{v:.2f} a second')}."
    titles = "requests that arrive, per second", "answered in time, per second"
    return figure(data, layout(*(axis(title, rangemode="tozero") for title in titles)), alt)


def waiting(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The wait for the first token that one request in a hundred exceeds, and the limit."""
    style = Style([row["dtype"] for row in rows])
    data: list[dict[str, Any]] = []
    for row in rows:
        x, y = [r["rate"] for r in row["rates"]], [r["first_token_p99"] for r in row["rates"]]
        told = [units.seconds(value) for value in y]
        hover = f"<b>{row['dtype']}</b><br>%{{x:.2f}} requests/s<br>%{{customdata}}<extra></extra>"
        data.append(_trace(style, row["dtype"], x=x, y=y, customdata=told, hovertemplate=hover))
    longest, limit = max(x for t in data for x in t["x"]), rows[0]["slo"]["first_token"]
    bound = {"x": [0, longest], "y": [limit, limit], "mode": "lines", "hoverinfo": "skip", "showlegend": False}
    data.append(bound | {"line": {"color": "@muted", "width": 1, "dash": "dot"}})
    seen = {f"{row['dtype']}, {r['rate']:.2f}/s": r["first_token_p99"] for row in rows for r in row["rates"]}
    high = value_axis("p99 of the time to the first token", [v for t in data for v in t["y"]], units.short_seconds)
    alt = f"p99 of the time to the first token over requests that arrive, {extremes(seen, units.seconds)}."
    return figure(data, layout(axis("requests that arrive, per second", rangemode="tozero"), high), alt)


def _trace(style: Style, label: str, **rest: Any) -> dict[str, Any]:
    look = {"mode": "lines+markers", "line": style.line(label, 1.8), "marker": style.marker(label)}
    return style.trace(label, **look, **rest) | {"showlegend": True}


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Both plots as one HTML page that needs nothing beside itself. Needs plotly."""
    return sheet("Goodput over the rate of arrivals", {"goodput": kept(rows), "waiting": waiting(rows)})
