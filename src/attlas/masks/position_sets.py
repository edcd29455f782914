"""Leaves given by lists of positions: Documents (boundaries) and Global (tokens)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from attlas.masks.base import Leaf, Span
from attlas.masks.box import Box, Pairs, TileKeys, three_valued
from attlas.masks.options import integers, shorten
from attlas.masks.placement import on_device


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Documents(Leaf):
    """q and k lie in the same document of one dense row; `lengths` are the documents' lengths from position 0 on.

    Positions past the end form one last document. For sequences packed on one axis use a packed grid instead: there positions
    start again at 0 in each sequence.
    """

    lengths: tuple[int, ...]
    effort = 1

    def __init__(self, lengths: Sequence[int] | Tensor) -> None:
        object.__setattr__(self, "lengths", integers(f"Documents({shorten(lengths)})", "lengths", lengths, 0))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Where documents end, ascending, without repetition; a position's document is the number of ends at or before it."""
        return tuple(sorted(set(accumulate(self.lengths))))

    @cached_property
    def _ends(self) -> Tensor:
        return torch.tensor(self.ends, dtype=torch.int64, device="cpu")

    def document(self, positions: Tensor) -> Tensor:
        return torch.searchsorted(on_device(self, "_ends", positions.device), positions.contiguous(), right=True)

    def evaluate(self, pairs: Pairs) -> Tensor:
        return self.document(pairs.q) == self.document(pairs.k)

    def classify_box(self, box: Box) -> Tensor:
        q_lo, q_hi = box.of_q(lambda lo, hi: self.document(lo)), box.of_q(lambda lo, hi: self.document(hi))
        k_lo, k_hi = box.of_k(lambda lo, hi: self.document(lo)), box.of_k(lambda lo, hi: self.document(hi))
        return three_valued((q_lo <= k_hi) & (k_lo <= q_hi), (q_lo == k_hi) & (k_lo == q_hi))

    def tile_keys(self, box: Box) -> TileKeys:
        """With at most one document end inside each side, the ends' offsets and the documents' difference say all."""
        apart = box.of_q(lambda lo, hi: self.document(lo)) - box.of_k(lambda lo, hi: self.document(lo))
        q_at, k_at = box.of_q(self._end_inside), box.of_k(self._end_inside)
        return TileKeys((apart, q_at, k_at), (q_at >= 0) & (k_at >= 0))

    def _end_inside(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Offset of the one document end inside (lo, hi], 0 when there is none, -1 when there are several."""
        first = self.document(lo)
        inside = self.document(hi) - first
        ends = torch.cat([self._ends, self._ends.new_zeros(1)])  # the entry past the end is never used: no end lies after it
        return torch.where(inside == 0, 0, torch.where(inside == 1, ends[first] - lo, -1))

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        first, last = bisect_right(self.ends, q_lo), bisect_right(self.ends, q_hi)
        return self.ends[first - 1] if first else None, self.ends[last] - 1 if last < len(self.ends) else None


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Global(Leaf):
    """q in tokens or k in tokens: global positions see everything and are seen by everything (Longformer, BigBird, 2020)."""

    tokens: tuple[int, ...]
    effort = 1

    def __init__(self, tokens: Sequence[int] | Tensor) -> None:
        object.__setattr__(self, "tokens", tuple(sorted(set(integers(f"Global({shorten(tokens)})", "tokens", tokens, 0)))))

    @cached_property
    def _tokens(self) -> Tensor:
        return torch.tensor(self.tokens, dtype=torch.int64, device="cpu")

    def contains(self, positions: Tensor) -> Tensor:
        if not self.tokens:
            return torch.zeros_like(positions, dtype=torch.bool)
        tokens = on_device(self, "_tokens", positions.device)
        found = torch.searchsorted(tokens, positions.contiguous()).clamp_(max=len(self.tokens) - 1)
        return tokens[found] == positions

    def _range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the first token in [lo, hi], and how many there are."""
        first = torch.searchsorted(self._tokens, lo.contiguous())
        return first, torch.searchsorted(self._tokens, hi.contiguous(), right=True) - first

    def evaluate(self, pairs: Pairs) -> Tensor:
        return self.contains(pairs.q) | self.contains(pairs.k)

    def classify_box(self, box: Box) -> Tensor:
        return torch.maximum(box.of_q(self._classify_side), box.of_k(self._classify_side))

    def _classify_side(self, lo: Tensor, hi: Tensor) -> Tensor:
        count = self._range(lo, hi)[1]
        return three_valued(count > 0, count > hi - lo)

    def tile_keys(self, box: Box) -> TileKeys:
        offset, count = (lambda lo, hi: self._side(lo, hi)[0]), (lambda lo, hi: self._side(lo, hi)[1])
        return TileKeys((box.of_q(offset), box.of_q(count), box.of_k(offset), box.of_k(count)))

    def _side(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """(offset, count) of the tokens in [lo, hi] when they are consecutive positions, else (lo, -1)."""
        if not self.tokens:
            return torch.zeros_like(lo), torch.zeros_like(lo)
        first, count = self._range(lo, hi)
        last = (first + count - 1).clamp(min=0)
        head = self._tokens[first.clamp(max=len(self.tokens) - 1)]
        run = (count == 0) | (self._tokens[last] - head + 1 == count)
        return torch.where(run, torch.where(count > 0, head - lo, 0), lo), torch.where(run, count, -1)

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        if not self.tokens:
            return None
        if bisect_left(self.tokens, q_lo) < bisect_right(self.tokens, q_hi):
            return None, None
        return self.tokens[0], self.tokens[-1]
