"""Which slabs of keys each block of queries works through, and which of their pairs are masked.

A `Row` is a block of queries; its `Slab`s are runs of keys wide enough for one good matrix product and narrow enough that the
score buffer stays in cache. A slab names the tiles (sub-rectangles) in which some pair is masked; outside them nothing is tested.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attlas.kernels.blocked.gangs import Gang, gangs
from attlas.kernels.reach import Rectangle, rectangles
from attlas.masks.block_map import BlockMap
from attlas.masks.expr import All, Mask
from attlas.masks.geometry import Grid
from attlas.masks.lru import BoundedCache

SLAB_KEYS = 640  # keys of a slab: enough to hide the cost of a launch, few enough that the scores of a head fit the L2 cache
SCORES = 5 << 17  # scores that are held at a time, all heads of a chunk together: 2.5 MiB in fp32, so that they stay in cache
GANG_SCORES = 2 * SCORES  # of a gang: fewer, larger products lose less where another program holds up one of the threads
SHORT_RUN = 256  # runs of keys shorter than this are gathered into one slab, longer ones are read in place
# Sizes of blocks: rows of a product (query block times heads of a group), keys of a block of the compiled mask, and the measured
# rate of the products relative to the first. Large blocks run faster and waste more pairs at the edges of a mask.
SIZES = ((256, 128, 1.0), (128, 64, 0.88), (64, 64, 0.84))
LEAST_QUERIES = 16  # of a query block, however many heads share a key
CLEAN = 0.15  # share of blocks with masked pairs up to which the first size is taken without trying the others
FEW_QUERIES = 32  # up to here the mask is evaluated directly instead of being compiled


_LAYOUTS = BoundedCache(max_items=64, max_bytes=1 << 26)


class Slab(NamedTuple):
    """runs: key ranges in slab order; tiles: (offset in the slab, width, tile id) of the parts that hold masked pairs."""

    runs: tuple[tuple[int, int], ...]
    width: int
    tiles: tuple[tuple[int, int, int], ...]


class Row(NamedTuple):
    """Queries q0 ... q1-1 and the slabs of keys that at least one of them may attend to."""

    q0: int
    q1: int
    slabs: tuple[Slab, ...]


class Layout(ABC):
    """The rows of every (batch row, head) of a mask. `batch` and `heads` are 1 where the mask does not differ by them."""

    batch: int = 1
    heads: int = 1
    block_q: int
    block_k: int = 1  # of a compiled mask
    mean_keys: float  # keys that a query works through, on average

    @abstractmethod
    def rows(self, b: int, h: int | None, *, isolate: bool = False) -> Iterable[Row]:
        """Rows in order: those that all heads have in common (h None), or those that head h has beside them. Every query is in
        exactly one. isolate: tiles get slabs of their own."""

    @abstractmethod
    def seen(self, tile: int) -> Tensor:
        """bool [at least the row's queries, at least the tile's width]: True = may attend."""

    def shared_out(self, b: int, h: int | None) -> tuple[Sequence[Gang], Iterable[Row]]:
        """`rows`: those that are worked on together, and the others."""
        return (), self.rows(b, h)

    def has_common(self, b: int) -> bool:
        """Whether there are rows that all heads have in common."""
        return self.heads == 1

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._bias: dict[tuple[int, torch.dtype], Tensor] = {}

    def bias(self, tile: int, dtype: torch.dtype) -> Tensor:
        """0 where the tile may attend, -inf elsewhere."""
        key = (tile, dtype)
        found = self._bias.get(key)
        if found is None:
            seen = self.seen(tile)
            found = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            if len(self._bias) >= 64:  # windows and triangles need a handful; a random mask would fill the memory
                self._bias.clear()
            self._bias[key] = found
        return found


Tiles = dict[int, tuple[int, int]]  # first key -> (width, tile id)


def _split(runs: list[tuple[int, int]], tiles: Tiles) -> Iterator[Slab]:
    """Slabs of runs of keys: long runs in pieces of about SLAB_KEYS, short ones gathered when there are several."""
    short = [r for r in runs if r[1] - r[0] < SHORT_RUN]
    if len(short) < 3:
        short = []
    gathered = set(short)
    for run in runs:
        if run not in gathered:
            yield from _pieces(*run, tiles)
    while short:
        taken, width = [short.pop(0)], 0
        while short and sum(b - a for a, b in taken) + short[0][1] - short[0][0] <= SLAB_KEYS:
            taken.append(short.pop(0))
        here: list[tuple[int, int, int]] = []
        for a, b in taken:
            here += [(t - a + width, *tiles[t]) for t in tiles if a <= t < b]
            width += b - a
        yield Slab(tuple(taken), width, tuple(here))


def _pieces(a: int, b: int, tiles: Tiles) -> Iterator[Slab]:
    """Slabs of one run; a tile is never cut."""
    starts = [t for t in tiles if a <= t < b]
    pieces = -(-(b - a) // SLAB_KEYS)
    step = -(-(b - a) // pieces // 64) * 64
    while a < b:
        end = min(b, a + step)
        for t in starts:
            if t < end < t + tiles[t][0]:
                end = t + tiles[t][0]
        yield Slab(((a, end),), end - a, tuple((t - a, *tiles[t]) for t in starts if a <= t < end))
        a = end


class MapLayout(Layout):
    """The layout of a compiled BlockMap."""

    def __init__(self, block_map: BlockMap, device: torch.device):
        super().__init__(device)
        self.map = block_map
        self.batch, self.heads = block_map.batch, block_map.heads
        self.block_q, self.block_k = block_map.block_q, block_map.block_k
        self._blocks = -(-block_map.q_len // block_map.block_q)
        self._ptr: list[int] = block_map.row_ptr.tolist()
        self._cols: list[int] = block_map.cols.tolist()
        self._tiles: list[int] = block_map.tile_ids.tolist()
        self.mean_keys = len(self._cols) * block_map.block_k / max(1, len(self._ptr) - 1)
        self._kept: tuple[Row, ...] | None = None
        self._shared: dict[tuple[int, int | None], tuple[tuple[Gang, ...], tuple[Row, ...]]] = {}
        self._common: dict[int, frozenset[int]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held, the lists by an estimate."""
        return self.map.nbytes + 200 * len(self._cols) + sum(t.numel() * t.element_size() for t in self._bias.values())

    def rows(self, b: int, h: int | None, *, isolate: bool = False) -> Iterable[Row]:
        if isolate or self.batch * self.heads > 1:
            return self._make_rows(b, h, isolate)
        if self._kept is None:
            self._kept = tuple(self._make_rows(b, h, isolate))
        return self._kept

    def shared_out(self, b: int, h: int | None) -> tuple[Sequence[Gang], Iterable[Row]]:
        if self.heads == 1:
            return (), self.rows(b, h)
        if (b, h) not in self._shared:
            found: tuple[Gang, ...] = ()
            if h is not None:
                rows = {i: self._row(b, h, i) for i in self._numbers(b, h)}
                found = tuple(gangs(self.map, rows, (SLAB_KEYS, GANG_SCORES), self.device))
            done = {i * self.block_q for gang in found for i in gang.rows.tolist()}
            self._shared[b, h] = found, tuple(row for row in self._make_rows(b, h, False) if row.q0 not in done)
        return self._shared[b, h]

    def has_common(self, b: int) -> bool:
        return self.heads == 1 or bool(self._in_common(b))

    def _in_common(self, b: int) -> frozenset[int]:
        """Numbers of the rows that are the same in all heads, which are worked on together."""
        if b not in self._common:
            heads = range(1, self.heads)
            same = (i for i in range(self._blocks) if all(self._row(b, 0, i) == self._row(b, h, i) for h in heads))
            self._common[b] = frozenset(same)
        return self._common[b]

    def _row(self, b: int, h: int, i: int) -> tuple[list[int], list[int]]:
        """Blocks of keys and tiles of a block of queries."""
        at = (b * self.heads + h) * self._blocks + i
        span = slice(self._ptr[at], self._ptr[at + 1])
        return self._cols[span], self._tiles[span]

    def _numbers(self, b: int, h: int | None) -> Iterator[int]:
        for i in range(self._blocks):
            if self.heads == 1 or (i in self._in_common(b)) == (h is None):
                yield i

    def _make_rows(self, b: int, h: int | None, isolate: bool) -> Iterator[Row]:
        for i in self._numbers(b, h):
            slabs = tuple(self._slabs(*self._row(b, h or 0, i), isolate))
            yield Row(i * self.block_q, min(self.map.q_len, (i + 1) * self.block_q), slabs)

    def _slabs(self, cols: list[int], ids: list[int], isolate: bool) -> Iterator[Slab]:
        bk, k_len = self.map.block_k, self.map.k_len
        runs: list[tuple[int, int]] = []
        tiles: Tiles = {}
        for col, tile in zip(cols, ids, strict=True):
            a, b = col * bk, min(k_len, (col + 1) * bk)
            if tile >= 0 and isolate:
                yield Slab(((a, b),), b - a, ((0, b - a, tile),))
                continue
            if tile >= 0:
                tiles[a] = (b - a, tile)
            if runs and runs[-1][1] == a:
                runs[-1] = (runs[-1][0], b)
            else:
                runs.append((a, b))
        yield from _split(runs, tiles)

    def seen(self, tile: int) -> Tensor:
        return self.map.tile(tile).to(self.device)


