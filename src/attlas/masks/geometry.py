"""Which absolute positions, and which sequences, the array indices of queries and keys stand for.

Masks are functions of absolute positions and sequence ids, never of array indices: slot 0 of a rolling cache may hold position
70,000. An `Axis` lists runs of consecutive positions in array order; a `Grid` pairs the axes of the queries and of the keys.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, overload

import torch
from torch import Tensor

from attlas.errors import ShapeError
from attlas.masks.placement import on_device
from attlas.shapes import SeqInfo


@dataclass(frozen=True)
class Segment:
    """`length` tokens at absolute positions `position`, `position + 1`, ...

    sequence  which sequence of a packed batch they belong to
    index     array index, inside that sequence, of the first token; read only by `Causal(align="start")`
    """

    length: int
    position: int
    sequence: int = 0
    index: int = 0

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ShapeError(f"{self}: length must not be negative")

    def continued_by(self, other: Segment) -> bool:
        """True when `other` goes on exactly where this segment ends."""
        return (
            self.sequence == other.sequence
            and self.position + self.length == other.position
            and self.index + self.length == other.index
        )


@dataclass(frozen=True)
class Axis:
    """Segments in array order. Empty segments are dropped and continuing ones joined, so equal axes compare equal."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        joined: list[Segment] = []
        for s in self.segments:
            if s.length == 0:
                continue
            if joined and joined[-1].continued_by(s):
                last = joined.pop()
                s = Segment(last.length + s.length, last.position, last.sequence, last.index)
            joined.append(s)
        object.__setattr__(self, "segments", tuple(joined))

    @classmethod
    def of(cls, positions: Axis | range | Tensor | Sequence[int] | Sequence[Segment], sequence: int = 0) -> Axis:
        """The axis of one sequence whose tokens stand at `positions`, in array order (an axis or segments pass unchanged)."""
        if isinstance(positions, Axis):
            return positions
        if isinstance(positions, range) and positions.step == 1:
            return cls((Segment(len(positions), positions.start, sequence),))
        if not isinstance(positions, Tensor):
            items = list(positions)
            if items and isinstance(items[0], Segment):
                return cls(tuple(items))  # type: ignore[arg-type]
            positions = torch.tensor([operator.index(p) for p in items], dtype=torch.int64, device="cpu")  # type: ignore[arg-type]
        if positions.ndim != 1 or positions.is_floating_point() or positions.dtype == torch.bool:
            raise ShapeError(f"Axis.of(positions {list(positions.shape)} {positions.dtype}): wanted integers [T]")
        p = positions.cpu().to(torch.int64)
        cuts = [0, *(torch.nonzero(p[1:] != p[:-1] + 1).flatten() + 1).tolist(), len(p)]
        first = p[torch.tensor(cuts[:-1], device="cpu")].tolist() if len(p) else [0]
        return cls(tuple(Segment(b - a, f, sequence, a) for (a, b), f in zip(pairwise(cuts), first, strict=True)))

    def __len__(self) -> int:
        return self._length

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, tuple[Segment, ...]]:
        return {"segments": self.segments}  # cached values stay behind

    @cached_property
    def _length(self) -> int:
        return sum(s.length for s in self.segments)

    @cached_property
    def _hash(self) -> int:
        return hash(self.segments)

    @cached_property
    def ids(self) -> frozenset[int]:
        """The sequence ids that occur."""
        return frozenset(s.sequence for s in self.segments)

    @cached_property
    def span(self) -> tuple[int, int] | None:
        """Lowest and highest position, both included; None for an empty axis."""
        if not self.segments:
            return None
        return min(s.position for s in self.segments), max(s.position + s.length - 1 for s in self.segments)

    @cached_property
    def table(self) -> Tensor:
        """int64 [4, segments] on the CPU: array offset of the segment's end, and position, sequence and index minus array offset
        (so that `table[1, s] + t` is the position of array token t in segment s; the sequence row is the id itself)."""
        rows: list[list[int]] = [[], [], [], []]
        offset = 0
        for s in self.segments:
            for row, value in zip(rows, (offset + s.length, s.position - offset, s.sequence, s.index - offset), strict=True):
                row.append(value)
            offset += s.length
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def lookup(self, tokens: Tensor, row: int) -> Tensor:
        """Position (row 1), sequence id (row 2) or in-sequence index (row 3) of array tokens; past the end the last goes on."""
        if len(self.segments) == 1:
            s = self.segments[0]
            return torch.full_like(tokens, s.sequence) if row == 2 else tokens + (s.position if row == 1 else s.index)
        if not self.segments:
            return torch.zeros_like(tokens)
        table = on_device(self, "table", tokens.device)
        segment = torch.searchsorted(table[0], tokens, right=True).clamp_(max=len(self.segments) - 1)
        value = table[row][segment]
        return value if row == 2 else value + tokens

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Absolute position of every token, int64 [T]."""
        if len(self.segments) == 1:
            s = self.segments[0]
            return torch.arange(s.position, s.position + s.length, device=device)
        return self.lookup(torch.arange(len(self), device=device), 1)

    def sequences(self, device: torch.device | str | None = None) -> Tensor:
        """Sequence id of every token, int64 [T]."""
        return self.lookup(torch.arange(len(self), device=device), 2)

    def indices(self, device: torch.device | str | None = None) -> Tensor:
        """Array index of every token inside its sequence, int64 [T]."""
        return self.lookup(torch.arange(len(self), device=device), 3)


class _Packed:
    """`Grid.packed(seq)` makes a grid; `grid.packed` tells whether a grid has more than one sequence."""

    @overload
    def __get__(self, grid: None, owner: type[Grid]) -> Callable[[SeqInfo], Grid]: ...
    @overload
    def __get__(self, grid: Grid, owner: type[Grid]) -> bool: ...
    def __get__(self, grid: Grid | None, owner: type[Grid]) -> Callable[[SeqInfo], Grid] | bool:
        return owner.of_sequences if grid is None else grid.num_sequences > 1


@dataclass(frozen=True)
class Grid:
    """The pairs (query, key) that a mask is asked about. Pairs of different sequences are never allowed."""

    q: Axis
    k: Axis

    packed = _Packed()

    @classmethod
    def dense(cls, Tq: int, Tk: int) -> Grid:
        """Keys 0 ... Tk-1, queries Tk-Tq ... Tk-1: aligned to the end. With Tq > Tk the first queries have negative positions."""
        if Tq < 0 or Tk < 0:
            raise ShapeError(f"Grid.dense({Tq}, {Tk}): lengths must not be negative")
        return cls(Axis((Segment(Tq, Tk - Tq),)), Axis((Segment(Tk, 0),)))

    @classmethod
    def of_sequences(cls, seq: SeqInfo) -> Grid:
        """One segment per sequence of a packed batch; the keys of each sequence stand at positions 0, 1, ..."""
        q = [Segment(n, first, i) for i, (n, first) in enumerate(zip(seq.lengths, seq.first, strict=True))]
        k = [Segment(n, 0, i) for i, n in enumerate(seq.keys)]
        return cls(Axis(tuple(q)), Axis(tuple(k)))

    @classmethod
    def at(
        cls,
        q_positions: Axis | range | Tensor | Sequence[int] | Sequence[Segment],
        k_positions: Axis | range | Tensor | Sequence[int] | Sequence[Segment],
    ) -> Grid:
        """Queries and keys at explicit positions: a chunk of a prefill, a decode step, the slots of a rolling cache."""
        return cls(Axis.of(q_positions), Axis.of(k_positions))

    @classmethod
    def of(cls, grid: Grid | tuple[int, int]) -> Grid:
        """A grid, or `(Tq, Tk)` for `Grid.dense`."""
        return grid if isinstance(grid, Grid) else cls.dense(*_pair(grid))

    @property
    def shape(self) -> tuple[int, int]:
        """(Tq, Tk)"""
        return len(self.q), len(self.k)

    @cached_property
    def num_sequences(self) -> int:
        return len(self.q.ids | self.k.ids)

    @cached_property
    def _hash(self) -> int:
        return hash((self.q, self.k))

    def __hash__(self) -> int:
        return self._hash


def _pair(value: Any) -> tuple[int, int]:
    try:
        Tq, Tk = value
        return operator.index(Tq), operator.index(Tk)
    except (TypeError, ValueError):
        raise ShapeError(f"wanted a Grid or (Tq, Tk), got {value!r}") from None
