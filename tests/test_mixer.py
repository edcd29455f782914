"""The contract that all mixers share: options, positions, caches, costs, errors."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attlas.catalogue.index import build
from attlas.errors import AttlasError, OptionError, ShapeError, UnsupportedError
from attlas.masks import All, Causal, Dilated, Fixed, Global, Local, Nothing, PerHead, Prefix, Sinks, Strided, Window
from attlas.nn.attention import Attention
from attlas.nn.reach import Reach, is_causal, is_shift_invariant, reach
from attlas.positions.rope import Rope
from attlas.scores import RelativeBias
from attlas.shapes import SeqInfo
from attlas.testing.budget import assert_same, error_budget
from attlas.testing.inputs import randn
from attlas.testing.subject import seeded

T, DIM, H, D = 23, 19, 3, 4


# ---- options -------------------------------------------------------------------------------------------------------------------


def test_rope_forms() -> None:
    x = randn(2, T, DIM)
    same = [seeded(build("causal", DIM, H, head_dim=D, rope=r), torch.float64)(x) for r in (True, 10000.0, Rope(D))]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    other = [
        seeded(build("causal", DIM, H, head_dim=D, rope=r), torch.float64)(x) for r in (500.0, Rope(D, interleaved=True), False)
    ]
    assert all((a - same[0]).abs().max() > 1e-3 for a in other)
    for bad, why in ((Rope(6), "head_dim 6"), (0.5, "base above 1")):
        with pytest.raises(OptionError, match=why):
            build("causal", DIM, H, head_dim=D, rope=bad)
    with pytest.raises(OptionError, match=r"even head_dim.*rope=False"):
        build("causal", 21, 3)
    assert build("causal", 21, 3, rope=False).head_dim == 7


def test_learned_bias_is_a_shared_parameter() -> None:
    table = nn.Parameter(randn(8, H, dtype=torch.float32))
    layers = [build("full", DIM, H, head_dim=D, rope=False, scale=1.0, score_mod=RelativeBias(table, True, 16)) for _ in range(2)]
    assert all(any(p is table for p in layer.parameters()) for layer in layers)
    stack = nn.Sequential(*layers).double()
    x = randn(1, 13, DIM)
    y = stack(x)
    y.sum().backward()
    params = [*layers[0].score_params, *layers[1].score_params]
    assert params[0] is params[1] and params[0].grad is not None and params[0].grad.abs().sum() > 0
    with torch.no_grad():
        params[0].add_(0.5 * randn(8, H, seed=3))
    assert (stack(x) - y).abs().max() > 1e-3


def test_fixed_slopes_are_neither_rounded_nor_saved() -> None:
    mixer = build("alibi", 21, 7).to(torch.bfloat16)
    (slopes,) = mixer.score_mod(torch.device("cpu")).tensors()
    assert slopes.dtype == torch.float32
    assert slopes.tolist() == [2.0**-e for e in (2, 4, 6, 8, 1, 3, 5)]
    assert all("proj" in name for name in mixer.state_dict()), "fixed slopes are no weights"


def test_grouped_query_equals_multi_head_with_repeated_heads() -> None:
    grouped = seeded(build("grouped-query", DIM, 6, head_dim=D, num_kv_heads=3), torch.float64)
    multi = build("multi-head", DIM, 6, head_dim=D).double()
    weights = grouped.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        weights[name] = weights[name].view(3, D, DIM).repeat_interleave(2, dim=0).flatten(0, 1)
    multi.load_state_dict(weights)
    x = randn(2, T, DIM)
    assert_same(grouped(x), multi(x), "repeated heads")
    assert 2 * grouped.cache_bytes(T) == multi.cache_bytes(T)


def test_attend_is_a_seam() -> None:
    calls = []

    def mine(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)

    mixer = build("sliding-window", DIM, H, head_dim=D, window=5, attend=mine)
    assert not mixer(randn(2, T, DIM, dtype=torch.float32)).any()
    assert calls[0]["mask"] == Causal() & Window.last(5) and calls[0]["seq"] is None


def test_use_pins_every_op() -> None:
    mixer = build("causal", DIM, H, head_dim=D).use("no-such")
    with pytest.raises(AttlasError, match="no-such"):
        mixer(randn(1, 5, DIM, dtype=torch.float32))
    with pytest.raises(AttlasError, match="no-such"):
        mixer(randn(1, 5, DIM, dtype=torch.float32), cache=mixer.new_cache())
    assert build("flash", DIM, H, head_dim=D).impl == "blocked"


# ---- positions -----------------------------------------------------------------------------------------------------------------


def test_positions_with_a_cache() -> None:
    mixer = seeded(build("causal", DIM, H, head_dim=D), torch.float64)
    x = randn(1, 11, DIM)
    cache = mixer.new_cache(rows=1)
    y = torch.cat([mixer(x[:, :4], cache=cache), mixer(x[:, 4:], cache=cache, positions=torch.arange(4, 11))], dim=1)
    assert_same(y, mixer(x), "explicit positions that agree with the cache")
    with pytest.raises(ShapeError, match=r"the cache holds \(11,\) tokens"):
        mixer(x[:, :2], cache=cache, positions=torch.arange(5, 7))
    with pytest.raises(UnsupportedError, match="consecutive"):
        mixer(x[:, :2], cache=cache, positions=torch.tensor([11, 13]))
    assert cache.lengths == (11,), "a refused call leaves the cache as it was"


# ---- cross-attention and caches ------------------------------------------------------------------------------------------------


def test_cross_cache_keeps_and_replaces_memory() -> None:
    mixer = seeded(build("cross", DIM, H, head_dim=D), torch.float64)
    x, one, two = randn(2, 11, DIM), randn(2, 5, DIM, seed=1), randn(2, 3, DIM, seed=2)
    cache = mixer.new_cache(rows=2)
    with pytest.raises(ShapeError, match="holds no memory"):
        mixer(x, cache=cache)
    assert_same(mixer(x[:, :4], memory=one, cache=cache), mixer(x[:, :4], memory=one), "first call")
    assert_same(mixer(x[:, 4:], cache=cache), mixer(x[:, 4:], memory=one), "later call")
    assert_same(mixer(x, memory=two, cache=cache), mixer(x, memory=two), "new memory")
    assert_same(mixer(x[:, :1], cache=cache), mixer(x[:, :1], memory=two), "kept")
    assert cache.lengths == (3, 3)


def test_cross_ragged_memory() -> None:
    mixer = seeded(build("cross", DIM, H, head_dim=D, bias=True), torch.float64)
    x, memory = randn(3, 5, DIM), randn(3, 7, DIM, seed=1)
    y = mixer(x, memory=memory, seq=SeqInfo((5, 5, 5), lengths_k=(7, 0, 2)))
    assert_same(y[2:], mixer(x[2:], memory=memory[2:, :2]), "two tokens")
    assert_same(y[1], mixer.o_proj.bias.expand(5, -1), "no memory gives zero before the output bias")


def test_bidirectional_mixers_have_no_cache() -> None:
    with pytest.raises(UnsupportedError, match=r"full\(dim=19, num_heads=3.*no cache"):
        build("full", DIM, H, head_dim=D).new_cache()


def test_cache_of_another_layer() -> None:
    mixer, other = build("causal", DIM, H, head_dim=D), build("sliding-window", DIM, H, head_dim=D, window=5)
    with pytest.raises(ShapeError, match="another layer"):
        mixer(randn(1, 3, DIM, dtype=torch.float32), cache=other.new_cache())


def test_caches_follow_from_masks() -> None:
    window = Window.last(5)
    table = {
        Causal(): Reach(None),
        Causal() & window: Reach(5),
        Causal() & Local(7): Reach(7),
        Dilated(3, 0, 4): Reach(13),
        Causal() & (window | Sinks(3)): Reach(5, 3),
        Causal() & (window | Global((0, 1))): Reach(5, 2),
        Causal() & (window | Global((0, 4))): Reach(None),
        Causal() & (window | Strided(7)): Reach(None),
        Causal() & (window | Prefix(3)): Reach(None),
        Causal() & PerHead((window, Window.last(9))): Reach(9),
        Causal() & PerHead((window, All())): Reach(None),
        Causal() & ~window: Reach(None),
        Causal() & Nothing(): Reach(1),
    }
    for mask, want in table.items():
        assert reach(mask) == want, mask
        assert is_causal(mask), mask
    for mask in (
        None,
        All(),
        Window(3, 1),
        Local(5),
        Causal() | Local(5),
        Prefix(3),
        Causal(align="start"),
        Fixed(4, 1),
        ~Causal(),
    ):
        assert not is_causal(mask), mask
    assert is_causal(PerHead((Causal(), window))) and not is_causal(PerHead((Causal(), All())))
    assert all(is_shift_invariant(m) for m in (None, Causal() & ~window, PerHead((Strided(3), Dilated(2, 0, 3)))))
    assert not any(is_shift_invariant(m) for m in (Sinks(3), Causal() & Local(3), Global((0,)) | window, ~Fixed(3, 1)))


@pytest.mark.parametrize(
    "mask", [Causal() & PerHead((Window.last(3), Window.last(9), All())), Causal() & (Window.last(4) | Sinks(3))]
)
def test_any_causal_mask_decodes(mask: Any) -> None:
    mixer = seeded(Attention(DIM, H, head_dim=D, mask=mask), torch.float64)
    x, cache = randn(2, T, DIM), mixer.new_cache(rows=2)
    y = torch.cat([mixer(part, cache=cache) for part in x.split([7, 1, 1, 5, 9], dim=1)], dim=1)
    assert_same(y, mixer(x), "decode")


def test_decoding_with_dense_padded_rows() -> None:
    """A right-padded batch of prompts goes into the cache without its padding."""
    mixer = seeded(build("sliding-window", DIM, H, head_dim=D, window=5), torch.float64)
    x = randn(3, 11, DIM)
    cache = mixer.new_cache(rows=3)
    y = mixer(x, seq=SeqInfo((11, 4, 7)), cache=cache)
    assert cache.lengths == (11, 4, 7) and not y[1, 4:].any()
    step = mixer(randn(3, 1, DIM, seed=4), cache=cache)
    for b, n in enumerate((11, 4, 7)):
        alone = mixer(torch.cat([x[b : b + 1, :n], randn(3, 1, DIM, seed=4)[b : b + 1]], dim=1))
        assert_same(step[b, 0], alone[0, -1], f"row {b}")


# ---- costs ---------------------------------------------------------------------------------------------------------------------


def test_flops_and_cache_in_closed_form() -> None:
    n, w = 1009, 31
    projections = n * 2 * (4 * DIM * H * D)
    pair = 4 * H * D
    pairs = {
        "full": n * n,
        "causal": n * (n + 1) // 2,
        "sliding-window": w * n - w * (w - 1) // 2,
        "streaming": w * n - w * (w - 1) // 2 + sum(min(4, max(0, i - w + 1)) for i in range(n)),
        "local": (n // w) * w * (w + 1) // 2 + (n % w) * (n % w + 1) // 2,
    }
    for name, count in pairs.items():
        options = {"sliding-window": {"window": w}, "streaming": {"window": w}, "local": {"block": w}}.get(name, {})
        mixer = build(name, DIM, H, head_dim=D, **options)
        assert mixer.flops(n) == projections + pair * count, name
    halves = Attention(DIM, H, head_dim=D, mask=PerHead((Causal(), All(), Nothing())))
    assert halves.flops(n) == projections + 4 * D * (n * (n + 1) // 2 + n * n)
    assert build("cross", DIM, H, head_dim=D).flops(n, 7) == 4 * (n + 7) * DIM * H * D + pair * n * 7
    assert build("causal", DIM, H, head_dim=D).cache_bytes(n) == 2 * n * H * D * 4
    assert build("causal", DIM, H, head_dim=D).bfloat16().cache_bytes(n) == 2 * n * H * D * 2
    assert build("sliding-window", DIM, H, head_dim=D, window=w).cache_bytes(10**9) == 2 * w * H * D * 4


@pytest.mark.parametrize("name", ["causal", "sliding-window", "local", "global", "streaming", "dilated-window", "alibi"])
def test_flops_of_a_million_tokens_are_cheap(name: str) -> None:
    options = {"window": 257, "block": 257, "dilation": 3}
    mixer = build(name, 512, 8, **{k: v for k, v in options.items() if k in build_options(name)})
    before = time.perf_counter()
    assert mixer.flops(1_000_003) > mixer.flops(1009)
    assert time.perf_counter() - before < 5


def build_options(name: str) -> set[str]:
    from attlas.catalogue.index import card

    return set(card(name).options)


# ---- errors --------------------------------------------------------------------------------------------------------------------


def test_errors_restate_the_call() -> None:
    mixer = build("sliding-window", DIM, H, head_dim=D, window=5)
    with pytest.raises(ShapeError, match=r"sliding-window\(dim=19, num_heads=3.*Window\(4, 0\).*x \[2, 5, 7\] float32 cpu"):
        mixer(torch.zeros(2, 5, 7))
    with pytest.raises(ShapeError, match="float64"):
        mixer(randn(1, 5, DIM))
    with pytest.raises(UnsupportedError, match=r"takes no memory; got x .* memory \[2, 3, 19\]"):
        mixer(torch.zeros(2, 5, DIM), memory=torch.zeros(2, 3, DIM))
    with pytest.raises(OptionError, match="dim 19 is not divisible by num_heads 3; give head_dim"):
        build("causal", DIM, H)
    with pytest.raises(OptionError, match="num_kv_heads 2 must divide num_heads 3"):
        build("causal", DIM, H, head_dim=D, num_kv_heads=2)
    with pytest.raises(OptionError, match="sink_positions='absolute'"):
        build("streaming", DIM, H, head_dim=D, window=5, rope=False)
    with pytest.raises(OptionError, match="positions, none below 0"):
        build("global", DIM, H, head_dim=D, window=5, tokens=(-1,))


def test_autocast() -> None:
    mixer = build("causal", DIM, H, head_dim=D)
    x = randn(2, T, DIM, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert (y.float() - mixer(x)).abs().max() < 0.05


def test_error_budget() -> None:
    truth = torch.tensor([1.0, -2.0], dtype=torch.float64)
    naive = truth.float() + torch.tensor([1e-4, 0.0])
    assert error_budget(truth.float() + 1.9e-4, naive, truth).ok
    assert not error_budget(truth.float() + 2.1e-4, naive, truth).ok
    assert not error_budget(truth.float() * math.nan, naive, truth).ok
    assert error_budget(truth.float(), truth.float(), truth).allowed > 0
