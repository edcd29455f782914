"""Initial weights for training from scratch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attlas.models.embedding import Head
from attlas.models.layers import Experts, FeedForward, Layer
from attlas.nn.attention import Attention
from attlas.nn.rwkv import ChannelMix

STD = 0.02


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw CPU random numbers from `seed` inside, and leave the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def init_weights(model: nn.Module) -> None:
    """Weights of linear maps and tables ~ N(0, 0.02^2), biases 0; maps that write to the residual stream (`o_proj` of attention,
    `down` of feed-forward networks) ~ N(0, 0.02^2 / (2 layers)), with layers the depth of their own stack. Mixers outside the
    softmax family keep their own initialisation, with `o_proj` divided by sqrt(2 layers) where they have one. Norms stay 1
    (unit-offset ones 0).

    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    layers: dict[Layer, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            _normal(module.weight)
        elif isinstance(module, nn.ModuleList):
            stack = [m for m in module if isinstance(m, Layer)]
            layers |= dict.fromkeys(stack, 1 / math.sqrt(2 * max(len(stack), 1)))
        elif isinstance(module, Head):
            _init_head(module)
    for layer, shrink in layers.items():
        _init_mixers(layer, shrink)
        _init_feed_forward(layer, shrink)


def _init_head(head: Head) -> None:
    if head.weight is not None:
        _normal(head.weight)
    if head.dense is not None:
        _linear(head.dense)


def _init_mixers(layer: Layer, shrink: float) -> None:
    for mixer in (layer.mixer, layer.cross):
        out = getattr(mixer, "o_proj", None)
        if isinstance(mixer, Attention):
            for linear in (m for m in mixer.modules() if isinstance(m, nn.Linear)):
                _linear(linear, shrink if linear is out else 1.0)
        elif isinstance(out, nn.Linear):
            with torch.no_grad():
                out.weight.mul_(shrink)


def _init_feed_forward(layer: Layer, shrink: float) -> None:
    ffn = layer.ffn
    for dense in (ffn, getattr(ffn, "shared", None)):
        if isinstance(dense, FeedForward):
            for linear in (dense.gate, dense.up, dense.down):
                if linear is not None:
                    _linear(linear, shrink if linear is dense.down else 1.0)
    if isinstance(ffn, ChannelMix):
        for linear in (ffn.up, ffn.r_proj, ffn.down):
            _linear(linear, shrink if linear is ffn.down else 1.0)
    elif isinstance(ffn, Experts):
        for weight in (ffn.router.weight, ffn.gate, ffn.up):
            if weight is not None:
                _normal(weight)
        _normal(ffn.down, shrink)


def _normal(weight: Tensor, factor: float = 1.0) -> None:
    nn.init.normal_(weight, std=STD * factor)


def _linear(linear: nn.Linear, factor: float = 1.0) -> None:
    _normal(linear.weight, factor)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
