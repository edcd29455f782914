"""Short convolutions and the blocks around them, token by token as their papers write them. Any dtype, twice differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def depthwise(x: Tensor, weight: Tensor, ahead: int) -> Tensor:
    """y[b, t, c] = sum_i weight[c, i] x[b, t + i - (W - 1 - ahead), c], zeros outside the sequence: a convolution of every
    channel with W taps, of which `ahead` lie on later tokens.

    x [B, T, C], weight [C, W], 0 <= ahead < W -> [B, T, C]. O(T W C) time. LeCun et al. 1989; ahead = 0 is causal.
    """
    length, taps = x.shape[1], weight.shape[1]
    outs = []
    for t in range(length):
        total = torch.zeros_like(x[:, 0])
        for i in range(taps):
            s = t + i - (taps - 1 - ahead)
            if 0 <= s < length:
                total = total + weight[:, i] * x[:, s]
        outs.append(total)
    return torch.stack(outs, 1) if outs else x


def separable(x: Tensor, up: Tensor, scale: Tensor, bias: Tensor, weight: Tensor, down: Tensor, ahead: int) -> Tensor:
    """ConvFormer's token mixer: W_down (w * (s relu(W_up x)^2 + b)), * the depthwise convolution.

    x [B, T, D], up [E, D], scale and bias scalars, weight [E, W], down [D, E]. Yu et al. 2022, arXiv:2210.13452.
    """
    inner = scale * torch.relu(x @ up.T) ** 2 + bias
    return depthwise(inner, weight, ahead) @ down.T


def gated(x: Tensor, up: Tensor, weight: Tensor, gain: Tensor, shift: Tensor, down: Tensor, ahead: int) -> Tensor:
    """Conformer's convolution module: W_down silu(norm(w * (a sigmoid(g)))) with [a, g] = W_up x, norm a layer norm.

    x [B, T, D], up [2 E, D], weight [E, W], gain and shift [E], down [D, E]. Gulati et al. 2020, arXiv:2005.08100.
    """
    a, g = (x @ up.T).chunk(2, -1)
    inner = depthwise(a / (1 + torch.exp(-g)), weight, ahead)
    centred = inner - inner.mean(-1, keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * gain + shift
    return (normed / (1 + torch.exp(-normed))) @ down.T
