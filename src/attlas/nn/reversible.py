"""Reversible residual layers: a backward pass that recomputes its inputs instead of keeping them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attlas.numerics import first_order

Pairs = list[tuple[nn.Module, nn.Module]]


class Reversible(nn.Module):
    """A stack of layers (f, g) on two streams:  y1 = x1 + f(x2),  y2 = x2 + g(y1);  x2 = y2 - g(y1),  x1 = y1 - f(x2) going back.

    layers   pairs of modules from [..., dim] to [..., dim], e.g. (norm and mixer, norm and feed-forward network)
    forward  (x1, x2) -> (y1, y2), all of one shape; a transformer starts both streams with its embeddings

    The backward pass holds the activations of one f or g at a time, and between forward and backward only y1 and y2 are kept,
    however many layers there are. Price: each f and g runs once more. f and g must be functions of their input (no dropout, no
    statistics that move); what is recomputed differs from what was by rounding, which can tip a hash or a choice of clusters that
    stood on the edge. Gradients of first order only. Sources: Gomez et al. 2017, arXiv 1707.04585; Kitaev et al. 2020,
    arXiv 2001.04451.
    """

    def __init__(self, layers: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in layers)

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [(pair[0], pair[1]) for pair in self.layers]  # type: ignore[index]
        learned = [p for p in self.parameters() if p.requires_grad]
        return _Stack.apply(pairs, x1, x2, *learned)


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Pairs, x1: Tensor, x2: Tensor, *learned: Tensor) -> tuple[Tensor, Tensor]:
        for f, g in pairs:
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        kind = x1.device.type
        ctx.pairs, ctx.autocast = pairs, (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(x1, x2, *learned)
        return x1, x2

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor | None, ...]:
        y1, y2, *learned = saved
        y1, y2 = y1.detach(), y2.detach()
        sums: dict[Tensor, Tensor] = {}
        with torch.autocast(*ctx.autocast):  # what is recomputed must be what was computed
            for f, g in reversed(ctx.pairs):
                y2, d1 = _undo(g, y1, y2, d1, d2, sums)
                y1, d2 = _undo(f, y2, y1, d2, d1, sums)
        return None, d1, d2, *(sums.get(p) for p in learned)


def _undo(f: nn.Module, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, sums: dict[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """From y = z + f(x): z, and dx + the gradient of f for x; the gradients of f's parameters are added to `sums`."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        out = f(x)
    learned = [p for p in f.parameters() if p.requires_grad]
    more, *grads = torch.autograd.grad(out, [x, *learned], dy, allow_unused=True)
    for p, grad in zip(learned, grads, strict=True):
        if grad is not None:
            sums[p] = sums[p] + grad if p in sums else grad
    return y - out.detach(), dx if more is None else dx + more
