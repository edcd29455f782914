"""DeepSeek-V2 language models with dense feed-forward networks, as transformers saves them.

Layers with routed and shared experts (`first_k_dense_replace` below the number of layers) are refused: `Experts` divides the
weights of the chosen experts by their sum and has no shared ones, DeepSeek-V2 does the opposite in both.
"""

from __future__ import annotations

from attlas.errors import UnsupportedError
from attlas.models.config import FeedForwardConfig, HeadConfig, MixerConfig, NormConfig, StackConfig, TransformerConfig
from attlas.models.hf_fields import Fields, activation, rope
from attlas.models.weight_maps import Weight, linear, lm_head, table

SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def config(c: Fields) -> TransformerConfig:
    depth, dense = c.need("num_hidden_layers"), c.get("first_k_dense_replace", default=0)
    if dense < depth:
        raise UnsupportedError(
            f"deepseek_v2: first_k_dense_replace={dense} of {depth} layers; layers with shared and routed experts are not "
            "supported"
        )
    turned = rope(c, c.need("qk_rope_head_dim"), interleaved=True)
    mixer = {n: c.need(n) for n in SIZES} | {"q_lora_rank": c.get("q_lora_rank"), "rope": turned}
    return TransformerConfig(
        "decoder",
        c.need("vocab_size"),
        c.need("hidden_size"),
        c.need("num_attention_heads"),
        decoder=StackConfig(
            depth,
            (MixerConfig("multi-head-latent", {**mixer, "bias": c.get("attention_bias", default=False)}),),
            FeedForwardConfig(
                c.need("intermediate_size"), activation(c, "hidden_act", "silu"), bias=c.get("mlp_bias", default=False)
            ),
            NormConfig("rms", c.get("rms_norm_eps", default=1e-6)),
        ),
        head=HeadConfig(tied=c.get("tie_word_embeddings", default=False)),
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
        *(w for n in ("gate", "up", "down") for w in linear(f"{there}.mlp.{n}_proj", f"{here}.ffn.{n}")),
        table("norm", "decoder.norm"),
        *lm_head(config, "lm_head"),
    )
