"""Nystromformer against transformers' layer with the same weights; Linformer against its formula and its exact setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from same_weights import EXACT, Pair, inputs, lively
from torch import Tensor, nn
from torch.nn import functional

from attlas.catalogue.index import build
from hf_models import transformers

DIM, HEADS = 66, 6


def nystromformer(length: int, landmarks: int, kernel: int | None) -> Any:
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = transformers().NystromformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, num_landmarks=landmarks, segment_means_seq_len=length,
        conv_kernel_size=kernel or 1, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = lively(NystromformerSelfAttention(config))
    # One coefficient per head; this option of theirs cannot be set. Its default, "original", is our start="batch".
    theirs.init_option = "exact"
    if kernel is None:
        theirs.conv_kernel_size, theirs.conv = None, None
    return theirs


@pytest.mark.parametrize(("length", "landmarks", "kernel"), [(35, 5, 3), (36, 12, None), (44, 11, 65), (29, 29, 7)])
def test_nystromformer(length: int, landmarks: int, kernel: int | None):
    theirs, out = nystromformer(length, landmarks, kernel), lively(nn.Linear(DIM, DIM), seed=3)
    mine = build("nystromformer", DIM, HEADS, landmarks=landmarks, conv_kernel=kernel, bias=True)
    pair = Pair(mine).linear(out, "o_proj")
    for name in ("query", "key", "value"):
        pair.linear(getattr(theirs, name), f"{name[0]}_proj")
    if kernel is not None:
        pair.copy(theirs.conv.weight, "conv", convert=lambda w: (w[:, 0, :, 0],))
    pair.without_effect("k_proj.bias")  # it moves all keys and landmarks alike, which no softmax sees
    pair.must_agree(lambda x: out(theirs(x)[0]), mine, inputs(2, length, DIM), atol=1e-10)


def test_nystromformer_with_one_start_for_the_batch():
    """transformers' default. Two iterations, so that the start shows: theirs has six, and an argument for it."""
    theirs, out = nystromformer(35, 5, 3), lively(nn.Linear(DIM, DIM), seed=3)
    theirs.init_option, inverse = "original", theirs.iterative_inv
    theirs.iterative_inv = lambda matrix: inverse(matrix, 2)
    mine = build("nystromformer", DIM, HEADS, landmarks=5, conv_kernel=3, iterations=2, start="batch", bias=True)
    pair = Pair(mine).linear(out, "o_proj")
    for name in ("query", "key", "value"):
        pair.linear(getattr(theirs, name), f"{name[0]}_proj")
    pair.copy(theirs.conv.weight, "conv", convert=lambda w: (w[:, 0, :, 0],))
    pair.without_effect("k_proj.bias")
    x = inputs(2, 35, DIM)
    pair.must_agree(lambda x: out(theirs(x)[0]), mine, x, atol=1e-10)
    mine.shared = False
    assert (mine(x) - out(theirs(x)[0])).abs().max() > 1e-4


def test_nystromformer_does_not_depend_on_the_batch():
    mine = build("nystromformer", DIM, HEADS, landmarks=5, conv_kernel=3).double()
    x = inputs(3, 37, DIM)
    torch.testing.assert_close(mine(x)[1:2], mine(x[1:2]), atol=EXACT, rtol=0)


@pytest.mark.parametrize("share", ["none", "heads", "key-value"])
def test_linformer_is_its_formula(share: Any):
    """By torch's own attention over keys and values that are shortened head by head."""
    mine = build("linformer", DIM, HEADS, max_len=31, proj_len=7, share=share).double()
    x = inputs(2, 23, DIM)
    q, k, v = (p(x).view(2, 23, HEADS, 11).transpose(1, 2) for p in (mine.q_proj, mine.k_proj, mine.v_proj))
    F: Tensor = mine.E if mine.F is None else mine.F

    def shorten(matrix: Tensor, t: Tensor) -> Tensor:
        rows = [matrix[h if share == "none" else 0, :, :23] @ t[:, h] for h in range(HEADS)]
        return torch.stack(rows, 1)

    y = functional.scaled_dot_product_attention(q, shorten(mine.E, k), shorten(F, v))
    want = mine.o_proj(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(mine(x), want, atol=EXACT, rtol=0)
    probe = inputs(2, 23, DIM, seed=4)
    grads = [torch.autograd.grad((out * probe).sum(), list(mine.parameters())) for out in (mine(x), want)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=EXACT * 100, rtol=0)


def test_linformer_with_identity_matrices_is_full_attention():
    mine = build("linformer", DIM, HEADS, max_len=23, proj_len=23).double()
    full = build("full", DIM, HEADS, rope=False).double()
    full.load_state_dict({name: t for name, t in mine.state_dict().items() if name.endswith("proj.weight")})
    with torch.no_grad():
        mine.E.copy_(torch.eye(23))
        mine.F.copy_(torch.eye(23))
    x = inputs(2, 23, DIM)
    torch.testing.assert_close(mine(x), full(x), atol=EXACT, rtol=0)
