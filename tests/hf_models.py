"""Tiny random models of transformers, and our model with the same weights. Importing transformers takes seconds: it happens
once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from attlas.models.config import TransformerConfig
from attlas.models.presets import config_from_hf
from attlas.models.transformer import Transformer
from attlas.models.weights import load_hf_state_dict

VOCAB = 97


@cache
def transformers() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 66,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 53,
    "max_position_embeddings": 83,
}
LLAMA = {**COMMON, "hidden_size": 60, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
GPT = {"vocab_size": VOCAB, "n_positions": 83, "n_embd": 66, "n_layer": 2, "n_head": 3, "bos_token_id": 1, "eos_token_id": None}
FALCON = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": None}
GEMMA = {**LLAMA, "head_dim": 14, "sliding_window": 7, "query_pre_attn_scalar": 11}


def _yarn() -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 17}


def _llama3() -> dict[str, Any]:
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 19}
    return {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, **bands}


# name -> (configuration class, model class, fields)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**GPT, "n_inner": 59}),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**GPT, "rotary_dim": 6}),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**COMMON, "hidden_size": 72, "num_attention_heads": 3, "eos_token_id": None},
    ),
    "gpt_neox sequential": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**COMMON, "hidden_size": 72, "num_attention_heads": 3, "use_parallel_residual": False, "attention_bias": False},
    ),
    "falcon multi-query": ("FalconConfig", "FalconForCausalLM", FALCON),
    "falcon groups": ("FalconConfig", "FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon alibi": (
        "FalconConfig",
        "FalconForCausalLM",
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama tied": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama llama3": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, "rope_parameters": _llama3()}),
    "llama yarn": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, "rope_parameters": _yarn()}),
    "llama linear": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**LLAMA, "head_dim": 22, "rope_parameters": {"rope_type": "linear", "rope_theta": 7e3, "factor": 3.0}},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": 11}),
    "mistral full": ("MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": None, "head_dim": 14}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**LLAMA, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**LLAMA, "head_dim": 14}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**LLAMA, "num_local_experts": 5, "num_experts_per_tok": 3}),
    "bert": ("BertConfig", "BertForMaskedLM", COMMON),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**COMMON, "type_vocab_size": 1, "hidden_act": "relu"}),
}
T5 = {"vocab_size": VOCAB, "d_model": 42, "d_kv": 10, "d_ff": 53, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 3}
T5_GATED = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "relative_attention_num_buckets": 12}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {**T5, "relative_attention_max_distance": 19},
    "t5 gated": T5_GATED,
}
DECODERS = [name for name in MODELS if name not in ("bert", "roberta")]


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights that make every term count: N(0, 0.15) for matrices, norms near 1, biases near 0.3."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            is_norm = p.ndim == 1 and name.endswith("weight")
            p.copy_(noise * 0.15 if p.ndim > 1 else (1 if is_norm else 0) + 0.3 * noise)
    return model


@cache
def theirs(name: str) -> Any:
    """The fp32 model of transformers, in eval mode. Shared between tests: do not change it."""
    t = transformers()
    if name in ENCODER_DECODERS:
        config, cls = t.T5Config(decoder_start_token_id=0, **ENCODER_DECODERS[name]), t.T5ForConditionalGeneration
    else:
        config_name, cls_name, fields = MODELS[name]
        config, cls = getattr(t, config_name)(**fields), getattr(t, cls_name)
        config._experts_implementation = "eager"  # the default takes neither fp64 nor sizes that are no multiple of 16 bytes
    return randomise(cls(config)).eval()


def ours(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
    model = theirs(name)
    config: TransformerConfig = config_from_hf(model.config)
    return load_hf_state_dict(Transformer(config, dtype=dtype), model.state_dict(), model.config.model_type)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids that are neither padding nor a special token."""
    return torch.randint(5, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
