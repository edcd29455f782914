"""Blocks of queries that gather as many blocks of keys, worked on in one product.

Where every head has a map of its own (BigBird's random blocks), the products of one head and one block of queries are too small
to hide what a call costs. Rows of a map that touch equally many blocks, all of them full, differ only in which ones: their keys
are gathered side by side and multiplied at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attlas.masks.block_map import BlockMap

if TYPE_CHECKING:
    from attlas.kernels.blocked.chunks import Chunk


class Gang(NamedTuple):
    """rows int64 [G]: blocks of queries; cols int64 [G * each]: blocks of keys, `each` for every one of them, and `places` the
    same as numbers."""

    rows: Tensor
    cols: Tensor
    each: int
    places: tuple[int, ...]


def gangs(
    block_map: BlockMap, rows: Sequence[tuple[list[int], list[int]]], most: tuple[int, int], device: torch.device
) -> Iterator[Gang]:
    """Gangs of two rows or more out of `rows`, the (blocks of keys, tiles) of each block of queries. Whole blocks only; `most`:
    keys of a row, and scores of a gang."""
    alike: dict[int, list[int]] = {}
    whole_q, whole_k = block_map.q_len // block_map.block_q, block_map.k_len // block_map.block_k
    for i, (cols, tiles) in enumerate(rows):
        if cols and i < whole_q and cols[-1] < whole_k and len(cols) * block_map.block_k <= most[0] and max(tiles) < 0:
            alike.setdefault(len(cols), []).append(i)
    for each, members in alike.items():
        step = max(2, most[1] // (block_map.block_q * each * block_map.block_k))
        for at in range(0, len(members), step):
            part = members[at : at + step]
            if len(part) > 1:
                cols = [c for i in part for c in rows[i][0]]
                yield Gang(torch.tensor(part, device=device), torch.tensor(cols, device=device), each, tuple(cols))


def blocks_of(x: Tensor, size: int) -> Tensor:
    """[T, D] -> [T // size, size, D]: a view of the whole blocks."""
    whole = x.shape[0] // size
    return x[: whole * size].unflatten(0, (whole, size))


def of_head(x: Tensor, chunk: Chunk) -> Tensor:
    """Query-side [B, Tq, H, D] -> [Tq, D] of the one query head of a chunk."""
    return x[chunk.b0, :, chunk.a0]


def gathered(x: Tensor, gang: Gang, size: int) -> Tensor:
    """Keys or values [1, Tk, D] -> [G, each * size, D]."""
    return blocks_of(x[0], size).index_select(0, gang.cols).view(len(gang.rows), gang.each * size, x.shape[-1])


def taken(x: Tensor, chunk: Chunk, gang: Gang, size: int, dtype: torch.dtype) -> Tensor:
    """Query-side [B, Tq, H, D] -> a fresh [G, size, D]."""
    return blocks_of(of_head(x, chunk), size).index_select(0, gang.rows).to(dtype)


def put(x: Tensor, chunk: Chunk, gang: Gang, value: Tensor) -> None:
    """Write value [G, size, D] to the rows of x [B, Tq, H, D]."""
    blocks_of(of_head(x, chunk), value.shape[1]).index_copy_(0, gang.rows, value.to(x.dtype))


def add_to_keys(total: Tensor, chunk: Chunk, gang: Gang, value: Tensor) -> None:
    """total [B, Tk, Hkv, D] += value [G, each * size, D], block by block."""
    size = value.shape[1] // gang.each
    sums, parts = blocks_of(total[chunk.b0, :, chunk.h0], size), value.reshape(-1, size, value.shape[-1])
    if total.device.type != "cpu":
        sums.index_add_(0, gang.cols, parts)
        return
    each = sums.unbind(0)  # on a CPU index_add_ goes element by element: one addition a block is several times faster
    for at, part in zip(gang.places, parts.unbind(0), strict=True):
        each[at].add_(part)
