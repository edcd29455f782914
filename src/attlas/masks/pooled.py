"""Masks between tokens and groups of tokens: keys that stand for `size` tokens each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.masks.base import Leaf, Mask, Span
from attlas.masks.box import Box, Pairs, TileKeys
from attlas.masks.expr import And, Not, Or, conjunction, disjunction


@dataclass(frozen=True, eq=False, repr=False)
class Pooled(Leaf):
    """`leaf`, asked about groups: the query at position q counts as one at (q + shift) // size; key positions number the groups.

    Pooled(Causal() & ~Window.last(1), size): the groups before the query's own. Made of compound masks by `pooled`."""

    leaf: Mask
    size: int
    shift: int = 0

    def _group(self, q: Tensor) -> Tensor:
        return torch.div(q + self.shift, self.size, rounding_mode="floor")

    def _box(self, box: Box) -> Box:
        sides = box.q_blocks
        blocks = None if sides is None else (self._group(sides[0]), self._group(sides[1]), sides[2])
        return Box(self._group(box.q_lo), self._group(box.q_hi), box.k_lo, box.k_hi, q_blocks=blocks, k_blocks=box.k_blocks)

    def evaluate(self, pairs: Pairs) -> Tensor:
        return self.leaf.evaluate(Pairs(self._group(pairs.q), pairs.k))

    def classify_box(self, box: Box) -> Tensor:
        return self.leaf.classify_box(self._box(box))

    def tile_keys(self, box: Box) -> TileKeys:
        inner = self.leaf.tile_keys(self._box(box))
        return TileKeys((torch.remainder(box.q_lo + self.shift, self.size), *inner.columns), inner.keyed)

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return self.leaf.hull((q_lo + self.shift) // self.size, (q_hi + self.shift) // self.size)

    def hull_of_complement(self, q_lo: int, q_hi: int) -> Span | None:
        return self.leaf.hull_of_complement((q_lo + self.shift) // self.size, (q_hi + self.shift) // self.size)


def pooled(mask: Mask, size: int, shift: int = 0) -> Mask:
    """`mask`, a rule about groups, as a rule about queries that are tokens and keys that are groups of `size` tokens."""
    if isinstance(mask, And | Or):
        join = conjunction if isinstance(mask, And) else disjunction
        return join(pooled(m, size, shift) for m in mask.operands)
    if isinstance(mask, Not):
        return ~pooled(mask.operand, size, shift)
    return mask if size == 1 and not shift else Pooled(mask, size, shift)
