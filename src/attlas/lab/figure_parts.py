"""What all plots of the report have in common: one look per mechanism, axes, and names of colours instead of colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attlas.lab.options import REFERENCE

PALETTE = 10
SYMBOLS = (
    "circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star", "hexagon", "x", "pentagon",
)  # fmt: skip
DASHES = ("solid", "dash", "dot", "dashdot")
Figure = dict[str, Any]


class Style:
    """Colour, symbol and dash of each mechanism: `causal` is always the first, the others follow in the order named."""

    def __init__(self, labels: Sequence[str]) -> None:
        rest = [label for label in labels if label != REFERENCE]
        self.index = {REFERENCE: 0} | {label: i + 1 for i, label in enumerate(rest)}

    def colour(self, label: str) -> str:
        i = self.index[label]
        return f"@c{i if i < PALETTE else 1 + (i - 1) % (PALETTE - 1)}"

    def symbol(self, label: str) -> str:
        return SYMBOLS[self.index[label] % len(SYMBOLS)]

    def dash(self, label: str) -> str:
        return DASHES[self.index[label] // PALETTE % len(DASHES)]

    def trace(self, label: str, **rest: Any) -> dict[str, Any]:
        """A trace that belongs to a mechanism: the page shows and hides it with the mechanism's chip."""
        return {"meta": label, "name": label, "showlegend": False, **rest}

    def line(self, label: str, width: float = 2.0) -> dict[str, Any]:
        return {"color": self.colour(label), "width": width + (0.8 if label == REFERENCE else 0.0), "dash": self.dash(label)}

    def marker(self, label: str, size: float = 7) -> dict[str, Any]:
        return {"color": self.colour(label), "symbol": self.symbol(label), "size": size}


def axis(title: str, *, log: bool = False, **rest: Any) -> dict[str, Any]:
    out = {
        "title": {"text": title, "standoff": 10},
        "gridcolor": "@grid",
        "linecolor": "@line",
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": "@line",
        "ticklen": 4,
        "automargin": True,
    }
    return {**out, **({"type": "log"} if log else {}), **rest}


def length_axis(lengths: Sequence[int]) -> dict[str, Any]:
    ticks = sorted(set(lengths))
    while len(ticks) > 7:
        ticks = ticks[::2]
    text = [f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else f"{n:,}" for n in ticks]
    return axis("length in tokens", log=True, tickvals=ticks, ticktext=text)


def value_axis(title: str, values: Sequence[float], tell: Callable[[float], str], *, base: int = 10) -> dict[str, Any]:
    """A log axis for positive values in base units, with ticks at round numbers that `tell` writes out."""
    low, high = min(values), max(values)
    spread = math.log10(high / low)
    if base == 2:
        step = max(1, math.ceil(math.log2(high / low) / 7))
        ticks = [2.0 ** (i * step) for i in range(-40 // step, 60 // step + 1)]
    else:
        narrow = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if spread < 0.6 else (1, 2, 3, 5, 7)
        heads = narrow if spread < 1.1 else (1, 2, 5) if spread < 2.2 else (1, 3) if spread < 3.5 else (1,)
        ticks = [head * 10.0**i for i in range(-12, 15) for head in heads]
    pad = max(0.06 * spread, 0.08)
    bounds = [math.log10(low) - pad, math.log10(high) + pad]
    shown = [t for t in ticks if bounds[0] <= math.log10(t) <= bounds[1]]
    return axis(title, log=True, range=bounds, tickvals=shown, ticktext=[tell(t) for t in shown])


# Of a label beside its marker: plotly's name -> direction from the marker.
PLACES = {
    "top center": (0, 1), "bottom center": (0, -1), "middle right": (1, 0), "middle left": (-1, 0), "top right": (1, 1),
    "top left": (-1, 1), "bottom right": (1, -1), "bottom left": (-1, -1),
}  # fmt: skip
Box = tuple[float, float, float, float]  # left, right, bottom, top in pixels


def place_labels(
    spots: Mapping[str, tuple[float, float]], sizes: Mapping[str, float], *, log_x: bool, width: int = 980, height: int = 330
) -> dict[str, str]:
    """Where the name of each marker stands so that names and markers cover each other least, on a plot of about that size.

    Greedy: markers with near neighbours first, each name where it overlaps the least of what is there.
    """
    xs = {k: math.log(x) if log_x else x for k, (x, _) in spots.items()}
    ys = {k: -y for k, (_, y) in spots.items()}  # less is better, and better is up
    scale_x = width * 0.78 / max(1e-12, max(xs.values()) - min(xs.values()))
    scale_y = height * 0.69 / max(1e-12, max(ys.values()) - min(ys.values()))
    at = {k: (xs[k] * scale_x, ys[k] * scale_y) for k in spots}
    taken: list[Box] = [(x - sizes[k] / 2, x + sizes[k] / 2, y - sizes[k] / 2, y + sizes[k] / 2) for k, (x, y) in at.items()]
    crowd = {k: sum(math.dist(at[k], other) < 110 for other in at.values()) for k in at}
    out = {}
    for label in sorted(at, key=lambda k: -crowd[k]):
        boxes = {place: _label_box(at[label], sizes[label], len(label), *way) for place, way in PLACES.items()}
        out[label] = min(boxes, key=lambda place: sum(_overlap(boxes[place], other) for other in taken))
        taken.append(boxes[out[label]])
    return out


def _label_box(at: tuple[float, float], size: float, letters: int, right: int, up: int) -> Box:
    wide, high = 6.7 * letters, 15.0
    x = at[0] + right * (size / 2 + 2 + wide / 2)
    y = at[1] + up * (size / 2 + 2 + high / 2)
    return x - wide / 2, x + wide / 2, y - high / 2, y + high / 2


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[2], b[2]))


def layout(x: Mapping[str, Any], y: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
    return {
        "xaxis": dict(x),
        "yaxis": dict(y),
        "margin": {"l": 8, "r": 16, "t": 26, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@muted", "size": 12.5},
        "hoverlabel": {"bgcolor": "@card", "bordercolor": "@line", "font": {"color": "@ink"}},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "@muted", "activecolor": "@accent"},
        **rest,
    }


def figure(data: list[dict[str, Any]], shape: Mapping[str, Any], alt: str) -> Figure | None:
    return {"data": data, "layout": dict(shape), "alt": alt} if data else None


def extremes(values: Mapping[str, float], tell: Callable[[float], str]) -> str:
    """'from 1.2 (a) to 3.4 (b)'."""
    low, high = min(values, key=lambda k: values[k]), max(values, key=lambda k: values[k])
    return f"from {tell(values[low])} ({low}) to {tell(values[high])} ({high})"
