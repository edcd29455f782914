"""Convolution and attention in one block: short filters see the neighbours, softmax the rest."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attlas.cache.layer import Cache
from attlas.cache.part import PartSpec
from attlas.cache.state import StatePart
from attlas.errors import OptionError
from attlas.masks.expr import Mask
from attlas.masks.leaves import Causal
from attlas.nn.attention import Attention
from attlas.nn.mixer import Mixer
from attlas.nn.recurrent import Rows
from attlas.numerics import wide_dtype
from attlas.ops.long_conv import short_conv
from attlas.ops.scan import pad_packed, unpad_packed
from attlas.positions.rope import Rope
from attlas.reference.convolution import depthwise
from attlas.shapes import SeqInfo

CONVS = ("separable", "gated")
ORDERS = ("parallel", "conv-first", "attention-first")


class ConvModule(nn.Module):
    """Depthwise convolution between two per-token maps: down(act(w * gate(up(x)))), with `width` channels.

    separable  gate = s relu(.)^2 + b with learned scalars, no act (ConvFormer);
    gated      gate = GLU (up makes twice the channels), act = silu of a layer norm (Conformer)
    `ahead` of the `kernel` taps lie on later tokens; 0 = causal.
    """

    def __init__(self, dim: int, width: int, kernel: int, ahead: int, kind: str) -> None:
        super().__init__()
        self.ahead, self.gated = ahead, kind == "gated"
        self.up = nn.Linear(dim, 2 * width if self.gated else width, bias=False)
        self.weight = nn.Parameter(torch.empty(width, kernel).uniform_(-(kernel**-0.5), kernel**-0.5))
        self.down = nn.Linear(width, dim, bias=False)
        self.norm = nn.LayerNorm(width) if self.gated else None
        if not self.gated:
            self.act_scale, self.act_bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, tail: Tensor, rows: Rows, *, literal: bool) -> tuple[Tensor, Tensor]:
        """x [N, T, dim], tail [N, kernel - 1 - ahead, width] (what the filter saw before x) -> (y, next tail)."""
        inner = rows.mask(F.glu(self.up(x), -1) if self.gated else self._star_relu(self.up(x)))
        mixed = self._convolve(inner, tail.to(inner.dtype), literal)
        if self.norm is not None:
            mixed = F.silu(self.norm(mixed))
        return self.down(mixed), rows.last(inner, tail)

    def _star_relu(self, x: Tensor) -> Tensor:
        return self.act_scale * F.relu(x).square() + self.act_bias

    def _convolve(self, inner: Tensor, tail: Tensor, literal: bool) -> Tensor:
        """With taps ahead, zeros stand after the last token; a tail takes the place of earlier ones."""
        if literal:
            return depthwise(torch.cat([tail, inner], 1), self.weight, self.ahead)[:, tail.shape[1] :]
        if not self.ahead:
            return short_conv(inner, self.weight, tail=tail)
        later = torch.cat([inner[:, self.ahead :], inner.new_zeros(inner.shape[0], self.ahead, inner.shape[2])], 1)
        first = torch.cat([tail, inner[:, : self.ahead]], 1)
        if first.shape[1] < self.weight.shape[1] - 1:  # fewer tokens than taps ahead
            later, first = self._short_rows(inner, tail)
        return short_conv(later, self.weight, tail=first)

    def _short_rows(self, inner: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        whole = F.pad(torch.cat([tail, inner], 1), (0, 0, 0, self.ahead))
        split = self.weight.shape[1] - 1
        return whole[:, split:], whole[:, :split]

    def flops(self, seq_len: int) -> int:
        """Of the two maps; the taps, 2 kernel width per token, are left out like those of every short convolution."""
        return 2 * seq_len * (self.up.weight.numel() + self.down.weight.numel())


class ConvHybrid(Mixer):
    """Softmax attention a(.) and a convolution c(.), joined by `order`:

        parallel         y = a(x) + c(x)
        conv-first       y = c(x) + a(x + c(x))         local features first, as ConvFormer's stages before CAFormer's
        attention-first  y = a(x) + c(x + a(x))         as a Conformer block

    dim, num_heads  of the attention; num_kv_heads, head_dim, rope as in `attlas.nn.attention.Attention`
    kernel          taps of the filter; odd, unless causal
    expansion       channels of the filter over dim
    conv            "separable": ConvFormer's module, down(w * (s relu(up x)^2 + b));
                    "gated": Conformer's, down(silu(norm(w * glu(up x)))), with a layer norm where the paper has a batch norm
    causal          False: attention to every key, filters centred on their token (no cache)
    Cost: attention's, and O(T dim^2 expansion) for the module. Cache: keys and values, and kernel - 1 tokens of the filter's
    input. Sources: Yu et al. 2022, arXiv 2210.13452; Gulati et al. 2020, arXiv 2005.08100.
    """

    name = "conv-hybrid"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel: int = 7,
        expansion: float = 2.0,
        conv: Literal["separable", "gated"] = "separable",
        order: Literal["parallel", "conv-first", "attention-first"] = "parallel",
        causal: bool = True,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool | float | Rope = True,
    ) -> None:
        super().__init__(dim)
        call = f"ConvHybrid(dim={dim}, kernel={kernel}, expansion={expansion}, conv={conv!r}, order={order!r}, causal={causal})"
        if conv not in CONVS or order not in ORDERS:
            raise OptionError(f"{call}: conv is one of {', '.join(CONVS)}; order one of {', '.join(ORDERS)}")
        width = round(dim * expansion)
        if kernel < 1 or width < 1 or not (causal or kernel % 2):
            raise OptionError(f"{call}: kernel must be at least 1 and, unless causal, odd; dim * expansion at least 1")
        self.causal, self.order, self.kind, self.kernel = causal, order, conv, kernel
        self.attention = Attention(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            mask=Causal() if causal else None,
            rope=rope,
        )
        self.uses_positions = self.attention.uses_positions
        self.conv = ConvModule(dim, width, kernel, 0 if causal else kernel // 2, conv)

    def cache_specs(self) -> tuple[PartSpec, ...]:
        if not self.causal:
            return super().cache_specs()
        wide = wide_dtype(self.conv.weight.dtype)
        return (*self.attention.cache_specs(), PartSpec("state", (("conv", self._tail_shape()),), dtype=wide))

    def _tail_shape(self) -> tuple[int, int]:
        return self.kernel - 1 - self.conv.ahead, self.conv.weight.shape[0]

    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        kv = None if cache is None else Cache(cache.parts[:1])

        def attend(x: Tensor) -> Tensor:
            return self.attention.mix(x, memory=memory, positions=positions, seq=seq, cache=kv)

        def convolve(x: Tensor) -> Tensor:
            return self._convolve(x, seq, cache)

        first, second = (convolve, attend) if self.order == "conv-first" else (attend, convolve)
        y = first(x)
        return y + second(x if self.order == "parallel" else x + y)

    def _convolve(self, x: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        literal = self.impl == "reference"
        if x.numel() == 0:
            return x
        if seq is None:
            empty = x.new_zeros(x.shape[0], *self._tail_shape())
            return self.conv(x, empty, Rows(None, x.shape[1], x.device), literal=literal)[0]
        padded = pad_packed(x, seq.lengths)
        rows = Rows(seq.lengths, padded.shape[1], x.device)
        part = None if cache is None else cache.parts[1]
        assert part is None or isinstance(part, StatePart), part
        tail = padded.new_zeros(padded.shape[0], *self._tail_shape()) if part is None else part.states(seq.rows)[0]
        y, tail = self.conv(padded, tail, rows, literal=literal)
        if part is not None:
            part.put((tail,), seq)
        return unpad_packed(y, seq.lengths)

    def describe_mask(self) -> Mask | None:
        return self.attention.mask

    def flops(self, seq_len: int) -> int:
        return self.attention.flops(seq_len) + self.conv.flops(seq_len)

    def extra_repr(self) -> str:
        heads = f"dim={self.dim}, num_heads={self.attention.num_heads}, kernel={self.kernel}, conv={self.kind!r}"
        return f"{heads}, order={self.order!r}, causal={self.causal}"
