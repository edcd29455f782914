"""Llama, Mistral, Falcon and GPT-OSS attention of transformers against our mixers with the same weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from same_weights import Pair, causal_bias, inputs, lively

from attlas.catalogue.index import build
from attlas.models.weight_maps import by_group
from attlas.positions.rope import Rope
from attlas.positions.scaling import Linear, Llama3, Yarn
from hf_models import transformers

T = 23


def tables(embedding: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Their cos and sin for positions 0 ... T-1."""
    return embedding(x, torch.arange(x.shape[1])[None])


def four_projections(pair: Pair, attention: Any) -> Pair:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        pair.linear(getattr(attention, name), name)
    return pair


SCALINGS = {
    "default": ({}, None),
    "linear": ({"factor": 3.0}, Linear(3.0)),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 19},
        Llama3(8.0, 1.0, 4.0, 19),
    ),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": 17}, Yarn(4.0, 17)),
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("num_kv_heads", [1, 3, 6])
def test_llama(num_kv_heads: int, scaling: str):
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    fields, value = SCALINGS[scaling]
    config = transformers().LlamaConfig(
        hidden_size=66,
        num_attention_heads=6,
        num_key_value_heads=num_kv_heads,
        head_dim=14,
        attention_bias=True,
        max_position_embeddings=71,
        rope_parameters={"rope_type": scaling, "rope_theta": 5e3, **fields},
        attn_implementation="eager",
    )
    theirs = lively(LlamaAttention(config, 0))
    mine = build("grouped-query", 66, 6, num_kv_heads=num_kv_heads, head_dim=14, bias=True, rope=Rope(14, 5e3, scaling=value))
    x = inputs(2, T, 66)
    turns = tables(LlamaRotaryEmbedding(config), x)
    four_projections(Pair(mine), theirs).must_agree(lambda x: theirs(x, turns, causal_bias(T))[0], mine, x)


@pytest.mark.parametrize("window", [1, 5, 40])
def test_mistral(window: int):
    from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding

    config = transformers().MistralConfig(
        hidden_size=60, num_attention_heads=6, num_key_value_heads=2, sliding_window=window, attn_implementation="eager"
    )
    theirs = lively(MistralAttention(config, 0))
    mine = build("sliding-window", 60, 6, window=window, num_kv_heads=2)
    x = inputs(2, T, 60)
    pair = four_projections(Pair(mine), theirs)
    turns = tables(MistralRotaryEmbedding(config), x)
    if window == 1:  # one key: its weight is 1 whatever the query, so queries and keys have no gradient
        with torch.no_grad():
            torch.testing.assert_close(mine(x), theirs(x, turns, causal_bias(T, window))[0], atol=1e-12, rtol=0)
    else:
        pair.must_agree(lambda x: theirs(x, turns, causal_bias(T, window))[0], mine, x)


@pytest.mark.parametrize("fused", ["multi-query", "groups", "heads"])
def test_falcon_rotary(fused: str):
    from transformers.models.falcon.modeling_falcon import FalconAttention, FalconRotaryEmbedding

    kv = {"multi-query": 1, "groups": 2, "heads": 6}[fused]
    config = transformers().FalconConfig(
        hidden_size=60,
        num_attention_heads=6,
        num_kv_heads=kv,
        multi_query=fused == "multi-query",
        new_decoder_architecture=fused == "groups",
        bias=True,
        attn_implementation="eager",
    )
    theirs = lively(FalconAttention(config, 0))
    mine = build("multi-query", 60, 6, bias=True) if kv == 1 else build("grouped-query", 60, 6, num_kv_heads=kv, bias=True)
    split = by_group(kv, 6 // kv)
    pair = Pair(mine).linear(theirs.dense, "o_proj")
    pair.linear(theirs.query_key_value, "q_proj", "k_proj", "v_proj", convert=split, bias=split)
    x = inputs(2, T, 60)
    turns = tables(FalconRotaryEmbedding(config), x)
    run = partial(theirs, alibi=None, attention_mask=causal_bias(T), position_embeddings=turns)
    pair.must_agree(lambda x: run(x)[0], mine, x)


@pytest.mark.parametrize("window", [None, 5])
def test_gpt_oss_learned_sinks(window: int | None):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

    config = transformers().GptOssConfig(
        hidden_size=60,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=14,
        rope_parameters={"rope_type": "default", "rope_theta": 3e3},
        layer_types=["full_attention"] * 2,
        attn_implementation="eager",
    )
    theirs = lively(GptOssAttention(config, 0))
    mine = build("learned-sink", 60, 6, window=window, num_kv_heads=2, head_dim=14, bias=True, rope=3e3)
    pair = four_projections(Pair(mine), theirs).copy(theirs.sinks, "sink")
    x = inputs(2, T, 60)
    turns = tables(GptOssRotaryEmbedding(config), x)
    pair.must_agree(lambda x: theirs(x, turns, causal_bias(T, window))[0], mine, x)


def test_qwen3_norms_of_queries_and_keys():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    config = transformers().Qwen3Config(
        hidden_size=60, num_attention_heads=6, num_key_value_heads=2, head_dim=14, attn_implementation="eager"
    )
    theirs = lively(Qwen3Attention(config, 0))
    mine = build("grouped-query", 60, 6, num_kv_heads=2, head_dim=14, qk_norm=True)
    pair = four_projections(Pair(mine), theirs)
    pair.copy(theirs.q_norm.weight, "q_norm.weight").copy(theirs.k_norm.weight, "k_norm.weight")
    x = inputs(2, T, 60)
    turns = tables(Qwen3RotaryEmbedding(config), x)
    pair.must_agree(lambda x: theirs(x, turns, causal_bias(T))[0], mine, x)
