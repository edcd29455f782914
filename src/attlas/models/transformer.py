"""ONE transformer: decoder, encoder or encoder-decoder, as its configuration says. Any mixer can be any layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from attlas.cache.layer import Cache
from attlas.errors import ShapeError, UnsupportedError
from attlas.models.config import StackConfig, TransformerConfig
from attlas.models.embedding import Embedding, Head
from attlas.models.generate import generate
from attlas.models.init import init_weights, seeded
from attlas.models.layers import Experts, FeedForward, Layer, Memory, Step, make_norm
from attlas.models.mixers import build_mixer
from attlas.models.tokens import Tokens
from attlas.nn.mixer import Mixer
from attlas.shapes import SeqInfo, describe


class Stack(nn.Module):
    """Layers one after the other, and a final norm. Holds no embedding: vectors in, vectors out."""

    def __init__(self, config: StackConfig, dim: int, num_heads: int) -> None:
        super().__init__()
        layers = []
        for i in range(config.num_layers):
            cross = None if config.cross is None else build_mixer(config.cross, dim, num_heads)
            layers.append(Layer(dim, config, build_mixer(config.mixer(i), dim, num_heads), cross, config.ffn(i)))
        self.layers = nn.ModuleList(layers)
        self.norm = make_norm(config.norm, dim) if config.final_norm else None
        self._share(config.shared_parameters)

    def _share(self, names: Sequence[str]) -> None:
        """Make the named parameters of all mixers one parameter, that of layer 0."""
        first, *others = (layer.mixer for layer in self.blocks)
        for name in names:
            *path, last = name.split(".")
            shared = first.get_parameter(name)
            for mixer in others:
                setattr(mixer.get_submodule(".".join(path)), last, shared)

    def forward(self, x: Tensor, step: Step, cache: Sequence[Cache] | None = None) -> Tensor:
        at = 0
        for layer in self.blocks:
            end = at + len(layer.mixers())
            x = layer(x, step, None if cache is None else cache[at:end])
            at = end
        return x if self.norm is None else self.norm(x)

    @property
    def blocks(self) -> list[Layer]:
        return cast(list[Layer], list(self.layers))

    def mixers(self) -> list[Mixer]:
        """All that look at other tokens, in the order of the cache list: mixer 0, (cross 0, shifted network 0,) mixer 1, ..."""
        return [m for layer in self.blocks for m in layer.mixers()]


class Transformer(nn.Module):
    """tokens -> logits, for every architecture that a `TransformerConfig` can say.

    config   what to build
    seed     initial weights: linear and embedding weights from N(0, 0.02), those that write to the residual stream divided by
             sqrt(2 layers), biases 0; mixers with initialisations of their own keep them (drawn from the same seed). The global
             random state is not touched
    Tokens may come dense, padded or packed (see `forward`); with `cache` the same forward is a prefill, a chunk of one, or a
    decode step. There is no dropout. Submodules: `embed` (and `encoder_embed`, where that differs), `decoder` and/or
    `encoder` (with `.layers[i].mixer`, `.cross`, `.ffn`), `head`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        with seeded(seed):  # on the CPU, so that the same seed gives the same weights on every device
            self.embed = Embedding(config)
            self.encoder_embed = Embedding(config, self.embed.tokens) if config.encoder_embedding is not None else None
            self.encoder = None if config.encoder is None else Stack(config.encoder, config.dim, config.num_heads)
            self.decoder = None if config.decoder is None else Stack(config.decoder, config.dim, config.num_heads)
            self.head = None if config.head is None else Head(config)
            init_weights(self)
        self.to(device=device, dtype=dtype)

    # ---- forward ------------------------------------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Tensor,
        *,
        seq: SeqInfo | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        token_types: Tensor | None = None,
        cache: Sequence[Cache] | None = None,
        memory: Memory | Tensor | None = None,
        source: Tensor | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab] (packed: [T, vocab]), or final hidden states where the configuration has no head.

        tokens          int64 [B, T]; or packed [T], with `seq` when it holds several sequences
        seq             lengths, cache rows and first positions of packed sequences; beside dense tokens: the valid tokens of each
                        right-padded row
        attention_mask  [B, T], nonzero = token, zero = padding, left or right of the tokens (not between). Padding is left out of
                        the computation; its logits are 0. Positions count tokens, so they do not depend on the padding
        positions       absolute positions like `tokens`, or [T] shared by rows; None = 0, 1, 2 ..., or where the cache stands
        token_types     segment ids like `tokens` (BERT); None = 0
        cache           what `new_cache` made: the tokens are appended to its rows
        memory, source  what the cross-attention reads: a Memory or [B, S, dim] from `encode`, or source tokens [B, S] that are
                        encoded here (padding in `source_mask`). With a cache both may be left out after the first call
        Raises ShapeError or UnsupportedError, restating the call.
        """
        if source is not None:
            if memory is not None:
                raise ShapeError(f"Transformer: give memory or source, not both; got {describe(tokens=tokens, source=source)}")
            memory = self.encode(source, attention_mask=source_mask)
        hidden, layout = self._hidden(tokens, seq, attention_mask, positions, token_types, cache, memory)
        return layout.unpack(hidden if self.head is None else self.logits(hidden))

    def hidden(
        self,
        tokens: Tensor,
        *,
        seq: SeqInfo | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        token_types: Tensor | None = None,
        cache: Sequence[Cache] | None = None,
        memory: Memory | Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, dim] (packed: [T, dim]); arguments as in `forward`. `logits(hidden[...])` makes logits of
        those rows that are wanted, which spares the vocabulary matrix for the others."""
        hidden, layout = self._hidden(tokens, seq, attention_mask, positions, token_types, cache, memory)
        return layout.unpack(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of final hidden states [..., dim]."""
        if self.head is None:
            raise UnsupportedError("Transformer: this model was configured without a head, it has no logits")
        return self.head(hidden, self.embed.tokens.weight)

    def encode(self, tokens: Tensor, *, seq: SeqInfo | None = None, attention_mask: Tensor | None = None) -> Memory:
        """Run the encoder of an encoder-decoder; the result goes to `forward(..., memory=)`. Arguments as in `forward`."""
        if self.encoder is None or self.decoder is None:
            raise UnsupportedError(f"Transformer: encode needs kind='encoder-decoder', this is {self.config.kind!r}")
        layout = Tokens.of(tokens, seq, attention_mask, None, None)
        embed = self.embed if self.encoder_embed is None else self.encoder_embed
        x = self.encoder(embed(layout, None), Step(layout.seq, layout.irregular, None))
        return Memory(x, None if layout.seq is None else layout.seq.lengths)

    def _hidden(
        self,
        tokens: Tensor,
        seq: SeqInfo | None,
        attention_mask: Tensor | None,
        positions: Tensor | None,
        token_types: Tensor | None,
        cache: Sequence[Cache] | None,
        memory: Memory | Tensor | None,
    ) -> tuple[Tensor, Tokens]:
        stack = self._main
        memory = self._check_memory(memory, cache, tokens)
        if cache is not None and len(cache) != len(stack.mixers()):
            raise ShapeError(f"Transformer: cache has {len(cache)} layers, the model needs {len(stack.mixers())} (see new_cache)")
        if positions is not None and self.embed.positions is None and not any(m.uses_positions for m in stack.mixers()):
            raise UnsupportedError("Transformer: nothing in this model looks at positions, so the given ones would be ignored")
        packed = memory is not None and memory.lengths is not None
        layout = Tokens.of(tokens, seq, attention_mask, positions, None if cache is None else cache[0].lengths, packed=packed)
        step = Step(layout.seq, layout.irregular, memory)
        return stack(self.embed(layout, token_types), step, cache), layout

    def _check_memory(self, memory: Memory | Tensor | None, cache: Sequence[Cache] | None, tokens: Tensor) -> Memory | None:
        if self.config.kind != "encoder-decoder":
            if memory is not None:
                raise UnsupportedError(
                    f"Transformer: a model of kind {self.config.kind!r} reads no memory; got {describe(tokens=tokens)}"
                )
            return None
        if memory is None and cache is None:
            raise ShapeError(f"Transformer: an encoder-decoder needs memory= or source=; got {describe(tokens=tokens)}")
        return Memory(memory) if isinstance(memory, Tensor) else memory

    generate = generate  # as a method: model.generate(prompts, max_new_tokens, ...)

    # ---- caches -------------------------------------------------------------------------------------------------------------

    def new_cache(
        self,
        rows: int = 1,
        max_len: int | None = None,
        *,
        memory_len: int | None = None,
        layout: Literal["contiguous", "paged"] = "contiguous",
        page_size: int = 16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> list[Cache]:
        """Empty caches for `rows` sequences of up to `max_len` tokens, and `memory_len` tokens of memory (None = they grow): one
        per layer, in layer order; with cross-attention two per layer (self, cross), and one more for a shifted feed-forward
        network. dtype and device follow the parameters.
        Raises UnsupportedError when a mixer cannot decode, naming the layer."""
        options = {"layout": layout, "page_size": page_size, "dtype": dtype, "device": device}
        caches = []
        for i, layer in enumerate(self._main.blocks):
            for mixer in layer.mixers():
                longest = memory_len if mixer is layer.cross else max_len
                caches.append(_layer_cache(i, mixer, rows, longest, options))
        return caches

    @property
    def _main(self) -> Stack:
        stack = self.decoder if self.decoder is not None else self.encoder
        assert stack is not None
        return stack

    # ---- what it costs ------------------------------------------------------------------------------------------------------

    def num_parameters(self, *, embedding: bool = True) -> int:
        """Number of weights, shared ones counted once; `embedding=False` leaves out the token and position tables (a tied output
        matrix is the token table)."""
        embeds = [e for e in (self.embed, self.encoder_embed) if e is not None]
        skipped = set() if embedding else {id(p) for e in embeds for p in e.tables()}
        return sum(p.numel() for p in self.parameters() if id(p) not in skipped)

    def flops(self, seq_len: int) -> int:
        """Useful floating-point operations (2 per multiply-add) of one forward over one sequence of `seq_len` tokens, logits of
        all of them included; an encoder-decoder reads as many source tokens. Norms, activations and softmax are not counted."""
        total = 0 if self.head is None else self.head.flops(seq_len)
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                total += sum(m.flops(seq_len) for m in stack.mixers())
                total += sum(layer.ffn.flops(seq_len) for layer in stack.blocks if isinstance(layer.ffn, FeedForward | Experts))
        return total

    def cache_bytes(self, seq_len: int) -> int:
        """Bytes of the contiguous caches of one sequence of `seq_len` tokens, in the dtype of the parameters; cross-attention
        holds as many source tokens."""
        return sum(m.cache_bytes(seq_len) for m in self._main.mixers())

    def use(self, impl: str) -> Transformer:
        """Pin the implementation of every mixer's ops (see `Mixer.use`); returns self."""
        for stack in (self.encoder, self.decoder):
            for mixer in () if stack is None else stack.mixers():
                mixer.use(impl)
        return self


def _layer_cache(index: int, mixer: Mixer, rows: int, max_len: int | None, options: dict[str, Any]) -> Cache:
    try:
        return mixer.new_cache(rows, max_len, **options)
    except UnsupportedError as error:
        raise UnsupportedError(f"Transformer.new_cache: layer {index}: {error}") from error
