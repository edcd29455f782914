"""Architectures of other libraries as configurations: what transformers calls a model, said as a `TransformerConfig`.

A preset is a function from the fields of a transformers configuration (`config.json`), a map of weight names, and nothing else:
there is no code per architecture. Fields that ask for something the preset does not know raise UnsupportedError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from attlas.errors import UnsupportedError
from attlas.models import deepseek, long_documents, rwkv
from attlas.models import weight_maps as maps
from attlas.models.config import (
    AlibiConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    HeadConfig,
    MixerConfig,
    NormConfig,
    RelativeBiasConfig,
    StackConfig,
    TransformerConfig,
)
from attlas.models.hf_fields import Fields, activation, longest, rope
from attlas.models.weight_maps import Weight
from attlas.positions.rope import Rope
from attlas.registry import suggest
from attlas.scores import Softcap


class HasToDict(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Preset:
    """One architecture of another library.

    model_type     what transformers calls it
    config         fields -> configuration
    weights        configuration -> where each tensor of a checkpoint goes
    prefix         first part of the checkpoint's names, which headless checkpoints leave out
    ignored        tensors that may be there and are not weights of this model (patterns)
    """

    model_type: str
    config: Callable[[Fields], TransformerConfig]
    weights: Callable[[TransformerConfig], tuple[Weight, ...]]
    prefix: str
    ignored: tuple[str, ...] = ()


def preset(name: str) -> Preset:
    """The preset of a transformers `model_type`; an unknown one raises UnsupportedError with the known ones."""
    if name not in PRESETS:
        raise UnsupportedError(f"no preset for model_type {name!r}; {suggest(name, PRESETS)}")
    return PRESETS[name]


def config_from_hf(
    config: Mapping[str, Any] | HasToDict, *, max_len: int | None = None, tensors: int | None = None
) -> TransformerConfig:
    """The configuration of a transformers model, from its configuration object or the contents of its config.json.

    max_len  the longest sequence that will be run; only dynamic NTK rotary scaling depends on it (None = the trained length)
    tensors  how many there are in the checkpoint; a configuration of more layers is a DataError (None = not known)
    """
    fields = Fields(config if isinstance(config, Mapping) else config.to_dict(), max_len, tensors)
    made = preset(fields.need("model_type")).config(fields)
    turned = [m.given["rope"] for m in made.main.mixers if isinstance(m.given.get("rope"), Rope)]
    limits = [n for n in (longest(fields, rope) for rope in turned) if n is not None]
    return replace(made, max_positions=max(limits, default=None))


# ---- decoders ---------------------------------------------------------------------------------------------------------------


def _gpt2(c: Fields) -> TransformerConfig:
    c.refuse(scale_attn_by_inverse_layer_idx=(True,), add_cross_attention=(True,), scale_attn_weights=(False,))
    dim = c.need("n_embd", "hidden_size")
    return TransformerConfig(
        "decoder",
        c.need("vocab_size"),
        dim,
        c.need("n_head"),
        decoder=StackConfig(
            c.depth("n_layer"),
            (MixerConfig("causal", {"rope": False, "bias": True}),),
            FeedForwardConfig(
                c.get("n_inner") or 4 * dim, activation(c, "activation_function", "gelu_new"), gated=False, bias=True
            ),
            NormConfig("layer", c.get("layer_norm_epsilon", default=1e-5)),
        ),
        embedding=EmbeddingConfig(positions=c.get("n_positions", default=1024)),
        head=HeadConfig(tied=c.get("tie_word_embeddings", default=True)),
    )


def _gptj(c: Fields) -> TransformerConfig:
    dim, heads = c.need("n_embd", "hidden_size"), c.need("n_head")
    turned = rope(c, dim // heads, rotary_dim=c.get("rotary_dim"), interleaved=True)
    return TransformerConfig(
        "decoder",
        c.need("vocab_size"),
        dim,
        heads,
        decoder=StackConfig(
            c.depth("n_layer"),
            (MixerConfig("causal", {"rope": turned}),),
            FeedForwardConfig(
                c.get("n_inner") or 4 * dim, activation(c, "activation_function", "gelu_new"), gated=False, bias=True
            ),
            NormConfig("layer", c.get("layer_norm_epsilon", default=1e-5)),
            parallel=True,
        ),
        head=HeadConfig(tied=c.get("tie_word_embeddings", default=False), bias=True),
    )


def _gpt_neox(c: Fields) -> TransformerConfig:
    dim, heads = c.need("hidden_size"), c.need("num_attention_heads")
    turned = rope(c, dim // heads, partial=0.25)
    return TransformerConfig(
        "decoder",
        c.need("vocab_size"),
        dim,
        heads,
        decoder=StackConfig(
            c.depth("num_hidden_layers"),
            (MixerConfig("causal", {"rope": turned, "bias": c.get("attention_bias", default=True)}),),
            FeedForwardConfig(c.need("intermediate_size"), activation(c, "hidden_act", "gelu"), gated=False, bias=True),
            NormConfig("layer", c.get("layer_norm_eps", default=1e-5)),
            parallel=c.get("use_parallel_residual", default=True),
            parallel_norms=2,
        ),
        head=HeadConfig(tied=c.get("tie_word_embeddings", default=False)),
    )


def _falcon(c: Fields) -> TransformerConfig:
    dim, heads = c.need("hidden_size"), c.need("num_attention_heads")
    new = c.get("new_decoder_architecture", default=False)
    kv = c.need("num_kv_heads") if new else (1 if c.get("multi_query", default=True) else heads)
    if c.get("alibi", default=False):
        positions: dict[str, Any] = {"rope": False, "score_mod": AlibiConfig((dim // heads) ** -0.5)}
    else:
        positions = {"rope": rope(c, dim // heads)}
    bias = c.get("bias", default=False)
    parallel = bool(new or c.get("parallel_attn", default=True))
    norms = (c.get("num_ln_in_parallel_attn") or 2) if new else 1
    return TransformerConfig(
        "decoder",
        c.need("vocab_size"),
        dim,
        heads,
        decoder=StackConfig(
            c.depth("num_hidden_layers"),
            (MixerConfig("causal", {"num_kv_heads": kv, "bias": bias, **positions}),),
            FeedForwardConfig(c.get("ffn_hidden_size") or 4 * dim, activation(c, "activation", "gelu"), gated=False, bias=bias),
            NormConfig("layer", c.get("layer_norm_epsilon", default=1e-5)),
            parallel=parallel,
            parallel_norms=norms,
        ),
        head=HeadConfig(tied=c.get("tie_word_embeddings", default=True)),
    )


def _llama_mixers(c: Fields, **options: Any) -> tuple[MixerConfig, ...]:
    """One mixer for each layer: full or windowed as `layer_types` (or the older fields) say, with the rotary base of its type."""
    heads, depth = c.need("num_attention_heads"), c.depth("num_hidden_layers")
    head_dim = c.get("head_dim") or c.need("hidden_size") // heads
    shared = {"num_kv_heads": c.get("num_key_value_heads") or heads, "head_dim": head_dim, **options}
    mixers = []
    for kind in c.layer_types(depth):
        given = {**shared, "rope": rope(c, head_dim, layer_type=kind)}
        if kind == "sliding_attention":
            mixers.append(MixerConfig("sliding-window", {**given, "window": c.need("sliding_window")}))
        else:
            mixers.append(MixerConfig("causal", given))
    return tuple(mixers[:1]) if len(set(mixers)) == 1 else tuple(mixers)


def _llama(c: Fields, *, bias: bool | str = False, qk_norm: bool = False, experts: bool = False) -> TransformerConfig:
    eps = c.get("rms_norm_eps", default=1e-6)
    if qk_norm and eps != 1e-6:
        raise UnsupportedError(f"{c.need('model_type')}: rms_norm_eps={eps}; the norm of queries and keys uses 1e-6")
    ffn = FeedForwardConfig(
        c.need("intermediate_size"),
        activation(c, "hidden_act", "silu"),
        bias=c.get("mlp_bias", default=False),
        experts=c.need("num_local_experts") if experts else 0,
        experts_per_token=c.get("num_experts_per_tok", default=2),
    )
    return TransformerConfig(
        "decoder",
        c.need("vocab_size"),
        c.need("hidden_size"),
        c.need("num_attention_heads"),
        decoder=StackConfig(
            c.depth("num_hidden_layers"),
            _llama_mixers(c, bias=c.get("attention_bias", default=False) or bias, qk_norm=qk_norm),
            ffn,
            NormConfig("rms", eps),
        ),
        head=HeadConfig(tied=c.get("tie_word_embeddings", default=False)),
    )


def _qwen2(c: Fields) -> TransformerConfig:
    return _llama(c, bias="qkv")


def _qwen3(c: Fields) -> TransformerConfig:
    return _llama(c, qk_norm=True)


def _mixtral(c: Fields) -> TransformerConfig:
    return _llama(c, experts=True)


def _gemma(c: Fields, *, qk_norm: bool) -> TransformerConfig:
    c.refuse(use_bidirectional_attention=(True,))
    dim, eps = c.need("hidden_size"), c.get("rms_norm_eps", default=1e-6)
    if qk_norm and eps != 1e-6:
        raise UnsupportedError(f"{c.need('model_type')}: rms_norm_eps={eps}; the norm of queries and keys uses 1e-6")
    options: dict[str, Any] = {"scale": c.get("query_pre_attn_scalar", default=256) ** -0.5, "qk_norm": qk_norm}
    cap = c.get("attn_logit_softcapping")
    if cap:
        options["score_mod"] = Softcap(cap)
    return TransformerConfig(
        "decoder",
        c.need("vocab_size"),
        dim,
        c.need("num_attention_heads"),
        decoder=StackConfig(
            c.depth("num_hidden_layers"),
            _llama_mixers(c, bias=c.get("attention_bias", default=False), **options),
            FeedForwardConfig(c.need("intermediate_size"), activation(c, "hidden_activation", "gelu_pytorch_tanh")),
            NormConfig("rms", eps, unit_offset=True),
            norm_position="sandwich",
        ),
        embedding=EmbeddingConfig(scale=math.sqrt(dim)),
        head=HeadConfig(tied=c.get("tie_word_embeddings", default=True), softcap=c.get("final_logit_softcapping") or None),
    )


# ---- encoders, encoder-decoders ---------------------------------------------------------------------------------------------


def _bert(c: Fields) -> TransformerConfig:
    c.refuse(is_decoder=(True,), add_cross_attention=(True,), position_embedding_type=("relative_key", "relative_key_query"))
    roberta = c.need("model_type") != "bert"
    act = activation(c, "hidden_act", "gelu")
    offset = c.get("pad_token_id", default=1) + 1 if roberta else 0
    # The extra layer of RoBERTa's head is always a gelu, whatever the layers use.
    return long_documents.bert_like(
        c, (MixerConfig("full", {"rope": False, "bias": True}),), offset, act, "gelu" if roberta else act
    )


def _t5(c: Fields) -> TransformerConfig:
    dim, heads, tied = c.need("d_model"), c.need("num_heads"), c.get("tie_word_embeddings", default=True)
    kind = c.get("feed_forward_proj", default="relu")
    ffn = FeedForwardConfig(
        c.need("d_ff"), "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-"), kind.startswith("gated-")
    )

    def stack(depth: int, causal: bool) -> StackConfig:
        bias = RelativeBiasConfig(
            c.get("relative_attention_num_buckets", default=32), c.get("relative_attention_max_distance", default=128), not causal
        )
        shape = {"head_dim": c.need("d_kv"), "scale": 1.0}
        own = MixerConfig("causal" if causal else "full", {**shape, "rope": False, "score_mod": bias})
        cross = MixerConfig("cross", shape) if causal else None
        norm = NormConfig("rms", c.get("layer_norm_epsilon", default=1e-6))
        return StackConfig(depth, (own,), ffn, norm, cross=cross, shared_parameters=("score_params.0",))

    return TransformerConfig(
        "encoder-decoder",
        c.need("vocab_size"),
        dim,
        heads,
        decoder=stack(c.depth("num_decoder_layers", "num_layers"), causal=True),
        encoder=stack(c.depth("num_layers"), causal=False),
        head=HeadConfig(tied=tied, scale=dim**-0.5 if c.get("scale_decoder_outputs", default=tied) else 1.0),
    )


def _gemma2(c: Fields) -> TransformerConfig:
    return _gemma(c, qk_norm=False)


def _gemma3(c: Fields) -> TransformerConfig:
    return _gemma(c, qk_norm=True)


_CAUSAL_BUFFERS = ("*.attn.bias", "*.attn.masked_bias", "*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq")
_BERT_EXTRAS = ("*embeddings.position_ids", "*embeddings.token_type_ids", "*pooler.*", "cls.seq_relationship.*")

PRESETS: dict[str, Preset] = {
    p.model_type: p
    for p in (
        Preset("gpt2", _gpt2, maps.gpt2, "transformer.", _CAUSAL_BUFFERS),
        Preset("gptj", _gptj, maps.gptj, "transformer.", _CAUSAL_BUFFERS),
        Preset("gpt_neox", _gpt_neox, maps.gpt_neox, "gpt_neox.", _CAUSAL_BUFFERS),
        Preset("falcon", _falcon, maps.falcon, "transformer.", _CAUSAL_BUFFERS),
        Preset("llama", _llama, maps.llama, "model.", _CAUSAL_BUFFERS),
        Preset("mistral", _llama, maps.llama, "model.", _CAUSAL_BUFFERS),
        Preset("qwen2", _qwen2, maps.llama, "model.", _CAUSAL_BUFFERS),
        Preset("qwen3", _qwen3, maps.llama, "model.", _CAUSAL_BUFFERS),
        Preset("mixtral", _mixtral, maps.mixtral, "model.", _CAUSAL_BUFFERS),
        Preset("rwkv", rwkv.config, rwkv.weights, "rwkv."),
        Preset("gemma2", _gemma2, maps.gemma, "model."),
        Preset("gemma3_text", _gemma3, maps.gemma, "model."),
        Preset("bert", _bert, maps.bert, "bert.", _BERT_EXTRAS),
        Preset("roberta", _bert, maps.roberta, "roberta.", _BERT_EXTRAS),
        Preset("longformer", long_documents.longformer, long_documents.longformer_weights, "longformer.", _BERT_EXTRAS),
        Preset("big_bird", long_documents.big_bird, maps.bert, "bert.", _BERT_EXTRAS),
        Preset("led", long_documents.led, long_documents.led_weights, "led."),
        Preset("deepseek_v2", deepseek.v2, deepseek.weights, "model.", _CAUSAL_BUFFERS),
        Preset("deepseek_v3", deepseek.v3, deepseek.weights, "model.", (*_CAUSAL_BUFFERS, "model.layers.61.*")),
        Preset("t5", _t5, maps.t5, "", ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)),
    )
}
