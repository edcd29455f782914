"""What a mask means for decoding: is it causal, and which keys may a later query still ask for?

Both are read off the structure of the mask expression, so they hold at every length. They err on the safe side: a mask that is
not understood is "not causal" and "needs every key".
"""

from __future__ import annotations

from dataclasses import dataclass

from attlas.masks.explicit import PerHead
from attlas.masks.expr import All, And, Mask, Not, Nothing, Or
from attlas.masks.leaves import Causal, Dilated, Local, Sinks, Strided, Window
from attlas.masks.position_sets import Global


@dataclass(frozen=True)
class Reach:
    """A query never asks for more than the last `window` keys (itself included) and the first `sinks` keys of its sequence.
    window None = all keys."""

    window: int | None
    sinks: int = 0

    @property
    def size(self) -> float:
        return float("inf") if self.window is None else self.window + self.sinks


def _inner(mask: And | Or | PerHead) -> tuple[Mask, ...]:
    return mask.masks if isinstance(mask, PerHead) else mask.operands


def is_causal(mask: Mask | None) -> bool:
    """True when the mask allows no query to attend to a later position."""
    if isinstance(mask, Causal | Sinks | Nothing):
        return not (isinstance(mask, Causal) and mask.align == "start")
    if isinstance(mask, Window | Dilated):
        return mask.right == 0
    if isinstance(mask, And):
        return any(is_causal(m) for m in mask.operands)
    if isinstance(mask, Or | PerHead):
        return all(is_causal(m) for m in _inner(mask))
    return False


def is_shift_invariant(mask: Mask | None) -> bool:
    """True when adding the same number to all positions changes nothing."""
    if mask is None or isinstance(mask, Causal | Window | Dilated | Strided | All | Nothing):
        return True
    if isinstance(mask, Not):
        return is_shift_invariant(mask.operand)
    if isinstance(mask, And | Or | PerHead):
        return all(is_shift_invariant(m) for m in _inner(mask))
    return False


def reach(mask: Mask | None) -> Reach:
    """Which keys a causal mixer with this mask must keep."""
    if isinstance(mask, Window):
        return Reach(None if mask.left is None else mask.left + 1)
    if isinstance(mask, Dilated):
        return Reach(None if mask.left is None else mask.left * mask.dilation + 1)
    if isinstance(mask, Local):
        return Reach(mask.block)
    if isinstance(mask, Sinks):
        return Reach(1, mask.n)
    if isinstance(mask, Global):
        # A global query reads every earlier key; when the global tokens are the first n, those earlier keys are themselves sinks.
        n = len(mask.tokens)
        return Reach(1, n) if tuple(sorted(mask.tokens)) == tuple(range(n)) else Reach(None)
    if isinstance(mask, Nothing):
        return Reach(1)
    if isinstance(mask, And):
        return min((reach(m) for m in mask.operands), key=lambda r: r.size)
    if isinstance(mask, Or | PerHead):
        parts = [reach(m) for m in _inner(mask)]
        if any(p.window is None for p in parts):
            return Reach(None)
        return Reach(max(p.window or 0 for p in parts), max(p.sinks for p in parts))
    return Reach(None)
