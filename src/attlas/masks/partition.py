"""An axis cut into blocks, with the hull of positions and sequences of every block at every level of coarseness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.masks.geometry import Axis

FACTOR = 4  # blocks of one level that make one block of the next
_FAR = 2**62


@dataclass(frozen=True, eq=False)
class Level:
    """Inclusive hulls of the blocks of one level, int64 [n]; hulls that nobody asks for are None."""

    lo: Tensor
    hi: Tensor
    tokens: Tensor
    sequence_lo: Tensor | None = None
    sequence_hi: Tensor | None = None
    index_lo: Tensor | None = None
    index_hi: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lo)

    def coarser(self) -> Level:
        """FACTOR blocks in one."""

        def fold(values: Tensor | None, fill: int, how: str) -> Tensor | None:
            if values is None:
                return None
            padded = torch.nn.functional.pad(values, (0, -len(values) % FACTOR), value=fill).view(-1, FACTOR)
            return getattr(padded, how)(1)

        lows = [fold(x, _FAR, "amin") for x in (self.lo, self.sequence_lo, self.index_lo)]
        highs = [fold(x, -_FAR, "amax") for x in (self.hi, self.sequence_hi, self.index_hi)]
        tokens = fold(self.tokens, 0, "sum")
        assert lows[0] is not None and highs[0] is not None and tokens is not None
        return Level(lows[0], highs[0], tokens, lows[1], highs[1], lows[2], highs[2])


class Partition:
    """Block b holds the array tokens starts[b] ... starts[b + 1] - 1; no block is empty."""

    def __init__(self, axis: Axis, starts: Tensor, *, packed: bool, index: bool):
        self.axis = axis
        self.starts, self.ends = starts[:-1], starts[1:]
        self.tallest = int((self.ends - self.starts).max()) if len(self.starts) else 0
        self.first_segment = self.pieces = None  # of every block; None: every block lies inside one segment
        self.levels = [self._one_segment(packed, index) if len(axis.segments) == 1 else self._many_segments(packed, index)]

    @classmethod
    def regular(cls, axis: Axis, block: int, *, packed: bool, index: bool) -> Partition:
        """Blocks of equal length; the last one may be shorter."""
        starts = torch.arange(0, len(axis) + block, block)[: -(-len(axis) // block) + 1].clamp(max=len(axis))
        return cls(axis, starts, packed=packed, index=index)

    def __len__(self) -> int:
        return len(self.starts)

    def level(self, n: int) -> Level:
        while len(self.levels) <= n:
            self.levels.append(self.levels[-1].coarser())
        return self.levels[n]

    def size(self, n: int) -> int:
        """Number of blocks at level n."""
        return max(-(-len(self) // FACTOR**n), min(len(self), 1))

    def _one_segment(self, packed: bool, index: bool) -> Level:
        s = self.axis.segments[0]
        sequence = torch.full_like(self.starts, s.sequence) if packed else None
        lo, hi = self.starts, self.ends - 1
        own = (lo + s.index, hi + s.index) if index else (None, None)
        return Level(lo + s.position, hi + s.position, self.ends - self.starts, sequence, sequence, *own)

    def _many_segments(self, packed: bool, index: bool) -> Level:
        if not len(self):
            none = self.starts
            return Level(*(none,) * 7)
        ends, offset, sequence, index_offset = self.axis.table
        segment_starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        first = torch.searchsorted(ends, self.starts, right=True)
        last = torch.searchsorted(segment_starts, self.ends - 1, right=True) - 1
        self.first_segment, self.pieces = first, last - first + 1
        block = torch.repeat_interleave(torch.arange(len(self)), self.pieces)
        segment = torch.arange(len(block)) - torch.repeat_interleave(self.pieces.cumsum(0) - self.pieces - first, self.pieces)
        lo = torch.maximum(self.starts[block], segment_starts[segment])
        hi = torch.minimum(self.ends[block], ends[segment]) - 1

        def hull(low: Tensor, high: Tensor) -> Iterator[Tensor]:
            for values, how, start in ((low, "amin", _FAR), (high, "amax", -_FAR)):
                yield torch.full((len(self),), start).scatter_reduce_(0, block, values, how)

        ids = hull(sequence[segment], sequence[segment]) if packed else (None, None)
        own = hull(lo + index_offset[segment], hi + index_offset[segment]) if index else (None, None)
        return Level(*hull(lo + offset[segment], hi + offset[segment]), self.ends - self.starts, *ids, *own)
