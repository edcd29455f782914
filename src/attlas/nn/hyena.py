"""Hyena: gated long convolutions whose filters are functions of time."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from attlas.cache.layer import Cache
from attlas.cache.part import PartSpec
from attlas.cache.state import StatePart
from attlas.errors import OptionError, UnsupportedError
from attlas.nn.derived import register_derived
from attlas.nn.mixer import Mixer
from attlas.nn.recurrent import Rows, ShortConv
from attlas.numerics import wide_dtype
from attlas.ops.long_conv import long_conv
from attlas.ops.scan import pad_packed, unpad_packed
from attlas.shapes import SeqInfo


class ImplicitFilter(nn.Module):
    """h_c(t) = network(features of t)_c * exp(-|delta_c| t / max_len) for t = 0 ... max_len - 1: taps that cost no parameter per
    tap.

    The features of t are t / max_len and `bands` cosines and sines; the network has sine activations of one learned frequency."""

    features: Tensor
    rates: Tensor

    def __init__(self, channels: int, max_len: int, width: int, bands: int) -> None:
        super().__init__()
        self.max_len = max_len
        register_derived(self, "features", partial(_features, max_len, bands))
        register_derived(self, "rates", partial(_rates, channels))
        self.layers = nn.ModuleList([nn.Linear(1 + 2 * bands, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.last = nn.Linear(width, channels, bias=False)
        self.frequency = nn.Parameter(torch.ones(width))

    def forward(self, length: int) -> Tensor:
        """The first `length` taps, [channels, length]; they do not depend on `length`."""
        x = self.features[:length]
        window = torch.exp(-x[:, :1] * self.rates)
        for layer in self.layers:
            x = torch.sin(self.frequency * layer(x))
        return (self.last(x) * window).T


def _features(max_len: int, bands: int) -> Tensor:
    """[max_len, 1 + 2 bands]"""
    time = torch.linspace(0, 1, max_len)[:, None]
    turns = torch.linspace(1e-4, max(bands - 1, 1e-4), bands)
    angle = 2 * math.pi * torch.arange(max_len)[:, None] / max_len * turns
    return torch.cat([time, angle.cos(), -angle.sin()], 1)


def _rates(channels: int) -> Tensor:
    """Decay to 1 % after 0.3 ... 1.5 of max_len, [channels]."""
    fast, slow = math.log(1e-2) / 0.3, math.log(1e-2) / 1.5
    return torch.linspace(slow, fast, channels).abs()


class Hyena(Mixer):
    """x_0, ..., x_{N-1}, v = shortconv(W x);  v <- h_i * (v x_i) + D_i v x_i  for i = N-1 ... 1;  y = o(v x_0)     (* =
    convolution)

    order          N >= 2: N - 1 long convolutions, N gates
    max_len        longest sequence: the filters are made for it;  filter_width  of their network;  filter_bands  of their
                   features
    Cost O(N T log T dim). Decoding keeps the inputs of every long convolution, (N - 1) dim numbers per token, and takes O(T) per
    token:
    there is no state of fixed size.   Source: Poli et al. 2023, arXiv 2302.10866.
    """

    name = "hyena"
    causal = True
    uses_positions = False

    def __init__(
        self,
        dim: int,
        *,
        order: int = 2,
        max_len: int = 8192,
        filter_width: int = 64,
        filter_bands: int = 1,
        conv_width: int = 3,
    ) -> None:
        super().__init__(dim)
        call = f"Hyena(dim={dim}, order={order}, max_len={max_len}, filter_width={filter_width})"
        if order < 2 or min(max_len, filter_width, filter_bands, conv_width, dim) < 1:
            raise OptionError(f"{call}: order must be at least 2, the others at least 1")
        self.order, self.max_len = order, max_len
        self.in_proj = nn.Linear(dim, (order + 1) * dim)
        self.conv = ShortConv((order + 1) * dim, conv_width, bias=True)
        self.filter = ImplicitFilter((order - 1) * dim, max_len, filter_width, filter_bands)
        self.skip = nn.Parameter(torch.randn(order - 1, dim))
        self.o_proj = nn.Linear(dim, dim)

    def cache_specs(self) -> tuple[PartSpec, ...]:
        channels, width = self.conv.weight.shape
        wide = wide_dtype(self.o_proj.weight.dtype)
        tokens = PartSpec("tokens", (("inputs", ((self.order - 1) * self.dim,)),))
        return (PartSpec("state", (("conv", (width - 1, channels)),), dtype=wide), tokens)

    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        if self.impl not in ("auto", "reference"):
            raise UnsupportedError(f"{self}: runs as impl 'auto' or 'reference'; got {self.impl!r}")
        if x.numel() == 0:
            return x
        if seq is None:
            return self._rows(x, self._no_tail(x), Rows(None, x.shape[1], x.device), None)[0]
        padded = pad_packed(x, seq.lengths)
        rows = Rows(seq.lengths, padded.shape[1], x.device)
        if cache is None:
            return unpad_packed(self._rows(padded, self._no_tail(padded), rows, None)[0], seq.lengths)
        state, tokens = cache.parts
        assert isinstance(state, StatePart), state
        past = [tokens.read(r).tensors[0] for r in seq.rows]
        y, tail, inputs = self._rows(padded, state.states(seq.rows)[0], rows, past)
        state.put((tail,), seq)
        tokens.write((unpad_packed(inputs, seq.lengths),), seq)
        return unpad_packed(y, seq.lengths)

    def _no_tail(self, x: Tensor) -> Tensor:
        channels, width = self.conv.weight.shape
        return x.new_zeros(x.shape[0], width - 1, channels)

    def _rows(self, x: Tensor, tail: Tensor, rows: Rows, past: list[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, T, dim] -> (y, next tail, inputs of the long convolutions [N, T, (order - 1) dim])."""
        longest = x.shape[1] + max((len(p) for p in past), default=0) if past is not None else x.shape[1]
        if longest > self.filter.max_len:
            raise UnsupportedError(
                f"{self}: a sequence of {longest} tokens is longer than max_len {self.filter.max_len}, which the filters cover"
            )
        projected, tail = self.conv(self.in_proj(x), tail, rows)
        *gates, v = projected.split(self.dim, -1)
        taps = self.filter(longest).split(self.dim)
        inputs = []
        for i in range(self.order - 2, -1, -1):
            u = v * gates[i + 1]
            before = None if past is None else [p[:, i * self.dim : (i + 1) * self.dim] for p in past]
            inputs.append(u)
            v = self._convolve(u, taps[i], before) + self.skip[i] * u
        return self.o_proj(v * gates[0]), tail, torch.cat(inputs[::-1], -1)

    def _convolve(self, u: Tensor, taps: Tensor, past: list[Tensor] | None) -> Tensor:
        conv = direct_conv if self.impl == "reference" else long_conv
        if past is None or not any(len(p) for p in past):
            return conv(u, taps)
        rows = []
        for new, before in zip(u, past, strict=True):
            both = torch.cat([before.to(new.dtype), new])[None]
            few = new.shape[0] <= 8
            rows.append(last_outputs(both, taps, new.shape[0]) if few else conv(both, taps)[:, len(before) :])
        return torch.cat(rows)

    def flops(self, seq_len: int) -> int:
        transform = 2.5 * 2 * seq_len * math.log2(max(2 * seq_len, 2))  # a real one of length 2T, by the usual count
        convolution = min(int(3 * transform + 6 * seq_len), seq_len**2)
        filters = seq_len * 2 * sum(p.numel() for p in self.filter.parameters() if p.dim() == 2)
        return seq_len * 2 * self.dim**2 * (self.order + 2) + filters + (self.order - 1) * self.dim * convolution

    def extra_repr(self) -> str:
        return f"dim={self.dim}, order={self.order}, max_len={self.max_len}"


def direct_conv(u: Tensor, taps: Tensor) -> Tensor:
    """The causal convolution of `ops.long_conv` as its sum reads, O(T^2)."""
    return last_outputs(u, taps, u.shape[1])


def last_outputs(u: Tensor, taps: Tensor, count: int) -> Tensor:
    """The last `count` outputs of the causal convolution of u [N, T, C] with taps [C, >= T], by the sum itself."""
    length = u.shape[1]
    outs = [torch.einsum("ntc,ct->nc", u[:, : t + 1], taps[:, : t + 1].flip(1)) for t in range(length - count, length)]
    return torch.stack(outs, 1)
