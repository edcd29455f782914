"""Longformer and BigBird against transformers' layers with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from same_weights import Pair, inputs, lively
from torch import Tensor, nn

from attlas.catalogue.index import build
from attlas.masks import Window
from hf_models import transformers

DIM, HEADS = 66, 6
T = 24


def longformer(window: int, tokens: tuple[int, ...]) -> Any:
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = transformers().LongformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    theirs = lively(LongformerSelfAttention(config, layer_id=0))

    def run(x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[:2], dtype=x.dtype)
        mask[:, list(tokens)] = 10000.0
        return theirs(
            x, attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=bool(tokens)
        )[0]

    return theirs, run


@pytest.mark.parametrize("tokens", [(0,), (0, 3, 17), (5, 23)])
@pytest.mark.parametrize("window", [4, 8])
def test_longformer(window: int, tokens: tuple[int, ...]):
    theirs, run = longformer(window, tokens)
    out = lively(nn.Linear(DIM, DIM), seed=3)
    mine = build("longformer", DIM, HEADS, window=Window(window // 2, window // 2), tokens=tokens, rope=False, bias=True)
    pair = Pair(mine).linear(out, "o_proj")
    for name in ("query", "key", "value"):
        pair.linear(getattr(theirs, name), f"{name[0]}_proj").linear(getattr(theirs, f"{name}_global"), f"{name[0]}_global_proj")
    # A bias on all keys of one softmax cancels, in each of the two.
    pair.without_effect("k_proj.bias", "k_global_proj.bias")
    pair.must_agree(lambda x: out(run(x)), mine, inputs(2, T, DIM))
