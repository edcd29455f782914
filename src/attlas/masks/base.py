"""What a mask is and what it can be asked: the base of all expressions, and the base of the leaves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields
from functools import cached_property, reduce
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError
from attlas.masks.box import PARTIAL, Box, Pairs, TileKeys
from attlas.masks.geometry import Grid

if TYPE_CHECKING:
    from attlas.masks.block_map import BlockMap

Span = tuple[int | None, int | None]  # inclusive bounds of key positions, None = unlimited

_numbers = count()
_alive: WeakValueDictionary[str, Mask] = WeakValueDictionary()


class Mask(ABC):
    """A rule on absolute positions (and, for some leaves, batch row and head) that says which pairs may attend."""

    batch: int | None = None  # number of batch rows the mask is written for; None = any
    heads: int | None = None  # number of heads the mask is written for; None = any
    uses_index: bool = False  # reads array indices beside positions
    effort: int = 0  # classifying a box takes 0 = arithmetic, 1 = searching
    precedence: int = 3  # for printing: | is 1, & is 2, ~ and leaves are 3
    handle: str  # names this object for as long as it lives; what a compiled graph holds in its place

    def __new__(cls, *args: Any, **kwargs: Any) -> Mask:
        new = super().__new__(cls)
        object.__setattr__(new, "handle", str(next(_numbers)))
        _alive[new.handle] = new
        return new

    @staticmethod
    def of_handle(handle: str) -> Mask:
        """The mask with this handle. OptionError when it is gone."""
        found = _alive.get(handle)
        if found is None:
            raise OptionError(
                f"mask {handle} is gone: keep the mask that a compiled function was traced with for as long as the function"
            )
        return found

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
        from attlas.masks.expr import conjunction  # the compounds are masks themselves

        return conjunction((self, other)) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        from attlas.masks.expr import disjunction

        return disjunction((self, other)) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        from attlas.masks.expr import Not

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


def check_sizes(mask: Mask, batch: int | None, heads: int | None) -> None:
    """Raise ShapeError when a call has another batch size or head count than the mask is written for."""
    for name, wanted, got in (("batch rows", mask.batch, batch), ("heads", mask.heads, heads)):
        if wanted is not None and got is not None and wanted != got:
            raise ShapeError(f"{mask!r} is written for {wanted} {name}, the call has {got}")
