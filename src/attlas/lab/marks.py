"""The symbols of the plots as small SVG pictures, for use in words and tables."""

from __future__ import annotations

import math

from attlas.lab.figure_parts import Style


def mark(label: str, style: Style) -> str:
    """The mechanism's symbol in its colour, as it stands in the plots."""
    return (
        f'<svg class="mark" viewBox="-6 -6 12 12" aria-hidden="true">'
        f'<path d="{SHAPES[style.symbol(label)]}" fill="var(--{style.colour(label)[1:]})"/></svg>'
    )


def _polygon(corners: int, radius: float, turn: float = -90.0) -> str:
    angles = [math.radians(turn + 360 * i / corners) for i in range(corners)]
    return "M" + "L".join(f"{radius * math.cos(a):.2f} {radius * math.sin(a):.2f}" for a in angles) + "Z"


def _star() -> str:
    points = [(6 if i % 2 == 0 else 2.6, math.radians(-90 + 36 * i)) for i in range(10)]
    return "M" + "L".join(f"{r * math.cos(a):.2f} {r * math.sin(a):.2f}" for r, a in points) + "Z"


SHAPES = {
    "circle": "M5 0A5 5 0 1 1 -5 0A5 5 0 1 1 5 0Z",
    "square": "M-4.5-4.5H4.5V4.5H-4.5Z",
    "diamond": _polygon(4, 6),
    "triangle-up": _polygon(3, 6),
    "cross": "M-1.8-5.5H1.8V-1.8H5.5V1.8H1.8V5.5H-1.8V1.8H-5.5V-1.8H-1.8Z",
    "triangle-down": _polygon(3, 6, 90),
    "star": _star(),
    "hexagon": _polygon(6, 5.4),
    "x": "M-5-2.6L-2.6-5L0-2.4L2.6-5L5-2.6L2.4 0L5 2.6L2.6 5L0 2.4L-2.6 5L-5 2.6L-2.4 0Z",
    "pentagon": _polygon(5, 5.6),
}
