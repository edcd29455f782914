"""Leaves that carry something given: Dense (a bool tensor) and PerHead (one mask for each head)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from attlas.errors import AttlasError, OptionError, ShapeError
from attlas.masks.base import Leaf, Mask, Span
from attlas.masks.box import Box, Pairs, TileKeys, three_valued
from attlas.masks.cells import CellCounts
from attlas.masks.expr import join_spans
from attlas.masks.geometry import Grid
from attlas.masks.options import shorten
from attlas.masks.placement import on_device

CELL = 32  # side of the squares that Dense is summed up in before blocks are classified


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Leaf):
    """Any bool tensor [Tq, Tk], [H, Tq, Tk] or [B, H, Tq, Tk] (H or B of size 1 stand for any number); True = may attend.

    Row r stands for position r + Tk - Tq and column c for position c. Asking about a position outside of the tensor raises. The
    tensor is kept, not copied: two masks are equal when they hold the same tensor, and changing it in place afterwards raises at
    the next use. Compiling reads its elements once, piece by piece.
    """

    tensor: Tensor
    _view: tuple[int, int] | None = field(default=None, init=False)  # which batch row and head of the tensor; None = all of it
    _version: int = field(default=0, init=False)
    effort = 1

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor) or self.tensor.dtype != torch.bool or self.tensor.ndim not in (2, 3, 4):
            got = f"{self.tensor.dtype} {list(self.tensor.shape)}" if isinstance(self.tensor, Tensor) else shorten(self.tensor)
            raise OptionError(f"Dense({got}): wanted a bool tensor [Tq, Tk], [H, Tq, Tk] or [B, H, Tq, Tk]")
        object.__setattr__(self, "_version", _version(self.tensor))

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        t = self.tensor
        return t.shape[0] if t.ndim == 4 and t.shape[0] != 1 and self._view is None else None

    @property
    def heads(self) -> int | None:  # type: ignore[override]
        t = self.tensor
        return t.shape[-3] if t.ndim > 2 and t.shape[-3] != 1 and self._view is None else None

    @property
    def identity(self) -> tuple[Any, ...]:
        return id(self.tensor), self._view

    @property
    def held_bytes(self) -> int:
        return self.tensor.numel()

    def __repr__(self) -> str:
        view = "" if self._view is None else f" row {self._view[0]} head {self._view[1]}"
        return f"Dense(<bool {list(self.tensor.shape)} at {id(self.tensor):#x}{view}>)"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _version=_version(state["tensor"]))

    def at(self, row: int, head: int) -> Mask:
        if self.tensor.ndim == 2 or self._view is not None:
            return self
        one = Dense(self.tensor)
        object.__setattr__(one, "_view", (row if self.batch else 0, head if self.heads else 0))
        object.__setattr__(one, "_version", self._version)
        return one

    def check(self, grid: Grid) -> None:
        if self._version != _version(self.tensor):
            raise AttlasError(f"{self!r}: the tensor was changed in place after the mask was made; make a new mask")
        Tq, Tk = self.tensor.shape[-2:]
        for name, axis, lo, hi in (("query", grid.q, Tk - Tq, Tk - 1), ("key", grid.k, 0, Tk - 1)):
            got = axis.span
            if got is not None and (got[0] < lo or got[1] > hi):
                raise ShapeError(f"{self!r} stands for {name} positions {lo} ... {hi}; asked about {got[0]} ... {got[1]}")

    @cached_property
    def _matrix(self) -> Tensor:
        """[Tq, Tk] where batch rows and heads do not differ, else [B|1, H|1, Tq, Tk]."""
        t = self.tensor
        if self.batch is None and self.heads is None and self._view is None:
            return t.reshape(t.shape[-2:])
        if self._view is not None:
            return t.reshape(-1, *t.shape[-3:])[self._view[0], self._view[1]]
        return t if t.ndim != 3 else t.unsqueeze(0)

    def evaluate(self, pairs: Pairs) -> Tensor:
        matrix = on_device(self, "_matrix", pairs.q.device)
        Tq, Tk = matrix.shape[-2:]
        if not Tq or not Tk:
            return torch.zeros(1, 1, dtype=torch.bool, device=pairs.q.device)
        rows, cols = (pairs.q - (Tk - Tq)).clamp(0, Tq - 1), pairs.k.clamp(0, Tk - 1)  # clamped: tiles have rows past the edge
        return matrix[..., rows, cols]

    @cached_property
    def _cells(self) -> tuple[CellCounts, CellCounts]:
        """Squares with some element set, and squares with all (existing) elements set."""
        matrix = self._matrix
        cols = -(-matrix.shape[1] // CELL)

        def cells(row: Tensor, fill: bool) -> Tensor:
            return torch.nn.functional.pad(row, (0, cols * CELL - len(row)), value=fill).view(cols, CELL)

        some = [cells(strip.any(0), False).any(1) for strip in matrix.split(CELL)]
        every = [cells(strip.all(0), True).all(1) for strip in matrix.split(CELL)]
        return CellCounts(torch.stack(some).cpu()), CellCounts(torch.stack(every).cpu())

    def classify_box(self, box: Box) -> Tensor:
        Tq, Tk = self._matrix.shape
        shift = Tk - Tq
        rectangle = ((box.q_lo - shift) // CELL, (box.q_hi - shift) // CELL, box.k_lo // CELL, box.k_hi // CELL)
        some, every = (table.count(*rectangle) for table in self._cells)
        area = (rectangle[1] - rectangle[0] + 1) * (rectangle[3] - rectangle[2] + 1)
        return three_valued(some > 0, every == area)

    def tile_keys(self, box: Box) -> TileKeys:
        return TileKeys((), torch.zeros_like(box.q_lo, dtype=torch.bool))

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        Tq, Tk = self.tensor.shape[-2:]
        rows = self._matrix[..., max(q_lo - (Tk - Tq), 0) : max(q_hi - (Tk - Tq) + 1, 0), :]
        cols = rows.flatten(0, -2).any(0).nonzero().flatten() if rows.numel() else rows.new_empty(0)
        return (int(cols[0]), int(cols[-1])) if len(cols) else None


@dataclass(frozen=True, eq=False, repr=False, init=False)
class PerHead(Leaf):
    """masks[h] for head h: heads that look at different things (windows of different lengths, retrieval and streaming heads)."""

    masks: tuple[Mask, ...]

    def __init__(self, masks: Sequence[Mask]) -> None:
        call = f"PerHead({shorten(masks)})"
        if not isinstance(masks, Sequence) or not masks or not all(isinstance(m, Mask) for m in masks):
            raise OptionError(f"{call}: wanted one mask for each head")
        for m in masks:
            if m.heads is not None:
                raise ShapeError(f"{call}: {m!r} differs by head itself")
        object.__setattr__(self, "masks", tuple(masks))
        _ = self.batch  # masks that cannot go together are refused here

    @property
    def heads(self) -> int | None:  # type: ignore[override]
        return len(self.masks)

    @cached_property
    def batch(self) -> int | None:  # type: ignore[override]
        sizes = {m.batch for m in self.masks} - {None}
        if len(sizes) > 1:
            raise ShapeError(f"PerHead({shorten(self.masks)}): masks are written for different batch sizes: {sorted(sizes)}")  # type: ignore[type-var]
        return sizes.pop() if sizes else None

    @cached_property
    def uses_index(self) -> bool:  # type: ignore[override]
        return any(m.uses_index for m in self.masks)

    @property
    def held_bytes(self) -> int:
        return sum(m.held_bytes for m in self.masks)

    def check(self, grid: Grid) -> None:
        for m in self.masks:
            m.check(grid)

    def at(self, row: int, head: int) -> Mask:
        return self.masks[head].at(row, 0)

    def evaluate(self, pairs: Pairs) -> Tensor:
        answers = [m.evaluate(pairs) for m in self.masks]
        shape = torch.broadcast_shapes(*(a.shape for a in answers))
        shape = (*(1,) * (4 - len(shape)), *shape)
        return torch.cat([a.expand(shape) for a in answers], dim=1)

    def classify_box(self, box: Box) -> Tensor:
        raise AssertionError("PerHead is compiled head by head")

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return reduce(join_spans, (m.hull(q_lo, q_hi) for m in self.masks))

    def hull_of_complement(self, q_lo: int, q_hi: int) -> Span | None:
        return reduce(join_spans, ((~m).hull(q_lo, q_hi) for m in self.masks))


def _version(tensor: Tensor) -> int:
    """Torch's count of in-place changes (inference tensors keep none)."""
    return 0 if tensor.is_inference() else tensor._version
