"""Compiling masks to block maps, counting what they allow, and the cache of results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.errors import ShapeError
from attlas.masks import bits
from attlas.masks.block_map import FULL_TILE, BlockMap, check_blocks
from attlas.masks.descent import Blockset, Found, Grains, descend
from attlas.masks.expr import Mask
from attlas.masks.geometry import Grid
from attlas.masks.lru import BoundedCache
from attlas.masks.partition import FACTOR, Partition
from attlas.masks.tiles import DROPPED, TileMaker

CACHE = BoundedCache(max_items=256, max_bytes=512 * 2**20)
HELD = BoundedCache(max_items=64, max_bytes=128 * 2**20)  # of masks that keep tensors alive, which may be of one call only


def block_map(mask: Mask, grid: Grid, block_q: int, block_k: int, device: torch.device | str | None) -> BlockMap:
    """`Mask.block_map`: from the cache, or compiled."""
    check_blocks("block_map", grid.shape, block_q, block_k)
    mask.check_on(grid)
    key = (mask, grid, block_q, block_k, str(device))
    cache = HELD if mask.held_bytes else CACHE
    found = cache.get(key)
    if found is None:
        with torch.inference_mode(False):  # what is kept may be used in training later
            found = compile_mask(mask, grid, block_q, block_k).to(device)
        cache.put(key, found, mask.held_bytes)
    assert isinstance(found, BlockMap)
    return found


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of some rows, in order: counts int64 [rows], cols and tile_ids int32 [nnz], and the tiles the ids point into."""

    counts: Tensor
    cols: Tensor
    tile_ids: Tensor
    tiles: Tensor


def compile_mask(mask: Mask, grid: Grid, block_q: int, block_k: int) -> BlockMap:
    """Compile without the cache. Maps that differ by batch row or head are compiled once for each different one."""
    grains = regular_grains(mask, grid, block_q, block_k)
    batch, heads = mask.batch or 1, mask.heads or 1
    which: dict[Mask, int] = {}
    order = [which.setdefault(mask.at(b, h), len(which)) for b in range(batch) for h in range(heads)]
    distinct = [list(_compile_one(m, grains, block_q, block_k)) for m in which]
    parts = [part for n in order for part in distinct[n]]
    return _assemble(parts, grid, block_q, block_k, batch, heads)


def regular_grains(mask: Mask, grid: Grid, block_q: int, block_k: int) -> Grains:
    q, k = (
        Partition.regular(axis, block, packed=grid.packed, index=mask.uses_index)
        for axis, block in ((grid.q, block_q), (grid.k, block_k))
    )
    return Grains(q, k, grid.packed)


def _compile_one(mask: Mask, grains: Grains, block_q: int, block_k: int) -> Iterator[Entries]:
    """The bands of one mask that differs neither by batch row nor by head."""
    maker = TileMaker(mask, grains, block_q, block_k)
    rows = 0
    for found in descend(mask, grains):
        rows = found.hi
        state, tiles = maker.solve(found.i, found.j)
        yield _entries(found, state, tiles, len(grains.k))
    if rows < len(grains.q):  # no keys at all
        none = torch.zeros(0, dtype=torch.int32, device="cpu")
        yield Entries(torch.zeros(len(grains.q), dtype=torch.int64, device="cpu"), none, none, maker.solve(none, none)[1])


def _entries(found: Found, state: Tensor, tiles: Tensor, nk: int) -> Entries:
    """Sort the full runs and the single blocks of a band by (row, column) and write them out block by block."""
    kept = (state != DROPPED).nonzero().flatten()
    rows, firsts, lengths = [found.i[kept]], [found.j[kept]], [torch.ones_like(kept)]
    for blocks in found.full:
        for part, values in zip((rows, firsts, lengths), _runs(blocks, found.hi, nk), strict=True):
            part.append(values)
    row, first, length = torch.cat(rows) - found.lo, torch.cat(firsts), torch.cat(lengths)
    counts = torch.zeros(found.hi - found.lo, dtype=torch.int64, device="cpu").index_add_(0, row, length)
    total = int(counts.sum())
    cols = torch.ones(total, dtype=torch.int32, device="cpu")
    tile_ids = torch.full_like(cols, FULL_TILE)
    if total:
        place = row * nk + first
        order = torch.sort(place.int() if len(counts) * nk < 2**31 else place).indices
        start = torch.empty_like(length)
        sorted_length, sorted_first = length[order], first[order]
        at = sorted_length.cumsum(0) - sorted_length
        # Columns by running sum: + 1 inside a run, and at its start the step from the end of the run before.
        step = sorted_first.clone()
        step[1:] -= sorted_first[:-1] + sorted_length[:-1] - 1
        cols[at] = step.int()
        torch.cumsum(cols, 0, out=cols)
        start[order] = at
        tile_ids[start[: len(kept)]] = state[kept].int()
    return Entries(counts, cols, tile_ids, tiles)


