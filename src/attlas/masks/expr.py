"""Mask expressions: immutable values that say which query may attend to which key. True = may attend, always.

    mask = Causal() & Window.last(4096) | Global([0])

Expressions compare by value, hash, and print as code that makes them again. `&` and `|` flatten, drop duplicates and order their
operands, and `~` moves inwards by De Morgan's laws, so equal formulas written differently compare equal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError
from attlas.masks.box import EMPTY, FULL, PARTIAL, Box, Pairs, TileKeys
from attlas.masks.geometry import Grid

if TYPE_CHECKING:
    from attlas.masks.block_map import BlockMap

MANY = 4096  # boxes from which on it pays to leave out the ones that are settled
Span = tuple[int | None, int | None]  # inclusive bounds of key positions, None = unlimited


class Mask(ABC):
    """A rule on absolute positions (and, for some leaves, batch row and head) that says which pairs may attend."""

    batch: int | None = None  # number of batch rows the mask is written for; None = any
    heads: int | None = None  # number of heads the mask is written for; None = any
    uses_index: bool = False  # reads array indices beside positions
    effort: int = 0  # classifying a box takes 0 = arithmetic, 1 = searching
    precedence: int = 3  # for printing: | is 1, & is 2, ~ and leaves are 3

    # -- what a leaf implements ------------------------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, pairs: Pairs) -> Tensor:
        """bool, broadcastable to [..., tq, tk]; leaves that differ by batch row or head return [B|1, H|1, tq, tk]."""

    @abstractmethod
    def classify_box(self, box: Box) -> Tensor:
        """int8: EMPTY or FULL where that holds for every pair of the box, else PARTIAL."""

    @abstractmethod
    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        """Inclusive hull of the keys that some query in q_lo ... q_hi may attend to; see `key_span`."""

    def tile_keys(self, box: Box) -> TileKeys:
        """Columns that determine the tile of each exact box; the default is that every tile stands alone."""
        return TileKeys((), torch.zeros_like(box.q_lo, dtype=torch.bool))

    def hull_of_complement(self, q_lo: int, q_hi: int) -> Span | None:
        return None, None

    def at(self, row: int, head: int) -> Mask:
        """The mask of one batch row and one head, which differs by neither."""
        return self

    def check(self, grid: Grid) -> None:
        """Raise when the mask cannot be asked about `grid`; most can be asked about any."""
        return

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors that the mask keeps alive."""
        return 0

    # -- algebra ---------------------------------------------------------------------------------------------------------------

    def __and__(self, other: Mask) -> Mask:
        return conjunction((self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return disjunction((self, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)

    def __bool__(self) -> bool:
        raise OptionError(f"the truth value of the mask {self!r} is undefined: write `&`, `|`, `~`, not `and`, `or`, `not`")

    @property
    @abstractmethod
    def identity(self) -> tuple[Any, ...]:
        """What makes two masks of one class equal."""

    @cached_property
    def _hash(self) -> int:
        return hash((type(self).__name__, self.identity))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other):
            return NotImplemented if not isinstance(other, Mask) else False
        assert isinstance(other, Mask)
        return self._hash == other._hash and self.identity == other.identity

    @cached_property
    def order(self) -> tuple[str, str]:
        """The key by which operands are sorted."""
        return type(self).__name__, repr(self)

    def __copy__(self) -> Mask:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Mask:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # cached values stay behind

    # -- questions -------------------------------------------------------------------------------------------------------------

    def dense(
        self,
        grid: Grid | tuple[int, int],
        *,
        batch: int | None = None,
        heads: int | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The mask written out, pair by pair: bool [Tq, Tk], or [B|1, H|1, Tq, Tk] when it differs by batch row or head.

        batch and heads, when given, are checked against the sizes the mask needs (ShapeError); a mask that differs by neither
        still returns [Tq, Tk]. Cost: Tq * Tk.
        """
        grid = Grid.of(grid)
        check_sizes(self, batch, heads)
        self.check_on(grid)
        Tq, Tk = grid.shape
        index = (None, None)
        if self.uses_index:
            index = (grid.q.indices(device)[:, None], grid.k.indices(device)[None, :])  # type: ignore[assignment]
        pairs = Pairs(grid.q.positions(device)[:, None], grid.k.positions(device)[None, :], *index)
        allowed = self.evaluate(pairs)
        if grid.packed:
            allowed = allowed & (grid.q.sequences(device)[:, None] == grid.k.sequences(device)[None, :])
        if self.batch is None and self.heads is None:
            return allowed.expand(Tq, Tk)
        return allowed.expand(self.batch or 1, self.heads or 1, Tq, Tk)

    def to_bool(self, Tq: int, Tk: int, *, device: torch.device | str | None = None) -> Tensor:
        """`dense` for Tq queries that stand at the end of Tk keys."""
        return self.dense(Grid.dense(Tq, Tk), device=device)

    def block_map(
        self,
        grid: Grid | tuple[int, int],
        *,
        block_q: int = 128,
        block_k: int = 128,
        device: torch.device | str | None = None,
    ) -> BlockMap:
        """Compile to a `BlockMap`: for each block of queries, the blocks of keys it touches. Cached.

        Cost: grows with the number of touched blocks, never with Tq * Tk (`Dense` touches its own elements).
        """
        from attlas.masks.compile import block_map

        return block_map(self, Grid.of(grid), block_q, block_k, device)

    def classify(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Tensor:
        """int8 EMPTY=0, PARTIAL=1 or FULL=2 for blocks of positions with inclusive bounds, int64 tensors of one shape.

        EMPTY and FULL are certain; PARTIAL may be said of a block that is in fact empty or full.
        """
        box = Box(q_lo, q_hi, k_lo, k_hi)
        answers = [self.at(b, h).classify_box(box) for b in range(self.batch or 1) for h in range(self.heads or 1)]
        low, high = reduce(torch.minimum, answers), reduce(torch.maximum, answers)
        return torch.where(low == high, low, torch.full_like(low, PARTIAL))

    def key_span(self, q_lo: int, q_hi: int) -> Span | None:
        """Hull (inclusive) of the key positions that queries at positions q_lo ... q_hi may attend to.

        A bound None is unlimited; None instead of a span means no key at all. Every allowed key lies in the hull.
        """
        return self.hull(q_lo, q_hi)

    def count(self, grid: Grid | tuple[int, int]) -> int:
        """Number of allowed pairs, exact; over all batch rows and heads when the mask differs by them. Never Tq * Tk work."""
        from attlas.masks.compile import count

        return count(self, Grid.of(grid))

    def check_on(self, grid: Grid) -> None:
        """Raise ShapeError when the mask does not fit the grid."""
        if self.batch is not None and grid.packed:
            raise ShapeError(
                f"{self!r} differs by batch row, and a packed grid of {grid.num_sequences} sequences has no batch dimension"
            )
        self.check(grid)


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
class Leaf(Mask):
    """Base of the leaves: prints as a call with the options that were given."""

    @cached_property
    def identity(self) -> tuple[Any, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def __repr__(self) -> str:
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.default is MISSING:
                shown.append(repr(value))
            elif value != f.default:
                shown.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


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


def check_sizes(mask: Mask, batch: int | None, heads: int | None) -> None:
    """Raise ShapeError when a call has another batch size or head count than the mask is written for."""
    for name, wanted, got in (("batch rows", mask.batch, batch), ("heads", mask.heads, heads)):
        if wanted is not None and got is not None and wanted != got:
            raise ShapeError(f"{mask!r} is written for {wanted} {name}, the call has {got}")


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
