"""Mask expressions: immutable values that say which query may attend to which key. True = may attend, always.

    mask = Causal() & Window.last(4096) | Global([0])

Expressions compare by value, hash, and print as code that makes them again. `&` and `|` flatten, drop duplicates and order their
operands, and `~` moves inwards by De Morgan's laws, so equal formulas written differently compare equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from attlas.errors import ShapeError
from attlas.masks.base import Leaf, Mask, Span
from attlas.masks.box import EMPTY, FULL, Box, Pairs, TileKeys
from attlas.masks.geometry import Grid

MANY = 4096  # boxes from which on it pays to leave out the ones that are settled


# -- compound masks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Compound(Mask):
    """Several operands joined by one operator. Made by `&` and `|`, never by hand."""

    operands: tuple[Mask, ...]
    symbol = "?"
    effort = 1

    @cached_property
    def batch(self) -> int | None:  # type: ignore[override]
        return agree(self, "batch")

    @cached_property
    def heads(self) -> int | None:  # type: ignore[override]
        return agree(self, "heads")

    @cached_property
    def uses_index(self) -> bool:  # type: ignore[override]
        return any(m.uses_index for m in self.operands)

    @property
    def identity(self) -> tuple[Any, ...]:
        return self.operands

    @property
    def held_bytes(self) -> int:
        return sum(m.held_bytes for m in self.operands)

    def check(self, grid: Grid) -> None:
        for m in self.operands:
            m.check(grid)

    @cached_property
    def _by_effort(self) -> tuple[Mask, ...]:
        return tuple(sorted(self.operands, key=lambda m: m.effort))

    def classify_in_turn(self, box: Box, join: Callable[[Tensor, Tensor], Tensor], settled: int) -> Tensor:
        """Join the operands' answers; boxes that one operand settles are not put to those after it, when that saves much."""
        first, *others = self._by_effort
        status = first.classify_box(box)
        for m in others:
            if len(status) >= MANY:
                live = (status != settled).nonzero().flatten()
                if len(live) < 0.6 * len(status):
                    status[live] = join(status[live], m.classify_box(box.take(live)))
                    continue
            status = join(status, m.classify_box(box))
        return status

    def __repr__(self) -> str:
        parts = (f"({m!r})" if m.precedence < self.precedence else repr(m) for m in self.operands)
        return f" {self.symbol} ".join(parts)


class And(Compound):
    """Allowed where every operand allows."""

    precedence = 2
    symbol = "&"

    def evaluate(self, pairs: Pairs) -> Tensor:
        return reduce(torch.logical_and, (m.evaluate(pairs) for m in self.operands))

    def classify_box(self, box: Box) -> Tensor:
        return self.classify_in_turn(box, torch.minimum, EMPTY)

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return reduce(intersect_spans, (m.hull(q_lo, q_hi) for m in self.operands))

    def at(self, row: int, head: int) -> Mask:
        return self if self.batch is None and self.heads is None else conjunction(m.at(row, head) for m in self.operands)

    def __invert__(self) -> Mask:
        return disjunction(~m for m in self.operands)


class Or(Compound):
    """Allowed where some operand allows."""

    precedence = 1
    symbol = "|"

    def evaluate(self, pairs: Pairs) -> Tensor:
        return reduce(torch.logical_or, (m.evaluate(pairs) for m in self.operands))

    def classify_box(self, box: Box) -> Tensor:
        return self.classify_in_turn(box, torch.maximum, FULL)

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return reduce(join_spans, (m.hull(q_lo, q_hi) for m in self.operands))

    def at(self, row: int, head: int) -> Mask:
        return self if self.batch is None and self.heads is None else disjunction(m.at(row, head) for m in self.operands)

    def __invert__(self) -> Mask:
        return conjunction(~m for m in self.operands)


