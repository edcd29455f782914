"""What leaves are asked about: single pairs (`Pairs`), or whole blocks of pairs (`Box`), answered in three values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

EMPTY, PARTIAL, FULL = 0, 1, 2


def three_valued(some: Tensor, every: Tensor) -> Tensor:
    """int8: EMPTY where not `some`, FULL where `every`, else PARTIAL. `every` must imply `some`."""
    return some.view(torch.int8) + every.view(torch.int8)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Positions of queries [..., tq, 1] and keys [..., 1, tk], int64, broadcast against each other.

    q_index and k_index are the in-sequence array indices, present when the mask `uses_index`.
    """

    q: Tensor
    k: Tensor
    q_index: Tensor | None = None
    k_index: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Box:
    """Blocks of pairs: inclusive bounds of the query and key positions of each block, int64 tensors of one shape.

    The bounds are hulls, so answers must hold for every pair inside them. For tile keys the block is exact: positions
    q_lo ... q_hi and k_lo ... k_hi in order.
    """

    q_lo: Tensor
    q_hi: Tensor
    k_lo: Tensor
    k_hi: Tensor
    qi_lo: Tensor | None = None
    qi_hi: Tensor | None = None
    ki_lo: Tensor | None = None
    ki_hi: Tensor | None = None
    q_blocks: tuple[Tensor, Tensor, Tensor] | None = None  # bounds of the distinct sides, and which of them each box has
    k_blocks: tuple[Tensor, Tensor, Tensor] | None = None

    def take(self, at: Tensor) -> Box:
        """The boxes `at`."""
        bounds = (self.q_lo, self.q_hi, self.k_lo, self.k_hi, self.qi_lo, self.qi_hi, self.ki_lo, self.ki_hi)
        sides = ((*side[:2], side[2][at]) if side is not None else None for side in (self.q_blocks, self.k_blocks))
        return Box(*(None if x is None else x[at] for x in bounds), *sides)  # type: ignore[arg-type]

    def of_q(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """function(q_lo, q_hi), elementwise, worked out once for each distinct side when boxes share sides."""
        return _shared(function, self.q_lo, self.q_hi, self.q_blocks)

    def of_k(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """function(k_lo, k_hi), likewise."""
        return _shared(function, self.k_lo, self.k_hi, self.k_blocks)

    @cached_property
    def d_lo(self) -> Tensor:
        """Least query position minus key position."""
        return self.q_lo - self.k_hi

    @cached_property
    def d_hi(self) -> Tensor:
        """Greatest query position minus key position."""
        return self.q_hi - self.k_lo


def _shared(
    function: Callable[[Tensor, Tensor], Tensor], lo: Tensor, hi: Tensor, blocks: tuple[Tensor, Tensor, Tensor] | None
) -> Tensor:
    if blocks is None or len(lo) <= len(blocks[0]):
        return function(lo, hi)
    return function(blocks[0], blocks[1])[blocks[2]]


@dataclass(frozen=True, eq=False)
class TileKeys:
    """Columns that determine the contents of a tile of given height and width: equal columns, equal tiles.

    keyed False: the columns do not suffice there (the tile is evaluated by itself); None means that they always do.
    """

    columns: tuple[Tensor, ...] = ()
    keyed: Tensor | None = None
