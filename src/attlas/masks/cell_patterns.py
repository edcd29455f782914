"""Leaves that decide by whole blocks: BlockWindow (neighbours), Blocks (a matrix) and Random (a reproducible draw)."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attlas.errors import OptionError
from attlas.masks.base import Leaf, Mask, Span
from attlas.masks.box import Box, Pairs, TileKeys, three_valued
from attlas.masks.cells import MAX_CELLS, CellCounts, CellList
from attlas.masks.options import integer, optional_integer, shorten
from attlas.masks.placement import on_device


@dataclass(frozen=True, eq=False, repr=False)
class BlockWindow(Leaf):
    """-right <= q // block - k // block <= left: a window that counts whole blocks of `block` positions."""

    block: int
    left: int
    right: int

    def __post_init__(self) -> None:
        call = f"BlockWindow({self.block!r}, {self.left!r}, {self.right!r})"
        for name, least in (("block", 1), ("left", 0), ("right", 0)):
            object.__setattr__(self, name, integer(call, name, getattr(self, name), least))

    def evaluate(self, pairs: Pairs) -> Tensor:
        apart = pairs.q // self.block - pairs.k // self.block
        return (apart >= -self.right) & (apart <= self.left)

    def classify_box(self, box: Box) -> Tensor:
        b = self.block
        q_lo, q_hi = box.of_q(lambda lo, hi: lo // b), box.of_q(lambda lo, hi: hi // b)
        k_lo, k_hi = box.of_k(lambda lo, hi: lo // b), box.of_k(lambda lo, hi: hi // b)
        least, most = q_lo - k_hi, q_hi - k_lo
        return three_valued((least <= self.left) & (most >= -self.right), (most <= self.left) & (least >= -self.right))

    def tile_keys(self, box: Box) -> TileKeys:
        b = self.block
        q, k = box.of_q(lambda lo, hi: lo // b), box.of_k(lambda lo, hi: lo // b)
        return TileKeys((box.q_lo - q * b, box.k_lo - k * b, q - k))

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        return (q_lo // self.block - self.left) * self.block, (q_hi // self.block + self.right + 1) * self.block - 1


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Blocks(Leaf):
    """allowed[q // block_size, k // block_size]; positions outside of the matrix may not attend.

    allowed is bool [nq_blocks, nk_blocks] or [H, nq_blocks, nk_blocks], as a tensor (copied), nested sequences of bools, or rows
    written as strings: `Blocks(("100", "110"), 64)`.
    """

    allowed: Tensor
    block_size: int
    effort = 1

    def __init__(self, allowed: Tensor | Sequence[Any], block_size: int) -> None:
        call = f"Blocks({shorten(allowed)}, {block_size!r})"
        object.__setattr__(self, "block_size", integer(call, "block_size", block_size, 1))
        object.__setattr__(self, "allowed", _bool_matrix(call, allowed))

    @property
    def heads(self) -> int | None:  # type: ignore[override]
        return self.allowed.shape[0] if self.allowed.ndim == 3 else None

    @cached_property
    def identity(self) -> tuple[Any, ...]:
        digest = hashlib.blake2b(ctypes.string_at(self.allowed.data_ptr(), self.allowed.numel()), digest_size=16)
        return tuple(self.allowed.shape), digest.hexdigest(), self.block_size

    @cached_property
    def order(self) -> tuple[str, str]:
        return "Blocks", repr(self.identity)

    @property
    def held_bytes(self) -> int:
        return 9 * self.allowed.numel()

    @cached_property
    def _counts(self) -> CellCounts:
        return CellCounts(self.allowed)

    @cached_property
    def _heads(self) -> tuple[Blocks, ...]:
        return tuple(Blocks(a, self.block_size) for a in self.allowed)

    def __repr__(self) -> str:
        matrices = self.allowed.reshape(-1, *self.allowed.shape[-2:]).tolist()
        text = tuple(tuple("".join("01"[cell] for cell in row) for row in matrix) for matrix in matrices)
        return f"Blocks({text if self.allowed.ndim == 3 else text[0]!r}, {self.block_size})"

    def at(self, row: int, head: int) -> Mask:
        return self._heads[head] if self.allowed.ndim == 3 else self

    def evaluate(self, pairs: Pairs) -> Tensor:
        nq, nk = self.allowed.shape[-2:]
        q, k = pairs.q // self.block_size, pairs.k // self.block_size
        inside = (q >= 0) & (q < nq) & (k >= 0) & (k < nk)
        found = on_device(self, "allowed", q.device)[..., q.clamp(0, nq - 1), k.clamp(0, nk - 1)]
        return inside & (found if self.allowed.ndim == 2 else found.unsqueeze(0))

    def classify_box(self, box: Box) -> Tensor:
        assert self.allowed.ndim == 2
        q_lo, q_hi, k_lo, k_hi = _cells(box, self.block_size)
        count = self._counts.count(q_lo, q_hi, k_lo, k_hi)
        return three_valued(count > 0, count == (q_hi - q_lo + 1) * (k_hi - k_lo + 1))

    def tile_keys(self, box: Box) -> TileKeys:
        def contains(q: Tensor, k: Tensor) -> Tensor:
            return self._counts.count(q, q, k, k) > 0

        return _cell_keys(box, self.block_size, contains)

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        rows = self.allowed[..., max(q_lo // self.block_size, 0) : max(q_hi // self.block_size + 1, 0), :]
        cols = rows.reshape(-1, rows.shape[-1]).any(0).nonzero().flatten() if rows.numel() else rows.new_empty(0)
        if not len(cols):
            return None
        return int(cols[0]) * self.block_size, (int(cols[-1]) + 1) * self.block_size - 1


@dataclass(frozen=True, eq=False, repr=False)
class Random(Leaf):
    """Each block of queries sees `num_blocks` distinct blocks of keys drawn at random (the random part of BigBird, 2020).

    Drawn uniformly from the blocks [0, span), or, with span=None, from [0, own block], where a query block with fewer than
    num_blocks of them sees all. The draw is a hash of (seed, query block), a function of absolute positions only: the same at any
    length, on any machine.
    """

    num_blocks: int
    block_size: int
    seed: int
    span: int | None = None
    effort = 1

    def __post_init__(self) -> None:
        call = f"Random({self.num_blocks!r}, {self.block_size!r}, seed={self.seed!r}, span={self.span!r})"
        object.__setattr__(self, "num_blocks", integer(call, "num_blocks", self.num_blocks, 1))
        object.__setattr__(self, "block_size", integer(call, "block_size", self.block_size, 1))
        object.__setattr__(self, "seed", integer(call, "seed", self.seed))
        object.__setattr__(self, "span", optional_integer(call, "span", self.span, 0))
        if self.span is not None and self.num_blocks > self.span:
            raise OptionError(f"{call}: cannot draw {self.num_blocks} distinct blocks from the {self.span} blocks of the span")

    def draw(self, query_blocks: Tensor) -> Tensor:
        """The key blocks drawn for each query block, int64 [..., num_blocks]; -1 where there are not so many.

        Floyd's algorithm: the i-th draw is uniform on [0, j], j = n - num_blocks + i, and is replaced by j when drawn before.
        """
        n = (query_blocks + 1 if self.span is None else torch.full_like(query_blocks, self.span)).unsqueeze(-1)
        turn = torch.arange(self.num_blocks, device=query_blocks.device)
        j = n - self.num_blocks + turn
        drawn = _hash(self.seed, query_blocks.unsqueeze(-1), turn) % (j + 1).clamp_(min=1)
        for i in range(1, self.num_blocks):
            before = (drawn[..., :i] == drawn[..., i : i + 1]).any(-1)
            drawn[..., i] = torch.where(before, j[..., i], drawn[..., i])
        return drawn if self.span is not None else torch.where(j >= turn, drawn, torch.where(turn < n, turn, -1))

    def evaluate(self, pairs: Pairs) -> Tensor:
        k = pairs.k // self.block_size
        drawn = self.draw(pairs.q // self.block_size)
        allowed = k == drawn[..., 0]
        for i in range(1, self.num_blocks):
            allowed = allowed | (k == drawn[..., i])
        return allowed & (k >= 0)

    def _list(self, box: Box) -> CellList:
        """The drawn blocks of all query blocks asked about (the last list is kept: one compile asks many times)."""
        lo, hi = int(box.q_lo.min()) // self.block_size, int(box.q_hi.max()) // self.block_size
        kept: CellList | None = self.__dict__.get("_kept")
        if kept is None or lo < kept.row_lo or hi > kept.row_hi:
            rows = torch.arange(lo, hi + 1, device="cpu")
            cols = self.draw(rows)
            real = cols >= 0
            kept = CellList(rows[:, None].expand_as(cols)[real], cols[real], lo, hi)
            self.__dict__["_kept"] = kept
        return kept

    def classify_box(self, box: Box) -> Tensor:
        if not box.q_lo.numel():
            return torch.empty_like(box.q_lo, dtype=torch.int8)
        return self._list(box).classify(*_cells(box, self.block_size))

    def tile_keys(self, box: Box) -> TileKeys:
        return _cell_keys(box, self.block_size, self._list(box).contains)

    def hull(self, q_lo: int, q_hi: int) -> Span | None:
        first, last = q_lo // self.block_size, q_hi // self.block_size
        if last - first >= 64:
            end = last + 1 if self.span is None else self.span
            return (0, end * self.block_size - 1) if end > 0 else None
        drawn = self.draw(torch.arange(first, last + 1, device="cpu"))
        drawn = drawn[drawn >= 0]
        if not len(drawn):
            return None
        return int(drawn.min()) * self.block_size, (int(drawn.max()) + 1) * self.block_size - 1


def _cells(box: Box, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last row, first and last column of the cells that each box touches."""
    q = [box.of_q(lambda lo, hi: lo // size), box.of_q(lambda lo, hi: hi // size)]
    return q[0], q[1], box.of_k(lambda lo, hi: lo // size), box.of_k(lambda lo, hi: hi // size)


def _cell_keys(box: Box, size: int, contains: Callable[[Tensor, Tensor], Tensor]) -> TileKeys:
    """A tile is known by its offset inside the cells and by which of the cells it touches are set."""
    q_lo, q_hi, k_lo, k_hi = _cells(box, size)
    rows, cols = (int((hi - lo).max()) + 1 if hi.numel() else 1 for lo, hi in ((q_lo, q_hi), (k_lo, k_hi)))
    if rows * cols > MAX_CELLS:
        return TileKeys((), torch.zeros_like(q_lo, dtype=torch.bool))
    bits = torch.zeros_like(q_lo)
    for a in range(rows):
        for b in range(cols):
            q, k = torch.minimum(q_lo + a, q_hi), torch.minimum(k_lo + b, k_hi)
            bits |= contains(q, k).long() << (a * cols + b)
    return TileKeys((box.q_lo % size, box.k_lo % size, bits & 0xFFFFFFFF, bits >> 32))


def _hash(seed: int, block: Tensor, turn: Tensor) -> Tensor:
    """63 well-mixed bits of (seed, block, turn): the finaliser of splitmix64 (Steele et al., 2014) on a Weyl sequence."""
    start = _signed(seed * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019)
    x = block * _signed(0x9E3779B97F4A7C15) + (turn * 0x2545F4914F6CDD1D + start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift)) * _signed(factor)
    return (x ^ _shift_right(x, 31)) & 0x7FFFFFFFFFFFFFFF


def _shift_right(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)  # logical, on signed integers


def _signed(x: int) -> int:
    """x modulo 2**64 as a signed 64-bit integer."""
    x &= 0xFFFFFFFFFFFFFFFF
    return x - (1 << 64) if x >> 63 else x


def _bool_matrix(call: str, value: Any) -> Tensor:
    """A contiguous bool copy on the CPU, 2-D or 3-D."""
    if not isinstance(value, Tensor):
        try:
            value = torch.tensor(_rows(value), dtype=torch.bool, device="cpu")
        except (TypeError, ValueError) as error:
            raise OptionError(f"{call}: allowed is not a matrix: {error}") from None
    if value.dtype != torch.bool:
        raise OptionError(f"{call}: allowed must be bool, not {value.dtype}")
    if value.ndim not in (2, 3):
        raise OptionError(f"{call}: allowed must be [nq_blocks, nk_blocks] or [H, nq_blocks, nk_blocks], not {list(value.shape)}")
    if not value.numel():
        raise OptionError(f"{call}: allowed must have at least one block each way, not {list(value.shape)}")
    return value.detach().cpu().contiguous().clone()


def _rows(value: Any) -> Any:
    """Nested lists of bools from nested sequences whose rows may be strings of 0 and 1."""
    if isinstance(value, str):
        if set(value) - set("01"):
            raise ValueError(f"a row must be written with 0 and 1, not {value!r}")
        return [c == "1" for c in value]
    if isinstance(value, (bool, int)) or not hasattr(value, "__iter__"):
        if value in (0, 1):
            return bool(value)
        raise ValueError(f"{value!r} is neither True nor False")
    return [_rows(v) for v in value]