@dataclass(frozen=True, eq=False, repr=False)
class Not(Mask):
    """Allowed where a leaf forbids. Made by `~`."""

    operand: Mask

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        return self.operand.batch

    @property
    def heads(self) -> int | None:  # type: ignore[override]
        return self.operand.heads

    @property
    def uses_index(self) -> bool:  # type: ignore[override]
        return self.operand.uses_index

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.operand,)

    @property
    def held_bytes(self) -> int:
        return self.operand.held_bytes

    @cached_property
    def order(self) -> tuple[str, str]:
        return self.operand.order[0] + "~", self.operand.order[1]

    def check(self, grid: Grid) -> None:
        self.operand.check(grid)

    def evaluate(self, pairs: Pairs) -> Tensor:
        return ~self.operand.evaluate(pairs)

    def classify_box(self, box: Box) -> Tensor:
        return FULL - self.operand.classify_box(box)

    def tile_keys(self, box: Box) -> TileKeys:
        return self.operand.tile_keys(box)

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return self.operand.hull_of_complement(q_lo, q_hi)

    def at(self, row: int, head: int) -> Mask:
        return self if self.batch is None and self.heads is None else ~self.operand.at(row, head)

    def __invert__(self) -> Mask:
        return self.operand

    def __repr__(self) -> str:
        return f"~{self.operand!r}"


@dataclass(frozen=True, eq=False, repr=False)
class All(Leaf):
    """Every query may attend to every key (of its own sequence)."""

    def evaluate(self, pairs: Pairs) -> Tensor:
        return torch.ones(1, 1, dtype=torch.bool, device=pairs.q.device)

    def classify_box(self, box: Box) -> Tensor:
        return torch.full_like(box.q_lo, FULL, dtype=torch.int8)

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return None, None

    def __invert__(self) -> Mask:
        return Nothing()


@dataclass(frozen=True, eq=False, repr=False)
class Nothing(Leaf):
    """No query may attend to any key."""

    def evaluate(self, pairs: Pairs) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.bool, device=pairs.q.device)

    def classify_box(self, box: Box) -> Tensor:
        return torch.full_like(box.q_lo, EMPTY, dtype=torch.int8)

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return None

    def __invert__(self) -> Mask:
        return All()


# -- building ------------------------------------------------------------------------------------------------------------------


def conjunction(masks: Iterable[Mask]) -> Mask:
    """The canonical form of `m1 & m2 & ...`."""
    return _join(And, masks, unit=All, zero=Nothing)


def disjunction(masks: Iterable[Mask]) -> Mask:
    """The canonical form of `m1 | m2 | ...`."""
    return _join(Or, masks, unit=Nothing, zero=All)


def _join(kind: type[Compound], masks: Iterable[Mask], unit: type[Leaf], zero: type[Leaf]) -> Mask:
    unique: dict[Mask, None] = {}
    for m in masks:
        for part in m.operands if isinstance(m, kind) else (m,):
            if isinstance(part, zero):
                return zero()
            if not isinstance(part, unit):
                unique[part] = None
    if len(unique) < 2:
        return next(iter(unique), unit())
    joined = kind(tuple(sorted(unique, key=lambda m: m.order)))
    _ = joined.batch, joined.heads  # operands that cannot go together are refused here, where they are joined
    return joined


def agree(mask: Compound, name: str) -> int | None:
    """The one batch size or head count that the operands ask for."""
    sizes = {getattr(m, name) for m in mask.operands} - {None}
    if len(sizes) > 1:
        what = "batch rows" if name == "batch" else name
        raise ShapeError(f"{mask!r}: operands are written for different numbers of {what}: {sorted(sizes)}")
    return sizes.pop() if sizes else None


def intersect_spans(a: Span | None, b: Span | None) -> Span | None:
    if a is None or b is None:
        return None
    lo = max((x for x in (a[0], b[0]) if x is not None), default=None)
    hi = min((x for x in (a[1], b[1]) if x is not None), default=None)
    return None if lo is not None and hi is not None and lo > hi else (lo, hi)


def join_spans(a: Span | None, b: Span | None) -> Span | None:
    if a is None or b is None:
        return b if a is None else a
    lo = None if a[0] is None or b[0] is None else min(a[0], b[0])
    hi = None if a[1] is None or b[1] is None else max(a[1], b[1])
    return lo, hi
