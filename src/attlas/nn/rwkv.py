"""The time mixing of RWKV 4, 6 and 7, and the channel mixing of RWKV-4: its feed-forward half, which looks one token back."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attlas.errors import OptionError, UnsupportedError
from attlas.kernels.blocked.wkv import wkv
from attlas.nn.attention import check_heads
from attlas.nn.recurrent import RecurrentMixer, Rows, States, scan_flops


def shift(x: Tensor, tail: Tensor) -> Tensor:
    """x [N, T, C] one token later; tail [N, 1, C] is the token before the first."""
    return torch.cat([tail.to(x.dtype), x[:, :-1]], 1)


class Rwkv4(RecurrentMixer):
    """y_t = o( sigmoid(r_t) * wkv_t ),
    wkv_t = sum_{s <= t} e^{w_ts} v_s / sum_{s <= t} e^{w_ts},  w_ts = -(t - 1 - s) e^{decay} + k_s (s < t),  w_tt = bonus + k_t

    per channel; r, k, v are projections of x_t mixed with x_{t-1}: m x_t + (1 - m) x_{t-1}.

    State: 4 dim numbers in fp32. Cost O(T dim).   Source: Peng et al. 2023, arXiv 2305.13048.
    """

    name = "rwkv4"

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        if dim < 1:
            raise OptionError(f"Rwkv4(dim={dim}): dim must be at least 1")
        self.mix_r, self.mix_k, self.mix_v = (nn.Parameter(torch.linspace(0, 1, dim)) for _ in range(3))
        self.decay = nn.Parameter(torch.linspace(-5, 3, dim))
        self.bonus = nn.Parameter(torch.full((dim,), math.log(0.3)))
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return (("shift", (1, self.dim)), ("average", (self.dim,)), ("log_mass", (self.dim,)), ("seen", (1,)))

    def run(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        if self.impl not in ("auto", "reference"):
            raise UnsupportedError(f"{self}: runs as impl 'auto' or 'reference'; got {self.impl!r}")
        tail, average, log_mass, seen = states
        before = shift(x, tail)
        r, k, v = (
            proj(before + (x - before) * mix)
            for proj, mix in ((self.r_proj, self.mix_r), (self.k_proj, self.mix_k), (self.v_proj, self.mix_v))
        )
        wide = average.dtype
        args = (
            -self.decay.to(wide).exp(),
            self.bonus.to(wide),
            average,
            log_mass.masked_fill(seen == 0, float("-inf")),
            rows.valid,
        )
        run = wkv_recurrent if self.impl == "reference" else wkv
        y, average, log_mass = run(k.to(wide), v.to(wide), *args)
        count = (
            torch.full_like(seen, x.shape[1]) if rows.lengths is None else torch.tensor(rows.lengths, device=x.device)[:, None]
        )
        seen = ((seen + count) > 0).to(wide)
        out = self.o_proj(torch.sigmoid(r) * y.to(x.dtype))
        return out, (rows.last(x, tail), average, log_mass.masked_fill(seen == 0, 0), seen)

    def flops(self, seq_len: int) -> int:
        return seq_len * 8 * self.dim**2

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def wkv_recurrent(
    k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, average: Tensor, log_mass: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `kernels.blocked.wkv`, token by token."""
    outs = []
    for t in range(k.shape[1]):
        both = torch.stack([log_mass, bonus + k[:, t]])
        share = both.softmax(0)
        outs.append(share[0] * average + share[1] * v[:, t])
        new = torch.stack([log_mass + log_decay, k[:, t]])
        share = new.softmax(0)
        average_new, mass_new = share[0] * average + share[1] * v[:, t], new.logsumexp(0)
        keep = None if valid is None else valid[:, t, None]
        average = average_new if keep is None else torch.where(keep, average_new, average)
        log_mass = mass_new if keep is None else torch.where(keep, mass_new, log_mass)
    return torch.stack(outs, 1), average, log_mass