class RectangleLayout(Layout):
    """A few rectangles, each evaluated pair by pair (or not at all where everything is allowed): no compilation."""

    def __init__(self, rectangles: list[Rectangle], block_q: int, device: torch.device):
        super().__init__(device)
        masks = [r.mask for r in rectangles if r.mask is not None]
        self.batch = max((m.batch or 1 for m in masks), default=1)
        self.heads = max((m.heads or 1 for m in masks), default=1)
        self.rectangles, self.block_q = rectangles, block_q
        queries = sum(r.q1 - r.q0 for r in rectangles)
        self.mean_keys = sum((r.q1 - r.q0) * (r.k1 - r.k0) for r in rectangles) / max(1, queries)
        self._seen: list[Tensor] = []
        self._dense: dict[int, Tensor] = {}
        self._rows: dict[tuple[int, int | None], tuple[Row, ...]] = {}

    def rows(self, b: int, h: int | None, *, isolate: bool = False) -> tuple[Row, ...]:
        if (b, h) not in self._rows:
            self._rows[b, h] = tuple(self._make_rows(b, h))
        return self._rows[b, h]

    def _make_rows(self, b: int, h: int | None) -> Iterator[Row]:
        for i, r in enumerate(self.rectangles):
            if r.mask is None:
                slabs = tuple(_split([(r.k0, r.k1)] if r.k1 > r.k0 else [], {}))
                for q0 in range(r.q0, r.q1, self.block_q):
                    yield Row(q0, min(r.q1, q0 + self.block_q), slabs)
            else:
                yield Row(r.q0, r.q1, tuple(self._masked(i, r, b, h)))

    def _masked(self, i: int, r: Rectangle, b: int, h: int | None) -> Iterator[Slab]:
        if i not in self._dense:
            assert r.mask is not None
            dense = r.mask.dense(r.grid, device=self.device)
            self._dense[i] = dense.reshape(-1, *dense.shape[-2:]) if dense.ndim > 2 else dense[None]
        heads = (r.mask.heads or 1) if r.mask is not None else 1
        batch = (r.mask.batch or 1) if r.mask is not None else 1
        seen = self._dense[i][(b if batch > 1 else 0) * heads + (h or 0 if heads > 1 else 0)]
        for slab in _split([(r.k0, r.k1)] if r.k1 > r.k0 else [], {}):
            ((a, e),) = slab.runs
            part = seen[:, a - r.k0 : e - r.k0]
            some, every = bool(part.any()), bool(part.all())
            if every:
                yield slab
            elif some:
                self._seen.append(part)
                yield Slab(slab.runs, slab.width, ((0, slab.width, len(self._seen) - 1),))

    def seen(self, tile: int) -> Tensor:
        return self._seen[tile]


