"""Drawings of masks: as numbers, as text for a terminal, as SVG. Queries run down, keys run across, as in a score matrix."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, product
from xml.sax.saxutils import escape

import torch
from torch import Tensor

from attlas.errors import OptionError
from attlas.masks.compile import counts_of, different
from attlas.masks.descent import Grains
from attlas.masks.expr import Mask
from attlas.masks.geometry import Grid
from attlas.masks.partition import FACTOR, Partition

SHADES = " ░▒▓█"
HALVES = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
INK, PAPER, FRAME, TEXT = "#1f5fa8", "#f4f6f8", "#8a94a0", "#39424e"
MOST_CELLS = 96  # per side of an SVG
SMALL = 2**21  # pairs up to which a drawing is made from the mask written out
BLOCKS = 2048  # blocks per side, about, at which larger masks are looked at


def pattern(mask: Mask, Tq: int, Tk: int, rows: int, cols: int) -> list[list[float]]:
    """Share of allowed pairs in each cell of a rows x cols picture of Tq queries (at the end of the keys) and Tk keys.

    Counted, not sampled; over all batch rows and heads where the mask differs by them. Cell r covers queries r * Tq // rows up to
    the next cell's first one (for large masks: moved by at most a thousandth of the axis); with more cells than
    tokens, neighbouring cells show the same token. Cost: the cells, and the blocks on the mask's edges, never Tq * Tk.
    """
    grid = Grid.dense(Tq, Tk)
    if min(rows, cols) < 1:
        raise OptionError(f"pattern({mask!r}, {Tq}, {Tk}, rows={rows}, cols={cols}): a picture needs at least one cell each way")
    mask.check_on(grid)
    if not Tq or not Tk:
        return [[0.0] * cols for _ in range(rows)]
    found = _cells(mask, grid, min(rows, Tq), min(cols, Tk))
    down = torch.arange(rows, device="cpu") * found.shape[0] // rows
    across = torch.arange(cols, device="cpu") * found.shape[1] // cols
    cells: list[list[float]] = found[down][:, across].tolist()
    return cells


def to_text(mask: Mask, Tq: int, Tk: int, width: int = 64) -> str:
    """A drawing for a terminal, at most `width` characters wide inside its frame.

    Where every pair has its own dot, dots are half characters; else a character shows how much of its cell is allowed, from ░
    (some) to █ (all).
    """
    if width < 1:
        raise OptionError(f"to_text({mask!r}, {Tq}, {Tk}, width={width}): width must be positive")
    mask.check_on(Grid.dense(Tq, Tk))
    head = f"{mask!r}  {Tq} queries down, {Tk} keys across"
    if not Tq or not Tk:
        return head
    cols = min(Tk, width)
    if Tk <= width and Tq <= 4 * width:
        cells = pattern(mask, Tq, Tk, Tq, Tk)
        if all(c in (0.0, 1.0) for row in cells for c in row):
            return _framed(head, [_dots(*pair) for pair in zip(cells[::2], [*cells[1::2], [0.0] * cols], strict=False)], cols)
    rows = max(1, min(Tq, round(cols * Tq / Tk / 2), 4 * width))  # a character is twice as high as wide
    return _framed(head, ["".join(map(_shade, row)) for row in pattern(mask, Tq, Tk, rows, cols)], cols)


def to_svg(mask: Mask, Tq: int, Tk: int, size: int = 480) -> str:
    """A drawing as a stand-alone SVG document, the longer side `size` pixels, axes labelled with positions."""
    if size < 1:
        raise OptionError(f"to_svg({mask!r}, {Tq}, {Tk}, size={size}): size must be positive")
    mask.check_on(Grid.dense(Tq, Tk))
    longest = max(Tq, Tk, 1)
    width, height = (max(8.0, size * T / longest) for T in (Tk, Tq))
    rows, cols = (max(1, min(T, MOST_CELLS)) for T in (Tq, Tk))
    left, top, margin = 64, 56, 16
    across, down = f"{width + left + margin:g}", f"{height + top + margin:g}"
    body = [*_svg_cells(pattern(mask, Tq, Tk, rows, cols), width, height), *_svg_axes(Tq, Tk, width, height)]
    lines = "\n".join(f"    {line}" for line in body)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down}" width="{across}" height="{down}">
  <title>{escape(repr(mask))}</title>
  <rect width="100%" height="100%" fill="white"/>
  <g transform="translate({left} {top})" font-family="system-ui, sans-serif" font-size="11" fill="{TEXT}">
{lines}
  </g>
</svg>
"""


def _cells(mask: Mask, grid: Grid, rows: int, cols: int) -> Tensor:
    """float64 [rows, cols]; no more cells than tokens either way."""
    Tq, Tk = grid.shape
    small = Tq * Tk <= SMALL
    q, k = (_Cuts(T, n, 1 if small else _block(T, n)) for T, n in ((Tq, rows), (Tk, cols)))
    allowed = torch.zeros(rows, cols, dtype=torch.float64, device="cpu")
    for one, times in different(mask).items():
        allowed += times * (_by_pairs(one, grid, q, k) if small else _by_blocks(one, grid, q, k))
    area = q.bounds.diff()[:, None] * k.bounds.diff()
    return allowed / (area * (mask.batch or 1) * (mask.heads or 1))


def _block(T: int, cells: int) -> int:
    """Power of two by which T tokens are cut for a drawing: about BLOCKS blocks, at least one for each cell."""
    size = 1
    while size * BLOCKS < T and size * 2 * cells <= T:
        size *= 2
    return size


