"""Measured: the time of sparse patterns grows with n, not with n^2. CPU time of one thread, which neighbours disturb little."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from attlas.catalogue.index import build, cards

NEAR, FAR = 2048, 8192  # four times as many tokens: time times 4 when linear, times 16 when quadratic
BAND = torch.eye(FAR // 256, dtype=torch.bool)

LARGE: dict[str, dict[str, Any]] = {
    "local": {"block": 256},
    "sliding-window": {"window": 256},
    "dilated-window": {"window": 64, "dilation": 4},
    "global": {"window": 256, "tokens": (0, 1)},
    "streaming": {"window": 252},
    "longformer": {"window": 256, "tokens": (0, 1)},
    "bigbird": {"block": 64},
    "learned-sink": {"window": 256},
    "reformer": {"chunk": 64, "rounds": 2, "causal": True},
    "clustered": {"clusters": 64},
    "improved-clustered": {"clusters": 64, "topk": 32},
    "routing": {"clusters": 32, "window": 256},
    "strided": {"stride": 256},
    "fixed": {"block": 256},
    "block-sparse": {"layout": BAND | BAND.roll(1, 0), "block_size": 256},
    "hierarchical": {"block": 16},
    "multi-resolution": {"block": 32, "blocks_per_row": 4},
    "axial": {"shape": (32, 256)},
}


def _seconds(mixer: Any, length: int) -> float:
    x = torch.randn(1, length, mixer.dim, requires_grad=True)
    best = float("inf")
    for _ in range(4):
        start = time.process_time()
        mixer(x).sum().backward()
        best = min(best, time.process_time() - start)
    return best


@pytest.mark.heavy
@pytest.mark.parametrize("name", LARGE)
def test_time_grows_as_the_card_says(name: str) -> None:
    mixer = build(name, 64, 1, **LARGE[name])
    work = mixer.flops(FAR) / mixer.flops(NEAR)
    ratio = _seconds(mixer, FAR) / _seconds(mixer, NEAR)
    assert work < 4.5
    assert ratio < 7, f"{name}: {FAR // NEAR} times the tokens, {work:.1f} times the flops, {ratio:.1f} times the time"


def test_every_fast_pattern_is_measured() -> None:
    fast = {c.name for c in cards(family="fixed patterns", min_level=3)}
    assert fast <= set(LARGE), "add the size at which the new card's growth is measured"
