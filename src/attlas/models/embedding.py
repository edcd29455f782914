"""Both ends of the model: tokens to vectors, vectors to logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.errors import ShapeError
from attlas.models.config import TransformerConfig
from attlas.models.layers import ACTIVATION, make_norm
from attlas.models.tokens import Tokens


class Embedding(nn.Module):
    """tokens * scale + positions + token types, normalised where asked; [..., T] ids -> [..., T, dim]."""

    def __init__(self, config: TransformerConfig, shared: nn.Embedding | None = None) -> None:
        """`shared`: the token table of the decoder; this is then the embedding of the encoder alone."""
        super().__init__()
        own = None if shared is None else config.encoder_embedding
        options = config.embedding if own is None else own
        self.offset, self.scale = options.position_offset, options.scale
        self.tokens = nn.Embedding(config.vocab_size, config.dim) if shared is None else shared
        self.positions = nn.Embedding(options.positions, config.dim) if options.positions else None
        self.types = nn.Embedding(options.token_types, config.dim) if options.token_types else None
        self.norm = make_norm(config.main.norm, config.dim) if options.norm else None

    def forward(self, tokens: Tokens, token_types: Tensor | None) -> Tensor:
        x = self._look_up(tokens.ids)
        if self.scale != 1.0:
            # The factor is rounded to the dtype of the vectors first, as in the code that trained such models.
            x = x * torch.tensor(self.scale, dtype=x.dtype)
        if self.types is not None:
            types = torch.zeros_like(tokens.ids) if token_types is None else tokens.pack(token_types, "token_types")
            x = x + self.types(types)
        elif token_types is not None:
            raise ShapeError("Transformer: this model has no token types; got token_types")
        if self.positions is not None:
            room = self.positions.num_embeddings - self.offset
            if tokens.last_position >= room:
                raise ShapeError(
                    f"Transformer: position {tokens.last_position} is beyond the {room} learned positions of this model"
                )
            x = x + self.positions(tokens.positions + self.offset)
        return x if self.norm is None else self.norm(x)

    def _look_up(self, ids: Tensor) -> Tensor:
        try:
            return self.tokens(ids)
        except IndexError as error:
            low, high, size = int(ids.min()), int(ids.max()), self.tokens.num_embeddings
            raise ShapeError(f"Transformer: token ids run from {low} to {high}, the vocabulary has {size}") from error

    def tables(self) -> list[Tensor]:
        """The tables whose rows are looked up."""
        return [m.weight for m in (self.tokens, self.positions, self.types) if m is not None]


class Head(nn.Module):
    """logits = softcap(transform(x) * scale @ W^T + bias); W is the token embedding when tied, else `weight` [vocab, dim]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        options = config.head
        assert options is not None
        self.scale, self.softcap = options.scale, options.softcap
        self.dense = self.norm = None
        if options.transform is not None:
            self.dense, self.norm = nn.Linear(config.dim, config.dim), make_norm(config.main.norm, config.dim)
            self.act = ACTIVATION[options.transform]
        self.weight = None if options.tied else nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if options.bias else None
        self.vocab_weights = config.vocab_size * config.dim

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        if self.dense is not None and self.norm is not None:
            x = self.norm(self.act(self.dense(x)))
        if self.scale != 1.0:
            x = x * self.scale
        logits = F.linear(x, table if self.weight is None else self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * (self.vocab_weights + (0 if self.dense is None else self.dense.weight.numel()))
