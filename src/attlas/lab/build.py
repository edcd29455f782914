"""The models that the lab trains: one language model and one recall model per mechanism, all of one size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from attlas.errors import UnsupportedError
from attlas.lab.mechanisms import Mechanism
from attlas.lab.options import CompareOptions
from attlas.lab.tasks.mqar import RecallTask
from attlas.lab.tasks.text import VOCAB
from attlas.models.config import FeedForwardConfig, language_model
from attlas.models.init import seeded
from attlas.models.layers import FeedForward
from attlas.models.transformer import Transformer

TOLERANCE = 0.02
RECALL_HEAD_DIM, RECALL_LAYERS = 16, 2
RECALL_HIDDEN = 32
GROWTH = 2.5


@dataclass(frozen=True)
class Sized:
    """hidden: width of the feed-forward network that brings the model to `parameters`, nearest to the common target."""

    hidden: int
    parameters: int


def text_model(mechanism: Mechanism, options: CompareOptions, hidden: int, seed: int = 0) -> Transformer:
    """Decoder over bytes: pre-norm, RMSNorm, SwiGLU of width `hidden`, tied embedding, `mechanism` in every layer."""
    pair = (mechanism.name, mechanism.options_at(options.dim, options.heads))
    config = language_model(VOCAB, options.dim, options.layers, options.heads, mixers=(pair,), hidden=hidden)
    return Transformer(config, seed=seed, device=options.device)


class ShortConv(nn.Module):
    """x_t + sum_{j < width} w_j * x_{t-j}, per channel: lets a layer see which value follows which key. x [B, T, dim]."""

    def __init__(self, dim: int, width: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, dim) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.weight[0] * x
        for j in range(1, self.weight.shape[0]):  # shifted adds: several times faster on a CPU than a depthwise nn.Conv1d
            out = out + self.weight[j] * nn.functional.pad(x, (0, 0, j, 0))[:, : x.shape[1]]
        return out


class RecallLayer(nn.Module):
    def __init__(self, mixer: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm_mixer, self.conv, self.mixer = nn.RMSNorm(dim), ShortConv(dim), mixer
        self.norm_ffn, self.ffn = nn.RMSNorm(dim), FeedForward(dim, FeedForwardConfig(hidden))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.conv(self.norm_mixer(x)))
        return x + self.ffn(self.norm_ffn(x))


class RecallModel(nn.Module):
    """Tokens [B, T] -> hidden [B, T, dim]; `logits` of the rows that are asked for. Two layers: short convolution, mixer, small
    feed-forward network; tied embedding; no table of positions."""

    def __init__(self, mechanism: Mechanism, task: RecallTask, heads: int, hidden: int, *, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            dim = RECALL_HEAD_DIM * heads
            self.embed = nn.Embedding(task.vocab, dim)
            nn.init.normal_(self.embed.weight, std=0.02)
            mixers = [mechanism.build(dim, heads) for _ in range(RECALL_LAYERS)]
            self.layers = nn.ModuleList(RecallLayer(m, dim, hidden) for m in mixers)
            self.norm = nn.RMSNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embed.weight.T


def count(model: nn.Module) -> int:
    """Number of trainable weights, shared ones once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def equal_sizes(parameters: Mapping[str, Callable[[int], int]], base: int, least: int, stage: str) -> dict[str, Sized]:
    """Feed-forward widths that bring all models to one number of weights.

    parameters  label -> number of weights as a function of the width (affine)
    base        the number wanted; where a mechanism alone is larger than that, everybody grows with it, up to GROWTH times
    least       the smallest feed-forward width that a model may be left with
    Raises UnsupportedError for a mechanism that is too large, or that no width brings within 2 %.
    """
    floors = {label: of(least) for label, of in parameters.items()}
    for label, floor in floors.items():
        if floor > GROWTH * base:
            raise UnsupportedError(
                f"{label}: its {stage} model has {floor:,} weights even with a feed-forward width of {least}; the others have "
                f"about {base:,}. Use a larger --dim, or options that make the mechanism smaller"
            )
    target = max(base, *floors.values())
    return {label: match(label, of, target, stage) for label, of in parameters.items()}


def match(label: str, parameters: Callable[[int], int], target: int, stage: str) -> Sized:
    """The feed-forward width whose model comes nearest to `target` weights; UnsupportedError when none comes within 2 %."""
    at_one, at_two = parameters(1), parameters(2)
    hidden = max(1, round(1 + (target - at_one) / (at_two - at_one)))
    reached = parameters(hidden)
    if abs(reached - target) > TOLERANCE * target:
        raise UnsupportedError(
            f"{label}: its {stage} model has {reached:,} weights with a feed-forward width of {hidden}, the others {target:,}; "
            f"a fair comparison needs them within {TOLERANCE:.0%}. Use a larger --dim"
        )
    return Sized(hidden, reached)


def text_sizes(mechanisms: Sequence[Mechanism], reference: Mechanism, options: CompareOptions) -> dict[str, Sized]:
    """Width per mechanism; the reference has the usual width 8/3 dim."""

    def parameters(m: Mechanism, hidden: int) -> int:
        return count(text_model(m, options, hidden))

    base = parameters(reference, round(8 * options.dim / 3))
    return equal_sizes({m.label: partial(parameters, m) for m in mechanisms}, base, max(1, options.dim // 4), "language")


def recall_sizes(mechanisms: Sequence[Mechanism], reference: Mechanism, task: RecallTask, heads: int) -> dict[str, Sized]:
    """Width per mechanism; the reference has RECALL_HIDDEN."""

    def parameters(m: Mechanism, hidden: int) -> int:
        return count(RecallModel(m, task, heads, hidden))

    base = parameters(reference, RECALL_HIDDEN)
    return equal_sizes({m.label: partial(parameters, m) for m in mechanisms}, base, 4, "recall")
