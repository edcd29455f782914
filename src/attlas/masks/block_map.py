"""The compiled form of a mask, and the one structure that block-wise kernels read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError
from attlas.masks import bits
from attlas.masks.geometry import Grid

if TYPE_CHECKING:
    from attlas.masks.expr import Mask

FULL_TILE = -1


@dataclass(frozen=True, eq=False)
class BlockMap:
    """For each block of queries, the blocks of keys it touches, in compressed rows.

    q_len, k_len      tokens;  nq = ceil(q_len / block_q), nk = ceil(k_len / block_k)
    batch, heads      1, or B / H when the map differs by batch row / head; row (b, h, i) is row (b * heads + h) * nq + i
    row_ptr           int64 [batch * heads * nq + 1]: the entries of row r are row_ptr[r] ... row_ptr[r + 1] - 1
    cols              int32 [nnz]: block of keys, ascending in each row
    tile_ids          int32 [nnz]: -1 = every pair of the block (clipped at the edge) is allowed, else an index into tiles
    tiles             uint8 [n_tiles, block_q, block_k // 8]: bit j of byte i of row r is query r, key 8 * i + j of the block;
                      bits past the edge are 0. No two tiles are equal, none is all ones on its block, none all zeros.
    """

    q_len: int
    k_len: int
    block_q: int
    block_k: int
    batch: int
    heads: int
    row_ptr: Tensor
    cols: Tensor
    tile_ids: Tensor
    tiles: Tensor

    @property
    def nq(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def nk(self) -> int:
        return -(-self.k_len // self.block_k)

    @property
    def nnz(self) -> int:
        """Number of touched blocks."""
        return len(self.cols)

    @property
    def device(self) -> torch.device:
        return self.cols.device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, those of a transpose included once it has been made."""
        own = sum(t.numel() * t.element_size() for t in (self.row_ptr, self.cols, self.tile_ids, self.tiles))
        turned = self.__dict__.get("_transposed")
        return own if turned is None else own + turned.nbytes - turned.tiles.numel()

    def __repr__(self) -> str:
        lead = "" if self.batch == self.heads == 1 else f", batch={self.batch}, heads={self.heads}"
        return (
            f"BlockMap({self.q_len} x {self.k_len} in blocks of {self.block_q} x {self.block_k}{lead}: "
            f"{self.nnz} blocks touched, {len(self.tiles)} tiles)"
        )

    def row(self, b: int, h: int, i: int) -> tuple[Tensor, Tensor]:
        """(cols, tile_ids) of query block i; b and h are ignored where the map does not differ by them."""
        r = (min(b, self.batch - 1) * self.heads + min(h, self.heads - 1)) * self.nq + i
        lo, hi = self.row_ptr[r : r + 2].tolist()
        return self.cols[lo:hi], self.tile_ids[lo:hi]

    def tile(self, tile_id: int) -> Tensor:
        """bool [block_q, block_k] of one tile; all ones for -1."""
        if tile_id == FULL_TILE:
            return torch.ones(self.block_q, self.block_k, dtype=torch.bool, device=self.device)
        return bits.unpack(self.tiles[tile_id])

    @cached_property
    def rows(self) -> Tensor:
        """int64 [nnz]: the row of every entry."""
        counts = self.row_ptr.diff()
        return torch.repeat_interleave(torch.arange(len(counts), device=self.device), counts, output_size=self.nnz)

    def to_dense(self) -> Tensor:
        """The mask written out: bool [batch, heads, q_len, k_len]."""
        lead, nq, nk = self.batch * self.heads, self.nq, self.nk
        out = torch.zeros(lead, nq, nk, self.block_q, self.block_k, dtype=torch.bool, device=self.device)
        one = torch.ones(1, self.block_q, self.block_k, dtype=torch.bool, device=self.device)
        pool = torch.cat([bits.unpack(self.tiles), one])  # tile -1 is the last one
        if self.nnz:
            out[self.rows // nq, self.rows % nq, self.cols.long()] = pool[self.tile_ids.long()]
        full = out.transpose(2, 3).reshape(lead, nq * self.block_q, nk * self.block_k)
        return full[:, : self.q_len, : self.k_len].reshape(self.batch, self.heads, self.q_len, self.k_len)

    def count(self) -> int:
        """Number of allowed pairs over all batch rows and heads."""
        if not self.nnz:
            return 0
        uses = torch.bincount(self.tile_ids + 1, minlength=len(self.tiles) + 1)
        total = int((uses[1:] * bits.popcount(self.tiles)).sum())
        full = self.tile_ids == FULL_TILE
        # Full blocks are counted whole, then what hangs over the last row and the last column is taken away again.
        over_q, over_k = self.nq * self.block_q - self.q_len, self.nk * self.block_k - self.k_len
        at_end = full & (self.cols == self.nk - 1)
        in_last, corners = 0, 0
        for lead in range(self.batch * self.heads):
            lo, hi = self.row_ptr[(lead + 1) * self.nq - 1 : (lead + 1) * self.nq + 1].tolist()
            in_last += int(full[lo:hi].sum())
            corners += int(at_end[lo:hi].sum())
        total += int(uses[0]) * self.block_q * self.block_k
        return total - in_last * over_q * self.block_k - int(at_end.sum()) * over_k * self.block_q + corners * over_q * over_k

    def density(self) -> float:
        """Allowed pairs / all pairs (0 for an empty map)."""
        pairs = self.batch * self.heads * self.q_len * self.k_len
        return self.count() / pairs if pairs else 0.0

    def to(self, device: torch.device | str | None) -> BlockMap:
        """The same map on another device."""
        if device is None or torch.device(device) == self.device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("row_ptr", "cols", "tile_ids", "tiles")}
        return replace(self, **moved)

    def transpose(self) -> KeyMajorMap:
        """The same map listed by blocks of keys, for backward passes. Made once and kept."""
        return self._transposed

    @cached_property
    @torch.inference_mode(False)
    def _transposed(self) -> KeyMajorMap:
        lead, nq, nk = self.batch * self.heads, self.nq, self.nk
        target = self.rows // max(nq, 1) * nk + self.cols
        counts = torch.bincount(target, minlength=lead * nk)
        order = torch.sort(target.int() if lead * nk < 2**31 else target, stable=True).indices
        row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        cols = (self.rows[order] % max(nq, 1)).int()
        shape = (self.q_len, self.k_len, self.block_q, self.block_k, self.batch, self.heads)
        return KeyMajorMap(*shape, row_ptr, cols, self.tile_ids[order], self.tiles)

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor | Sequence[Sequence[int]] | Sequence[Sequence[bool]],
        q_len: int,
        k_len: int,
        *,
        block_q: int = 128,
        block_k: int = 128,
        mask: Mask | None = None,
        grid: Grid | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMap:
        """The map of a selection of blocks, for mechanisms that choose them from the data.

        blocks  bool [nq, nk], [H, nq, nk] or [B, H, nq, nk]: True = chosen; or integers [..., nq, n]: the blocks of keys that
                each block of queries chose, any order, repetitions allowed, negative = none; or nested sequences of either kind
                [nq][...], where rows of integers may have different lengths
        mask    what is allowed inside the chosen blocks, e.g. `Causal()`; None = everything
        grid    positions the mask is asked about; None = `Grid.dense(q_len, k_len)`
        """
        check_blocks("BlockMap.from_blocks", (q_len, k_len), block_q, block_k)
        grid = Grid.dense(q_len, k_len) if grid is None else grid
        if grid.shape != (q_len, k_len):
            raise ShapeError(f"BlockMap.from_blocks(q_len={q_len}, k_len={k_len}): the grid has {grid.shape} queries and keys")
        chosen = _chosen(blocks, -(-q_len // block_q), -(-k_len // block_k))
        batch, heads = chosen.shape[:2]
        if mask is not None or grid.packed:
            from attlas.masks.compile import within
            from attlas.masks.expr import All

            return within(All() if mask is None else mask, grid, chosen.cpu(), block_q, block_k).to(device or chosen.device)
        counts = chosen.sum(-1).flatten()
        row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        cols = chosen.nonzero()[:, -1].int()
        tiles = torch.zeros(0, block_q, block_k // 8, dtype=torch.uint8, device=chosen.device)
        full = torch.full_like(cols, FULL_TILE)
        return cls(q_len, k_len, block_q, block_k, batch, heads, row_ptr, cols, full, tiles).to(device)


@dataclass(frozen=True, eq=False)
class KeyMajorMap:
    """A BlockMap listed by blocks of keys: row (b, h, j) is row (b * heads + h) * nk + j, cols are blocks of queries, ascending.

    The tiles are the ones of the BlockMap, rows still queries: a backward pass reads them as the forward pass does.
    """

    q_len: int
    k_len: int
    block_q: int
    block_k: int
    batch: int
    heads: int
    row_ptr: Tensor
    cols: Tensor
    tile_ids: Tensor
    tiles: Tensor

    @property
    def nq(self) -> int:
        return -(-self.q_len // self.block_q)

    @property
    def nk(self) -> int:
        return -(-self.k_len // self.block_k)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.row_ptr, self.cols, self.tile_ids, self.tiles))

    def row(self, b: int, h: int, j: int) -> tuple[Tensor, Tensor]:
        """(query blocks, tile_ids) of key block j; b and h are ignored where the map does not differ by them."""
        r = (min(b, self.batch - 1) * self.heads + min(h, self.heads - 1)) * self.nk + j
        lo, hi = self.row_ptr[r : r + 2].tolist()
        return self.cols[lo:hi], self.tile_ids[lo:hi]


def check_blocks(call: str, shape: tuple[int, int], block_q: int, block_k: int) -> None:
    """Raise OptionError for block sizes that tiles cannot be packed for."""
    if not (isinstance(block_q, int) and isinstance(block_k, int) and block_q > 0 and block_k > 0 and block_k % 8 == 0):
        sizes = f"block_q={block_q!r}, block_k={block_k!r}"
        raise OptionError(f"{call}({shape[0]} x {shape[1]}, {sizes}): block_q must be positive, block_k a positive multiple of 8")


def _chosen(blocks: Tensor | Sequence, nq: int, nk: int) -> Tensor:
    """bool [B|1, H|1, nq, nk]"""
    given = blocks if isinstance(blocks, Tensor) else _tensor(blocks)
    if given.ndim not in (2, 3, 4) or given.shape[-2] != nq or given.is_floating_point():
        raise ShapeError(
            f"BlockMap.from_blocks(blocks {list(given.shape)} {given.dtype}): wanted [.., nq={nq}, ..] bools or indices"
        )
    if given.dtype != torch.bool:
        if given.numel() and int(given.max()) >= nk:
            raise ShapeError(
                f"BlockMap.from_blocks(blocks {list(given.shape)}): block {int(given.max())} of only {nk} blocks of keys"
            )
        index = given.long()
        index = torch.where(index < 0, nk, index)  # "none" goes to a column that is cut off
        given = torch.zeros(*index.shape[:-1], nk + 1, dtype=torch.bool, device=index.device).scatter_(-1, index, True)[..., :nk]
    elif given.shape[-1] != nk:
        raise ShapeError(
            f"BlockMap.from_blocks(blocks {list(given.shape)} bool): wanted {nk} blocks of keys in the last dimension"
        )
    return given.reshape(*(1,) * (4 - given.ndim), *given.shape)


def _tensor(nested: Sequence) -> Tensor:
    """Nested sequences as a tensor; ragged rows of indices are filled up with -1."""
    rows = list(_innermost(nested))
    if rows and all(isinstance(v, bool) for r in rows for v in r):
        return torch.tensor(nested, dtype=torch.bool, device="cpu")
    width = max((len(r) for r in rows), default=0)

    def padded(value: Sequence) -> list:
        if value and isinstance(value[0], Sequence):
            return [padded(v) for v in value]
        return [*value, *[-1] * (width - len(value))]

    return torch.tensor(padded(nested), dtype=torch.int64, device="cpu")


def _innermost(nested: Sequence) -> Iterator[Sequence]:
    if len(nested) and isinstance(nested[0], Sequence):
        for part in nested:
            yield from _innermost(part)
    else:
        yield nested
