"""Hierarchical descent: from a few super-blocks that cover the grid down to the blocks that are neither empty nor full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.masks.box import FULL, PARTIAL, Box
from attlas.masks.expr import Mask
from attlas.masks.partition import FACTOR, Partition

ROOT = 1024  # super-blocks to start from: fewer levels cost less than fewer blocks, below this
LIMIT = 2**18  # candidates held at once; above it the rows are done in bands


@dataclass(frozen=True, eq=False)
class Grains:
    """A grid cut into blocks both ways."""

    q: Partition
    k: Partition
    packed: bool

    def box(self, level: int, i: Tensor, j: Tensor) -> Box:
        q, k = self.q.level(level), self.k.level(level)
        qi_lo, qi_hi = (None if x is None else x[i] for x in q.index)
        ki_lo, ki_hi = (None if x is None else x[j] for x in k.index)
        sides = (q.lo, q.hi, i), (k.lo, k.hi, j)
        return Box(q.lo[i], q.hi[i], k.lo[j], k.hi[j], qi_lo, qi_hi, ki_lo, ki_hi, *sides)

    def classify(self, mask: Mask, level: int, i: Tensor, j: Tensor) -> Tensor:
        """int8 EMPTY, PARTIAL or FULL for blocks (i, j) of a level; pairs of different sequences are not allowed."""
        status = mask.classify_box(self.box(level, i, j))
        if not self.packed:
            return status
        q, k = self.q.level(level), self.k.level(level)
        (q_first, q_last), (k_first, k_last) = q.sequences, k.sequences
        assert q_first is not None and q_last is not None and k_first is not None and k_last is not None
        q_lo, q_hi, k_lo, k_hi = q_first[i], q_last[i], k_first[j], k_last[j]
        same = ((q_lo <= k_hi) & (k_lo <= q_hi)).to(torch.int8) + ((q_lo == k_hi) & (q_hi == k_lo)).to(torch.int8)
        return torch.minimum(status, same)


@dataclass(frozen=True, eq=False)
class Blockset:
    """Blocks (i, j) whose rows are blocks of one level and whose columns are blocks of another (or the same) one."""

    row_level: int
    column_level: int
    i: Tensor
    j: Tensor

    def with_rows_of(self, level: int, rows: int) -> Blockset:
        """The same blocks cut into rows of a finer level, which has `rows` of them."""
        if level == self.row_level:
            return self
        size = FACTOR ** (self.row_level - level)
        i = (self.i[:, None] * size + torch.arange(size, device="cpu")).flatten()
        inside = (i < rows).nonzero().flatten()
        return Blockset(level, self.column_level, i[inside], self.j[:, None].expand(-1, size).flatten()[inside])

    def between(self, lo: int, hi: int) -> Blockset:
        """Those with lo <= row < hi."""
        at = ((self.i >= lo) & (self.i < hi)).nonzero().flatten()
        return Blockset(self.row_level, self.column_level, self.i[at], self.j[at])


@dataclass(frozen=True, eq=False)
class Found:
    """What a band of block rows lo ... hi - 1 holds: full blocks of any level, and blocks (i, j) that must be looked into."""

    lo: int
    hi: int
    full: list[Blockset]
    i: Tensor
    j: Tensor


def descend(mask: Mask, grains: Grains) -> Iterator[Found]:
    """The bands of the grid, in order of rows. `mask` differs neither by batch row nor by head."""
    if not len(grains.q) or not len(grains.k):
        return
    level = 0
    while grains.q.size(level) * grains.k.size(level) > ROOT:
        level += 1
    rows, columns = grains.q.size(level), grains.k.size(level)
    i, j = torch.arange(rows, device="cpu").repeat_interleave(columns), torch.arange(columns, device="cpu").repeat(rows)
    yield from _band(mask, grains, level, (0, rows), i, j, [])


def _band(
    mask: Mask, grains: Grains, level: int, rows: tuple[int, int], i: Tensor, j: Tensor, full: list[Blockset]
) -> Iterator[Found]:
    """Candidates (i, j) of a level in its rows rows[0] ... rows[1] - 1, and what was found full above them."""
    while True:
        status = grains.classify(mask, level, i, j)
        whole = (status == FULL).nonzero().flatten()
        if len(whole):
            full = [*full, Blockset(level, level, i[whole], j[whole])]
        rest = (status == PARTIAL).nonzero().flatten()
        i, j = i[rest], j[rest]
        if level == 0:
            yield Found(*rows, full, i, j)
            return
        lo, hi = rows
        bands = min(hi - lo, -(-len(i) * FACTOR * FACTOR // LIMIT))
        finer = grains.q.size(level - 1)
        if bands > 1:  # go on one after the other, so that the candidates and the results at hand stay few
            rest_of_band = Blockset(level, level, i, j)
            full = [block.with_rows_of(level, grains.q.size(level)) for block in full]
            for n in range(bands):
                a, b = lo + (hi - lo) * n // bands, lo + (hi - lo) * (n + 1) // bands
                part = rest_of_band.between(a, b)
                inner = _subdivide(grains, level, part.i, part.j)
                own = [block.between(a, b) for block in full]
                yield from _band(mask, grains, level - 1, (a * FACTOR, min(b * FACTOR, finer)), *inner, own)
            return
        i, j = _subdivide(grains, level, i, j)
        level, rows = level - 1, (lo * FACTOR, min(hi * FACTOR, finer))


def _subdivide(grains: Grains, level: int, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks of the level below inside blocks (i, j)."""
    rows, cols = grains.q.size(level - 1), grains.k.size(level - 1)
    # An axis with a single block left is not divided any further.
    fine_i = i[:, None] * FACTOR + torch.arange(FACTOR, device="cpu") if rows > 1 else i[:, None]
    fine_j = j[:, None] * FACTOR + torch.arange(FACTOR, device="cpu") if cols > 1 else j[:, None]
    shape = (len(i), fine_i.shape[1], fine_j.shape[1])
    i, j = fine_i[:, :, None].expand(shape).flatten(), fine_j[:, None, :].expand(shape).flatten()
    if (rows > 1 and rows % FACTOR) or (cols > 1 and cols % FACTOR):
        inside = ((i < rows) & (j < cols)).nonzero().flatten()
        i, j = i[inside], j[inside]
    return i, j
