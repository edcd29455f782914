"""Mixers against their definitions, written out one query, head and key at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attlas.catalogue.index import build
from attlas.errors import OptionError
from attlas.masks import Grid, Window
from attlas.scores import Softcap
from attlas.shapes import SeqInfo
from attlas.testing.budget import assert_same
from attlas.testing.inputs import randn
from attlas.testing.subject import seeded

T, DIM, H, D = 23, 19, 3, 4


def turn(x: Tensor, position: float, base: float = 10000.0) -> Tensor:
    """Rotate one head vector [d] as a list of complex numbers: pairs (i, i + d/2). Frequencies are fp32 numbers, as in
    checkpoints."""
    half = x.shape[-1] // 2
    angle = position * (1.0 / base ** (torch.arange(half).float() / half)).double()
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag])


def by_hand(
    mixer: Any,
    x: Tensor,
    allowed: Callable[[int, int], bool],
    *,
    memory: Tensor | None = None,
    score: Callable[[Tensor, Tensor, int, int, int], Tensor] | None = None,
    sink: bool = False,
) -> Tensor:
    """softmax attention of one sequence x [T, dim], one query, head and key at a time."""
    source = x if memory is None else memory
    heads, kv, d = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    q = mixer.q_proj(x).view(len(x), heads, d)
    k, v = (p(source).view(len(source), kv, d) for p in (mixer.k_proj, mixer.v_proj))
    out = torch.zeros_like(q)
    for i in range(len(x)):
        for h in range(heads):
            g = h // (heads // kv)
            keys = [j for j in range(len(source)) if allowed(i, j)]
            if not keys:
                continue
            s = torch.stack([_score(q[i, h], k[j, g], h, i, j, score) for j in keys])
            p = torch.exp(s - s.max())
            total = p.sum() + (torch.exp(mixer.sink[h] - s.max()) if sink else 0)
            out[i, h] = sum((w / total * v[j, g] for w, j in zip(p, keys, strict=True)), torch.zeros(d, dtype=x.dtype))
    return mixer.o_proj(out.flatten(1))


def _score(q: Tensor, k: Tensor, h: int, i: int, j: int, score: Any) -> Tensor:
    if score is not None:
        return score(q, k, h, i, j)
    return turn(q, i) @ turn(k, j) / math.sqrt(len(q))


def plain(q: Tensor, k: Tensor, h: int, i: int, j: int) -> Tensor:
    return q @ k / math.sqrt(len(q))


def with_alibi(q: Tensor, k: Tensor, h: int, i: int, j: int) -> Tensor:
    slope = [2**-4.0, 2**-8.0, 2**-2.0][h]  # three heads: two of the power of two below, then the first of the power above
    return plain(q, k, h, i, j) - slope * abs(i - j)


CASES: dict[str, tuple[str, dict[str, Any], Callable[[int, int], bool], dict[str, Any]]] = {
    "full": ("full", {}, lambda i, j: True, {}),
    "causal": ("causal", {}, lambda i, j: j <= i, {}),
    "no rope": ("causal", {"rope": False}, lambda i, j: j <= i, {"score": plain}),
    "scale": ("full", {"rope": False, "scale": 0.3}, lambda i, j: True, {"score": lambda q, k, h, i, j: q @ k * 0.3}),
    "multi-head": ("multi-head", {}, lambda i, j: j <= i, {}),
    "multi-query": ("multi-query", {}, lambda i, j: j <= i, {}),
    "grouped-query": ("grouped-query", {"num_heads": 6, "num_kv_heads": 3}, lambda i, j: j <= i, {}),
    "local": ("local", {"block": 5}, lambda i, j: j <= i and i // 5 == j // 5, {}),
    "local, bidirectional": ("local", {"block": 5, "causal": False}, lambda i, j: i // 5 == j // 5, {}),
    "sliding-window": ("sliding-window", {"window": 5}, lambda i, j: i - 5 < j <= i, {}),
    "sliding-window, bidirectional": ("sliding-window", {"window": Window(3, 2)}, lambda i, j: i - 3 <= j <= i + 2, {}),
    "dilated": ("dilated-window", {"window": 3, "dilation": 4}, lambda i, j: i - j in (0, 4, 8), {}),
    "dilated, bidirectional": (
        "dilated-window", {"window": 2, "dilation": 4, "causal": False}, lambda i, j: abs(i - j) in (0, 4), {}
    ),
    "global": ("global", {"window": 4, "tokens": (0, 7)}, lambda i, j: j <= i and (i - j < 4 or {i, j} & {0, 7}), {}),
    "global, bidirectional": (
        "global", {"window": Window(2, 3), "tokens": (0, 7)}, lambda i, j: -3 <= i - j <= 2 or {i, j} & {0, 7}, {}
    ),
    "absolute sinks": (
        "streaming", {"window": 5, "sinks": 2, "sink_positions": "absolute"}, lambda i, j: j <= i and (i - j < 5 or j < 2), {}
    ),
    "strided": ("strided", {"stride": 5}, lambda i, j: j <= i and (i - j < 5 or (i - j) % 5 == 0), {}),
    "strided, bidirectional": (
        "strided", {"stride": 5, "causal": False}, lambda i, j: abs(i - j) < 5 or (i - j) % 5 == 0, {}
    ),
    "fixed": ("fixed", {"block": 5, "summary": 2}, lambda i, j: j <= i and (i // 5 == j // 5 or j % 5 >= 3), {}),
    "block-sparse": (
        "block-sparse", {"layout": ("100", "110", "101"), "block_size": 7},
        lambda i, j: j <= i and i < 21 and (j // 7) in {0: (0,), 1: (0, 1), 2: (0, 2)}[i // 7], {},
    ),
    "alibi": ("alibi", {}, lambda i, j: j <= i, {"score": with_alibi}),
    "alibi, bidirectional": ("alibi", {"causal": False}, lambda i, j: True, {"score": with_alibi}),
    "flash": ("flash", {}, lambda i, j: j <= i, {}),
    "learned-sink": ("learned-sink", {}, lambda i, j: j <= i, {"sink": True}),
    "learned-sink, window": ("learned-sink", {"window": 4}, lambda i, j: i - 4 < j <= i, {"sink": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_definition(case: str) -> None:
    name, options, allowed, how = CASES[case]
    mixer = seeded(build(name, **{"dim": DIM, "num_heads": H, "head_dim": D, **options}), torch.float64)
    x = randn(T, DIM)
    with torch.no_grad():
        assert_same(mixer(x[None])[0], by_hand(mixer, x, allowed, **how), case)


@pytest.mark.parametrize("causal", [True, False])
def test_summaries_of_every_head(causal: bool) -> None:
    """fixed with columns: head h reads the two tokens of a block of 7 that end 2 (h mod 3) before its end."""
    mixer = build("fixed", DIM, 5, head_dim=D, block=7, summary=(2, 3), causal=causal)
    i, j = torch.arange(23)[:, None], torch.arange(23)
    for h, seen in enumerate(mixer.describe_mask().dense(Grid.dense(23, 23), heads=5)[0]):
        end = 7 - 2 * (h % 3)
        want = (i // 7 == j // 7) | ((j % 7 >= end - 2) & (j % 7 < end))
        assert torch.equal(seen, want & (j <= i) if causal else want), h
    x = randn(2, 23, DIM, dtype=torch.float32)
    cache = mixer.new_cache(2) if causal else None
    if cache is not None:
        steps = torch.cat([mixer(x[:, t : t + 1], cache=cache) for t in range(23)], 1)
        assert (steps - mixer(x)).abs().max() < 1e-5
    assert torch.equal(
        build("fixed", DIM, 5, head_dim=D, block=7, summary=(2, 1)).describe_mask().to_bool(23, 23),
        build("fixed", DIM, 5, head_dim=D, block=7, summary=2).describe_mask().to_bool(23, 23),
    )
    for bad in ((2, 4), (2, 0), (-1, 2)):
        with pytest.raises(OptionError, match="summary \\(times columns\\)"):
            build("fixed", DIM, 5, head_dim=D, block=7, summary=bad)


def test_cross_definition() -> None:
    mixer = seeded(build("cross", DIM, H, head_dim=D, memory_dim=7), torch.float64)
    x, memory = randn(11, DIM), randn(5, 7, seed=1)
    with torch.no_grad():
        want = by_hand(mixer, x, lambda i, j: True, memory=memory, score=plain)
        assert_same(mixer(x[None], memory=memory[None])[0], want, "cross")


def test_streaming_is_the_paper_s_cache() -> None:
    """The procedure of the paper, literally: keep keys unrotated, evict, number what is left 0, 1, 2, ..., rotate, attend."""
    sinks, window = 2, 5
    mixer = seeded(build("streaming", DIM, H, head_dim=D, sinks=sinks, window=window), torch.float64)
    x = randn(T, DIM)
    with torch.no_grad():
        q, k, v = (p(x).view(T, H, D) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        kept: list[int] = []
        rows = []
        for i in range(T):
            kept.append(i)
            if len(kept) > sinks + window:
                kept.pop(sinks)
            heads = []
            for h in range(H):
                query = turn(q[i, h], len(kept) - 1)
                s = torch.stack([query @ turn(k[j, h], at) for at, j in enumerate(kept)]) / math.sqrt(D)
                heads.append(torch.softmax(s, 0) @ v[kept, h])
            rows.append(torch.cat(heads))
        want = mixer.o_proj(torch.stack(rows))
        assert_same(mixer(x[None])[0], want, "streaming")
        absolute = seeded(
            build("streaming", DIM, H, head_dim=D, sinks=sinks, window=window, sink_positions="absolute"), torch.float64
        )
        assert (absolute(x[None])[0][sinks + window :] - want[sinks + window :]).abs().max() > 1e-3


def test_streaming_far_out_stays_bounded() -> None:
    """A late token is decoded from 7 kept tokens and equals the same suffix arrangement near the start, up to the sinks'
    distances."""
    mixer = seeded(build("streaming", DIM, H, head_dim=D, sinks=2, window=5), torch.float64)
    head, tail = randn(1, 2, DIM), randn(1, 9, DIM, seed=5)
    near, far = (torch.cat([head, randn(1, n, DIM, seed=6), tail], dim=1) for n in (17, 997))
    with torch.no_grad():
        cache = mixer.new_cache(rows=1)
        y_far = mixer(far, cache=cache)
        assert_same(
            y_far[:, -5:], mixer(near)[:, -5:], "positions inside the cache do not depend on the length of the stream", tol=1e-9
        )
        assert cache.nbytes() == mixer.cache_bytes(10**9)


def test_qk_norm_and_bias() -> None:
    mixer = seeded(build("causal", DIM, H, head_dim=D, qk_norm=True, rope=False, bias="qkv"), torch.float64)
    assert mixer.o_proj.bias is None and mixer.q_proj.bias is not None
    x = randn(T, DIM)

    def score(q: Tensor, k: Tensor, h: int, i: int, j: int) -> Tensor:
        def norm(t: Tensor, w: Tensor) -> Tensor:
            return t / torch.sqrt((t * t).mean() + 1e-6) * w

        return norm(q, mixer.q_norm.weight) @ norm(k, mixer.k_norm.weight) / math.sqrt(D)

    with torch.no_grad():
        assert_same(mixer(x[None])[0], by_hand(mixer, x, lambda i, j: j <= i, score=score), "qk_norm")
    with pytest.raises(OptionError, match="'qkv'"):
        build("causal", DIM, H, head_dim=D, bias="k")


def test_chained_score_mods() -> None:
    mixer = seeded(build("full", DIM, H, head_dim=D, rope=False, score_mod=Softcap(0.5)), torch.float64)
    x = randn(T, DIM)

    def score(q: Tensor, k: Tensor, h: int, i: int, j: int) -> Tensor:
        return 0.5 * torch.tanh(plain(q, k, h, i, j) / 0.5)

    with torch.no_grad():
        assert_same(mixer(x[None])[0], by_hand(mixer, x, lambda i, j: True, score=score), "softcap")


@pytest.mark.parametrize(
    "case", ["causal", "alibi", "sliding-window", "local", "global", "absolute sinks", "learned-sink, window"]
)
@pytest.mark.parametrize("where", [tuple(range(3, 16)), (0, 1, 2, 5, 6, 9, 10, 11, 17, 18, 19, 20, 22)], ids=["shifted", "gaps"])
def test_positions_are_what_the_mask_and_the_codes_see(case: str, where: tuple[int, ...]) -> None:
    """Tokens at the given positions = the same tokens among others that nobody may see."""
    name, options, allowed, how = CASES[case]
    mixer = seeded(build(name, **{"dim": DIM, "num_heads": H, "head_dim": D, **options}), torch.float64)
    x = randn(T, DIM)
    at = torch.tensor(where)
    with torch.no_grad():
        want = by_hand(mixer, x, lambda i, j: j in where and allowed(i, j), **how)[at]
        assert_same(mixer(x[at][None], positions=at)[0], want, "dense")
        two = torch.stack([x[at], x[: len(at)]])
        rows = torch.stack([at, torch.arange(len(at))])
        got = mixer(two, positions=rows)
        assert_same(got[0], want, "positions by row, first row")
        assert_same(got[1], mixer(x[None, : len(at)])[0], "positions by row, second row")
        packed = mixer(two.flatten(0, 1), positions=rows.flatten(), seq=SeqInfo((len(at),) * 2))
        assert_same(packed, got.flatten(0, 1), "packed")


def test_gradient_through_irregular_positions() -> None:
    mixer = seeded(build("alibi", DIM, H, head_dim=D), torch.float64)
    at = torch.tensor([0, 2, 3, 7, 8])
    x = randn(1, 5, DIM).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mixer(x, positions=at), (x,), fast_mode=True)
