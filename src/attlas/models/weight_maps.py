"""Where the tensors of a checkpoint go: for each architecture a table from names there to names here.

Names are written without the checkpoint's prefix. `{i}` stands for the layer, `{e}` for the expert. A target `name[{e}]` is one
slice of a stacked parameter. A map is a function of the configuration because fused tensors are cut by its head counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from attlas.models.config import StackConfig, TransformerConfig

Convert = Callable[[Tensor], tuple[Tensor, ...]]


def as_it_is(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def transposed(tensor: Tensor) -> tuple[Tensor, ...]:
    """GPT-2 stores linear maps as [in, out]."""
    return (tensor.t(),)


def plus_one(tensor: Tensor) -> tuple[Tensor, ...]:
    """Gemma stores norm weights w that multiply as 1 + w."""
    return (1.0 + tensor.float(),)


def halves(tensor: Tensor) -> tuple[Tensor, ...]:
    """[E, 2 hidden, dim] -> two of [E, hidden, dim]."""
    first, second = tensor.chunk(2, dim=1)
    return first, second


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint: `convert(tensor)` gives one tensor for each of `targets`."""

    source: str
    targets: tuple[str, ...]
    convert: Convert = as_it_is


def expand(rules: Iterable[Weight], layers: int, experts: int = 0) -> dict[str, Weight]:
    """source name -> rule, with `{i}` and `{e}` written out."""
    table = {}
    for rule in rules:
        for i in range(layers if "{i}" in rule.source else 1):
            for e in range(experts if "{e}" in rule.source else 1):
                names = [n.replace("{i}", str(i)).replace("{e}", str(e)) for n in (rule.source, *rule.targets)]
                table[names[0]] = Weight(names[0], tuple(names[1:]), rule.convert)
    return table


# ---- pieces -----------------------------------------------------------------------------------------------------------------


def linear(source: str, target: str, convert: Convert = as_it_is) -> tuple[Weight, ...]:
    """A linear map or a norm: `.weight` and `.bias` (a bias that the model lacks is never asked for)."""
    return Weight(f"{source}.weight", (f"{target}.weight",), convert), Weight(f"{source}.bias", (f"{target}.bias",))


def old_norm(source: str, target: str) -> tuple[Weight, ...]:
    """A norm under today's names and under `.gamma`, `.beta`, which the first checkpoints of BERT still carry."""
    old = Weight(f"{source}.gamma", (f"{target}.weight",)), Weight(f"{source}.beta", (f"{target}.bias",))
    return *linear(source, target), *old


def table(source: str, target: str) -> Weight:
    return Weight(f"{source}.weight", (f"{target}.weight",))


def qkv(mixer: str) -> tuple[str, str, str]:
    return f"{mixer}.q_proj", f"{mixer}.k_proj", f"{mixer}.v_proj"


def fused_qkv(source: str, mixer: str, weight: Convert, bias: Convert) -> tuple[Weight, ...]:
    names = qkv(mixer)
    return (
        Weight(f"{source}.weight", tuple(f"{n}.weight" for n in names), weight),
        Weight(f"{source}.bias", tuple(f"{n}.bias" for n in names), bias),
    )


def side_by_side(tensor: Tensor) -> tuple[Tensor, ...]:
    """Rows [q | k | v], all as wide."""
    return tuple(tensor.chunk(3, dim=0))


def side_by_side_transposed(tensor: Tensor) -> tuple[Tensor, ...]:
    return side_by_side(tensor.t())


def by_group(num_kv_heads: int, queries: int) -> Convert:
    """Rows in groups: `queries` query heads, then their key head, then their value head (GPT-NeoX: one query head per group)."""

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        heads = tensor.unflatten(0, (num_kv_heads, queries + 2, -1))
        return tuple(part.flatten(0, 2) for part in (heads[:, :-2], heads[:, -2:-1], heads[:, -1:]))

    return split


