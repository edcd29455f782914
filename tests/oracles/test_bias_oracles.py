"""BERT, GPT-2, GPT-Neo, BLOOM, MPT, Falcon-ALiBi and T5 attention of transformers against our mixers with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from same_weights import EXACT, Pair, causal_bias, inputs, lively
from torch import Tensor, nn

from attlas.catalogue.index import build
from attlas.models.weight_maps import by_group, side_by_side, side_by_side_transposed, transposed
from attlas.ops.attention import attention
from attlas.scores import Alibi, RelativeBias
from hf_models import transformers

T = 23
QKV = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bert(implementation: str):
    from transformers.models.bert.modeling_bert import BertSelfAttention

    config = transformers().BertConfig(hidden_size=66, num_attention_heads=6, attn_implementation=implementation)
    theirs, out = lively(BertSelfAttention(config)), lively(nn.Linear(66, 66), seed=3)
    mine = build("full", 66, 6, rope=False, bias=True)
    pair = Pair(mine).linear(theirs.query, "q_proj").linear(theirs.key, "k_proj").linear(theirs.value, "v_proj")
    pair.linear(out, "o_proj").without_effect("k_proj.bias")
    pair.must_agree(lambda x: out(theirs(x)[0]), mine, inputs(2, T, 66), atol=EXACT)


def gpt2(cross: bool, **fields: Any) -> Any:
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    config = transformers().GPT2Config(n_embd=66, n_head=6, attn_implementation="sdpa", **fields)
    return lively(GPT2Attention(config, is_cross_attention=cross, layer_idx=2))


def test_gpt2():
    theirs = gpt2(cross=False)
    mine = build("causal", 66, 6, rope=False, bias=True)
    pair = Pair(mine).linear(theirs.c_attn, *QKV, convert=side_by_side_transposed, bias=side_by_side)
    pair.linear(theirs.c_proj, "o_proj", convert=transposed)
    pair.must_agree(lambda x: theirs(x)[0], mine, inputs(2, T, 66), atol=EXACT)


def test_gpt2_scaled_by_layer():
    theirs = gpt2(cross=False, scale_attn_by_inverse_layer_idx=True)
    mine = build("causal", 66, 6, rope=False, bias=True, scale=11**-0.5 / 3)
    pair = Pair(mine).linear(theirs.c_attn, *QKV, convert=side_by_side_transposed, bias=side_by_side)
    pair.linear(theirs.c_proj, "o_proj", convert=transposed)
    pair.must_agree(lambda x: theirs(x)[0], mine, inputs(2, T, 66), atol=EXACT)


def test_gpt2_cross_attention():
    theirs = gpt2(cross=True)
    mine = build("cross", 66, 6, bias=True)

    def halves(t: Tensor) -> tuple[Tensor, ...]:
        return t.t().chunk(2, dim=0)

    pair = Pair(mine).linear(theirs.q_attn, "q_proj", convert=transposed)
    pair.linear(theirs.c_attn, "k_proj", "v_proj", convert=halves, bias=lambda t: t.chunk(2))
    pair.linear(theirs.c_proj, "o_proj", convert=transposed)
    memory = inputs(2, 13, 66, seed=5)
    run = lambda x, m: theirs(x, encoder_hidden_states=m)[0]  # noqa: E731
    pair.must_agree(run, lambda x, m: mine(x, memory=m), inputs(2, T, 66), memory, atol=EXACT)


@pytest.mark.parametrize("kind", ["global", "local"])
def test_gpt_neo_has_no_scale(kind: str):
    from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

    config = transformers().GPTNeoConfig(hidden_size=66, num_heads=6, window_size=5, attention_types=[[[kind], 1]], num_layers=1)
    config.max_position_embeddings = 31
    theirs = lively(GPTNeoSelfAttention(config, kind))
    options = {"rope": False, "scale": 1.0}
    mine = build("sliding-window", 66, 6, window=5, **options) if kind == "local" else build("causal", 66, 6, **options)
    pair = Pair(mine)
    for name in QKV:
        pair.linear(getattr(theirs, name), name)
    pair.copy(theirs.out_proj.weight, "o_proj.weight")
    # Only their output map has a bias; scores of size 10 and more reach an fp32 softmax.
    pair.must_agree(lambda x: theirs(x)[0] - theirs.out_proj.bias, mine, inputs(2, T, 66) * 0.5, atol=1e-5)


@pytest.mark.parametrize("heads", [4, 6, 7])
def test_bloom_alibi(heads: int):
    from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor

    config = transformers().BloomConfig(hidden_size=10 * heads, n_head=heads, hidden_dropout=0.0, attention_dropout=0.0)
    theirs = lively(BloomAttention(config, 0))
    mine = build("alibi", 10 * heads, heads, bias=True)
    split = by_group(heads, 1)
    pair = Pair(mine).linear(theirs.query_key_value, *QKV, convert=split, bias=split).linear(theirs.dense, "o_proj")
    bias = build_alibi_tensor(torch.ones(2, T, dtype=torch.long), heads, torch.float64)
    run = lambda x: theirs(x, torch.zeros_like(x), bias, causal_bias(T))[0]  # noqa: E731
    pair.must_agree(run, mine, inputs(2, T, 10 * heads))


@pytest.mark.parametrize("heads", [4, 6, 7])
def test_mpt_alibi(heads: int):
    from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

    config = transformers().MptConfig(d_model=10 * heads, n_heads=heads)
    theirs = lively(MptAttention(config, 0))
    mine = build("alibi", 10 * heads, heads)
    pair = Pair(mine).linear(theirs.Wqkv, *QKV, convert=side_by_side).linear(theirs.out_proj, "o_proj")
    bias = build_mpt_alibi_tensor(heads, T).double()
    hidden = causal_bias(T) != 0
    pair.must_agree(lambda x: theirs(x, bias, attention_mask=hidden)[0], mine, inputs(2, T, 10 * heads))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_falcon_scales_its_alibi(implementation: str):
    from transformers.models.falcon.modeling_falcon import FalconAttention, build_alibi_tensor

    config = transformers().FalconConfig(
        hidden_size=40, num_attention_heads=4, alibi=True, multi_query=True, bias=True, attn_implementation=implementation
    )
    theirs = lively(FalconAttention(config, 0))
    slopes = Alibi.for_heads(4).slopes.double() * 10**-0.5
    mine = build("multi-query", 40, 4, rope=False, bias=True, score_mod=Alibi(slopes))
    split = by_group(1, 4)
    pair = Pair(mine).linear(theirs.query_key_value, *QKV, convert=split, bias=split).linear(theirs.dense, "o_proj")
    # Their slopes are bf16: exact here, where they are powers of two and positions are below 256.
    bias = build_alibi_tensor(torch.ones(2, T, dtype=torch.long), 4, torch.float64)
    mask = causal_bias(T)
    if implementation == "sdpa":  # the caller of this path folds the bias into the mask
        mask = bias.view(2, 4, 1, T) * 10**-0.5 + mask
    pair.must_agree(lambda x: theirs(x, bias, mask)[0], mine, inputs(2, T, 40), atol=EXACT)


# ---- T5 ---------------------------------------------------------------------------------------------------------------------


def t5_attention(decoder: bool, bias: bool) -> Any:
    from transformers.models.t5.modeling_t5 import T5Attention

    fields = {"relative_attention_num_buckets": 14, "relative_attention_max_distance": 17, "attn_implementation": "eager"}
    config = transformers().T5Config(d_model=42, d_kv=10, num_heads=3, is_decoder=decoder, **fields)
    return lively(T5Attention(config, has_relative_attention_bias=bias, layer_idx=0))


def t5_pair(mine: nn.Module, theirs: Any) -> Pair:
    pair = Pair(mine)
    for name in "qkvo":
        pair.linear(getattr(theirs, name), f"{name}_proj")
    return pair


@pytest.mark.parametrize("decoder", [False, True])
def test_t5_self_attention(decoder: bool):
    theirs = t5_attention(decoder, bias=True)
    table = RelativeBias(torch.zeros(14, 3, requires_grad=True), bidirectional=not decoder, max_distance=17)
    mine = build("causal" if decoder else "full", 42, 3, head_dim=10, rope=False, scale=1.0, score_mod=table)
    pair = t5_pair(mine, theirs).copy(theirs.relative_attention_bias.weight, "score_params.0")
    mask = causal_bias(T) if decoder else None
    x = inputs(2, T, 42) * 0.5
    pair.must_agree(lambda x: theirs(x, mask=mask, position_bias=theirs.compute_bias(T, T))[0], mine, x, atol=EXACT)


def test_t5_cross_attention_has_no_bias():
    theirs = t5_attention(decoder=True, bias=False)
    mine = build("cross", 42, 3, head_dim=10, scale=1.0)
    x, memory = inputs(2, T, 42) * 0.5, inputs(2, 13, 42, seed=5) * 0.5
    run = lambda x, m: theirs(x, key_value_states=m)[0]  # noqa: E731
    t5_pair(mine, theirs).must_agree(run, lambda x, m: mine(x, memory=m), x, memory, atol=EXACT)


def test_t5_bias_through_the_op():
    """The op alone, on heads: unscaled scores plus the table."""
    from transformers.models.t5.modeling_t5 import eager_attention_forward

    theirs = t5_attention(decoder=False, bias=True)
    q, k, v = (inputs(2, T, 3, 10, seed=s) for s in (1, 2, 3))
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    with torch.no_grad():
        want = eager_attention_forward(theirs, *heads, None, scaling=1.0, position_bias=theirs.compute_bias(T, T))[0]
        table = theirs.relative_attention_bias.weight
        got = attention(q, k, v, scale=1.0, score_mod=RelativeBias(table, bidirectional=True, max_distance=17))
    torch.testing.assert_close(got, want, atol=EXACT, rtol=0)
