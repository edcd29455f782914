"""Random expressions over random grids: the compiled map says exactly what the pair-by-pair truth says."""

from __future__ import annotations

import random
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attlas.masks import (
    All,
    Axis,
    Blocks,
    Causal,
    Dense,
    Dilated,
    Documents,
    Fixed,
    Global,
    Grid,
    Local,
    Mask,
    Nothing,
    Padding,
    PerHead,
    Prefix,
    Random,
    Segment,
    Sinks,
    Strided,
    Window,
    descent,
    tiles,
)
from attlas.masks.compile import compile_mask
from attlas.shapes import SeqInfo

BATCH, HEADS = 2, 3


class Draw:
    """Makes random grids and expressions from any source with the interface of random.Random."""

    def __init__(self, source: Any):
        self.r = source

    def n(self, lo: int, hi: int) -> int:
        return self.r.randint(lo, hi)

    def some(self, lo: int, hi: int) -> int | None:
        return None if self.n(0, 4) == 0 else self.n(lo, hi)

    def grid(self) -> Grid:
        kind = self.n(0, 5)
        if kind == 0:
            return Grid.dense(self.n(0, 97), self.n(0, 97))
        if kind == 1:
            count = self.n(1, 7)
            keys = [self.r.choice([0, 1, 3, 17, 41]) for _ in range(count)]
            queries = [self.n(0, k) if self.n(0, 2) else k for k in keys]
            starts = [self.n(0, 50) for _ in keys] if self.n(0, 4) == 0 else None
            return Grid.packed(SeqInfo(tuple(queries), tuple(keys), starts and tuple(starts)))
        if kind == 2:
            start = self.n(0, 71)
            stop = start + self.n(0, 37)
            return Grid.at(range(start, stop), range(self.n(0, start), stop))
        if kind == 3:  # a rolling buffer: the slots after the write position hold older tokens
            window, last = self.n(1, 61), self.n(0, 150)
            slots = sorted(range(max(0, last - window + 1), last + 1), key=lambda p: p % window)
            return Grid.at(range(last - self.n(0, 5), last + 1), slots)
        if kind == 4:
            return Grid.at([self.n(0, 89) for _ in range(self.n(0, 23))], [self.n(0, 89) for _ in range(self.n(0, 31))])
        pieces = [[Segment(self.n(0, 29), self.n(0, 83), self.n(0, 2), self.n(0, 5)) for _ in range(self.n(1, 4))] for _ in "qk"]
        return Grid(Axis(tuple(pieces[0])), Axis(tuple(pieces[1])))

    def leaf(self, grid: Grid, plain: bool) -> Mask:
        kind = self.n(0, 15 if plain or grid.packed else 20)
        if kind == 0:
            return Causal(self.r.choice(["end", "end", "start"]))
        if kind == 1:
            return Window(self.some(0, 40), self.some(0, 40))
        if kind == 2:
            return Window.last(self.n(1, 30))
        if kind == 3:
            return Dilated(self.some(0, 9), self.some(0, 9), self.n(1, 7))
        if kind == 4:
            return Strided(self.n(1, 19))
        if kind == 5:
            block = self.n(1, 23)
            return Fixed(block, self.n(0, block))
        if kind == 6:
            return Local(self.n(1, 31))
        if kind == 7:
            return Prefix(self.n(0, 60))
        if kind == 8:
            return Sinks(self.n(0, 20))
        if kind == 9:
            return Documents([self.n(0, 40) for _ in range(self.n(0, 5))])
        if kind == 10:
            start = self.n(0, 90)
            return Global([self.n(0, 90) for _ in range(self.n(0, 4))] if self.n(0, 1) else range(start, start + self.n(0, 30)))
        if kind == 11:
            return self.blocks(None)
        if kind == 12:
            m = self.n(1, 4)
            return Random(m, self.n(1, 17), self.n(0, 99), None if self.n(0, 1) else m + self.n(0, 5))
        if kind == 13:
            return self.r.choice([All(), Nothing()])
        if kind == 14:
            return self.tensor(grid, ())
        if kind == 15:
            return Causal() & Window.last(self.n(1, 50)) | Sinks(self.n(0, 5))
        if kind == 16:
            return Padding([self.n(0, 90) for _ in range(BATCH)])
        if kind == 17:
            return Prefix(tuple(self.n(0, 90) for _ in range(BATCH)))
        if kind == 18:
            return self.blocks(HEADS)
        if kind == 19:
            return PerHead(tuple(self.leaf(grid, plain=True) for _ in range(HEADS)))
        return self.tensor(grid, (self.r.choice([1, BATCH]), self.r.choice([1, HEADS])) if self.n(0, 1) else (HEADS,))

    def blocks(self, heads: int | None) -> Mask:
        rows, cols, p = self.n(1, 7), self.n(1, 7), self.r.choice([0.1, 0.5, 0.9])
        matrix = torch.rand(heads or 1, rows, cols, generator=self.generator()) < p
        return Blocks(matrix if heads else matrix[0], self.n(1, 29))

    def tensor(self, grid: Grid, lead: tuple[int, ...]) -> Mask:
        q, k = grid.q.span or (0, 0), grid.k.span or (0, 0)
        length = max(q[1], k[1], 0) + 1
        shape = (*lead, length - min(q[0], length - 1), length)
        return Dense(torch.rand(shape, generator=self.generator()) < self.r.choice([0.01, 0.5, 0.99]))

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.n(0, 2**31))

    def expression(self, grid: Grid, depth: int = 2) -> Mask:
        kind = self.n(0, 5)
        if depth == 0 or kind < 2:
            return self.leaf(grid, plain=False)
        if kind == 2:
            return ~self.expression(grid, depth - 1)
        parts = [self.expression(grid, depth - 1) for _ in range(self.n(2, 3))]
        return reduce(Mask.__and__ if kind == 3 else Mask.__or__, parts)


