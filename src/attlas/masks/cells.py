"""Which cells of a coarse matrix a rectangle touches: counts for a matrix that exists, search for a sparse list of cells."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CELLS = 64  # tiles that touch more cells than fit into one key are evaluated one by one


class CellCounts:
    """Exact number of set cells in any rectangle of a bool matrix [rows, cols], by a table of sums from the corner."""

    def __init__(self, cells: Tensor):
        self.rows, self.cols = cells.shape
        self.sums = torch.zeros(self.rows + 1, self.cols + 1, dtype=torch.int64, device="cpu")
        if cells.numel():
            torch.cumsum(cells, 0, out=self.sums[1:, 1:]).cumsum_(1)

    def count(self, r_lo: Tensor, r_hi: Tensor, c_lo: Tensor, c_hi: Tensor) -> Tensor:
        """Set cells with r_lo <= row <= r_hi and c_lo <= col <= c_hi; what lies outside of the matrix is not set."""
        r0, r1 = r_lo.clamp(0, self.rows), (r_hi + 1).clamp(0, self.rows)
        c0, c1 = c_lo.clamp(0, self.cols), (c_hi + 1).clamp(0, self.cols)
        s = self.sums
        return s[r1, c1] - s[r0, c1] - s[r1, c0] + s[r0, c0]


class CellList:
    """A sparse set of cells (row, col), answered at any power-of-two coarseness by binary search."""

    def __init__(self, rows: Tensor, cols: Tensor, row_lo: int, row_hi: int):
        """row_lo ... row_hi are the rows that the list speaks about."""
        self.row_lo, self.row_hi = row_lo, row_hi
        self._col_lo = int(cols.min()) if len(cols) else 0
        self._rows, self._cols = rows - row_lo, cols - self._col_lo
        self._width = int(self._cols.max()) + 1 if len(cols) else 1
        self._levels: dict[int, tuple[Tensor, Tensor]] = {}

    def _level(self, shift: int) -> tuple[Tensor, Tensor]:
        """Sorted codes of the non-empty cells of size 2**shift, and the number of set cells in each."""
        if shift not in self._levels:
            codes, counts = torch.unique(self._code(self._rows, self._cols, shift), return_counts=True)
            self._levels[shift] = codes, counts
        return self._levels[shift]

    def _code(self, rows: Tensor, cols: Tensor, shift: int) -> Tensor:
        return (rows >> shift) * ((self._width >> shift) + 1) + (cols >> shift)

    def _found(self, rows: Tensor, cols: Tensor, shift: int) -> Tensor:
        codes, counts = self._level(shift)
        if not len(codes):
            return torch.zeros_like(rows)
        wanted = self._code(rows, cols, shift)
        at = torch.searchsorted(codes, wanted).clamp_(max=len(codes) - 1)
        return torch.where(codes[at] == wanted, counts[at], 0)

    def contains(self, rows: Tensor, cols: Tensor) -> Tensor:
        cols = cols - self._col_lo
        inside = (cols >= 0) & (cols < self._width)
        return inside & (self._found(rows - self.row_lo, cols.clamp(0, self._width - 1), 0) > 0)

    def classify(self, r_lo: Tensor, r_hi: Tensor, c_lo: Tensor, c_hi: Tensor) -> Tensor:
        """int8 per rectangle: 0 certainly without set cells, 2 certainly all set, else 1. Exact up to 2 x 2 cells."""
        c_lo, c_hi = c_lo - self._col_lo, c_hi - self._col_lo
        area = (r_hi - r_lo + 1) * (c_hi - c_lo + 1)
        outside = (c_hi < 0) | (c_lo >= self._width)
        c_lo, c_hi = c_lo.clamp(0, self._width - 1), c_hi.clamp(0, self._width - 1)
        r_lo, r_hi = r_lo - self.row_lo, r_hi - self.row_lo
        count = torch.zeros_like(area)
        exact = torch.zeros_like(outside)
        waiting = ~outside
        shift = 0
        while bool(waiting.any()):  # the finest level at which the rectangle's corners cover it
            covered = waiting & ((r_hi >> shift) - (r_lo >> shift) <= 1) & ((c_hi >> shift) - (c_lo >> shift) <= 1)
            at = covered.nonzero().flatten()
            if len(at):
                count[at] = self._corners(r_lo[at], r_hi[at], c_lo[at], c_hi[at], shift)
                exact[at] = shift == 0
                waiting &= ~covered
            shift += 1
        return (count > 0).to(torch.int8) + (exact & (count == area)).to(torch.int8)

    def _corners(self, r_lo: Tensor, r_hi: Tensor, c_lo: Tensor, c_hi: Tensor, shift: int) -> Tensor:
        two_rows, two_cols = (r_hi >> shift) > (r_lo >> shift), (c_hi >> shift) > (c_lo >> shift)
        count = self._found(r_lo, c_lo, shift) + two_rows * self._found(r_hi, c_lo, shift)
        return count + two_cols * (self._found(r_lo, c_hi, shift) + two_rows * self._found(r_hi, c_hi, shift))
