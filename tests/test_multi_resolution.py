"""What is peculiar to attention at two resolutions: which pairs of blocks are computed token by token, what the others give."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attlas.catalogue.index import build
from attlas.errors import AttlasError, OptionError, ShapeError, UnsupportedError
from attlas.masks import Global, Local
from attlas.ops.attention import attention
from attlas.ops.groups import group_means, log_counts, merge_rows
from attlas.ops.resolution import multi_resolution_attention
from attlas.reference.multiscale import multi_resolution
from attlas.testing.budget import assert_same
from attlas.testing.inputs import randn
from attlas.testing.subject import seeded

CHOICES: list[dict[str, Any]] = [
    {},
    {"coarse": False},
    {"ranking": "relative"},
    {"ranking": "relative", "coarse": False, "diagonal": 1},
    {"blocks_per_row": 3, "first": 1, "diagonal": 1},
    {"blocks_per_row": 1, "coarse": False},
]


def qkv(length: int, heads: int = 3) -> list[Tensor]:
    return [randn(2, length, heads, 6, seed=s).requires_grad_() for s in (1, 2, 3)]


@pytest.mark.parametrize("options", CHOICES, ids=lambda o: "-".join(map(str, o.values())) or "default")
@pytest.mark.parametrize(("length", "block"), [(1, 3), (13, 2), (29, 5), (35, 7), (31, 16), (11, 1)])
def test_it_is_its_definition(options: dict[str, Any], length: int, block: int) -> None:
    rules = {"block": block, "blocks_per_row": 2, "coarse": True, "ranking": "absolute", "diagonal": 0, "first": 0, **options}
    inputs, probe = qkv(length), randn(2, length, 3, 6, seed=5)
    found = []
    for y in (multi_resolution_attention(*inputs, **rules), multi_resolution(*inputs, *rules.values())):
        grads = torch.autograd.grad((y * probe).sum(), inputs, allow_unused=True)
        found.append([y, *(torch.zeros(1) if g is None else g for g in grads)])
    for what, got, want in zip(("output", "gradient of q", "gradient of k", "gradient of v"), *found, strict=True):
        assert_same(got, want, what)


@pytest.mark.parametrize("length", [7, 20, 67])
def test_weights_sum_to_one(length: int) -> None:
    """A constant value stays constant, however the tokens are grouped and however short the last block is."""
    mixer = seeded(build("multi-resolution", 22, 2, block=4, blocks_per_row=1, head_dim=6), torch.float64)
    with torch.no_grad():
        mixer.v_proj.weight.zero_()
        mixer.v_proj.bias = nn.Parameter(randn(12))
    y = mixer(randn(1, length, 22))
    torch.testing.assert_close(y, mixer.o_proj(mixer.v_proj.bias).expand_as(y), atol=1e-12, rtol=0)


def test_blocks_that_are_asked_for_are_taken() -> None:
    q, k, v = qkv(29)
    near = multi_resolution_attention(q, k, v, block=5, blocks_per_row=1, diagonal=1, coarse=False)
    assert_same(near, attention(q, k, v, mask=Local(5)), "the diagonal")
    both = multi_resolution_attention(q, k, v, block=5, blocks_per_row=2, first=1, coarse=False)
    only = attention(q, k, v, mask=Global(range(5)))
    assert_same(both[:, :5], only[:, :5], "the first block asks all")  # 6 + 5 of the 12 pairs that may be taken
    assert ((both - only)[:, 5:].abs().amax((1, 3)) > 1e-3).sum() <= 6, "one more pair in each head, of one block"


def test_a_row_without_a_pair_is_zero() -> None:
    """A block of queries that is far ahead of the others takes every pair; relative to its row, each block has one."""
    q, k, v = (x.detach() for x in qkv(24))
    k, q[:, 8:12] = k.abs(), 50.0
    y = multi_resolution_attention(q, k, v, block=4, blocks_per_row=1, coarse=False)
    assert_same(y[:, 8:12], attention(q, k, v)[:, 8:12], "the block that takes all")
    assert not y[:, :8].any() and not y[:, 12:].any()
    y = multi_resolution_attention(q, k, v, block=4, blocks_per_row=1, coarse=False, ranking="relative")
    assert (y.abs().amax(-1) > 0).all()


def test_more_pairs_come_nearer_to_softmax_attention() -> None:
    q, k, v = (x.detach() for x in qkv(96))
    want, errors = attention(q, k, v), []
    for per_row in (1, 4, 8, 11, 12):
        y = multi_resolution_attention(q, k, v, block=8, blocks_per_row=per_row)
        errors.append(float((y - want).norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12 < errors[-2] < errors[0] / 2


def test_partial_results_of_a_row_are_joined() -> None:
    out, lse, rows = randn(13, 5, seed=1), randn(13, seed=2), torch.tensor([0, 3, 3, 0, 1, 3, 0, 4, 4, 0, 3, 3, 1])
    lse[4] = lse[12] = -math.inf
    out[4] = math.nan
    lse[7] = 800.0
    got, got_lse = merge_rows(out, lse, rows, 5)
    for row in range(5):
        parts = [i for i in range(13) if int(rows[i]) == row and lse[i] > -math.inf]
        if not parts:
            assert not got[row].any() and got_lse[row] == -math.inf
            continue
        torch.testing.assert_close(got[row], torch.softmax(lse[parts], 0) @ out[parts], atol=1e-14, rtol=1e-12)
        torch.testing.assert_close(got_lse[row], lse[parts].logsumexp(0), atol=1e-14, rtol=1e-12)


def test_means_of_groups_that_may_be_short() -> None:
    x = randn(2, 11, 3)
    means = group_means(x, 4)
    for g, piece in enumerate(x.split(4, 1)):
        torch.testing.assert_close(means[:, g], piece.mean(1), atol=1e-15, rtol=0)
    torch.testing.assert_close(log_counts(11, 4, x).exp(), torch.tensor([4.0, 4.0, 3.0], dtype=torch.float64))


BAD: list[dict[str, Any]] = [
    {"block": 0},
    {"blocks_per_row": 0},
    {"ranking": "best"},
    {"diagonal": 2},
    {"first": -1},
    {"blocks_per_row": 4, "diagonal": 3, "first": 1},
    {"causal": True},
]


@pytest.mark.parametrize("options", BAD, ids=lambda o: next(iter(o)))
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(AttlasError, match=r"multi-resolution\(dim=24, num_heads=3") as error:
        build("multi-resolution", 24, 3, **options)
    assert isinstance(error.value, UnsupportedError if "causal" in options else OptionError)
    if "causal" not in options:
        with pytest.raises(OptionError, match="multi_resolution_attention"):
            multi_resolution_attention(*qkv(7), **{"block": 4, "blocks_per_row": 2, **options})


def test_bad_shapes_and_decoding_are_refused() -> None:
    q, k, v = qkv(7)
    with pytest.raises(ShapeError, match=r"multi_resolution_attention\(q"):
        multi_resolution_attention(q, k[:, :5], v, block=2, blocks_per_row=2)
    with pytest.raises(UnsupportedError, match="cannot decode"):
        build("mra", 24, 3).new_cache()
