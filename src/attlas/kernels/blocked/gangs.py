"""Blocks of queries that gather as many blocks of keys, worked on in one product.

Where every head has a map of its own (BigBird's random blocks), the products of one head and one block of queries are too small
to hide what a call costs. Rows of a map that touch equally many blocks, all of them full, differ only in which ones: their keys
are gathered side by side and multiplied at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attlas.masks.block_map import BlockMap

if TYPE_CHECKING:
    from attlas.kernels.blocked.block_scores import Buffer
    from attlas.kernels.blocked.chunks import Chunk


class Gang(NamedTuple):
    """rows int64 [G]: blocks of queries; run: the first and one past the last of them where they follow each other; cols int64
    [G * each]: blocks of keys, `each` for every one of them."""

    rows: Tensor
    run: tuple[int, int] | None
    cols: Tensor
    each: int


Rows = dict[int, tuple[list[int], list[int]]]  # block of queries -> (its blocks of keys, their tiles)


def gangs(block_map: BlockMap, rows: Rows, most: tuple[int, int], device: torch.device) -> Iterator[Gang]:
    """Gangs of two rows or more out of `rows`. Whole blocks only; `most`: keys of a row, and scores of a gang."""
    alike: dict[int, list[int]] = {}
    whole_q, whole_k = block_map.q_len // block_map.block_q, block_map.k_len // block_map.block_k
    for i, (cols, tiles) in rows.items():
        if cols and i < whole_q and cols[-1] < whole_k and len(cols) * block_map.block_k <= most[0] and max(tiles) < 0:
            alike.setdefault(len(cols), []).append(i)
    for each, members in alike.items():
        fit = max(2, most[1] // (block_map.block_q * each * block_map.block_k))
        step = -(-len(members) // -(-len(members) // fit))
        step += step % 2  # gangs of about one size, and an even one, as threads divide them by rows
        for at in range(0, len(members), step):
            part = members[at : at + step]
            if len(part) > 1:
                cols = [c for i in part for c in rows[i][0]]
                run = (part[0], part[-1] + 1) if part[-1] - part[0] == len(part) - 1 else None
                yield Gang(torch.tensor(part, device=device), run, torch.tensor(cols, device=device), each)


def blocks_of(x: Tensor, size: int) -> Tensor:
    """[T, D] -> [T // size, size, D]: a view of the whole blocks."""
    whole = x.shape[0] // size
    return x[: whole * size].unflatten(0, (whole, size))


def gathered(x: Tensor, gang: Gang, size: int, buffer: Buffer) -> Tensor:
    """Keys or values [Tk, D] -> [G, each * size, D] in the memory of `buffer`."""
    out = buffer.shaped(len(gang.cols), size, x.shape[-1])
    torch.index_select(blocks_of(x, size), 0, gang.cols, out=out)
    return out.view(len(gang.rows), gang.each * size, x.shape[-1])


def taken(x: Tensor, chunk: Chunk, gang: Gang, size: int, dtype: torch.dtype) -> Tensor:
    """Query-side [B, Tq, H, D] -> [G, size, D], to be read only: a view where the rows follow each other."""
    blocks = blocks_of(_of_head(x, chunk), size)
    part = blocks.index_select(0, gang.rows) if gang.run is None else blocks[slice(*gang.run)]
    return part.to(dtype)


def put(x: Tensor, chunk: Chunk, gang: Gang, value: Tensor) -> None:
    """Write value [G, size, D] to the rows of x [B, Tq, H, D]."""
    blocks = blocks_of(_of_head(x, chunk), value.shape[1])
    if gang.run is None:
        blocks.index_copy_(0, gang.rows, value.to(x.dtype))
    else:
        blocks[slice(*gang.run)].copy_(value)


def _of_head(x: Tensor, chunk: Chunk) -> Tensor:
    """Query-side [B, Tq, H, D] -> [Tq, D] of the one query head of a chunk."""
    return x[chunk.b0, :, chunk.a0]