def _grouped(config: TransformerConfig) -> Convert:
    kv = config.main.mixers[0].given.get("num_kv_heads", config.num_heads)
    return by_group(kv, config.num_heads // kv)


D = "decoder.layers.{i}"
E = "encoder.layers.{i}"

# ---- decoders ---------------------------------------------------------------------------------------------------------------


def gpt2(config: TransformerConfig) -> tuple[Weight, ...]:
    return (
        table("wte", "embed.tokens"),
        table("wpe", "embed.positions"),
        *linear("h.{i}.ln_1", f"{D}.norm_mixer"),
        *fused_qkv("h.{i}.attn.c_attn", f"{D}.mixer", side_by_side_transposed, side_by_side),
        *linear("h.{i}.attn.c_proj", f"{D}.mixer.o_proj", transposed),
        *linear("h.{i}.ln_2", f"{D}.norm_ffn"),
        *linear("h.{i}.mlp.c_fc", f"{D}.ffn.up", transposed),
        *linear("h.{i}.mlp.c_proj", f"{D}.ffn.down", transposed),
        *linear("ln_f", "decoder.norm"),
        *lm_head(config, "lm_head"),
    )


def gptj(config: TransformerConfig) -> tuple[Weight, ...]:
    return (
        table("wte", "embed.tokens"),
        *linear("h.{i}.ln_1", f"{D}.norm_mixer"),
        *(w for name in ("q_proj", "k_proj", "v_proj") for w in linear(f"h.{{i}}.attn.{name}", f"{D}.mixer.{name}")),
        *linear("h.{i}.attn.out_proj", f"{D}.mixer.o_proj"),
        *linear("h.{i}.mlp.fc_in", f"{D}.ffn.up"),
        *linear("h.{i}.mlp.fc_out", f"{D}.ffn.down"),
        *linear("ln_f", "decoder.norm"),
        *lm_head(config, "lm_head"),
    )


def gpt_neox(config: TransformerConfig) -> tuple[Weight, ...]:
    split = _grouped(config)
    return (
        table("embed_in", "embed.tokens"),
        *linear("layers.{i}.input_layernorm", f"{D}.norm_mixer"),
        *linear("layers.{i}.post_attention_layernorm", f"{D}.norm_ffn"),
        *fused_qkv("layers.{i}.attention.query_key_value", f"{D}.mixer", split, split),
        *linear("layers.{i}.attention.dense", f"{D}.mixer.o_proj"),
        *linear("layers.{i}.mlp.dense_h_to_4h", f"{D}.ffn.up"),
        *linear("layers.{i}.mlp.dense_4h_to_h", f"{D}.ffn.down"),
        *linear("final_layer_norm", "decoder.norm"),
        *lm_head(config, "lm_head"),
        *lm_head(config, "embed_out"),
    )


def falcon(config: TransformerConfig) -> tuple[Weight, ...]:
    split = _grouped(config)
    return (
        table("word_embeddings", "embed.tokens"),
        *linear("h.{i}.input_layernorm", f"{D}.norm_mixer"),
        *linear("h.{i}.ln_attn", f"{D}.norm_mixer"),
        *linear("h.{i}.ln_mlp", f"{D}.norm_ffn"),
        *linear("h.{i}.post_attention_layernorm", f"{D}.norm_ffn"),
        *fused_qkv("h.{i}.self_attention.query_key_value", f"{D}.mixer", split, split),
        *linear("h.{i}.self_attention.dense", f"{D}.mixer.o_proj"),
        *linear("h.{i}.mlp.dense_h_to_4h", f"{D}.ffn.up"),
        *linear("h.{i}.mlp.dense_4h_to_h", f"{D}.ffn.down"),
        *linear("ln_f", "decoder.norm"),
        *lm_head(config, "lm_head"),
    )


def _llama_attention(norms: Convert) -> tuple[Weight, ...]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return (
        table("embed_tokens", "embed.tokens"),
        *(w for name in names for w in linear(f"layers.{{i}}.self_attn.{name}", f"{D}.mixer.{name}")),
        Weight("layers.{i}.self_attn.q_norm.weight", (f"{D}.mixer.q_norm.weight",), norms),
        Weight("layers.{i}.self_attn.k_norm.weight", (f"{D}.mixer.k_norm.weight",), norms),
        table("layers.{i}.input_layernorm", f"{D}.norm_mixer"),
        table("norm", "decoder.norm"),
    )


def gated(source: str, target: str) -> tuple[Weight, ...]:
    return tuple(w for name in ("gate", "up", "down") for w in linear(f"{source}.{name}_proj", f"{target}.{name}"))


def stacked_experts(ffn: str, source: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """The experts at `ffn`: each for itself under the given names, as in files, and all in one as the library holds them."""
    return (
        Weight(f"{source}.experts.{{e}}.{gate}.weight", (f"{ffn}.gate[{{e}}]",)),
        Weight(f"{source}.experts.{{e}}.{up}.weight", (f"{ffn}.up[{{e}}]",)),
        Weight(f"{source}.experts.{{e}}.{down}.weight", (f"{ffn}.down[{{e}}]",)),
        Weight("layers.{i}.mlp.experts.gate_up_proj", (f"{ffn}.gate", f"{ffn}.up"), halves),
        Weight("layers.{i}.mlp.experts.down_proj", (f"{ffn}.down",)),
    )


def llama(config: TransformerConfig) -> tuple[Weight, ...]:
    return (
        *_llama_attention(as_it_is),
        table("layers.{i}.post_attention_layernorm", f"{D}.norm_ffn"),
        *gated("layers.{i}.mlp", f"{D}.ffn"),
        *lm_head(config, "lm_head"),
    )


def mixtral(config: TransformerConfig) -> tuple[Weight, ...]:
    return (
        *_llama_attention(as_it_is),
        table("layers.{i}.post_attention_layernorm", f"{D}.norm_ffn"),
        *stacked_experts(f"{D}.ffn", "layers.{i}.block_sparse_moe", "w1", "w3", "w2"),
        table("layers.{i}.mlp.gate", f"{D}.ffn.router"),  # in memory
        table("layers.{i}.block_sparse_moe.gate", f"{D}.ffn.router"),  # in files
        *lm_head(config, "lm_head"),
    )


def gemma(config: TransformerConfig) -> tuple[Weight, ...]:
    return (
        *_llama_attention(plus_one),
        table("layers.{i}.post_attention_layernorm", f"{D}.norm_mixer_out"),
        table("layers.{i}.pre_feedforward_layernorm", f"{D}.norm_ffn"),
        table("layers.{i}.post_feedforward_layernorm", f"{D}.norm_ffn_out"),
        *gated("layers.{i}.mlp", f"{D}.ffn"),
        *lm_head(config, "lm_head"),
    )


def lm_head(config: TransformerConfig, source: str) -> tuple[Weight, ...]:
    """The output matrix; where it is tied, its copy in the checkpoint must be the token table."""
    if config.head is None:
        return ()
    target = "embed.tokens.weight" if config.head.tied else "head.weight"
    return Weight(f"{source}.weight", (target,)), Weight(f"{source}.bias", ("head.bias",))


# ---- encoders, encoder-decoders ---------------------------------------------------------------------------------------------


def _bert_body() -> tuple[Weight, ...]:
    one = "encoder.layer.{i}"
    return (
        table("embeddings.word_embeddings", "embed.tokens"),
        table("embeddings.position_embeddings", "embed.positions"),
        table("embeddings.token_type_embeddings", "embed.types"),
        *old_norm("embeddings.LayerNorm", "embed.norm"),
        *linear(f"{one}.attention.self.query", f"{E}.mixer.q_proj"),
        *linear(f"{one}.attention.self.key", f"{E}.mixer.k_proj"),
        *linear(f"{one}.attention.self.value", f"{E}.mixer.v_proj"),
        *linear(f"{one}.attention.output.dense", f"{E}.mixer.o_proj"),
        *old_norm(f"{one}.attention.output.LayerNorm", f"{E}.norm_mixer"),
        *linear(f"{one}.intermediate.dense", f"{E}.ffn.up"),
        *linear(f"{one}.output.dense", f"{E}.ffn.down"),
        *old_norm(f"{one}.output.LayerNorm", f"{E}.norm_ffn"),
    )


def bert(config: TransformerConfig) -> tuple[Weight, ...]:
    return (
        *_bert_body(),
        *linear("cls.predictions.transform.dense", "head.dense"),
        *old_norm("cls.predictions.transform.LayerNorm", "head.norm"),
        Weight("cls.predictions.bias", ("head.bias",)),
        *lm_head(config, "cls.predictions.decoder"),
    )


def roberta(config: TransformerConfig) -> tuple[Weight, ...]:
    return (
        *_bert_body(),
        *linear("lm_head.dense", "head.dense"),
        *linear("lm_head.layer_norm", "head.norm"),
        *lm_head(config, "lm_head"),
        *lm_head(config, "lm_head.decoder"),
    )


def t5(config: TransformerConfig) -> tuple[Weight, ...]:
    assert config.encoder is not None and config.decoder is not None
    return (
        table("shared", "embed.tokens"),
        table("encoder.embed_tokens", "embed.tokens"),
        table("decoder.embed_tokens", "embed.tokens"),
        *_t5_stack("encoder", config.encoder),
        *_t5_stack("decoder", config.decoder),
        *lm_head(config, "lm_head"),
    )


def _t5_stack(side: str, stack: StackConfig) -> tuple[Weight, ...]:
    there, here = f"{side}.block.{{i}}.layer", f"{side}.layers.{{i}}"
    ffn = 2 if stack.cross is not None else 1
    rules = [
        table(f"{there}.0.layer_norm", f"{here}.norm_mixer"),
        # One table per stack: the files keep it in the first layer, the layers here share it.
        Weight(
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (f"{side}.layers.0.mixer.score_params.0",)
        ),
        table(f"{there}.{ffn}.layer_norm", f"{here}.norm_ffn"),
        table(f"{there}.{ffn}.DenseReluDense.wi", f"{here}.ffn.up"),
        table(f"{there}.{ffn}.DenseReluDense.wi_0", f"{here}.ffn.gate"),
        table(f"{there}.{ffn}.DenseReluDense.wi_1", f"{here}.ffn.up"),
        table(f"{there}.{ffn}.DenseReluDense.wo", f"{here}.ffn.down"),
        table(f"{side}.final_layer_norm", f"{side}.norm"),
    ]
    rules += [table(f"{there}.0.SelfAttention.{n}", f"{here}.mixer.{n}_proj") for n in "qkvo"]
    if stack.cross is not None:
        rules.append(table(f"{there}.1.layer_norm", f"{here}.norm_cross"))
        rules += [table(f"{there}.1.EncDecAttention.{n}", f"{here}.cross.{n}_proj") for n in "qkvo"]
    return tuple(rules)
