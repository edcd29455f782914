"""Causal convolutions: long ones by FFT, short ones directly, both with the tail that decoding needs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attlas.errors import ShapeError
from attlas.numerics import wide_dtype
from attlas.shapes import describe


def long_conv(u: Tensor, kernel: Tensor, *, bidirectional: bool = False) -> Tensor:
    """y[b, t, c] = sum_{s <= t} kernel[c, t - s] u[b, s, c], in O(T log T).

    Shapes   u [B, T, C], kernel [C, L] -> [B, T, C]; taps past T are unused, missing taps are 0.
             bidirectional: kernel [C, 2, L] = (past taps 0 ... L-1, future taps 1 ... L); y adds sum_{s > t} kernel[c, 1, s - t
             - 1] u[b, s, c].
    Numerics fp32 (fp64 for fp64 inputs), out in u's dtype; transforms of length >= 2T, so nothing wraps round from the end to
    the start.
    Source   Poli et al. 2023, Hyena (arXiv 2302.10866).
    """
    want = 3 if bidirectional else 2
    if u.dim() != 3 or kernel.dim() != want or kernel.shape[0] != u.shape[2] or (bidirectional and kernel.shape[1] != 2):
        raise ShapeError(
            f"long_conv: u [B, T, C], kernel {'[C, 2, L]' if bidirectional else '[C, L]'} expected; got "
            f"{describe(u=u, kernel=kernel)}"
        )
    length = u.shape[1]
    if u.numel() == 0:
        return u
    dtype = wide_dtype(u.dtype)
    past = (kernel[:, 0] if bidirectional else kernel)[:, :length].to(dtype)
    size = _fft_size(2 * length)
    taps = F.pad(past, (0, size - past.shape[1]))
    if bidirectional:  # future tap s sits at index -s of the circular kernel
        future = kernel[:, 1, : length - 1].to(dtype)
        taps = taps + F.pad(future.flip(1), (size - future.shape[1], 0))
    spectrum = torch.fft.rfft(taps, n=size).transpose(0, 1)
    out = torch.fft.irfft(torch.fft.rfft(u.to(dtype), n=size, dim=1) * spectrum, n=size, dim=1)
    return out[:, :length].to(u.dtype)


def _fft_size(least: int) -> int:
    """Smallest 2^a 3^b >= least: fast to transform, at most a third larger."""
    best = 1 << (least - 1).bit_length()
    three = 3
    while three < best:
        size = three << max(0, (-(-least // three) - 1).bit_length())
        best, three = min(best, size), three * 3
    return best


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tail: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution with few taps: y[b, t, c] = bias[c] + sum_{i < W} weight[c, W - 1 - i] x[b, t - i, c].

    Shapes   x [B, T, C], weight [C, W]; tail [B, W - 1, C] = the inputs before x (None = zeros), so chunks continue exactly.
    """
    width = weight.shape[1]
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise ShapeError(f"short_conv: x [B, T, C], weight [C, W] expected; got {describe(x=x, weight=weight, bias=bias)}")
    if tail is None:
        tail = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    elif tuple(tail.shape) != (x.shape[0], width - 1, x.shape[2]):
        raise ShapeError(f"short_conv: tail must be [B, W - 1, C]; got {describe(x=x, weight=weight, tail=tail)}")
    padded = torch.cat([tail.to(x.dtype), x], 1)
    length = x.shape[1]
    out = padded[:, :length] * weight[:, 0]
    for i in range(1, width):
        out = torch.addcmul(out, padded[:, i : i + length], weight[:, i])
    return out if bias is None else out + bias