def _runs(blocks: Blockset, row_end: int, nk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, first column and length of the runs of single blocks that super-blocks consist of."""
    blocks = blocks.with_rows_of(0, row_end)
    size = FACTOR**blocks.column_level
    first = blocks.j * size
    return blocks.i, first, (first + size).clamp(max=nk) - first


def _assemble(parts: list[Entries], grid: Grid, block_q: int, block_k: int, batch: int, heads: int) -> BlockMap:
    """Join parts in order of rows, with one pool of tiles for all."""
    if not parts:
        none = torch.zeros(0, dtype=torch.int32, device="cpu")
        parts = [Entries(none.long(), none, none, torch.zeros(0, block_q, block_k // 8, dtype=torch.uint8, device="cpu"))]
    if len(parts) == 1:
        tiles, tile_ids = parts[0].tiles, parts[0].tile_ids
    else:
        pools = list({id(p.tiles): p.tiles for p in parts}.values())
        tiles, same = bits.deduplicate(torch.cat(pools))
        names = dict(zip((id(p) for p in pools), same.int().split([len(p) for p in pools]), strict=True))
        none = torch.full((1,), FULL_TILE, dtype=torch.int32, device="cpu")
        tile_ids = torch.cat([torch.cat([none, names[id(p.tiles)]])[p.tile_ids + 1] for p in parts])
    counts = torch.cat([p.counts for p in parts])
    cols = parts[0].cols if len(parts) == 1 else torch.cat([p.cols for p in parts])
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return BlockMap(*grid.shape, block_q, block_k, batch, heads, row_ptr, cols, tile_ids, tiles)


def within(mask: Mask, grid: Grid, chosen: Tensor, block_q: int, block_k: int) -> BlockMap:
    """The mask inside chosen blocks, bool [B|1, H|1, nq, nk]; only those are looked at."""
    mask.check_on(grid)
    batch, heads = mask.batch or 1, mask.heads or 1
    sizes = [max(wanted, got) for wanted, got in zip((batch, heads), chosen.shape[:2], strict=True)]
    if any(n not in (1, sizes[0]) for n in (batch, chosen.shape[0])) or any(
        n not in (1, sizes[1]) for n in (heads, chosen.shape[1])
    ):
        raise ShapeError(f"blocks {list(chosen.shape)} chosen for {mask!r}, which needs {batch} batch rows and {heads} heads")
    grains = regular_grains(mask, grid, block_q, block_k)
    if mask.batch is None and mask.heads is None:
        parts = [_within_one(mask, grains, chosen.flatten(0, 1), block_q, block_k)]
    else:
        chosen = chosen.expand(*sizes, *chosen.shape[2:])
        parts = [
            _within_one(mask.at(b, h), grains, chosen[b, h][None], block_q, block_k)
            for b in range(sizes[0])
            for h in range(sizes[1])
        ]
    return _assemble(parts, grid, block_q, block_k, *sizes)


def _within_one(mask: Mask, grains: Grains, chosen: Tensor, block_q: int, block_k: int) -> Entries:
    """chosen bool [lead, nq, nk]: the same mask for every lead."""
    lead, i, j = chosen.nonzero().unbind(1)
    status = grains.classify(mask, 0, i, j)
    state = torch.where(status == 0, DROPPED, FULL_TILE)
    partial = (status == 1).nonzero().flatten()
    state[partial], tiles = TileMaker(mask, grains, block_q, block_k).solve(i[partial], j[partial])
    kept = (state != DROPPED).nonzero().flatten()
    rows = len(grains.q)
    counts = torch.bincount((lead * rows + i)[kept], minlength=len(chosen) * rows)
    return Entries(counts, j[kept].int(), state[kept].int(), tiles)


def count(mask: Mask, grid: Grid, block: int = 128) -> int:
    """`Mask.count`: full super-blocks are counted whole, partial blocks by their tiles; nothing is written out."""
    mask.check_on(grid)
    grains = regular_grains(mask, grid, block, block)
    return sum(times * sum(int(n.sum()) for _, n in counts_of(one, grains)) for one, times in different(mask).items())


def different(mask: Mask) -> dict[Mask, int]:
    """The different masks of all batch rows and heads, and how many of these each is for."""
    return Counter(mask.at(b, h) for b in range(mask.batch or 1) for h in range(mask.heads or 1))


def counts_of(mask: Mask, grains: Grains) -> Iterator[tuple[Blockset, Tensor]]:
    """Blocks of any level, each with the pairs allowed in it; no pair is counted twice."""
    maker = TileMaker(mask, grains, max(grains.q.tallest, 1), -(-max(grains.k.tallest, 1) // 8) * 8)
    for found in descend(mask, grains):
        for b in found.full:
            yield b, grains.q.level(b.row_level).tokens[b.i] * grains.k.level(b.column_level).tokens[b.j]
        state, tiles = maker.solve(found.i, found.j)
        whole = grains.q.level(0).tokens[found.i] * grains.k.level(0).tokens[found.j]
        allowed = torch.cat([bits.popcount(tiles), whole.new_zeros(2)])[state]  # DROPPED is the last but one
        yield Blockset(0, 0, found.i, found.j), torch.where(state == FULL_TILE, whole, allowed)
