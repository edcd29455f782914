"""An axis cut into blocks, with the hull of positions and sequences of every block at every level of coarseness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.masks.geometry import Axis

FACTOR = 4  # blocks of one level that make one block of the next
_FAR = 2**62


Hull = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True, eq=False)
class Level:
    """Inclusive hulls of the positions, sequence ids and in-sequence indices of the blocks of one level, int64 [n] each.

    Hulls that nobody asks for are (None, None).
    """

    lo: Tensor
    hi: Tensor
    tokens: Tensor
    sequences: Hull = (None, None)
    index: Hull = (None, None)

    def coarser(self) -> Level:
        """FACTOR blocks in one."""

        def fold(values: Tensor, fill: int) -> Tensor:
            return torch.nn.functional.pad(values, (0, -len(values) % FACTOR), value=fill).view(-1, FACTOR)

        def hull(low: Tensor | None, high: Tensor | None) -> Hull:
            if low is None or high is None:
                return None, None
            return fold(low, _FAR).amin(1), fold(high, -_FAR).amax(1)

        lo, hi = fold(self.lo, _FAR).amin(1), fold(self.hi, -_FAR).amax(1)
        return Level(lo, hi, fold(self.tokens, 0).sum(1), hull(*self.sequences), hull(*self.index))


class Partition:
    """Block b holds the array tokens starts[b] ... starts[b + 1] - 1; no block is empty."""

    def __init__(self, axis: Axis, starts: Tensor, *, packed: bool, index: bool):
        self.axis = axis
        self.starts, self.ends = starts[:-1], starts[1:]
        self.tallest = int((self.ends - self.starts).max()) if len(self.starts) else 0
        self.first_segment: Tensor | None = None  # of every block, and the number of its segments;
        self.pieces: Tensor | None = None  # None: there is one segment in all
        self.levels = [self._one_segment(packed, index) if len(axis.segments) == 1 else self._many_segments(packed, index)]

    @classmethod
    def regular(cls, axis: Axis, block: int, *, packed: bool, index: bool) -> Partition:
        """Blocks of equal length; the last one may be shorter."""
        starts = torch.arange(0, len(axis) + block, block, device="cpu")[: -(-len(axis) // block) + 1].clamp(max=len(axis))
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
        lo, hi = self.starts, self.ends - 1
        one = torch.full_like(lo, s.sequence)
        own = (lo + s.index, hi + s.index) if index else (None, None)
        return Level(lo + s.position, hi + s.position, self.ends - self.starts, (one, one) if packed else (None, None), own)

    def _many_segments(self, packed: bool, index: bool) -> Level:
        if not len(self):
            none = self.starts
            return Level(none, none, none, (none, none), (none, none))
        ends, offset, sequence, index_offset = self.axis.table
        segment_starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        first = torch.searchsorted(ends, self.starts, right=True)
        last = torch.searchsorted(segment_starts, self.ends - 1, right=True) - 1
        pieces = last - first + 1
        self.first_segment, self.pieces = first, pieces
        block = torch.repeat_interleave(torch.arange(len(self), device="cpu"), pieces)
        segment = torch.arange(len(block), device="cpu") - torch.repeat_interleave(pieces.cumsum(0) - pieces - first, pieces)
        lo = torch.maximum(self.starts[block], segment_starts[segment])
        hi = torch.minimum(self.ends[block], ends[segment]) - 1

        def hull(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
            least, most = torch.full((len(self),), _FAR, device="cpu"), torch.full((len(self),), -_FAR, device="cpu")
            return least.scatter_reduce_(0, block, low, "amin"), most.scatter_reduce_(0, block, high, "amax")

        ids = hull(sequence[segment], sequence[segment]) if packed else (None, None)
        own = hull(lo + index_offset[segment], hi + index_offset[segment]) if index else (None, None)
        return Level(*hull(lo + offset[segment], hi + offset[segment]), self.ends - self.starts, ids, own)
