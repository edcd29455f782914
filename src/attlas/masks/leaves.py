"""Leaves that are arithmetic on positions: Causal, Window, Dilated, Strided, Fixed, Local, Prefix, Padding, Sinks.

Below q and k are the absolute positions of a query and a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.errors import OptionError
from attlas.masks.base import Leaf, Mask, Span
from attlas.masks.box import PARTIAL, Box, Pairs, TileKeys, three_valued
from attlas.masks.options import integer, integers, optional_integer, shorten


@dataclass(frozen=True, eq=False, repr=False)
class Causal(Leaf):
    """k <= q: a query attends to itself and to what came before.

    align="end"    positions are compared, so with Tq < Tk the last query sees every key (decoding, flash-attn)
    align="start"  array indices inside the sequence are compared: query row i sees key columns 0 ... i (SDPA's is_causal)
    """

    align: str = "end"

    def __post_init__(self) -> None:
        if self.align not in ("end", "start"):
            raise OptionError(f"Causal(align={self.align!r}): align must be 'end' or 'start'")

    @property
    def uses_index(self) -> bool:  # type: ignore[override]
        return self.align == "start"

    def evaluate(self, pairs: Pairs) -> Tensor:
        if self.align == "end":
            return pairs.k <= pairs.q
        assert pairs.q_index is not None and pairs.k_index is not None
        return pairs.k_index <= pairs.q_index

    def classify_box(self, box: Box) -> Tensor:
        if self.align == "end":
            return three_valued(box.d_hi >= 0, box.d_lo >= 0)
        if box.qi_lo is None or box.qi_hi is None or box.ki_lo is None or box.ki_hi is None:  # positions say nothing of indices
            return torch.full_like(box.q_lo, PARTIAL, dtype=torch.int8)
        return three_valued(box.qi_hi >= box.ki_lo, box.qi_lo >= box.ki_hi)

    def tile_keys(self, box: Box) -> TileKeys:
        if self.align == "end":
            return TileKeys((box.q_lo - box.k_lo,))
        assert box.qi_lo is not None and box.ki_lo is not None
        return TileKeys((box.qi_lo - box.ki_lo,))

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return (None, q_hi) if self.align == "end" else (None, None)

    def hull_of_complement(self, q_lo: int, q_hi: int) -> Span | None:
        return (q_lo + 1, None) if self.align == "end" else (None, None)


@dataclass(frozen=True, eq=False, repr=False)
class Window(Leaf):
    """-right <= q - k <= left: `left` other keys before the query and `right` after it; None is unlimited.

    `Window.last(n)` counts keys including the query's own: the n most recent ones.
    """

    left: int | None
    right: int | None

    def __post_init__(self) -> None:
        call = f"Window(left={self.left!r}, right={self.right!r})"
        object.__setattr__(self, "left", optional_integer(call, "left", self.left, 0))
        object.__setattr__(self, "right", optional_integer(call, "right", self.right, 0))

    @classmethod
    def last(cls, n: int) -> Window:
        """The n most recent keys, the query's own included."""
        return cls(integer(f"Window.last({n!r})", "n", n, 1) - 1, 0)

    def evaluate(self, pairs: Pairs) -> Tensor:
        allowed = None
        if self.left is not None:
            allowed = pairs.k >= pairs.q - self.left
        if self.right is not None:
            before = pairs.k <= pairs.q + self.right
            allowed = before if allowed is None else allowed & before
        return torch.ones_like(pairs.q, dtype=torch.bool) if allowed is None else allowed

    def classify_box(self, box: Box) -> Tensor:
        some = torch.ones_like(box.q_lo, dtype=torch.bool)
        every = some.clone()
        if self.left is not None:
            some &= box.d_lo <= self.left
            every &= box.d_hi <= self.left
        if self.right is not None:
            some &= box.d_hi >= -self.right
            every &= box.d_lo >= -self.right
        return three_valued(some, every)

    def tile_keys(self, box: Box) -> TileKeys:
        return TileKeys((box.q_lo - box.k_lo,))

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return None if self.left is None else q_lo - self.left, None if self.right is None else q_hi + self.right

    def hull_of_complement(self, q_lo: int, q_hi: int) -> Span | None:
        if self.left is None and self.right is None:
            return None
        if self.left is None:
            assert self.right is not None
            return q_lo + self.right + 1, None
        return (None, q_hi - self.left - 1) if self.right is None else (None, None)


@dataclass(frozen=True, eq=False, repr=False)
class Dilated(Leaf):
    """q - k = m * dilation with -right <= m <= left: a window that looks at every `dilation`-th key (Longformer, 2020)."""

    left: int | None
    right: int | None
    dilation: int

    def __post_init__(self) -> None:
        call = f"Dilated(left={self.left!r}, right={self.right!r}, dilation={self.dilation!r})"
        object.__setattr__(self, "left", optional_integer(call, "left", self.left, 0))
        object.__setattr__(self, "right", optional_integer(call, "right", self.right, 0))
        object.__setattr__(self, "dilation", integer(call, "dilation", self.dilation, 1))

    @property
    def window(self) -> Window:
        """The same reach without gaps."""
        reach = [None if n is None else n * self.dilation for n in (self.left, self.right)]
        return Window(*reach)

    def evaluate(self, pairs: Pairs) -> Tensor:
        return self.window.evaluate(pairs) & (pairs.q % self.dilation == pairs.k % self.dilation)

    def classify_box(self, box: Box) -> Tensor:
        lo, hi = box.d_lo, box.d_hi
        if self.right is not None:
            lo = lo.clamp(min=-self.right * self.dilation)
        if self.left is not None:
            hi = hi.clamp(max=self.left * self.dilation)
        some = _multiple_in(lo, hi, self.dilation)
        inside = (lo == box.d_lo) & (hi == box.d_hi)
        return three_valued(some, some & inside if self.dilation == 1 else some & inside & (lo == hi))

    def tile_keys(self, box: Box) -> TileKeys:
        inside = self.window.classify_box(box) != PARTIAL  # off the window's edges only the residue counts
        d = box.q_lo - box.k_lo
        return TileKeys((inside.long(), torch.where(inside, d % self.dilation, d)))

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return self.window.hull(q_lo, q_hi)


@dataclass(frozen=True, eq=False, repr=False)
class Strided(Leaf):
    """(q - k) % stride == 0: the columns of the strided Sparse Transformer pattern (Child et al., 2019)."""

    stride: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", integer(f"Strided({self.stride!r})", "stride", self.stride, 1))

    def evaluate(self, pairs: Pairs) -> Tensor:
        return pairs.q % self.stride == pairs.k % self.stride

    def classify_box(self, box: Box) -> Tensor:
        some = _multiple_in(box.d_lo, box.d_hi, self.stride)
        return three_valued(some, some if self.stride == 1 else some & (box.d_lo == box.d_hi))

    def tile_keys(self, box: Box) -> TileKeys:
        residues = box.of_q(lambda lo, hi: lo % self.stride) - box.of_k(lambda lo, hi: lo % self.stride)
        return TileKeys((residues + self.stride * (residues < 0),))

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return None, None


@dataclass(frozen=True, eq=False, repr=False)
class Local(Leaf):
    """q // block == k // block: attention inside blocks of `block` positions."""

    block: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", integer(f"Local({self.block!r})", "block", self.block, 1))

    def evaluate(self, pairs: Pairs) -> Tensor:
        return pairs.q // self.block == pairs.k // self.block

    def classify_box(self, box: Box) -> Tensor:
        return _same_block(box, self.block)

    def tile_keys(self, box: Box) -> TileKeys:
        b = self.block
        q, k = box.of_q(lambda lo, hi: lo // b), box.of_k(lambda lo, hi: lo // b)
        return TileKeys((box.q_lo - q * b, box.k_lo - k * b, q - k))

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return q_lo // self.block * self.block, (q_hi // self.block + 1) * self.block - 1


@dataclass(frozen=True, eq=False, repr=False)
class Fixed(Leaf):
    """q // block == k // block, or k % block >= block - summary: own block and the last `summary` keys of every block.

    The fixed pattern of the Sparse Transformer (Child et al., 2019), to be joined with `Causal()`.
    """

    block: int
    summary: int

    def __post_init__(self) -> None:
        call = f"Fixed(block={self.block!r}, summary={self.summary!r})"
        object.__setattr__(self, "block", integer(call, "block", self.block, 1))
        object.__setattr__(self, "summary", integer(call, "summary", self.summary, 0))
        if self.summary > self.block:
            raise OptionError(f"{call}: summary must be at most block")

    def evaluate(self, pairs: Pairs) -> Tensor:
        own = pairs.q // self.block == pairs.k // self.block
        return own | (pairs.k % self.block >= self.block - self.summary)

    def classify_box(self, box: Box) -> Tensor:
        own = _same_block(box, self.block)
        first = self.block - self.summary  # residue of the first summary key

        def summaries(lo: Tensor, hi: Tensor) -> Tensor:
            residue = lo % self.block
            some = (lo + (first - residue).clamp(min=0) <= hi) & (self.summary > 0)
            every = (residue >= first) & (lo // self.block == hi // self.block)
            return three_valued(some, every | (self.summary == self.block))

        return torch.maximum(own, box.of_k(summaries))

    def tile_keys(self, box: Box) -> TileKeys:
        b = self.block
        near = _same_block(box, b) != 0
        zero = torch.zeros_like(box.q_lo)
        q, k = box.of_q(lambda lo, hi: lo // b), box.of_k(lambda lo, hi: lo // b)
        return TileKeys(
            (near.long(), torch.where(near, box.q_lo - q * b, zero), box.k_lo - k * b, torch.where(near, q - k, zero))
        )

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return (None, None) if self.summary else Local(self.block).hull(q_lo, q_hi)


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Prefix(Leaf):
    """k < n: every query sees the first n keys. With one n per batch row, `Prefix((5, 3))`, the mask needs that batch size."""

    n: int | tuple[int, ...]

    def __init__(self, n: int | Sequence[int] | Tensor) -> None:
        call = f"Prefix({shorten(n)})"
        if isinstance(n, (tuple, list, range)) or (isinstance(n, Tensor) and n.ndim):
            object.__setattr__(self, "n", integers(call, "n", n, 0))
            if not self.n:
                raise OptionError(f"{call}: one length per batch row is needed")
        else:
            object.__setattr__(self, "n", integer(call, "n", n, 0))

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        return len(self.n) if isinstance(self.n, tuple) else None

    @property
    def _most(self) -> int:
        return max(self.n) if isinstance(self.n, tuple) else self.n

    def evaluate(self, pairs: Pairs) -> Tensor:
        return pairs.k < _per_row(self.n, pairs)

    def classify_box(self, box: Box) -> Tensor:
        assert isinstance(self.n, int)
        return three_valued(box.k_lo < self.n, box.k_hi < self.n)

    def tile_keys(self, box: Box) -> TileKeys:
        return TileKeys((box.k_lo,))

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return None, self._most - 1

    def hull_of_complement(self, q_lo: int, q_hi: int) -> Span | None:
        return min(self.n) if isinstance(self.n, tuple) else self.n, None

    def at(self, row: int, head: int) -> Mask:
        return Prefix(self.n[row]) if isinstance(self.n, tuple) else self


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Padding(Leaf):
    """k < lengths[b]: batch row b has lengths[b] keys, the rest is padding on the right. Needs a batch of that size."""

    lengths: tuple[int, ...]

    def __init__(self, lengths: Sequence[int] | Tensor) -> None:
        call = f"Padding({shorten(lengths)})"
        object.__setattr__(self, "lengths", integers(call, "lengths", lengths, 0))
        if not self.lengths:
            raise OptionError(f"{call}: one length per batch row is needed")

    @property
    def batch(self) -> int | None:  # type: ignore[override]
        return len(self.lengths)

    def evaluate(self, pairs: Pairs) -> Tensor:
        return pairs.k < _per_row(self.lengths, pairs)

    def classify_box(self, box: Box) -> Tensor:
        raise AssertionError("Padding is compiled row by row, as Prefix")

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return None, max(self.lengths) - 1

    def hull_of_complement(self, q_lo: int, q_hi: int) -> Span | None:
        return min(self.lengths), None

    def at(self, row: int, head: int) -> Mask:
        return Prefix(self.lengths[row])


@dataclass(frozen=True, eq=False, repr=False)
class Sinks(Leaf):
    """k < n and k <= q: the first n keys stay visible (attention sinks, StreamingLLM, Xiao et al., 2023)."""

    n: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", integer(f"Sinks({self.n!r})", "n", self.n, 0))

    def evaluate(self, pairs: Pairs) -> Tensor:
        return pairs.k <= pairs.q.clamp(max=self.n - 1)

    def classify_box(self, box: Box) -> Tensor:
        some = (box.k_lo < self.n) & (box.d_hi >= 0)
        return three_valued(some, (box.k_hi < self.n) & (box.d_lo >= 0))

    def tile_keys(self, box: Box) -> TileKeys:
        return TileKeys((box.q_lo.clamp(max=self.n), box.k_lo))

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return None, min(self.n - 1, q_hi)


def _per_row(n: int | tuple[int, ...], pairs: Pairs) -> int | Tensor:
    return torch.tensor(n, dtype=torch.int64, device=pairs.k.device)[:, None, None, None] if isinstance(n, tuple) else n


def _multiple_in(lo: Tensor, hi: Tensor, step: int) -> Tensor:
    """True where some multiple of step lies in [lo, hi] (and lo <= hi)."""
    return (hi // step * step >= lo) & (lo <= hi)


def _same_block(box: Box, block: int) -> Tensor:
    (q_lo, q_hi), (k_lo, k_hi) = ((of(lambda lo, hi: lo // block), of(lambda lo, hi: hi // block)) for of in (box.of_q, box.of_k))
    return three_valued((q_lo <= k_hi) & (k_lo <= q_hi), (q_lo == k_hi) & (k_lo == q_hi))
