"""Longformer, BigBird, LED and DeepSeek-V2 as whole models: the same weights give what transformers gives."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from attlas.errors import UnsupportedError
from attlas.models.config import TransformerConfig
from attlas.models.generate import generate
from attlas.models.long_documents import with_global_tokens
from attlas.models.presets import config_from_hf
from attlas.models.transformer import Transformer
from attlas.models.weights import load_hf_state_dict
from hf_models import COMMON, VOCAB, randomise, tokens, transformers

CLOSE = {"atol": 3e-5, "rtol": 1e-4}
LED = {
    "vocab_size": VOCAB, "d_model": 42, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 3,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 53, "decoder_ffn_dim": 59, "attention_window": [4, 8],
    "max_encoder_position_embeddings": 83, "max_decoder_position_embeddings": 47,
}  # fmt: skip
DEEPSEEK = {
    "vocab_size": VOCAB, "hidden_size": 66, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 53,
    "first_k_dense_replace": 2, "kv_lora_rank": 18, "qk_nope_head_dim": 8, "qk_rope_head_dim": 10, "v_head_dim": 11,
    "num_experts_per_tok": 2, "eos_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 17, "mscale": 0.7}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "longformer": ("LongformerConfig", "LongformerForMaskedLM", {**COMMON, "attention_window": [4, 8], "type_vocab_size": 1}),
    "big_bird": ("BigBirdConfig", "BigBirdForMaskedLM", {**COMMON, "block_size": 3, "num_random_blocks": 2}),
    "big_bird full": ("BigBirdConfig", "BigBirdForMaskedLM", {**COMMON, "attention_type": "original_full"}),
    "led": ("LEDConfig", "LEDForConditionalGeneration", LED),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**DEEPSEEK, "q_lora_rank": 13}),
    "deepseek_v2 yarn": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**DEEPSEEK, "q_lora_rank": None, "rope_parameters": {**YARN, "mscale_all_dim": 1.3}},
    ),
}


@cache
def theirs(name: str) -> Any:
    config, model, fields = CASES[name]
    t = transformers()
    made = randomise(getattr(t, model)(getattr(t, config)(**fields))).eval()
    if name == "led":
        with torch.no_grad():
            made.final_logits_bias.copy_(torch.linspace(-1, 1, VOCAB)[None])
    return made


def ours(name: str, global_tokens: tuple[int, ...] | None = None) -> Transformer:
    model = theirs(name)
    config: TransformerConfig = config_from_hf(model.config)
    if global_tokens is not None:
        config = with_global_tokens(config, global_tokens)
    return load_hf_state_dict(Transformer(config), model.state_dict(), model.config.model_type)


def marked(x: Tensor, places: tuple[int, ...]) -> Tensor:
    found = torch.zeros_like(x)
    found[:, list(places)] = 1
    return found


def right_padding(lengths: list[int], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("places", [(), (0,), (2, 11)])
def test_longformer(places: tuple[int, ...]):
    x = tokens(3, 29)
    with torch.no_grad():
        want = theirs("longformer")(x, global_attention_mask=marked(x, places)).logits
        got = ours("longformer", places)(x)
    torch.testing.assert_close(got, want, **CLOSE)
    assert want.std() > 0.3


def test_longformer_without_a_word_about_global_tokens_has_none():
    x, mask = tokens(3, 29), right_padding([29, 13, 1], 29)
    padded = torch.where(mask.bool(), x, 1)
    with torch.no_grad():
        want, got = theirs("longformer")(padded, attention_mask=mask).logits, ours("longformer")(padded, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)


@pytest.mark.parametrize("length", [73, 28, 27, 13])  # 27 = 9 blocks: up to there every pair counts
def test_big_bird_as_it_is_evaluated(length: int):
    x = tokens(2, length)
    theirs.cache_clear()  # a short sequence makes their model full for good
    with torch.no_grad():
        want, got = theirs("big_bird")(x).logits, ours("big_bird")(x)
    torch.testing.assert_close(got, want, **CLOSE)
    assert want.std() > 0.3


def test_big_bird_full():
    x = tokens(2, 31)
    with torch.no_grad():
        torch.testing.assert_close(ours("big_bird full")(x), theirs("big_bird full")(x).logits, **CLOSE)


@pytest.mark.parametrize("places", [(), (0,)])
def test_led(places: tuple[int, ...]):
    source, mask, target = tokens(2, 29), right_padding([29, 13], 29), tokens(2, 11, seed=1)
    source = torch.where(mask.bool(), source, 1)
    with torch.no_grad():
        want = theirs("led")(
            source, attention_mask=mask, global_attention_mask=marked(source, places), decoder_input_ids=target
        ).logits
        mine = ours("led", places)
        torch.testing.assert_close(mine(target, source=source, source_mask=mask), want, **CLOSE)
    assert want.std() > 0.3
    memory = mine.encode(source, attention_mask=mask)
    assert generate(mine, [[0], [0]], 5, memory=memory) == generate(mine, [[0], [0]], 5, memory=memory, use_cache=False)
    assert mine.num_parameters() - mine.num_parameters(embedding=False) == 42 * (VOCAB + 83 + 47)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v2 yarn"])
def test_deepseek(name: str):
    x = tokens(2, 23)
    model, mine = theirs(name), ours(name)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), model(x).logits, **CLOSE)
        want = model.generate(x, max_new_tokens=7, do_sample=False, pad_token_id=0)[:, 23:]
    assert generate(mine, x, 7) == want.tolist()


def test_what_no_preset_covers_is_refused():
    t = transformers()
    for wrong in ({"norm_topk_prob": True}, {"topk_method": "noaux_tc"}, {"mlp_bias": True}, {"moe_layer_freq": 2}):
        with pytest.raises(UnsupportedError, match=f"deepseek_v2: {next(iter(wrong))}"):
            config_from_hf({**t.DeepseekV2Config(**{**DEEPSEEK, "first_k_dense_replace": 1}).to_dict(), **wrong})
    with pytest.raises(UnsupportedError, match="use_bias"):
        config_from_hf(t.BigBirdConfig(**COMMON, use_bias=False))
    with pytest.raises(UnsupportedError, match="longformer layers"):
        with_global_tokens(config_from_hf(t.BigBirdConfig(**COMMON)), (0,))
