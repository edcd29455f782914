"""Scalar answers about masks, against the mask written out."""

from __future__ import annotations

import itertools

import pytest

from attlas.kernels.reach import allows_all
from attlas.masks import Causal, Grid, Local, Prefix, Sinks, Strided, Window

EXACT = [
    Causal(),
    Sinks(3),
    Window.last(3),
    Window(2, 1),
    Window(None, 2),
    Window(4, None),
    Window(None, None),
    Prefix(4),
    Causal() & Window.last(4),
]
SAFE = [
    Window.last(3) | Sinks(2),
    Causal() & (Window.last(2) | Sinks(3)),
    ~Sinks(2) & Window.last(4),
    Local(3),
    Strided(2),
    ~Window.last(3),
]


@pytest.mark.parametrize("mask", [*EXACT, *SAFE], ids=repr)
def test_a_mask_is_dropped_only_where_it_allows_every_pair(mask):
    ranges = [(a, b) for a, b in itertools.product(range(8), repeat=2) if a <= b]
    written = mask.dense(Grid.at(range(8), range(8)))
    for (q0, q1), (k0, k1) in itertools.product(ranges, repeat=2):
        every = bool(written[q0 : q1 + 1, k0 : k1 + 1].all())
        said = allows_all(mask, (q0, q1), (k0, k1))
        assert every or not said, ((q0, q1), (k0, k1))
        assert said or not every or mask in SAFE, ((q0, q1), (k0, k1))
