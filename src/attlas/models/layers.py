"""The parts of a layer beside its mixer: norms, feed-forward networks, and the residual arrangement that joins them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.cache.layer import Cache
from attlas.models.config import FeedForwardConfig, NormConfig, StackConfig
from attlas.nn.mixer import Mixer
from attlas.nn.rwkv import ChannelMix
from attlas.numerics import wide_dtype, widened
from attlas.shapes import SeqInfo


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": squared_relu,
    "silu": F.silu,
}


class UnitOffsetRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + w), computed in fp32 (fp64 for fp64 x) and returned in x's dtype; w starts at 0.
    Source: Gemma Team 2024, arXiv 2403.08295."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        (wide,) = widened(x)
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (scaled * (1.0 + self.weight.to(wide.dtype))).to(x.dtype)


def make_norm(config: NormConfig, dim: int) -> nn.Module:
    """The norm that `config` describes, over a last dimension of `dim`."""
    if config.kind == "layer":
        return nn.LayerNorm(dim, eps=config.eps, bias=config.bias)
    if config.unit_offset:
        return UnitOffsetRMSNorm(dim, config.eps)
    return nn.RMSNorm(dim, eps=config.eps)


class FeedForward(nn.Module):
    """down(act(up(x))), or gated: down(act(gate(x)) * up(x)). x [..., dim] -> [..., dim].

    Cost: 2 flops per weight and token. Sources: Vaswani et al. 2017 (plain); Shazeer 2020, arXiv 2002.05202 (gated)."""

    def __init__(self, dim: int, config: FeedForwardConfig) -> None:
        super().__init__()
        self.act = ACTIVATION[config.activation]
        self.gate = nn.Linear(dim, config.hidden, bias=config.bias) if config.gated else None
        self.up = nn.Linear(dim, config.hidden, bias=config.bias)
        self.down = nn.Linear(config.hidden, dim, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.act(self.up(x)))
        return self.down(self.act(self.gate(x)) * self.up(x))

    def flops(self, tokens: int) -> int:
        return 2 * tokens * sum(m.weight.numel() for m in (self.gate, self.up, self.down) if m is not None)


TINY = 1e-20  # what a sum of sigmoids is kept above: all may be 0


class Router(nn.Module):
    """Which experts serve a token, and with what weights; `RouterConfig` says how. Computed in fp32 at least.

    s = softmax or sigmoid of `weight` x; the experts with the largest s + correction among those of the best groups are chosen;
    their weights are s (over the sum of those of the chosen ones), times a factor. Cost: 2 experts dim flops a token. Sources:
    see `RouterConfig`.
    """

    correction: Tensor | None

    def __init__(self, dim: int, config: FeedForwardConfig) -> None:
        super().__init__()
        self.config, self.per_token = config.router, config.experts_per_token
        self.weight = nn.Parameter(torch.empty(config.experts, dim))
        self.register_buffer("correction", torch.zeros(config.experts) if self.config.correction else None)

    def forward(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, dim] -> weights and indices [T, k]."""
        config, wide = self.config, wide_dtype(flat.dtype)
        logits = F.linear(flat.to(wide), self.weight.to(wide))
        scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
        ranks = scores if self.correction is None else scores + self.correction
        if config.groups > 1:
            ranks = self._best_groups(ranks)
        chosen = ranks.topk(self.per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if config.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + TINY)
        return (weights * config.scale).to(flat.dtype), chosen

    def _best_groups(self, ranks: Tensor) -> Tensor:
        """ranks [T, experts] with -inf outside the best groups of each token."""
        config = self.config
        grouped = ranks.unflatten(-1, (config.groups, -1))
        best = grouped.topk(config.best_of_group, dim=-1).values.sum(-1).topk(config.groups_per_token, dim=-1).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(closed[..., None], -math.inf).flatten(-2)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Router:
        """Conversions leave the correction in fp32: it is fitted in steps that 16 bits do not tell apart."""
        kept = self.correction
        super()._apply(fn, recurse)
        self.correction = None if kept is None else kept.to(self.weight.device)
        return self


class Experts(nn.Module):
    """Mixture of experts: y = sum over the k chosen experts e of w_e * FFN_e(x) (+ FFN_shared(x)), with k = experts_per_token.

    `router` chooses the experts of each token and weighs them. Every expert is a feed-forward network of the given form; `gate`,
    `up` are [experts, hidden, dim], `down` is [experts, dim, hidden]. A token's output does not depend on the other tokens (there
    is no capacity limit). Cost: 2 flops per weight of the k experts and the shared one, and token. Sources: Jiang et al. 2024,
    arXiv 2401.04088; shared experts and groups: DeepSeek-AI 2024, arXiv 2405.04434.
    """

    def __init__(self, dim: int, config: FeedForwardConfig) -> None:
        super().__init__()
        self.act = ACTIVATION[config.activation]
        self.per_token = config.experts_per_token
        self.router = Router(dim, config)
        shape = (config.experts, config.hidden, dim)
        self.gate = nn.Parameter(torch.empty(shape)) if config.gated else None
        self.up = nn.Parameter(torch.empty(shape))
        self.down = nn.Parameter(torch.empty(config.experts, dim, config.hidden))
        dense = FeedForwardConfig(config.shared, config.activation, config.gated)
        self.shared = FeedForward(dim, dense) if config.shared else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        weights, chosen = self.router(flat)
        out = torch.zeros_like(flat) if self.shared is None else self.shared(flat)
        slots = chosen.flatten()  # token t's choices stand at t k ... t k + k - 1
        counts = slots.bincount(minlength=len(self.up)).tolist()
        for expert, mine in enumerate(slots.argsort(stable=True).split(counts)):
            if len(mine):
                token = mine // self.per_token
                out.index_add_(0, token, self._expert(expert, flat[token]) * weights.flatten()[mine, None])
        return out.view_as(x)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        inner = F.linear(x, self.up[e])
        inner = self.act(inner) if self.gate is None else self.act(F.linear(x, self.gate[e])) * inner
        return F.linear(inner, self.down[e])

    def flops(self, tokens: int) -> int:
        one = sum(w[0].numel() for w in (self.gate, self.up, self.down) if w is not None)
        shared = 0 if self.shared is None else self.shared.flops(tokens)
        return 2 * tokens * (self.router.weight.numel() + self.per_token * one) + shared


