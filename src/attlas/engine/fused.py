"""The same forward as the model's own, for serving on a CPU; see `attlas.engine.fused_layers` for what is joined."""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.cache.layer import Cache
from attlas.engine.fused_layers import FusedLayer, Shared, fused_norm
from attlas.engine.pieces import cut
from attlas.engine.program import Program
from attlas.engine.runner import Runner
from attlas.kernels.cpu import dense
from attlas.models.layers import Step
from attlas.models.tokens import Tokens
from attlas.models.transformer import Transformer
from attlas.shapes import SeqInfo


class FusedRunner(Runner):
    """Runs the layers of a decoder joined, as one program where it knows all of them. With `alone` every token attends by itself:
    its logits are then a function of its sequence, to the bit."""

    def __init__(self, model: Transformer, caches: list[Cache], *, alone: bool = False) -> None:
        super().__init__(model, caches)
        self.alone = alone
        stack = model.decoder
        assert stack is not None and model.head is not None
        self.layers, at = [], 0
        for layer in stack.blocks:
            end = at + len(layer.mixers())
            self.layers.append(FusedLayer(layer, caches[at:end]))
            at = end
        self.norm = fused_norm(stack.norm)
        head, embedded = model.head, model.embed.tokens.weight
        self.head = (
            dense.PackedLinear(embedded if head.weight is None else head.weight, head.bias) if head.dense is None else None
        )
        known = all(layer.known for layer in self.layers)
        self.program = Program(self.layers, self.norm, embedded) if known and self.norm is not None else None

    @staticmethod
    def unsupported(model: Transformer) -> str | None:
        """Why the model's own forward has to be used, None = it need not."""
        weight = model.embed.tokens.weight
        if len({p.dtype for p in model.parameters()}) > 1:
            return "the parameters have several dtypes"
        return dense.unsupported(weight.dtype, weight.device)

    @property
    def invariant(self) -> bool:
        """Whether all of the forward is made of rows that do not see each other."""
        return self.alone and self.program is not None and self.head is not None

    def _hidden(self, tokens: Tensor, seq: SeqInfo) -> Tensor:
        layout = Tokens.of(tokens, seq, None, None, self.caches[0].lengths)
        assert layout.seq is not None
        shared = Shared(layout.seq, layout.positions, Step(layout.seq, None, None), cut(layout.seq, alone=self.alone))
        x, residual = self.model.embed(layout, None).contiguous(), None
        if self.program is not None and not self._cascades(shared):
            return self.program.run(x, shared)
        for layer in self.layers:
            x, residual = layer(x, residual, shared)
        if self.norm is not None:
            return self.norm(x, residual)
        x = x if residual is None else x + residual
        norm = self.model.decoder.norm if self.model.decoder is not None else None
        return x if norm is None else norm(x)

    def _cascades(self, shared: Shared) -> bool:
        known = (layer.attention for layer in self.layers if layer.attention is not None)
        return any(a.part.cascade and shared.prefix(a.part, a.rule) for a in known)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.model.head
        if self.head is None or head is None:
            return super()._logits(hidden)
        logits = self.head(hidden if head.scale == 1.0 else hidden * head.scale)
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
