"""Encoders of long documents, as transformers saves them: Longformer, BigBird, and the encoder-decoder LED.

transformers takes the global tokens of Longformer and LED with each call and has none by default; here they belong to the model:
`with_global_tokens(config_from_hf(...), (0,))` is the usual first token. BigBird is what transformers computes when it evaluates:
no random blocks, the first block counted 1 + num_random_blocks times, every pair up to (5 + 2 num_random_blocks) blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from attlas.errors import UnsupportedError
from attlas.masks import Window
from attlas.models import weight_maps as maps
from attlas.models.config import (
    EmbeddingConfig,
    FeedForwardConfig,
    HeadConfig,
    MixerConfig,
    NormConfig,
    StackConfig,
    TransformerConfig,
)
from attlas.models.hf_fields import Fields, activation
from attlas.models.weight_maps import Weight, linear, table
from attlas.nn.bigbird import Undrawn

REFUSED = {"is_decoder": (True,), "add_cross_attention": (True,)}
E, D = "encoder.layers.{i}", "decoder.layers.{i}"


def with_global_tokens(config: TransformerConfig, tokens: Sequence[int]) -> TransformerConfig:
    """A copy of a Longformer's or LED's configuration whose encoder has these global positions, the same in every sequence."""
    stack = config.encoder
    if stack is None or any(m.name != "longformer" for m in stack.mixers):
        raise UnsupportedError("with_global_tokens: this configuration has no encoder of longformer layers")
    mixers = tuple(MixerConfig(m.name, {**m.given, "tokens": tuple(tokens)}) for m in stack.mixers)
    return replace(config, encoder=replace(stack, mixers=mixers))


def _windows(c: Fields, depth: int, heads: int) -> tuple[MixerConfig, ...]:
    """One mixer per layer; `attention_window` counts the keys of both sides together."""
    given = c.get("attention_window", default=512)
    sizes = [given] * depth if isinstance(given, int) else list(given)
    if len(sizes) != depth or any(w < 2 or w % 2 for w in sizes):
        raise UnsupportedError(
            f"{c.need('model_type')}: attention_window={given} for {depth} layers; wanted even numbers, one each"
        )
    shared = {"tokens": (), "rope": False, "bias": True, "num_heads": heads}
    mixers = tuple(MixerConfig("longformer", {**shared, "window": Window(w // 2, w // 2)}) for w in sizes)
    return mixers[:1] if len(set(mixers)) == 1 else mixers


def bert_like(c: Fields, mixers: tuple[MixerConfig, ...], offset: int, act: str, transform: str) -> TransformerConfig:
    """BERT with these mixers: `offset` positions before the first, activation `act`, and `transform` in the head."""
    return TransformerConfig(
        "encoder",
        c.need("vocab_size"),
        c.need("hidden_size"),
        c.need("num_attention_heads"),
        encoder=StackConfig(
            c.depth("num_hidden_layers"),
            mixers,
            FeedForwardConfig(c.need("intermediate_size"), act, gated=False, bias=True),
            NormConfig("layer", c.get("layer_norm_eps", default=1e-12)),
            norm_position="post",
            final_norm=False,
        ),
        embedding=EmbeddingConfig(
            positions=c.need("max_position_embeddings"),
            position_offset=offset,
            token_types=c.get("type_vocab_size", default=2),
            norm=True,
            scale=c.need("hidden_size") ** 0.5 if c.get("rescale_embeddings") else 1.0,
        ),
        head=HeadConfig(tied=c.get("tie_word_embeddings", default=True), bias=True, transform=transform),
    )


def longformer(c: Fields) -> TransformerConfig:
    """RoBERTa with windows; the extra layer of its head is always a gelu."""
    c.refuse(**REFUSED)
    mixers = _windows(c, c.depth("num_hidden_layers"), c.need("num_attention_heads"))
    return bert_like(c, mixers, c.get("pad_token_id", default=1) + 1, activation(c, "hidden_act", "gelu"), "gelu")


def big_bird(c: Fields) -> TransformerConfig:
    """BERT with block-sparse attention, or with full attention where the configuration says so."""
    c.refuse(**REFUSED)
    full = c.get("attention_type", default="block_sparse") == "original_full"
    if not c.get("use_bias", default=True):
        raise UnsupportedError(
            "big_bird: use_bias=False (no bias on queries, keys and values, but one on the output) is not supported"
        )
    options: dict[str, Any] = {"rope": False, "bias": True}
    if not full:
        block, drawn = c.get("block_size", default=64), c.get("num_random_blocks", default=3)
        options |= {"block": block, "random_blocks": Undrawn(drawn)}
    act = activation(c, "hidden_act", "gelu_new")
    return bert_like(c, (MixerConfig("full" if full else "bigbird", options),), 0, act, act)


def led(c: Fields) -> TransformerConfig:
    """BART with a Longformer as its encoder."""
    act, norm = activation(c, "activation_function", "gelu"), NormConfig("layer", 1e-5)

    def stack(side: str, mixers: tuple[MixerConfig, ...], cross: MixerConfig | None) -> StackConfig:
        ffn = FeedForwardConfig(c.need(f"{side}_ffn_dim"), act, gated=False, bias=True)
        depth = c.depth(f"{side}_layers")
        return StackConfig(depth, mixers, ffn, norm, norm_position="post", final_norm=False, cross=cross)

    heads = c.need("decoder_attention_heads")
    own, cross = MixerConfig("causal", {"rope": False, "bias": True}), MixerConfig("cross", {"bias": True})
    windows = _windows(c, c.depth("encoder_layers"), c.need("encoder_attention_heads"))
    return TransformerConfig(
        "encoder-decoder",
        c.need("vocab_size"),
        c.need("d_model"),
        heads,
        decoder=stack("decoder", (own,), cross),
        encoder=stack("encoder", windows, None),
        embedding=EmbeddingConfig(positions=c.need("max_decoder_position_embeddings"), norm=True),
        head=HeadConfig(tied=c.get("tie_word_embeddings", default=True), bias=True),
        encoder_embedding=EmbeddingConfig(positions=c.need("max_encoder_position_embeddings"), norm=True),
    )


# ---- where the tensors go -----------------------------------------------------------------------------------------------------


def _global_projections(source: str) -> tuple[Weight, ...]:
    return tuple(w for n in ("query", "key", "value") for w in linear(f"{source}.{n}_global", f"{E}.mixer.{n[0]}_global_proj"))


def longformer_weights(config: TransformerConfig) -> tuple[Weight, ...]:
    return *maps.roberta(config), *_global_projections("encoder.layer.{i}.attention.self")


def _row(tensor: Tensor) -> tuple[Tensor, ...]:
    """[1, vocab] -> [vocab]."""
    return (tensor.flatten(),)


def led_weights(config: TransformerConfig) -> tuple[Weight, ...]:
    inner = "encoder.layers.{i}.self_attn"
    rules = [table(name, "embed.tokens") for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")]
    rules += _global_projections(f"{inner}.longformer_self_attn")
    for name in ("query", "key", "value"):
        rules += linear(f"{inner}.longformer_self_attn.{name}", f"{E}.mixer.{name[0]}_proj")
    rules += linear(f"{inner}.output", f"{E}.mixer.o_proj")
    for there, here in (("self_attn", "mixer"), ("encoder_attn", "cross")):
        for name, own in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj"), ("out_proj", "o_proj")):
            rules += linear(f"decoder.layers.{{i}}.{there}.{name}", f"{D}.{here}.{own}")
        rules += linear(f"decoder.layers.{{i}}.{there}_layer_norm", f"{D}.norm_{here}")
    rules += linear("encoder.layers.{i}.self_attn_layer_norm", f"{E}.norm_mixer")
    for side, embed in (("encoder", "encoder_embed"), ("decoder", "embed")):
        rules += [table(f"{side}.embed_positions", f"{embed}.positions")]
        rules += linear(f"{side}.layernorm_embedding", f"{embed}.norm")
        layer = f"{side}.layers.{{i}}"
        rules += linear(f"{layer}.fc1", f"{layer}.ffn.up") + linear(f"{layer}.fc2", f"{layer}.ffn.down")
        rules += linear(f"{layer}.final_layer_norm", f"{layer}.norm_ffn")
    head = () if config.head is None else (Weight("final_logits_bias", ("head.bias",), _row),)
    return *rules, *maps.lm_head(config, "lm_head"), *head
