"""The delta rule: what a key held before is erased when something new is written under it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attlas.errors import OptionError
from attlas.nn.attention import check_heads
from attlas.nn.recurrent import GatedNorm, RecurrentMixer, Rows, ShortConv, States, l2_normalise, scan_flops


class DeltaNet(RecurrentMixer):
    """S_t = S_{t-1} - beta_t k_t (k_t^T S_{t-1}) + beta_t k_t v_t^T,   y_t = o( norm_h(S_t^T q_t / sqrt(K)) )

    q, k, v pass a short causal convolution and silu; q and k are brought to length 1; beta = sigmoid(W x) per head.

    conv_width    taps of the short convolution
    negative      beta in (0, 2): the transition may have eigenvalues down to -1
    State: H x K x V in fp32, and conv_width - 1 tokens of q, k, v. Cost O(T (C + K) V) per head in chunks of C.
    Source: Schlag et al. 2021 (arXiv 2102.11174); Yang et al. 2024 (2406.06484).
    """

    name = "deltanet"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        conv_width: int = 4,
        negative: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(dim)
        call = f"DeltaNet(dim={dim}, num_heads={num_heads}, head_dim={head_dim}, conv_width={conv_width})"
        _, self.head_dim = check_heads(call, dim, num_heads, None, head_dim)
        if conv_width < 1:
            raise OptionError(f"{call}: conv_width must be at least 1")
        self.num_heads, self.negative = num_heads, negative
        inner = num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.beta_proj = nn.Linear(dim, num_heads, bias=False)
        self.conv = ShortConv(3 * inner, conv_width)
        self.norm = GatedNorm(self.head_dim, eps)
        self.o_proj = nn.Linear(inner, dim, bias=False)

    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        channels, width = self.conv.weight.shape
        return (("state", (self.num_heads, self.head_dim, self.head_dim)), ("conv", (width - 1, channels)))

    def run(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        qkv, tail = self.conv(torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1), states[1], rows)
        q, k, v = F.silu(qkv).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        beta = self.beta_proj(x).sigmoid() * (2 if self.negative else 1)
        out, state = self.recur(l2_normalise(q), rows.mask(l2_normalise(k)), rows.mask(v), states[0], delta=rows.mask(beta))
        return self.o_proj(self.norm(out).flatten(-2)), (state, tail)

    def flops(self, seq_len: int) -> int:
        inner = self.num_heads * self.head_dim
        projections = 8 * self.dim * inner + 2 * self.dim * self.num_heads
        return seq_len * projections + delta_flops(seq_len, self.num_heads, self.head_dim, self.head_dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, conv_width={self.conv.weight.shape[1]}"


class GatedDeltaNet(RecurrentMixer):
    """S_t = alpha_t (S_{t-1} - beta_t k_t (k_t^T S_{t-1})) + beta_t k_t v_t^T,   y_t = o( norm_h(S_t^T q_t / sqrt(K)) *
    silu(z_t) )

    alpha_t = exp(-exp(A) softplus(W_a x_t + dt_bias)) and beta_t = sigmoid(W_b x_t), per value head; q, k, v pass one short
    causal
    convolution and silu; q and k are brought to length 1. Value head h reads key head h // (num_heads / num_key_heads).

    num_heads       value heads (they carry the state);  num_key_heads  None = num_heads
    head_dim        of q and k, None = dim / num_heads;   head_dim_v  None = head_dim
    State: H x K x V in fp32, and conv_width - 1 tokens of q, k, v. Cost O(T (C + K) V) per head in chunks of C.
    Source: Yang et al. 2024, arXiv 2412.06464.
    """

    name = "gated-deltanet"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_key_heads: int | None = None,
        head_dim: int | None = None,
        head_dim_v: int | None = None,
        conv_width: int = 4,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim)
        call = (
            f"GatedDeltaNet(dim={dim}, num_heads={num_heads}, num_key_heads={num_key_heads}, "
            f"head_dim={head_dim}, conv_width={conv_width})"
        )
        self.num_key_heads, self.head_dim = check_heads(call, dim, num_heads, num_key_heads, head_dim)
        if conv_width < 1 or (head_dim_v is not None and head_dim_v < 1):
            raise OptionError(f"{call}: conv_width and head_dim_v must be at least 1")
        self.num_heads, self.head_dim_v = num_heads, head_dim_v or self.head_dim
        key, value = self.num_key_heads * self.head_dim, num_heads * self.head_dim_v
        self.qkv_proj, self.z_proj = nn.Linear(dim, 2 * key + value, bias=False), nn.Linear(dim, value, bias=False)
        self.beta_proj, self.decay_proj = nn.Linear(dim, num_heads, bias=False), nn.Linear(dim, num_heads, bias=False)
        self.conv = ShortConv(2 * key + value, conv_width)
        self.log_rate = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(torch.ones(num_heads))
        self.norm = GatedNorm(self.head_dim_v, eps)
        self.o_proj = nn.Linear(value, dim, bias=False)

    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        channels, width = self.conv.weight.shape
        return (("state", (self.num_heads, self.head_dim, self.head_dim_v)), ("conv", (width - 1, channels)))

    def run(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        qkv, tail = self.conv(self.qkv_proj(x), states[1], rows)
        key, value = self.num_key_heads * self.head_dim, self.num_heads * self.head_dim_v
        q, k, v = (part.unflatten(-1, (heads, -1)) for part, heads in zip(
            F.silu(qkv).split([key, key, value], -1), (self.num_key_heads, self.num_key_heads, self.num_heads), strict=True
        ))  # fmt: skip
        q, k = (l2_normalise(part).repeat_interleave(self.num_heads // self.num_key_heads, -2) for part in (q, k))
        wide = states[0].dtype
        log_decay = -self.log_rate.to(wide).exp() * F.softplus(self.decay_proj(x).to(wide) + self.dt_bias.to(wide))
        out, state = self.recur(
            q, rows.mask(k), rows.mask(v), states[0], log_decay=rows.mask(log_decay), delta=rows.mask(self.beta_proj(x).sigmoid())
        )
        z = self.z_proj(x).unflatten(-1, (self.num_heads, -1))
        return self.o_proj(self.norm(out, z).flatten(-2)), (state, tail)

    def flops(self, seq_len: int) -> int:
        value = self.num_heads * self.head_dim_v
        projections = 2 * self.dim * (self.conv.weight.shape[0] + 2 * value + 2 * self.num_heads)
        return seq_len * projections + delta_flops(seq_len, self.num_heads, self.head_dim, self.head_dim_v)

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, num_key_heads={self.num_key_heads}"
        return f"{shown}, head_dim={self.head_dim}, head_dim_v={self.head_dim_v}, conv_width={self.conv.weight.shape[1]}"


def delta_flops(seq_len: int, heads: int, dim_k: int, dim_v: int) -> int:
    """Useful flops of the delta recurrence: read under k, write k v^T, read q; one multiply-add each per state element and
    token."""
    return scan_flops(seq_len, heads, dim_k, dim_v) * 3 // 2
