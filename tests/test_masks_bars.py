"""What compiling costs: time, memory, and the same against FlexAttention. Limits are far above what an idle machine needs."""

from __future__ import annotations

import pytest
import torch

from attlas.lab.bench_masks import against_flex, compiled, long_masks, measure, run, table
from attlas.lab.measure import peak_allocated, time_interleaved
from attlas.masks import BlockMap, Causal, Dense, Grid, Window

MILLION = 1 << 20
WINDOW = Causal() & Window.last(4096)


def test_window_over_a_million_tokens() -> None:
    found = measure("window", WINDOW, MILLION, repeats=3, rss=True)
    assert found["seconds"]["median"] < 1.0
    assert max(found["map_bytes"], found["peak_bytes"], found["rss_growth"]) < 100e6
    assert found["tiles"] == 2 and found["blocks"] == 269808
    pairs = 4096 * MILLION - 4096 * 4095 // 2
    assert found["density"] * MILLION**2 == pytest.approx(pairs, abs=0.5)


def test_faster_than_flex_attention() -> None:
    found = against_flex(8192, repeats=2)
    assert found["agree"] and found["ratio"] >= 50


@pytest.mark.heavy
def test_faster_than_flex_attention_at_32k() -> None:
    found = against_flex(32768, repeats=5)
    assert found["agree"] and found["ratio"] >= 50


@pytest.mark.parametrize("name", long_masks())
def test_cost_grows_with_touched_blocks_not_with_pairs(name: str) -> None:
    """Sixteen times the length has 256 times the pairs; linear masks then take about sixteen times the memory."""
    short, long = (1 << 13, 1 << 17)
    maps = {n: compiled(long_masks(n)[name], n) for n in (short, long)}
    peaks = {n: peak_allocated(lambda n=n: compiled(long_masks(n)[name], n)) for n in (short, long)}
    if name != "causal":
        assert maps[long].nnz < 22 * maps[short].nnz
    assert peaks[long] < 60e6 + 3 * maps[long].nbytes
    assert maps[long].count() == long_masks(long)[name].count((long, long))


@pytest.mark.heavy
@pytest.mark.parametrize("name", long_masks())
def test_a_million_tokens_in_seconds(name: str) -> None:
    found = measure(name, long_masks()[name], MILLION, repeats=1)
    assert found["seconds"]["median"] < 20 and found["peak_bytes"] < 200e6 + 1.5 * found["map_bytes"]


def test_decoding_steps_are_cheap() -> None:
    """One query against a long cache: no work per block of keys beyond a few tensor operations."""
    grid = Grid.at(range(99999, 100000), range(100000))
    times = time_interleaved({"dense": lambda: WINDOW.dense(grid), "span": lambda: WINDOW.key_span(99999, 99999)}, 5)
    assert times["dense"].median < 0.01 and times["span"].median < 0.001
    found: list[BlockMap] = []
    assert peak_allocated(lambda: found.append(WINDOW.block_map(grid))) < 2e6
    assert found[0].count() == 4096


def test_dense_masks_are_read_piece_by_piece() -> None:
    tensor = torch.ones(4096, 8192, dtype=torch.bool).tril_(4096)
    grid = Grid.dense(4096, 8192)
    mask = Dense(tensor)
    peak = peak_allocated(lambda: mask.block_map(grid))
    assert peak < tensor.numel() and len(mask.block_map(grid).tiles) == 1


def test_report_can_be_read() -> None:
    result = run(tokens=8192, peer_tokens=1024, repeats=1, rss=False)
    text = table(result)
    assert all(name in text for name in long_masks(8192)) and "times faster" in text and "8,192" in text
