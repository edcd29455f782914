"""How much of the pages that rows hold is empty, in a chat load with the lengths of ShareGPT."""

from __future__ import annotations

import random

import pytest
import torch

from attlas.cache import CacheManager, PartSpec
from attlas.shapes import SeqInfo

# 202 tokens in and 179 out on average, as in a well-known sample of 500 ShareGPT prompts; a long tail (log-normal, sigma 1).
MEAN_PROMPT, MEAN_OUTPUT, SIGMA = 202, 179, 1.0
HEAD = (("k", (1, 1)), ("v", (1, 1)))


def lengths(mean: float, count: int, draw: random.Random) -> list[int]:
    middle = torch.tensor(mean).log().item() - SIGMA**2 / 2
    return [min(max(4, round(draw.lognormvariate(middle, SIGMA))), 2048) for _ in range(count)]


def waste(window: int | None, *, requests: int, rows: int, prefix_caching: bool = True) -> tuple[float, int]:
    """Continuous batching with a step per token: (mean over the steps of empty slots / slots held by rows, tokens computed)."""
    draw = random.Random(0)
    waiting = list(zip(lengths(MEAN_PROMPT, requests, draw), lengths(MEAN_OUTPUT, requests, draw), strict=True))
    m = CacheManager([(PartSpec("kv", HEAD, window),)], rows=rows, pages=rows * 256, prefix_caching=prefix_caching)
    part, left = m.caches[0].parts[0], dict[int, int]()
    empty, held, computed = 0, 0, 0
    while waiting or left:
        counts = dict.fromkeys(left, 1)
        while waiting and (admission := m.admit([draw.randrange(99)])) is not None:
            prompt, left[admission.row] = waiting.pop()
            counts[admission.row] = prompt
        for row, n in counts.items():
            assert m.reserve(row, n)
        total = sum(counts.values())
        part.write((torch.zeros(total, 1, 1),) * 2, SeqInfo(tuple(counts.values()), starts=None, ids=tuple(counts)))
        m.caches[0].end_step()
        stats = m.stats()
        held += stats.used * m.page_size
        empty += stats.used * m.page_size - stats.tokens
        computed += total
        left = {row: n - 1 for row, n in left.items()}
        for row in [row for row, n in left.items() if not n]:
            del left[row]
            m.release(row, None)
    m.check()
    assert m.stats().used == 0
    return empty / held, computed


@pytest.mark.parametrize("window", [None, 4096, 1024])
def test_less_than_four_percent_of_the_held_slots_are_empty(window):
    share, computed = waste(window, requests=60, rows=16)
    assert computed > 10_000 and 0.005 < share < 0.04


def test_a_short_window_wastes_a_page_at_either_end():
    """128 keys in pages of 16: what lies behind the window in its first page counts as empty too."""
    share, _ = waste(128, requests=40, rows=16)
    assert share < (15 + 16) / (127 + 15 + 16)


@pytest.mark.heavy
def test_five_hundred_requests():
    for window in (None, 4096, 1024, 128):
        share, computed = waste(window, requests=500, rows=64)
        print(f"window {window}: {share:.2%} of the held slots are empty ({computed} tokens)")
        assert share < (0.04 if window != 128 else 0.12)
