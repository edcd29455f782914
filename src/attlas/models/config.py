"""What a transformer is, as data. One frozen `TransformerConfig` describes every architecture that `Transformer` can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from attlas.errors import OptionError
from attlas.registry import suggest

ACTIVATIONS = ("gelu", "gelu_new", "relu", "relu2", "silu")

Kind = Literal["decoder", "encoder", "encoder-decoder"]
NormPosition = Literal["pre", "post", "sandwich"]


def _one_of(owner: str, name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise OptionError(f"{owner}: {name}={value!r}; {suggest(str(value), allowed)}")


@dataclass(frozen=True)
class NormConfig:
    """Normalisation of the last dimension.

    kind         "rms": x / sqrt(mean(x^2) + eps) * w;   "layer": (x - mean) / sqrt(var + eps) * w + b
    eps          added under the square root
    bias         whether a "layer" norm has b ("rms" never has one)
    unit_offset  multiply by 1 + w instead of w (Gemma); w then starts at 0
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    bias: bool = True
    unit_offset: bool = False

    def __post_init__(self) -> None:
        _one_of("NormConfig", "kind", self.kind, ("rms", "layer"))


@dataclass(frozen=True)
class RouterConfig:
    """How the tokens of a mixture of experts choose theirs, from one score per expert.

    score             "softmax" over the experts, or "sigmoid" of each logit
    normalised        the scores of a token's experts are divided by their sum
    scale             factor on them after that
    groups            the experts stand in so many groups of equal size; only the best groups of a token may serve it
    groups_per_token  how many groups
    best_of_group     a group is as good as the sum of the scores of its best so many experts
    correction        a bias per expert counts when experts and groups are chosen, and not in their weights (it balances the load
                      of the experts in training, without a gradient)

    Mixtral has the defaults; DeepSeek-V2 does not normalise, and chooses groups by their best expert; DeepSeek-V3 has sigmoids,
    a correction, and chooses groups by their best two. Sources: arXiv 2401.04088, 2405.04434, 2412.19437.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    best_of_group: int = 1
    correction: bool = False

    def __post_init__(self) -> None:
        _one_of("RouterConfig", "score", self.score, ("softmax", "sigmoid"))
        if not 1 <= self.groups_per_token <= self.groups or self.best_of_group < 1:
            raise OptionError(
                f"RouterConfig: groups={self.groups}, groups_per_token={self.groups_per_token}, "
                f"best_of_group={self.best_of_group}; all are at least 1, and a token has no more groups than there are"
            )

    def misfit(self, experts: int, per_token: int) -> str | None:
        """Why `per_token` of so many experts cannot be chosen like this, None = they can."""
        size, rest = divmod(experts, self.groups)
        if rest or size < self.best_of_group or size * self.groups_per_token < per_token:
            return f"groups={self.groups}, groups_per_token={self.groups_per_token}, best_of_group={self.best_of_group}"
        return None


@dataclass(frozen=True)
class FeedForwardConfig:
    """The per-token network of a layer.

    hidden             inner width
    activation         gelu (exact), gelu_new (tanh form), relu, relu2 (squared), silu
    gated              False: down(act(up(x)));  True: down(act(gate(x)) * up(x)), which is SwiGLU with silu and GEGLU with gelu
    bias               biases on all projections
    experts            0: one dense network. n: n networks of this form behind a linear router
    experts_per_token  how many experts, those with the largest scores, serve a token
    router             how they are chosen and weighed
    shared             inner width of one more network, that serves every token beside its experts (DeepSeek); 0 = none
    shifted            RWKV-4's channel mixing: sigmoid(r(x')) * down(relu2(up(x''))), where x' and x'' are learned mixtures of a
                       token with the one before it; its cache holds that token. Needs relu2, and neither gates nor biases
    """

    hidden: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    experts: int = 0
    experts_per_token: int = 2
    router: RouterConfig = RouterConfig()
    shared: int = 0
    shifted: bool = False

    def __post_init__(self) -> None:
        _one_of("FeedForwardConfig", "activation", self.activation, ACTIVATIONS)
        if self.shifted and (self.activation != "relu2" or self.gated or self.bias or self.experts):
            raise OptionError("FeedForwardConfig: shifted=True needs activation='relu2', gated=False, bias=False and experts=0")
        if self.experts and not 1 <= self.experts_per_token <= self.experts:
            raise OptionError(f"FeedForwardConfig: experts_per_token={self.experts_per_token} with experts={self.experts}")
        if self.experts and self.bias:
            raise OptionError("FeedForwardConfig: experts have no biases; use bias=False")
        if not self.experts and (self.shared or self.router != RouterConfig()):
            raise OptionError(f"FeedForwardConfig: shared={self.shared} and router={self.router} are for experts; there are none")
        if self.experts and (wrong := self.router.misfit(self.experts, self.experts_per_token)):
            raise OptionError(
                f"FeedForwardConfig: {wrong} with experts={self.experts}, experts_per_token={self.experts_per_token}"
            )


@dataclass(frozen=True)
class EmbeddingConfig:
    """How tokens become vectors: tokens * scale (+ learned positions) (+ token types), then an optional norm.

    positions        rows of the table of learned absolute positions; 0 = none (rotary or relative positions live in the mixers)
    position_offset  row of position 0 (RoBERTa: 2)
    token_types      rows of the segment table (BERT: 2); 0 = none
    norm             normalise the sum (BERT, BLOOM)
    scale            factor on the token vectors only (Gemma: sqrt(dim))
    """

    positions: int = 0
    position_offset: int = 0
    token_types: int = 0
    norm: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class HeadConfig:
    """How the final hidden states become logits.

    tied       the matrix is the token embedding
    bias       a bias per vocabulary entry
    transform  activation of an extra dense layer + norm before the matrix (BERT's masked-LM head); None = no such layer
    scale      factor on the hidden states before the matrix (T5 with tied embeddings: dim^-0.5)
    softcap    logits become softcap * tanh(logits / softcap) (Gemma 2); None = as they are
    """

    tied: bool = True
    bias: bool = False
    transform: str | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.transform is not None:
            _one_of("HeadConfig", "transform", self.transform, ACTIVATIONS)


@dataclass(frozen=True)
class MixerConfig:
    """One attention (or other token-mixing) layer: the name of a catalogue card and the options of its factory.

    `options` may be given as a mapping; it is kept as a sorted tuple of pairs, so that a configuration stays immutable.
    """

    name: str
    options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        pairs = self.options.items() if isinstance(self.options, Mapping) else self.options
        object.__setattr__(self, "options", tuple(sorted((str(k), v) for k, v in pairs)))

    @classmethod
    def of(cls, value: MixerLike) -> MixerConfig:
        """From a card name, a `(name, options)` pair or a MixerConfig."""
        if isinstance(value, MixerConfig):
            return value
        if isinstance(value, str):
            return cls(value)
        name, options = value
        return cls(name, options)

    def with_defaults(self, **defaults: Any) -> MixerConfig:
        """A copy in which `defaults` fill the options that are not set."""
        return MixerConfig(self.name, {**defaults, **self.given})

    @property
    def given(self) -> dict[str, Any]:
        """The options as a new dictionary."""
        return dict(self.options)


@dataclass(frozen=True)
class AlibiConfig:
    """Stands for `score_mod=Alibi(slopes * factor)` in a mixer's options, with the slopes of the paper for its number of heads.
    Falcon scales its biases like its scores: factor head_dim^-0.5."""

    factor: float = 1.0


@dataclass(frozen=True)
class RelativeBiasConfig:
    """Stands for `score_mod=RelativeBias(table)` in a mixer's options, with a new learned table [buckets, num_heads] of zeros."""

    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True


MixerLike = MixerConfig | str | tuple[str, Mapping[str, Any] | tuple[tuple[str, Any], ...]]


@dataclass(frozen=True)
class StackConfig:
    """A stack of layers: the decoder of a language model, the encoder of BERT, one of the two stacks of T5.

    num_layers         depth
    mixers             the pattern of mixers, repeated until the stack is full: `("sliding-window", ..., "causal")` is a hybrid
    feed_forward       the feed-forward network of every layer; None = none (some mixers, like Mamba blocks, need none)
    first_feed_forwards  those of the first layers, where they are others (DeepSeek: dense networks before experts)
    norm               the norm of every layer
    norm_position      "pre":      x + f(norm(x))            "post": norm(x + f(x))
                       "sandwich": x + norm(f(norm(x)))      (Gemma 2)
    parallel           mixer and feed-forward read the same x and are added together: x + mixer(norm(x)) + ffn(norm(x))
    parallel_norms     1: both read one norm (GPT-J, Falcon-7B);  2: each has its own (GPT-NeoX, Falcon-40B)
    final_norm         a norm after the last layer
    cross              the cross-attention of every layer, between mixer and feed-forward; None = none
    shared_parameters  names of parameters inside the mixers that all layers share with layer 0 (T5: the relative bias table)
    """

    num_layers: int
    mixers: tuple[MixerConfig, ...]
    feed_forward: FeedForwardConfig | None
    norm: NormConfig = NormConfig()
    norm_position: NormPosition = "pre"
    parallel: bool = False
    parallel_norms: int = 1
    final_norm: bool = True
    cross: MixerConfig | None = None
    shared_parameters: tuple[str, ...] = ()
    first_feed_forwards: tuple[FeedForwardConfig, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixers", tuple(MixerConfig.of(m) for m in self.mixers))
        if self.cross is not None:
            object.__setattr__(self, "cross", MixerConfig.of(self.cross))
        _one_of("StackConfig", "norm_position", self.norm_position, ("pre", "post", "sandwich"))
        if self.num_layers < 1 or not self.mixers:
            raise OptionError(f"StackConfig: num_layers={self.num_layers} and {len(self.mixers)} mixers; both must be at least 1")
        if self.parallel and (self.norm_position != "pre" or self.cross is not None or self.feed_forward is None):
            raise OptionError("StackConfig: parallel=True needs norm_position='pre', a feed_forward and no cross-attention")
        if self.first_feed_forwards and (self.feed_forward is None or len(self.first_feed_forwards) > self.num_layers):
            raise OptionError(
                f"StackConfig: {len(self.first_feed_forwards)} first_feed_forwards with num_layers={self.num_layers}, "
                f"feed_forward={self.feed_forward}; they need as many layers, and a feed_forward for the others"
            )
        if self.parallel and any(f.shifted for f in (self.feed_forward, *self.first_feed_forwards) if f is not None):
            raise OptionError("StackConfig: a feed_forward with shifted=True stands after the mixer; use parallel=False")
        if self.parallel_norms not in (1, 2):
            raise OptionError(f"StackConfig: parallel_norms={self.parallel_norms}; it is 1 or 2")

    def mixer(self, layer: int) -> MixerConfig:
        """The mixer of layer `layer` (0-based)."""
        return self.mixers[layer % len(self.mixers)]

    def ffn(self, layer: int) -> FeedForwardConfig | None:
        """The feed-forward network of layer `layer` (0-based)."""
        return self.first_feed_forwards[layer] if layer < len(self.first_feed_forwards) else self.feed_forward


@dataclass(frozen=True)
class TransformerConfig:
    """A whole model.

    kind        "decoder" (one causal stack), "encoder" (one bidirectional stack), "encoder-decoder" (two, joined by
                cross-attention)
    vocab_size  rows of the token embedding
    dim         width of the residual stream
    num_heads   query heads of every mixer, unless the mixer's options say otherwise
    decoder     the stack that makes the logits; for kind="encoder" it is None
    encoder     the stack that makes the memory or, for kind="encoder", the logits; for kind="decoder" it is None
    embedding   shared by both stacks
    encoder_embedding  how the encoder's tokens become vectors where that differs (LED: own positions and norm); the token table
                is shared all the same. Encoder-decoders only
    head        None: the model returns final hidden states instead of logits
    max_positions  the longest sequence that a model whose positions have no table was made for, None = not known. The model
                runs longer ones all the same; an engine refuses them
    """

    kind: Kind
    vocab_size: int
    dim: int
    num_heads: int
    decoder: StackConfig | None = None
    encoder: StackConfig | None = None
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    head: HeadConfig | None = field(default_factory=HeadConfig)
    encoder_embedding: EmbeddingConfig | None = None
    max_positions: int | None = None

    def __post_init__(self) -> None:
        _one_of("TransformerConfig", "kind", self.kind, ("decoder", "encoder", "encoder-decoder"))
        wanted = {"decoder": (True, False), "encoder": (False, True), "encoder-decoder": (True, True)}[self.kind]
        if (self.decoder is not None, self.encoder is not None) != wanted:
            raise OptionError(f"TransformerConfig: kind={self.kind!r} needs decoder, encoder present as {wanted}")
        if self.kind == "encoder-decoder" and self.decoder is not None and self.decoder.cross is None:
            raise OptionError("TransformerConfig: the decoder of an encoder-decoder needs cross=, e.g. cross='cross'")
        if self.kind != "encoder-decoder" and self.encoder_embedding is not None:
            raise OptionError(f"TransformerConfig: encoder_embedding is for encoder-decoders, not for kind={self.kind!r}")

    @property
    def main(self) -> StackConfig:
        """The stack whose output becomes the logits."""
        stack = self.encoder if self.kind == "encoder" else self.decoder
        assert stack is not None
        return stack

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, for printing and saving."""
        return asdict(self)


def language_model(
    vocab_size: int,
    dim: int,
    num_layers: int,
    num_heads: int,
    *,
    mixers: Sequence[MixerLike] = ("causal",),
    hidden: int | None = None,
    activation: str = "silu",
    gated: bool = True,
    positions: int = 0,
    norm: NormConfig | None = None,
    tied: bool = True,
) -> TransformerConfig:
    """A pre-norm decoder in today's usual form, to train from scratch and to compare mixers in.

    `mixers` is a pattern of card names or (name, options) pairs that repeats over the layers. `hidden` defaults to 8/3 dim for a
    gated network and 4 dim otherwise. `positions` > 0 adds a learned table for mixers that carry no positions of their own.
    """
    width = hidden or (round(8 * dim / 3) if gated else 4 * dim)
    stack = StackConfig(
        num_layers=num_layers,
        mixers=tuple(MixerConfig.of(m) for m in mixers),
        feed_forward=FeedForwardConfig(width, activation, gated),
        norm=norm or NormConfig(),
    )
    return TransformerConfig(
        "decoder",
        vocab_size,
        dim,
        num_heads,
        decoder=stack,
        embedding=EmbeddingConfig(positions=positions),
        head=HeadConfig(tied=tied),
    )


def with_mixers(config: TransformerConfig, *mixers: MixerLike) -> TransformerConfig:
    """A copy of `config` whose main stack uses another pattern of mixers: the way to compare mechanisms in one model."""
    stack = replace(config.main, mixers=tuple(MixerConfig.of(m) for m in mixers))
    return replace(config, encoder=stack) if config.kind == "encoder" else replace(config, decoder=stack)