def check(draw: Draw) -> None:
    """One random expression on one random grid, in blocks of one random size."""
    grid = draw.grid()
    mask = draw.expression(grid)
    block_q, block_k = draw.r.choice([1, 3, 8, 13, 32]), draw.r.choice([8, 16, 24, 64])
    truth = mask.dense(grid)
    wanted = truth.expand(mask.batch or 1, mask.heads or 1, *grid.shape)
    got = compile_mask(mask, grid, block_q, block_k)
    where = f"({mask!r}) on {grid} in blocks of {block_q} x {block_k}"
    assert torch.equal(got.to_dense(), wanted), where
    assert (got.batch, got.heads) == wanted.shape[:2], where
    check_canonical(got, where)
    assert got.count() == int(wanted.sum()), where
    if len(got.cols) % 3 == 0:
        assert mask.count(grid) == got.count(), where
    check_span(mask, grid, truth, where)


def check_canonical(got: Any, where: str) -> None:
    """Columns ascend, and tiles are neither empty nor full on their blocks, nor equal to each other."""
    assert got.row_ptr.dtype == torch.int64 and got.cols.dtype == got.tile_ids.dtype == torch.int32, where
    assert len(got.row_ptr) == got.batch * got.heads * got.nq + 1 and int(got.row_ptr[-1]) == got.nnz, where
    ascending = got.cols[1:] > got.cols[:-1]
    ascending[got.row_ptr[1:-1][(got.row_ptr[1:-1] > 0) & (got.row_ptr[1:-1] < got.nnz)] - 1] = True
    assert bool(ascending.all()), where
    assert len({bytes(t.flatten().tolist()) for t in got.tiles}) == len(got.tiles), where
    assert set(got.tile_ids.tolist()) - {-1} == set(range(len(got.tiles))), where
    rows = got.rows % max(got.nq, 1)
    for row, col, tile_id in zip(rows.tolist(), got.cols.tolist(), got.tile_ids.tolist(), strict=True):
        if tile_id >= 0:
            tile = got.tile(tile_id)
            height, width = got.q_len - row * got.block_q, got.k_len - col * got.block_k
            assert bool(tile.any()) and not bool(tile[:height, :width].all()), where
            assert not bool(tile[height:].any()) and not bool(tile[:, width:].any()) if height > 0 and width > 0 else True, where


def check_span(mask: Mask, grid: Grid, truth: torch.Tensor, where: str) -> None:
    """Every allowed key lies in the hull that key_span gives for the query alone and for all queries."""
    if not grid.shape[0] or not grid.shape[1]:
        return
    positions, keys = grid.q.positions(), grid.k.positions()
    allowed = truth.reshape(-1, *grid.shape).any(0)
    rows = torch.tensor([0, grid.shape[0] // 2, grid.shape[0] - 1])
    asked = [(int(positions[r]), int(positions[r]), allowed[r]) for r in rows]
    asked.append((int(positions.min()), int(positions.max()), allowed.any(0)))
    for lo, hi, seen in asked:
        span = mask.key_span(lo, hi)
        if span is None:
            assert not bool(seen.any()), where
            continue
        inside = (keys >= (span[0] if span[0] is not None else -1000)) & (keys <= (span[1] if span[1] is not None else 1000))
        assert not bool((seen & ~inside).any()), f"{where}: {span} for queries {lo} ... {hi}"


@pytest.fixture(params=[(1024, 2**18, 64), (1, 2**18, 0), (4, 48, 0)], ids=["flat", "deep", "bands"])
def levels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small grids are classified block by block; smaller limits make them take every level and many bands."""
    monkeypatch.setattr(descent, "ROOT", request.param[0])
    monkeypatch.setattr(descent, "LIMIT", request.param[1])
    monkeypatch.setattr(tiles, "FEW", request.param[2])


relaxed = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@relaxed
@given(st.randoms(use_true_random=False))
def test_map_is_truth_shrinking(levels: None, source: random.Random) -> None:
    check(Draw(source))


@pytest.mark.parametrize("seed", range(0, 700, 50))
def test_map_is_truth(levels: None, seed: int) -> None:
    for n in range(50):
        check(Draw(random.Random(seed + n)))


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(1000, 8000, 50))
def test_map_is_truth_many_times(levels: None, seed: int) -> None:
    for n in range(50):
        check(Draw(random.Random(seed + n)))
