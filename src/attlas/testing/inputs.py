"""Seeded inputs. Sizes are distinct primes, so that two axes that are mixed up never fit by accident."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

BATCH = 2
LONG = 29  # longer than any window, block or sink count of the small examples
SHORT = 13
EDGES = 293  # crosses the edges of blocks of 64, 128 and 256 tokens, and ends inside one
MEMORY = 7
RAGGED = (7, 1, 0, 13)
RAGGED_MEMORY = (5, 3, 2, 11)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers on the CPU; the same ones for every dtype, up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def chunks(total: int, seed: int, largest: int = 5) -> list[int]:
    """A random way to cut `total` tokens into chunks of 1 ... largest."""
    rng = random.Random(seed)
    out: list[int] = []
    while sum(out) < total:
        out.append(min(rng.randint(1, largest), total - sum(out)))
    return out


def longest(mixer: Any) -> int:
    """EDGES tokens, or as many as the mixer takes."""
    return EDGES if mixer.max_len is None else min(EDGES, mixer.max_len)
