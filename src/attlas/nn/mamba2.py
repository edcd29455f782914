"""Mamba-2: a state-space model whose state decays by one number per head, which is linear attention with a gate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attlas.errors import OptionError
from attlas.nn.recurrent import GatedNorm, RecurrentMixer, Rows, ShortConv, States, scan_flops


class Mamba2(RecurrentMixer):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T,   y_t = o( norm( (h_t^T C_t + skip x_t) * silu(z_t) ) )

    [z | x, B, C | dt] are one projection of the input; x, B, C pass a short causal convolution and silu; dt = softplus(dt +
    dt_bias) and
    A = -exp(log_rate), one per head. B (the key) and C (the query) are shared by the heads of a group.

    num_heads    heads of the expanded width;   expand  inner width over dim
    state_dim    N, width of B and C;           num_groups  of heads that share B and C (and of the output norm)
    conv_width   taps of the short convolution
    State: H x N x (expand * dim / H) in fp32, and conv_width - 1 tokens of x, B, C. Cost O(T (C + N) P) per head in chunks of C.
    Source: Dao and Gu 2024, arXiv 2405.21060.
    """

    name = "mamba2"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        expand: int = 2,
        state_dim: int = 128,
        num_groups: int = 1,
        conv_width: int = 4,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(dim)
        inner = expand * dim
        call = f"Mamba2(dim={dim}, num_heads={num_heads}, expand={expand}, state_dim={state_dim}, num_groups={num_groups})"
        if min(num_heads, state_dim, num_groups, expand, conv_width) < 1 or inner % num_heads or num_heads % num_groups:
            raise OptionError(
                f"{call}: expand * dim must be a multiple of num_heads, num_heads one of num_groups, and all at least 1"
            )
        self.num_heads, self.state_dim, self.num_groups, self.inner = num_heads, state_dim, num_groups, inner
        channels = inner + 2 * num_groups * state_dim
        self.in_proj = nn.Linear(dim, inner + channels + num_heads, bias=False)
        self.conv = ShortConv(channels, conv_width, bias=True)
        self.log_rate = nn.Parameter(torch.arange(1, num_heads + 1, dtype=torch.get_default_dtype()).log())
        step = torch.empty(num_heads).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus^-1(step)
        self.skip = nn.Parameter(torch.ones(num_heads))
        self.norm = GatedNorm(inner // num_groups, eps, affine=False, gate_first=True)
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.o_proj = nn.Linear(inner, dim, bias=False)

    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        channels, width = self.conv.weight.shape
        return (("state", (self.num_heads, self.state_dim, self.inner // self.num_heads)), ("conv", (width - 1, channels)))

    def run(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        z, xbc, dt = self.in_proj(x).split([self.inner, self.conv.weight.shape[0], self.num_heads], -1)
        xbc, tail = self.conv(xbc, states[1], rows)
        shared = self.num_groups * self.state_dim
        value, key, query = F.silu(xbc).split([self.inner, shared, shared], -1)
        value = value.unflatten(-1, (self.num_heads, -1))
        key, query = (
            part.unflatten(-1, (self.num_groups, -1)).repeat_interleave(self.num_heads // self.num_groups, -2)
            for part in (key, query)
        )
        wide = states[0].dtype
        step = rows.mask(F.softplus(dt.to(wide) + self.dt_bias.to(wide)))
        out, state = self.recur(
            query.to(wide),
            key.to(wide),
            step[..., None] * value,
            states[0],
            log_decay=-self.log_rate.to(wide).exp() * step,
            scale=1.0,
        )
        y = (out + self.skip.to(wide)[:, None] * value).to(x.dtype).flatten(-2)
        groups = (self.num_groups, -1)
        y = self.norm(y.unflatten(-1, groups), z.unflatten(-1, groups)).flatten(-2) * self.norm_weight
        return self.o_proj(y), (state, tail)

    def flops(self, seq_len: int) -> int:
        projections = 2 * self.dim * (self.in_proj.out_features + self.inner)
        return seq_len * projections + scan_flops(seq_len, self.num_heads, self.state_dim, self.inner // self.num_heads)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, state_dim={self.state_dim}, inner={self.inner}, "
            f"num_groups={self.num_groups}"
        )