def make_feed_forward(dim: int, config: FeedForwardConfig) -> FeedForward | Experts | ChannelMix:
    if config.shifted:
        return ChannelMix(dim, config.hidden)
    return Experts(dim, config) if config.experts else FeedForward(dim, config)


@dataclass(frozen=True)
class Memory:
    """What cross-attention reads: hidden [B, S, dim] with lengths None (all tokens valid), or packed [S_total, dim] with the
    number of tokens of each sequence."""

    hidden: Tensor
    lengths: tuple[int, ...] | None = None


class Step:
    """What all layers of one forward share: how the tokens lie (`seq`, `positions`) and what the cross-attention reads."""

    def __init__(self, seq: SeqInfo | None, positions: Tensor | None, memory: Memory | None) -> None:
        self.seq, self.positions = seq, positions
        self.memory = None if memory is None else memory.hidden
        # A packed call needs to know where each memory ends; a dense memory beside packed tokens is valid throughout.
        lengths_k = None if memory is None else memory.lengths
        if memory is not None and lengths_k is None and seq is not None:
            lengths_k = (memory.hidden.shape[1],) * memory.hidden.shape[0]
        self.cross_seq = None if seq is None else SeqInfo(seq.lengths, lengths_k, seq.starts, seq.ids)


class Layer(nn.Module):
    """One layer: mixer, optional cross-attention and optional feed-forward network, each around the residual stream as `config`
    says."""

    def __init__(
        self, dim: int, config: StackConfig, mixer: Mixer, cross: Mixer | None, feed_forward: FeedForwardConfig | None
    ) -> None:
        super().__init__()
        self.position, self.parallel = config.norm_position, config.parallel
        sandwich = config.norm_position == "sandwich"

        def norm(wanted: bool = True) -> nn.Module | None:
            return make_norm(config.norm, dim) if wanted else None

        has_ffn = feed_forward is not None
        self.norm_mixer, self.mixer = norm(), mixer
        self.norm_cross, self.cross = norm(cross is not None), cross
        self.norm_ffn = norm(has_ffn and not (config.parallel and config.parallel_norms == 1))
        self.ffn = make_feed_forward(dim, feed_forward) if feed_forward is not None else None
        self.norm_mixer_out, self.norm_cross_out = norm(sandwich), norm(sandwich and cross is not None)
        self.norm_ffn_out = norm(sandwich and has_ffn)

    def mixers(self) -> list[Mixer]:
        """What of the layer looks at other tokens and so has a cache: mixer, cross-attention, shifted feed-forward network."""
        return [m for m in (self.mixer, self.cross, self.ffn) if isinstance(m, Mixer)]

    def forward(self, x: Tensor, step: Step, caches: Sequence[Cache] | None) -> Tensor:
        """`caches`: one for each of `mixers()`."""
        held = {} if caches is None else {id(m): c for m, c in zip(self.mixers(), caches, strict=True)}
        cache = held.get(id(self.mixer))

        def mix(y: Tensor) -> Tensor:
            return self.mixer(y, seq=step.seq, positions=step.positions if self.mixer.uses_positions else None, cache=cache)

        if self.parallel:
            assert self.norm_mixer is not None and self.ffn is not None
            y = self.norm_mixer(x)
            return x + mix(y) + self.ffn(y if self.norm_ffn is None else self.norm_ffn(x))
        x = self._residual(x, mix, self.norm_mixer, self.norm_mixer_out)
        if self.cross is not None:
            cross = partial(self.cross, memory=step.memory, seq=step.cross_seq, cache=held.get(id(self.cross)))
            x = self._residual(x, cross, self.norm_cross, self.norm_cross_out)
        if self.ffn is None:
            return x
        shifted = isinstance(self.ffn, ChannelMix)
        ffn = partial(self.ffn, seq=step.seq, cache=held.get(id(self.ffn))) if shifted else self.ffn
        return self._residual(x, ffn, self.norm_ffn, self.norm_ffn_out)

    def _residual(self, x: Tensor, f: Callable[[Tensor], Tensor], norm: nn.Module | None, out: nn.Module | None) -> Tensor:
        assert norm is not None
        if self.position == "post":
            return norm(x + f(x))
        y = f(norm(x))
        return x + (y if out is None else out(y))
