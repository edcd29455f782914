"""Gated linear attention: a state that forgets, by a constant (RetNet) or by what the tokens say (GLA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attlas.errors import OptionError
from attlas.nn.attention import check_heads
from attlas.nn.recurrent import GatedNorm, RecurrentMixer, Rows, States, scan_flops
from attlas.positions.rotation import rotate


class Retention(RecurrentMixer):
    """S_t = gamma_h S_{t-1} + k_t v_t^T,  y_t = o( norm_h(S_t^T q_t) * silu(g(x_t)) ),  gamma_h = 1 - 2^(-5-h)

    q and k are rotated by angles 10000^(-i / (K/2 - 1)), i = 0 ... K/2 - 1 (both ends included), in neighbouring pairs; k is
    scaled by
    K^-1/2; norm_h is an RMS norm over each head without weights.

    expand_v   width of all value heads over dim (the paper's 2)
    State: H x K x V in fp32. Cost O(T K V) per head.   Source: Sun et al. 2023, arXiv 2307.08621.
    """

    name = "retnet"
    uses_positions = True

    def __init__(self, dim: int, num_heads: int, *, expand_v: float = 2.0, eps: float = 1e-6) -> None:
        super().__init__(dim)
        call = f"Retention(dim={dim}, num_heads={num_heads}, expand_v={expand_v})"
        _, self.head_dim = check_heads(call, dim, num_heads, None, None)
        self.num_heads, value = num_heads, round(dim * expand_v)
        if value < num_heads or value % num_heads or self.head_dim % 2:
            raise OptionError(f"{call}: expand_v * dim must be a multiple of num_heads, and dim / num_heads even")
        self.head_dim_v = value // num_heads
        self.q_proj, self.k_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.v_proj, self.g_proj = nn.Linear(dim, value, bias=False), nn.Linear(dim, value, bias=False)
        self.o_proj = nn.Linear(value, dim, bias=False)
        self.norm = GatedNorm(self.head_dim_v, eps, affine=False)

    def log_decay(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """ln gamma [H]."""
        heads = torch.arange(self.num_heads, dtype=torch.float64, device=device)
        return torch.log1p(-torch.exp2(-5 - heads)).to(dtype)

    def angles(self, positions: Tensor) -> Tensor:
        """[..., T] -> fp64 [..., T, 1, K / 2]."""
        steps = torch.linspace(0, 1, self.head_dim // 2, dtype=torch.float64, device=positions.device)
        return (positions[..., None].double() * 10000.0**-steps)[..., None, :]

    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return (("state", (self.num_heads, self.head_dim, self.head_dim_v)),)

    def run(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        angles = self.angles(positions)
        cos, sin = (turn.to(states[0].dtype) for turn in (angles.cos(), angles.sin()))
        q, k = (rotate(p(x).unflatten(-1, (self.num_heads, -1)), cos, sin, interleaved=True) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (self.num_heads, -1))
        decay = self.log_decay(x.device, states[0].dtype).expand(*q.shape[:3])
        out, state = self.recur(q, rows.mask(k), rows.mask(v), states[0], log_decay=rows.mask(decay))
        y = self.norm(out).flatten(-2) * F.silu(self.g_proj(x))
        return self.o_proj(y), (state,)

    def flops(self, seq_len: int) -> int:
        value = self.num_heads * self.head_dim_v
        return seq_len * self.dim * (4 * self.dim + 6 * value) + scan_flops(
            seq_len, self.num_heads, self.head_dim, self.head_dim_v
        )

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, head_dim_v={self.head_dim_v}"


class GatedLinearAttention(RecurrentMixer):
    """S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T,  y_t = o( norm_h(S_t^T q_t) * silu(g(x_t)) ),
    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1 / gate_normaliser), per channel of k.

    expand_k, expand_v   width of all key and value heads over dim (paper: 0.5 and 1)
    gate_rank            inner width of the gate's two matrices
    gate_normaliser      tau: larger forgets more slowly
    State: H x K x V in fp32. Cost O(T K V) per head.   Source: Yang et al. 2023, arXiv 2312.06635.
    """

    name = "gla"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_normaliser: float = 16.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(dim)
        key, value = round(dim * expand_k), round(dim * expand_v)
        call = (
            f"GatedLinearAttention(dim={dim}, num_heads={num_heads}, expand_k={expand_k}, expand_v={expand_v}, "
            f"gate_rank={gate_rank})"
        )
        if (
            num_heads < 1
            or min(key, value) < num_heads
            or key % num_heads
            or value % num_heads
            or gate_rank < 1
            or gate_normaliser <= 0
        ):
            raise OptionError(
                f"{call}: expand_k * dim and expand_v * dim must be multiples of num_heads, gate_rank and normaliser positive"
            )
        self.num_heads, self.head_dim, self.head_dim_v = num_heads, key // num_heads, value // num_heads
        self.gate_normaliser = gate_normaliser
        self.q_proj, self.k_proj = nn.Linear(dim, key, bias=False), nn.Linear(dim, key, bias=False)
        self.v_proj, self.g_proj = nn.Linear(dim, value, bias=False), nn.Linear(dim, value, bias=False)
        self.gate_down, self.gate_up = nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, key)
        self.o_proj = nn.Linear(value, dim, bias=False)
        self.norm = GatedNorm(self.head_dim_v, eps)

    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return (("state", (self.num_heads, self.head_dim, self.head_dim_v)),)

    def run(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        q, k, v, z = (p(x).unflatten(-1, (self.num_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj, self.g_proj))
        gate = self.gate_up(self.gate_down(x)).unflatten(-1, (self.num_heads, -1)).to(states[0].dtype)
        log_decay = F.logsigmoid(gate) / self.gate_normaliser
        out, state = self.recur(q, rows.mask(k), rows.mask(v), states[0], log_decay=rows.mask(log_decay))
        return self.o_proj(self.norm(out, z).flatten(-2)), (state,)

    def flops(self, seq_len: int) -> int:
        key, value, rank = self.num_heads * self.head_dim, self.num_heads * self.head_dim_v, self.gate_down.out_features
        projections = 4 * self.dim * key + 6 * self.dim * value + 2 * rank * (self.dim + key)
        return seq_len * projections + scan_flops(seq_len, self.num_heads, self.head_dim, self.head_dim_v)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, head_dim_v={self.head_dim_v}"