class ChannelMix(RecurrentMixer):
    """y_t = sigmoid(W_r m_r(x)_t) * W_down relu(W_up m_k(x)_t)^2,   m(x)_t = m x_t + (1 - m) x_{t-1}

    The feed-forward half of an RWKV-4 layer; no mechanism of its own. State: the last token, in fp32.
    Cost 2 T dim (dim + 2 hidden) flops.   Source: Peng et al. 2023, arXiv 2305.13048.
    """

    name = "channel-mix"

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(dim)
        self.hidden = hidden
        self.mix_k, self.mix_r = (nn.Parameter(torch.linspace(0, 1, dim)) for _ in range(2))
        self.up, self.down = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.r_proj = nn.Linear(dim, dim, bias=False)

    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return (("shift", (1, self.dim)),)

    def run(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        before = shift(x, states[0])
        k, r = (before + (x - before) * mix for mix in (self.mix_k, self.mix_r))
        return self.r_proj(r).sigmoid() * self.down(F.relu(self.up(k)).square()), (rows.last(x, states[0]),)

    def flops(self, seq_len: int) -> int:
        return 2 * seq_len * self.dim * (self.dim + 2 * self.hidden)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, hidden={self.hidden}"


class _MatrixRwkv(RecurrentMixer):
    """What RWKV 6 and 7 share: heads with matrix states, token shift, a group norm over each head."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim)
        _, self.head_dim = check_heads(f"{type(self).__name__}(dim={dim}, num_heads={num_heads})", dim, num_heads, None, None)
        self.num_heads = num_heads
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm = nn.GroupNorm(num_heads, dim, eps=64e-5)

    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return (("state", (self.num_heads, self.head_dim, self.head_dim)), ("shift", (1, self.dim)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _normed(self, out: Tensor) -> Tensor:
        return self.norm(out.reshape(-1, self.dim)).view(*out.shape[:2], self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"


class Rwkv6(_MatrixRwkv):
    """S_t = Diag(w_t) S_{t-1} + k_t v_t^T,   y_t = o( norm_h((S_{t-1} + Diag(u) k_t v_t^T)^T r_t) * silu(g_t) ),   w_t =
    exp(-exp(d_t))

    r, k, v, g and the decay d_t are read from x_t + (x_{t-1} - x_t) * m_t, where each m_t depends on the token (low rank
    mix_rank);
    d_t = decay + tanh(x A) B with rank decay_rank.
    State: H x K x K in fp32 and one token. Cost O(T K^2) per head.   Source: Peng et al. 2024, arXiv 2404.05892.
    """

    name = "rwkv6"

    def __init__(self, dim: int, num_heads: int, *, mix_rank: int = 32, decay_rank: int = 64) -> None:
        super().__init__(dim, num_heads)
        if min(mix_rank, decay_rank) < 1:
            raise OptionError(f"Rwkv6(dim={dim}, mix_rank={mix_rank}, decay_rank={decay_rank}): ranks must be at least 1")
        self.mix_base = nn.Parameter(torch.linspace(1, 0, dim))
        self.mixes = nn.Parameter(torch.linspace(1, 0, dim).repeat(5, 1))
        self.mix_down = nn.Parameter(torch.empty(dim, 5 * mix_rank).uniform_(-1e-4, 1e-4))
        self.mix_up = nn.Parameter(torch.empty(5, mix_rank, dim).uniform_(-1e-4, 1e-4))
        self.decay = nn.Parameter(torch.linspace(-6, -1, dim))
        self.decay_down = nn.Parameter(torch.empty(dim, decay_rank).uniform_(-1e-4, 1e-4))
        self.decay_up = nn.Parameter(torch.empty(decay_rank, dim).uniform_(-1e-4, 1e-4))
        self.bonus = nn.Parameter(torch.linspace(1, 0, dim).view(num_heads, -1))
        self.g_proj = nn.Linear(dim, dim, bias=False)

    def run(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        back = shift(x, states[1]) - x
        low = torch.tanh((x + back * self.mix_base) @ self.mix_down).unflatten(-1, (5, -1))
        mixes = self.mixes + torch.einsum("ntir,ird->ntid", low, self.mix_up)
        xw, xk, xv, xr, xg = (x[:, :, None] + back[:, :, None] * mixes).unbind(2)
        wide = states[0].dtype
        decay = (self.decay + torch.tanh(xw @ self.decay_down) @ self.decay_up).to(wide)
        out, state = self.recur(
            self._heads(self.r_proj(xr)),
            rows.mask(self._heads(self.k_proj(xk))),
            self._heads(self.v_proj(xv)),
            states[0],
            log_decay=rows.mask(self._heads(-decay.exp())),
            bonus=self.bonus,
            scale=1.0,
        )
        return self.o_proj(self._normed(out) * F.silu(self.g_proj(xg))), (state, rows.last(x, states[1]))

    def flops(self, seq_len: int) -> int:
        low = 2 * (2 * self.mix_down.numel() + 2 * self.decay_down.numel())
        return seq_len * (10 * self.dim**2 + low) + scan_flops(seq_len, self.num_heads, self.head_dim, self.head_dim)


class Rwkv7(_MatrixRwkv):
    """S_t = Diag(w_t) S_{t-1} - (kk_t * a_t) (kk_t^T S_{t-1}) + k_t v_t^T,   y_t = o( (norm_h(S_t^T r_t) + (r_t . k_t r_k) v_t)
    * g_t )

    kk = k * k_k brought to length 1 per head; w = exp(-e^-1/2 sigmoid(.)); a = sigmoid(.), the rate at which kk is erased from
    the
    undecayed state; k <- k (1 + (a - 1) k_a). Decay, a and g are low rank functions of their shifted inputs.
    State: H x K x K in fp32 and one token. Cost O(T (C + K) K) per head in chunks of C.   Source: Peng et al. 2025, arXiv
    2503.14456.
    """

    name = "rwkv7"

    def __init__(self, dim: int, num_heads: int, *, decay_rank: int = 64, rate_rank: int = 64, gate_rank: int = 128) -> None:
        super().__init__(dim, num_heads)
        if min(decay_rank, rate_rank, gate_rank) < 1:
            raise OptionError(
                f"Rwkv7(dim={dim}, decay_rank={decay_rank}, rate_rank={rate_rank}, gate_rank={gate_rank}): ranks from 1"
            )
        self.mixes = nn.Parameter(torch.linspace(1, 0, dim).repeat(6, 1))
        self.decay = nn.Parameter(torch.linspace(-6, -1, dim))
        self.rate = nn.Parameter(torch.zeros(dim))
        self.decay_down, self.decay_up = _low_rank(dim, decay_rank)
        self.rate_down, self.rate_up = _low_rank(dim, rate_rank)
        self.gate_down, self.gate_up = _low_rank(dim, gate_rank)
        self.k_k, self.k_a = nn.Parameter(torch.full((dim,), 0.85)), nn.Parameter(torch.ones(dim))
        self.r_k = nn.Parameter(torch.zeros(num_heads, self.head_dim))

    def run(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        back = shift(x, states[1]) - x
        xr, xw, xk, xv, xa, xg = (x[:, :, None] + back[:, :, None] * self.mixes).unbind(2)
        wide = states[0].dtype
        log_decay = -math.exp(-0.5) * torch.sigmoid((self.decay + torch.tanh(xw @ self.decay_down) @ self.decay_up).to(wide))
        rate = torch.sigmoid(self.rate + xa @ self.rate_down @ self.rate_up)
        k = self.k_proj(xk)
        erased = rows.mask(F.normalize(self._heads(k * self.k_k), dim=-1, eps=1e-12))
        k = rows.mask((k * (1 + (rate - 1) * self.k_a)).to(k.dtype))
        r, k, v = self._heads(self.r_proj(xr)), self._heads(k), self._heads(self.v_proj(xv))
        out, state = self.recur(
            r,
            k,
            v,
            states[0],
            log_decay=rows.mask(self._heads(log_decay)),
            delta=(-erased, erased * self._heads(rate)),
            scale=1.0,
        )
        y = self._normed(out) + ((r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(-2)
        gate = torch.sigmoid(xg @ self.gate_down) @ self.gate_up
        return self.o_proj(y * gate), (state, rows.last(x, states[1]))

    def flops(self, seq_len: int) -> int:
        low = 4 * (self.decay_down.numel() + self.rate_down.numel() + self.gate_down.numel())
        return seq_len * (8 * self.dim**2 + low) + scan_flops(seq_len, self.num_heads, self.head_dim, self.head_dim) * 3 // 2


def _low_rank(dim: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """[dim, rank] zeros and [rank, dim] orthogonal: the function starts at its constant."""
    return nn.Parameter(torch.zeros(dim, rank)), nn.Parameter(nn.init.orthogonal_(torch.empty(rank, dim), gain=0.1))