class _Cuts:
    """T tokens cut into cells whose borders are multiples of `block`."""

    def __init__(self, T: int, cells: int, block: int):
        self.block = block
        self.bounds = torch.arange(cells + 1, device="cpu") * (T // block) // cells * block
        self.bounds[-1] = T

    def shares(self, level: int, index: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For super-blocks of a level: cells that they reach into, and the share of their tokens that lies there."""
        lo = index * self.block * FACTOR**level
        hi = lo + tokens[index]
        first = torch.searchsorted(self.bounds, lo, right=True) - 1
        last = torch.searchsorted(self.bounds, hi)
        for n in range(int((last - first).max()) if len(index) else 0):
            cell = (first + n).clamp(max=len(self.bounds) - 2)
            inside = torch.minimum(hi, self.bounds[cell + 1]) - torch.maximum(lo, self.bounds[cell])
            yield cell, torch.where(first + n < last, inside.clamp(min=0) / tokens[index].double(), 0.0)


def _by_pairs(mask: Mask, grid: Grid, q: _Cuts, k: _Cuts) -> Tensor:
    """Allowed pairs of each cell, from the mask written out."""
    sums = torch.nn.functional.pad(mask.dense(grid).cpu().long().cumsum(0).cumsum(1), (1, 0, 1, 0))
    return sums[q.bounds][:, k.bounds].diff(dim=0).diff(dim=1).double()


def _by_blocks(mask: Mask, grid: Grid, q: _Cuts, k: _Cuts) -> Tensor:
    """Allowed pairs of each cell, from super-blocks (full ones may reach into several cells) and partial blocks (into one)."""
    sides = [Partition.regular(a, c.block, packed=False, index=mask.uses_index) for a, c in ((grid.q, q), (grid.k, k))]
    grains = Grains(sides[0], sides[1], packed=False)
    rows, cols = len(q.bounds) - 1, len(k.bounds) - 1
    allowed = torch.zeros(rows * cols, dtype=torch.float64, device="cpu")
    for blocks, pairs in counts_of(mask, grains):
        down = list(q.shares(blocks.row_level, blocks.i, sides[0].level(blocks.row_level).tokens))
        across = list(k.shares(blocks.column_level, blocks.j, sides[1].level(blocks.column_level).tokens))
        for (row, high), (col, wide) in product(down, across):
            allowed.index_add_(0, row * cols + col, pairs * high * wide)
    return allowed.view(rows, cols)


def _framed(head: str, lines: list[str], width: int) -> str:
    return "\n".join([head, f"┌{'─' * width}┐", *(f"│{line}│" for line in lines), f"└{'─' * width}┘"])


def _dots(upper: list[float], lower: list[float]) -> str:
    return "".join(HALVES[u > 0, v > 0] for u, v in zip(upper, lower, strict=True))


def _shade(density: float) -> str:
    """The lightest shade for any pair at all, the darkest only for all of them."""
    if density in (0.0, 1.0):
        return SHADES[-1 if density else 0]
    return SHADES[1 + int(density >= 0.25) + int(density >= 0.6)]


def _svg_cells(cells: list[list[float]], width: float, height: float) -> Iterator[str]:
    """One rectangle for each run of equal cells in a row."""
    yield f'<rect width="{width:g}" height="{height:g}" fill="{PAPER}"/>'
    high, wide = height / len(cells), width / len(cells[0])
    for r, row in enumerate(cells):
        start = 0
        for density, run in groupby(row):
            n = len(list(run))
            if density:
                opacity = "" if density == 1 else f' fill-opacity="{0.15 + 0.85 * density:.3g}"'
                box = f'x="{start * wide:.2f}" y="{r * high:.2f}" width="{n * wide:.2f}" height="{high:.2f}"'
                yield f'<rect {box} fill="{INK}"{opacity} shape-rendering="crispEdges"/>'
            start += n
    if max(len(cells), len(cells[0])) <= 32:  # few enough to be told apart
        lines = [f"M0 {r * high:.2f}h{width:g}" for r in range(1, len(cells))]
        lines += [f"M{c * wide:.2f} 0v{height:g}" for c in range(1, len(cells[0]))]
        yield f'<path d="{"".join(lines)}" stroke="white"/>'


def _svg_axes(Tq: int, Tk: int, width: float, height: float) -> Iterator[str]:
    yield f'<rect width="{width:g}" height="{height:g}" fill="none" stroke="{FRAME}"/>'
    yield f'<text x="{width / 2:g}" y="-34" text-anchor="middle" font-size="13">keys</text>'
    yield f'<text transform="translate(-46 {height / 2:g}) rotate(-90)" text-anchor="middle" font-size="13">queries</text>'
    for at, position in _ticks(Tk, width, 0):
        yield f'<path d="M{at:.2f} 0v-5" stroke="{FRAME}"/><text x="{at:.2f}" y="-10" text-anchor="middle">{position}</text>'
    for at, position in _ticks(Tq, height, Tk - Tq):
        yield f'<path d="M0 {at:.2f}h-5" stroke="{FRAME}"/><text x="-9" y="{at + 4:.2f}" text-anchor="end">{position}</text>'


def _ticks(T: int, length: float, first: int) -> Iterator[tuple[float, int]]:
    """(place in pixels, position) of some tokens, in steps of 1, 2 or 5 times a power of ten; at their middles."""
    if T:
        room = max(1, int(length // 60))  # labels that fit
        step = next(s for e in range(30) for s in (10**e, 2 * 10**e, 5 * 10**e) if s * room >= T)
        for t in range(-first % step, T, step):
            yield (t + 0.5) * length / T, first + t
