"""Foreign spellings against the functions that they imitate, or against their documented reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from attlas.compat.flash_attn import flash_attn_func
from attlas.compat.torch_sdpa import sdpa
from attlas.errors import OptionError, ShapeError, UnsupportedError
from attlas.testing.budget import assert_same
from attlas.testing.inputs import randn

B, H, L, S, E = 2, 3, 5, 11, 7


def heads(length: int, seed: int, num: int = H) -> Tensor:
    return randn(B, num, length, E, seed=seed)


MASKS = {
    "none": None,
    "[L, S]": randn(L, S, seed=4) > 0,
    "[1, S]": randn(1, S, seed=4) > 0,
    "[B, 1, 1, S]": randn(B, 1, 1, S, seed=4) > 0,
    "[H, L, S]": randn(H, L, S, seed=4) > 0,
    "[B, H, L, S]": randn(B, H, L, S, seed=4) > 0,
    "bias [L, S]": randn(L, S, seed=4),
    "bias [B, 1, L, S]": randn(B, 1, L, S, seed=4),
    "bias with -inf": randn(B, H, L, S, seed=4).masked_fill(randn(B, H, L, S, seed=5) > 0.3, -math.inf),
    "row of -inf": torch.zeros(L, S, dtype=torch.float64).index_fill(0, torch.tensor([2]), -math.inf),
}


@pytest.mark.parametrize("name", MASKS)
def test_sdpa_masks(name: str) -> None:
    q, k, v = (heads(n, i).requires_grad_() for i, n in enumerate((L, S, S)))
    mask = MASKS[name]
    leaves = [q, k, v]
    if mask is not None and mask.is_floating_point():
        mask = mask.clone().requires_grad_()
        leaves.append(mask)
    got, want = sdpa(q, k, v, attn_mask=mask), functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_same(got, want, name)
    weight = randn(*want.shape, seed=9)
    for a, b in zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(want, leaves, weight), strict=True):
        assert_same(a, b, f"{name}: gradient")


@pytest.mark.parametrize("lengths", [(L, S), (S, L), (S, S)])
def test_sdpa_is_causal_is_aligned_to_the_start(lengths: tuple[int, int]) -> None:
    q, k, v = heads(lengths[0], 0), heads(lengths[1], 1), heads(lengths[1], 2)
    assert_same(sdpa(q, k, v, is_causal=True), functional.scaled_dot_product_attention(q, k, v, is_causal=True), str(lengths))


def test_sdpa_options_and_shapes() -> None:
    q, k, v = heads(L, 0, 6), heads(S, 1, 2), heads(S, 2, 2)
    want = functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    assert_same(sdpa(q, k, v, scale=0.3, enable_gqa=True), want, "grouped heads")
    one = [t[0] for t in (q, q, q)]
    assert_same(sdpa(*one), functional.scaled_dot_product_attention(*one), "no batch dimension")


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"dropout_p": 0.1}, UnsupportedError, "dropout_p=0.1"),
        ({"is_causal": True, "attn_mask": torch.ones(L, S).bool()}, OptionError, "exclude each other"),
        ({"attn_mask": torch.ones(L, S + 1).bool()}, ShapeError, "does not broadcast to"),
        ({"attn_mask": torch.ones(L, S).int()}, ShapeError, "bool or floating point"),
    ],
)
def test_sdpa_errors(options: dict[str, Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=rf"sdpa\(query \[2, 3, 5, 7\].*{why}"):
        sdpa(heads(L, 0), heads(S, 1), heads(S, 2), **options)


def test_sdpa_needs_leave_for_grouped_heads() -> None:
    with pytest.raises(ShapeError, match="enable_gqa=True"):
        sdpa(heads(L, 0, 6), heads(S, 1, 2), heads(S, 2, 2))


def flash_reference(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: tuple[int, int], cap: float, slopes: Any) -> Tensor:
    """What flash-attn documents, pair by pair: shift by Tk - Tq, window inclusive on both sides, softcap before the bias."""
    tq, tk, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    s = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    if cap:
        s = cap * torch.tanh(s / cap)
    for i in range(tq):
        for j in range(tk):
            d = i + tk - tq - j
            if slopes is not None:
                s[:, :, i, j] -= slopes * abs(d)
            outside = (window[0] >= 0 and d > window[0]) or (window[1] >= 0 and -d > window[1])
            if outside or (causal and d < 0):
                s[:, :, i, j] = -math.inf
    p = torch.nan_to_num(torch.softmax(s, -1))
    return torch.einsum("bhij,bjhd->bihd", p, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (3, -1), (2, 1), (-1, 0), (0, 0)])
@pytest.mark.parametrize("extra", [{}, {"softcap": 0.7}, {"softcap": 0.7, "alibi_slopes": True}])
@pytest.mark.parametrize("lengths", [(5, 11), (11, 5)])
def test_flash_attn_func(causal: bool, window: tuple[int, int], extra: dict[str, Any], lengths: tuple[int, int]) -> None:
    q, k, v = randn(B, lengths[0], 6, E), randn(B, lengths[1], 2, E, seed=1), randn(B, lengths[1], 2, E, seed=2)
    slopes = torch.linspace(0.1, 0.7, 6, dtype=torch.float64) if extra.get("alibi_slopes") else None
    got = flash_attn_func(q, k, v, causal=causal, window_size=window, **{**extra, "alibi_slopes": slopes})
    want = flash_reference(q, k, v, causal=causal, window=window, cap=extra.get("softcap", 0.0), slopes=slopes)
    assert_same(got, want, f"{causal} {window} {extra}")


def test_flash_attn_func_errors() -> None:
    q = randn(B, L, H, E)
    with pytest.raises(UnsupportedError, match="differ by batch row"):
        flash_attn_func(q, q, q, alibi_slopes=torch.ones(B, H))
    with pytest.raises(UnsupportedError, match=r"dropout_p=0\.5"):
        flash_attn_func(q, q, q, dropout_p=0.5)
    with pytest.raises(OptionError, match=r"window_size=\(-2, 0\)"):
        flash_attn_func(q, q, q, window_size=(-2, 0))
    assert_same(flash_attn_func(q, q, q, softmax_scale=0.2), flash_attn_func(q * 0.2 * math.sqrt(E), q, q), "scale")
