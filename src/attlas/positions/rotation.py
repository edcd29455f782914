"""The rotation itself: pairs of channels times (cos, sin).

All forms do the same arithmetic in the same order, so a token's bits do not depend on how many tokens are turned with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Up to here the number of operator calls decides; above it, the memory traffic of intermediates.
SMALL = 1 << 16


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first 2 * cos.shape[-1] channels of x [..., T, H, D] turned by the angles of cos, sin [..., T, 1, pairs]; the rest
    unchanged."""
    if torch.compiler.is_compiling() or x.numel() <= SMALL:
        return _rotate_small(x, cos, sin, interleaved)
    if x.requires_grad and torch.is_grad_enabled():
        turned = _Rotate.apply(x, cos, sin, interleaved)
        assert isinstance(turned, Tensor)
        return turned
    return _rotate_large(x, cos, sin, interleaved)


def _pairs(x: Tensor, count: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two channels of every pair, as views."""
    if interleaved:
        return x[..., 0 : 2 * count : 2], x[..., 1 : 2 * count : 2]
    return x[..., :count], x[..., count : 2 * count]


def _rotate_small(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    count = cos.shape[-1]
    a, b = (channel.to(cos.dtype) for channel in _pairs(x, count, interleaved))
    pair = (torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin))
    out = (torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)).to(x.dtype)
    return out if 2 * count == x.shape[-1] else torch.cat((out, x[..., 2 * count :]), dim=-1)


def _rotate_large(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Written into one fresh tensor."""
    count = cos.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    a, b = (channel.to(cos.dtype) for channel in _pairs(x, count, interleaved))
    for target, first, second, sign in zip(_pairs(out, count, interleaved), (a, b), (b, a), (-1, 1), strict=True):
        if target.dtype == cos.dtype:
            target.copy_(first).mul_(cos).addcmul_(second, sin, value=sign)
        else:
            target.copy_((first * cos).addcmul_(second, sin, value=sign))
    if 2 * count < x.shape[-1]:
        out[..., 2 * count :] = x[..., 2 * count :]
    return out


class _Rotate(torch.autograd.Function):
    """`_rotate_large` with a gradient: the rotation by the opposite angle, which can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return _rotate_large(x, cos, sin, interleaved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, ctx.interleaved = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, -sin, ctx.interleaved), None, None, None
