"""DeepSeek-V2 and V3 language models, as transformers saves them.

Latent attention in every layer; the first layers have dense feed-forward networks, the others experts of which some serve every
token. V2 and V3 differ in how tokens choose: see `RouterConfig`. The layers that V3 files bring for predicting several tokens at
once are left unread.
"""

from __future__ import annotations

from attlas.errors import UnsupportedError
from attlas.models.config import (
    FeedForwardConfig,
    HeadConfig,
    MixerConfig,
    NormConfig,
    RouterConfig,
    StackConfig,
    TransformerConfig,
)
from attlas.models.hf_fields import Fields, activation, rope
from attlas.models.weight_maps import Weight, gated, linear, lm_head, stacked_experts, table

SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def v2(c: Fields) -> TransformerConfig:
    """The scores of the chosen experts are used as they are. `norm_topk_prob` is refused: transformers reads it nowhere, and the
    code that came with the models drops `routed_scaling_factor` for it."""
    c.refuse(norm_topk_prob=(True,))
    method = _known(c, "topk_method", "greedy", "group_limited_greedy")
    _known(c, "scoring_func", "softmax")
    limited = method == "group_limited_greedy"
    router = RouterConfig(
        "softmax",
        normalised=False,
        scale=c.get("routed_scaling_factor", default=1.0),
        groups=c.need("n_group") if limited else 1,
        groups_per_token=c.need("topk_group") if limited else 1,
    )
    return _model(c, router, c.get("first_k_dense_replace", default=0), interleaved=True)


def v3(c: Fields) -> TransformerConfig:
    """Sigmoids, with a bias that balances the experts without being part of their weights."""
    _known(c, "topk_method", "noaux_tc")
    _known(c, "scoring_func", "sigmoid")
    router = RouterConfig(
        "sigmoid",
        normalised=c.need("norm_topk_prob"),
        scale=c.need("routed_scaling_factor"),
        groups=c.need("n_group"),
        groups_per_token=c.need("topk_group"),
        best_of_group=2,
        correction=True,
    )
    return _model(c, router, c.need("first_k_dense_replace"), interleaved=c.get("rope_interleave", default=True))


def _known(c: Fields, name: str, *values: str) -> str:
    """The value of a field that has to be one of `values`, the first where it is not there."""
    value = str(c.get(name, default=values[0]))
    if value not in values:
        raise UnsupportedError(f"{c.need('model_type')}: {name}={value!r} is not supported; known: {', '.join(values)}")
    return value


def _model(c: Fields, router: RouterConfig, first: int, *, interleaved: bool) -> TransformerConfig:
    depth, act = c.depth("num_hidden_layers"), activation(c, "hidden_act", "silu")
    turned = rope(c, c.need("qk_rope_head_dim"), interleaved=interleaved)
    mixer = {n: c.need(n) for n in SIZES} | {"q_lora_rank": c.get("q_lora_rank"), "rope": turned}
    dense = FeedForwardConfig(c.need("intermediate_size"), act, bias=c.get("mlp_bias", default=False))
    return TransformerConfig(
        "decoder",
        c.need("vocab_size"),
        c.need("hidden_size"),
        c.need("num_attention_heads"),
        decoder=StackConfig(
            depth,
            (MixerConfig("multi-head-latent", {**mixer, "bias": c.get("attention_bias", default=False)}),),
            dense if first >= depth else _experts(c, router, act),
            NormConfig("rms", c.get("rms_norm_eps", default=1e-6)),
            first_feed_forwards=() if first >= depth else (dense,) * first,
        ),
        head=HeadConfig(tied=c.get("tie_word_embeddings", default=False)),
    )


def _experts(c: Fields, router: RouterConfig, act: str) -> FeedForwardConfig:
    c.refuse(mlp_bias=(True,))
    if c.get("moe_layer_freq", default=1) != 1:
        raise UnsupportedError(f"{c.need('model_type')}: moe_layer_freq={c.get('moe_layer_freq')} is not supported; known: 1")
    hidden = c.need("moe_intermediate_size")
    return FeedForwardConfig(
        hidden,
        act,
        experts=c.need("n_routed_experts"),
        experts_per_token=c.need("num_experts_per_tok"),
        router=router,
        shared=hidden * c.get("n_shared_experts", default=0),
    )


def weights(config: TransformerConfig) -> tuple[Weight, ...]:
    there, here = "layers.{i}", "decoder.layers.{i}"
    mixer = {n: n for n in ("q_proj", "q_a_proj", "q_b_proj", "kv_b_proj", "o_proj")}
    mixer |= {"kv_a_proj_with_mqa": "kv_a_proj", "q_a_layernorm": "q_a_norm", "kv_a_layernorm": "kv_a_norm"}
    return (
        table("embed_tokens", "embed.tokens"),
        *(w for name, own in mixer.items() for w in linear(f"{there}.self_attn.{name}", f"{here}.mixer.{own}")),
        table(f"{there}.input_layernorm", f"{here}.norm_mixer"),
        table(f"{there}.post_attention_layernorm", f"{here}.norm_ffn"),
        *gated(f"{there}.mlp", f"{here}.ffn"),
        *gated(f"{there}.mlp.shared_experts", f"{here}.ffn.shared"),
        *stacked_experts(f"{here}.ffn", f"{there}.mlp", "gate_proj", "up_proj", "down_proj"),
        table(f"{there}.mlp.gate", f"{here}.ffn.router"),
        Weight(f"{there}.mlp.gate.e_score_correction_bias", (f"{here}.ffn.router.correction",)),
        table("norm", "decoder.norm"),
        *lm_head(config, "lm_head"),
    )
