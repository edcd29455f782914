"""Multi-head latent attention against DeepSeek-V2's and V3's of transformers with the same weights, and its cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from same_weights import Pair, causal_bias, inputs, lively
from torch import Tensor

from attlas.catalogue.index import build
from attlas.nn.latent import MultiHeadLatent
from attlas.positions.rope import Rope
from attlas.positions.scaling import Yarn
from attlas.shapes import SeqInfo

DIM, HEADS, T = 66, 3, 23
SIZES = {"kv_lora_rank": 19, "qk_nope_head_dim": 7, "qk_rope_head_dim": 10, "v_head_dim": 11}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 16}
YARN |= {"mscale": 0.707, "mscale_all_dim": 1.3, "beta_fast": 32, "beta_slow": 1}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def theirs_of(version: int, q_rank: int | None, rope: dict[str, Any], bias: bool) -> tuple[Any, Any]:
    if version == 2:
        from transformers.models.deepseek_v2 import configuration_deepseek_v2 as configuration
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as modeling
    else:
        from transformers.models.deepseek_v3 import configuration_deepseek_v3 as configuration
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as modeling
    config = getattr(configuration, f"DeepseekV{version}Config")(
        hidden_size=DIM, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=q_rank, attention_bias=bias,
        rope_parameters=dict(rope), max_position_embeddings=640, attn_implementation="eager", head_dim=10, **SIZES,
    )  # fmt: skip
    attention = lively(getattr(modeling, f"DeepseekV{version}Attention")(config, layer_idx=0))
    return attention, getattr(modeling, f"DeepseekV{version}RotaryEmbedding")(config)


def pair_up(theirs: Any, mine: MultiHeadLatent) -> Pair:
    pair = Pair(mine).linear(theirs.kv_a_proj_with_mqa, "kv_a_proj").linear(theirs.kv_b_proj, "kv_b_proj")
    pair.copy(theirs.kv_a_layernorm.weight, "kv_a_norm.weight").linear(theirs.o_proj, "o_proj")
    if mine.q_rank is None:
        return pair.linear(theirs.q_proj, "q_proj")
    pair.linear(theirs.q_a_proj, "q_a_proj").linear(theirs.q_b_proj, "q_b_proj")
    return pair.copy(theirs.q_a_layernorm.weight, "q_a_norm.weight")


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("q_rank", "rope", "bias"), [(None, PLAIN, False), (13, PLAIN, True), (13, YARN, False)])
def test_deepseek(version: int, q_rank: int | None, rope: dict[str, Any], bias: bool):
    theirs, rotary = theirs_of(version, q_rank, rope, bias)
    scaling = None if rope is PLAIN else Yarn(40.0, 16, mscale=0.707, mscale_all_dim=1.3)
    mine = build("mla", DIM, HEADS, q_lora_rank=q_rank, rope=Rope(10, interleaved=True, scaling=scaling), bias=bias, **SIZES)
    assert mine.scale == pytest.approx(theirs.scaling, rel=1e-12)

    def run(x: Tensor) -> Tensor:
        where = rotary(x, torch.arange(T)[None].expand(x.shape[0], -1))
        return theirs(x, position_embeddings=where, attention_mask=causal_bias(T))[0]

    pair_up(theirs, mine).must_agree(run, mine, inputs(2, T, DIM))


def test_decoding_equals_deepseek():
    """The absorbed form, token by token, against their expanded one."""
    theirs, rotary = theirs_of(3, 13, YARN, False)
    mine = build(
        "mla",
        DIM,
        HEADS,
        q_lora_rank=13,
        rope=Rope(10, interleaved=True, scaling=Yarn(40.0, 16, mscale=0.707, mscale_all_dim=1.3)),
        **SIZES,
    )
    pair_up(theirs, mine)
    x = inputs(2, T, DIM)
    with torch.no_grad():
        want = theirs(x, position_embeddings=rotary(x, torch.arange(T)[None]), attention_mask=causal_bias(T))[0]
        cache = mine.new_cache(rows=2, max_len=T)
        got = torch.cat([mine(piece, cache=cache) for piece in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(got, want, atol=2e-6 * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_the_cache_holds_the_latent_and_the_rope_key_only(layout: Any, dtype: torch.dtype):
    mine = build("mla", DIM, HEADS, **SIZES).to(dtype)
    per_token = (SIZES["kv_lora_rank"] + SIZES["qk_rope_head_dim"]) * dtype.itemsize
    cache = mine.new_cache(max_len=32, layout=layout)
    mine(torch.randn(1, 32, DIM, dtype=dtype), cache=cache)
    assert mine.cache_bytes(32) == 32 * per_token == cache.nbytes()
    assert [spec.kind for spec in mine.cache_specs()] == ["latent"]


def test_decoding_never_expands_the_cache(monkeypatch: pytest.MonkeyPatch):
    mine = build("mla", DIM, HEADS, **SIZES)
    cache = mine.new_cache(rows=1)
    with torch.no_grad():
        mine(torch.randn(1, 40, DIM), cache=cache)
        monkeypatch.setattr(MultiHeadLatent, "_expand", lambda *_: pytest.fail("expanded"))
        mine(torch.randn(1, 1, DIM), cache=cache)


def test_a_prompt_beside_a_decode_step():
    """One step in which one sequence is absorbed and another expanded gives what each gives alone."""
    mine = build("mla", DIM, HEADS, **SIZES).double()
    assert mine.absorbs(1, 18) and mine.absorbs(2, 31) and not mine.absorbs(40, 45) and not mine.absorbs(17, 17)
    prompts = [inputs(n, DIM, seed=n) for n in (17, 5, 29)]
    news = [inputs(n, DIM, seed=50 + n) for n in (1, 40, 2)]
    want = [mine(torch.cat([p, new])[None])[0, len(p) :] for p, new in zip(prompts, news, strict=True)]
    cache = mine.new_cache(rows=3)
    mine(torch.cat(prompts), seq=SeqInfo((17, 5, 29)), cache=cache)
    got = mine(torch.cat([news[2], news[1], news[0]]), seq=SeqInfo((2, 40, 1), ids=(2, 1, 0)), cache=cache)
    torch.testing.assert_close(got, torch.cat(want[::-1]), atol=1e-12, rtol=0)
