"""Models as transformers saves them, served: the engine's greedy tokens are those of transformers' own `generate`."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from attlas.engine.engine import Engine
from attlas.engine.options import EngineOptions
from attlas.engine.request import SamplingParams
from attlas.errors import OptionError
from attlas.models.load import load_model
from attlas.models.transformer import Transformer
from engine_models import run, tokens_of
from hf_models import GEMMA, LLAMA, VOCAB, randomise, transformers

NEW, LONGEST = 29, 61
DEEPSEEK = {
    "vocab_size": VOCAB, "hidden_size": 66, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 53,
    "first_k_dense_replace": 1, "moe_intermediate_size": 37, "n_routed_experts": 12, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "routed_scaling_factor": 1.7, "kv_lora_rank": 18, "q_lora_rank": 13, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 10, "v_head_dim": 11, "max_position_embeddings": 113, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MISTRAL = {**LLAMA, "max_position_embeddings": 113}
GEMMAS = {**GEMMA, "max_position_embeddings": 113, "num_hidden_layers": 4}
# name -> (configuration class, model class, fields)
SERVED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", MISTRAL),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**MISTRAL, "sliding_window": 11}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", MISTRAL),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**MISTRAL, "head_dim": 14}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GEMMAS, "final_logit_softcapping": 13.0, "attn_logit_softcapping": 7.0}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GEMMAS, "sliding_window_pattern": 3}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**MISTRAL, "num_local_experts": 5, "num_experts_per_tok": 3}),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", DEEPSEEK),
    "deepseek_v2 groups": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**DEEPSEEK, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "q_lora_rank": None},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK, "n_group": 4, "topk_group": 2, "norm_topk_prob": True},
    ),
    "deepseek_v3 plain": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False},
    ),
    "rwkv": (
        "RwkvConfig",
        "RwkvForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": 46, "num_hidden_layers": 3, "intermediate_size": 61, "eos_token_id": None},
    ),
}


@cache
def theirs(name: str) -> Any:
    """The fp32 model of transformers. Its weights are large: rounding decides no greedy choice."""
    config, model, fields = SERVED[name]
    t = transformers()
    made = getattr(t, config)(**fields)
    made._experts_implementation = "eager"
    made = randomise(getattr(t, model)(made)).eval()
    generator = torch.Generator().manual_seed(5)
    for key, buffer in made.named_buffers():
        if key.endswith("e_score_correction_bias"):  # zeros in a new model: make them change what is chosen
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return made


@pytest.fixture(params=SERVED)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Transformer]:
    """A name, and our model from the folder that transformers wrote."""
    theirs(request.param).save_pretrained(tmp_path)
    return request.param, load_model(tmp_path)


def prompts() -> list[list[int]]:
    """Ragged, up to far beyond the windows; the last two begin alike."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in (3, 17, LONGEST, 1, 41)]
    return [*found, found[2][:37] + found[1]]


def want(name: str, prompt: list[int]) -> list[int]:
    """One prompt alone, without padding. RWKV's model is copied: evaluating it changes its weights."""
    model = copy.deepcopy(theirs(name)) if name == "rwkv" else theirs(name)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


def test_logits(saved: tuple[str, Transformer]):
    name, model = saved
    x = torch.randint(5, VOCAB, (2, 31), generator=torch.Generator().manual_seed(3))
    other = copy.deepcopy(theirs(name))
    with torch.no_grad():
        expected = other(x, use_cache=False).logits
        torch.testing.assert_close(model(x), expected, atol=3e-5, rtol=1e-4)
    assert expected.std() > 0.3


def test_greedy_tokens_are_those_of_generate(saved: tuple[str, Transformer]):
    """Many prompts at once, prefilled in chunks that fit neither pages nor windows; the second time with what the first one left
    in the cache."""
    name, model = saved
    made = Engine(model, options=EngineOptions(max_running=4, max_batched_tokens=19, page_size=8))
    assert made.max_len == (113 if name != "rwkv" else 4096)
    expected = [want(name, prompt) for prompt in prompts()]
    assert len({tuple(tokens) for tokens in expected}) > 4 and len({t for tokens in expected for t in tokens}) > 20
    for turn in "ab":
        for i, prompt in enumerate(prompts()):
            made.add(f"{turn}{i}", prompt, SamplingParams(max_tokens=NEW, temperature=0))
        got = run(made)
        assert [tokens_of(got[f"{turn}{i}", 0]) for i in range(len(expected))] == expected
    assert (made.stats().cached_tokens > 100) == made.cache.prefix_caching == (name != "rwkv")


def test_longer_than_the_model_is_refused(tmp_path: Path):
    theirs("llama").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    with pytest.raises(OptionError, match=r"max_len=114.*at most 113 tokens"):
        Engine(model, options=EngineOptions(max_len=114))
    made = Engine(model)
    with pytest.raises(OptionError, match="at most 113 tokens"):
        made.add("a", [5] * 113, SamplingParams())
    by_hand = Transformer(replace(model.config, max_positions=None))
    assert Engine(by_hand).max_len == 4096 and Engine(by_hand, options=EngineOptions(max_len=5000)).max_len == 5000