def make_layout(mask: Mask | None, grid: Grid, *, group: int, device: torch.device) -> Layout:
    """The cheapest layout that is exact for this mask on this grid. group: query heads that share a key head."""
    if (mask is None and not grid.packed) or few_queries(grid):
        found = rectangles(mask, grid)
        if found is not None:
            return RectangleLayout(found, _sizes(group)[0][0], device)
    key = (mask, grid, group, device)
    layout = _LAYOUTS.get(key)
    if layout is None:
        layout = MapLayout(_best_map(All() if mask is None else mask, grid, group), device)
        _LAYOUTS.put(key, layout)
    assert isinstance(layout, MapLayout)
    return layout


def few_queries(grid: Grid) -> bool:
    """Whether every sequence has so few queries that its mask is better evaluated than compiled."""
    return max((s.length for s in grid.q.segments), default=0) <= FEW_QUERIES


def _sizes(group: int) -> list[tuple[int, int, float]]:
    """(block_q, block_k, rate) for a number of query heads that share a key head."""
    stacked = min(group, 8).bit_length() - 1
    return [(max(LEAST_QUERIES, rows >> stacked), keys, rate) for rows, keys, rate in SIZES]


def _best_map(mask: Mask, grid: Grid, group: int) -> BlockMap:
    """The mask compiled with the blocks that mean the least work over rate."""
    best, least = None, float("inf")
    for block_q, block_k, rate in _sizes(group):
        found = mask.block_map(grid, block_q=block_q, block_k=block_k, device="cpu")
        cost = found.nnz * block_q * block_k / rate
        if cost < least:
            best, least = found, cost
        if int((found.tile_ids >= 0).sum()) <= CLEAN * found.nnz or len(grid.q) <= block_q // 2:
            break
    assert best is not None
    return best
