"""RWKV-4 language models, as transformers saves them.

There the hidden states, and the weights that write to them, are halved every `rescale_every` layers when the model is evaluated,
so that fp16 does not overflow. The last norm cancels that up to its eps; here nothing is rescaled and `rescale_every` not read.
Checkpoints hold the weights unscaled; a state dictionary taken from a model of transformers after its first evaluation does not.
"""

from __future__ import annotations

from torch import Tensor

from attlas.errors import UnsupportedError
from attlas.models.config import (
    EmbeddingConfig,
    FeedForwardConfig,
    HeadConfig,
    MixerConfig,
    NormConfig,
    StackConfig,
    TransformerConfig,
)
from attlas.models.hf_fields import Fields
from attlas.models.weight_maps import Weight, linear, table

LAST_EPS = 1e-5  # transformers' last norm does not follow layer_norm_epsilon


def config(c: Fields) -> TransformerConfig:
    """Time mixing and channel mixing in turn, layer norms before both, one more after the embedding."""
    dim, eps = c.need("hidden_size"), c.get("layer_norm_epsilon", default=LAST_EPS)
    inner = c.get("attention_hidden_size") or dim
    if inner != dim or eps != LAST_EPS:
        raise UnsupportedError(
            f"rwkv: attention_hidden_size={inner} with hidden_size={dim}, layer_norm_epsilon={eps}; supported are equal sizes "
            f"and {LAST_EPS}, which the last norm uses whatever the configuration says"
        )
    return TransformerConfig(
        "decoder",
        c.need("vocab_size"),
        dim,
        1,
        decoder=StackConfig(
            c.depth("num_hidden_layers"),
            (MixerConfig("rwkv4"),),
            FeedForwardConfig(c.get("intermediate_size") or 4 * dim, "relu2", gated=False, shifted=True),
            NormConfig("layer", eps),
        ),
        embedding=EmbeddingConfig(norm=True),
        head=HeadConfig(tied=c.get("tie_word_embeddings", default=False)),
    )


def flat(tensor: Tensor) -> tuple[Tensor, ...]:
    """[1, 1, dim] -> [dim]."""
    return (tensor.flatten(),)


def weights(config: TransformerConfig) -> tuple[Weight, ...]:
    layer, block = "decoder.layers.{i}", "blocks.{i}"
    time = {"key": "k_proj", "value": "v_proj", "receptance": "r_proj", "output": "o_proj"}
    channel = {"key": "up", "value": "down", "receptance": "r_proj"}
    mixes = {"key": "mix_k", "value": "mix_v", "receptance": "mix_r"}
    head = () if config.head is None else ("embed.tokens.weight" if config.head.tied else "head.weight",)
    return (
        table("embeddings", "embed.tokens"),
        *linear("blocks.0.pre_ln", "embed.norm"),
        *linear(f"{block}.ln1", f"{layer}.norm_mixer"),
        *linear(f"{block}.ln2", f"{layer}.norm_ffn"),
        Weight(f"{block}.attention.time_decay", (f"{layer}.mixer.decay",)),
        Weight(f"{block}.attention.time_first", (f"{layer}.mixer.bonus",)),
        *(Weight(f"{block}.attention.time_mix_{n}", (f"{layer}.mixer.{own}",), flat) for n, own in mixes.items()),
        *(Weight(f"{block}.feed_forward.time_mix_{n}", (f"{layer}.ffn.{mixes[n]}",), flat) for n in ("key", "receptance")),
        *(table(f"{block}.attention.{n}", f"{layer}.mixer.{own}") for n, own in time.items()),
        *(table(f"{block}.feed_forward.{n}", f"{layer}.ffn.{own}") for n, own in channel.items()),
        *linear("ln_out", "decoder.norm"),
        *(Weight("head.weight", (target,)) for target in head),
    )
