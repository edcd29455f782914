"""The linear recurrence, twice, as its definition reads: step by step, and as one quadratic product. Any dtype, any device.

    S_t = Diag(exp(log_decay_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T           S in R^{K x V}
    o_t = scale * S_t^T q_t                                            or, with a bonus u (read before write),
    o_t = scale * (S_{t-1} + Diag(u) k_t v_t^T)^T q_t

`a, b` are the low-rank part of the transition; the delta rule is a_t = exp(log_decay_t) * k_t, b_t = -beta_t k_t with beta_t k_t
written.
Shapes: q k a b [B, T, H, K], v [B, T, H, V], log_decay [B, T, H, K] (natural log, per token), bonus [H, K], state [B, H, K, V].
"""

from __future__ import annotations

import torch
from torch import Tensor


def scan_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """One token after the other: O(T K V) time, the definition itself. Returns (out [B, T, H, V], final state)."""
    state = initial_state
    outs = []
    for t in range(q.shape[1]):
        write = k[:, t, :, :, None] @ v[:, t, :, None, :]
        new = log_decay[:, t].exp()[..., None] * state + write
        if a is not None and b is not None:
            new = new + b[:, t, :, :, None] @ (a[:, t, :, None, :] @ state)
        seen = new if bonus is None else state + bonus[None, :, :, None] * write
        outs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], seen))
        state = new
    out = torch.stack(outs, 1) if outs else v.new_zeros(v.shape)
    return out, state


def scan_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """All tokens against all tokens: O(T^2 K) memory, for short inputs. Returns (out [B, T, H, V], final state)."""
    q, k, v, log_decay = (x.transpose(1, 2) for x in (q, k, v, log_decay))  # [B, H, T, ...]
    total = log_decay.cumsum(2)
    before = total - log_decay  # decay of everything up to, not including, token t
    steps = torch.arange(q.shape[2], device=q.device)
    earlier = steps[:, None] > steps[None, :]
    upto = earlier if bonus is not None else steps[:, None] >= steps[None, :]

    def pairs(x: Tensor, y: Tensor, grown: Tensor, allowed: Tensor) -> Tensor:
        """sum_k x_ik y_jk exp(grown_ik - total_jk) for allowed pairs, else 0."""
        gap = grown[:, :, :, None] - total[:, :, None]
        gap = gap.masked_fill(~allowed[:, :, None], float("-inf"))
        return torch.einsum("bhik,bhjk,bhijk->bhij", x, y, gap.exp())

    grown = before if bonus is not None else total
    out = pairs(q, k, grown, upto) @ v + (q * grown.exp()) @ initial_state
    end = total[:, :, -1:] if q.shape[2] else total.new_zeros(*total.shape[:2], 1, total.shape[3])
    left = (end - total).exp()
    state = end.transpose(2, 3).exp() * initial_state + (k * left).transpose(2, 3) @ v
    if a is not None and b is not None:
        a, b = a.transpose(1, 2), b.transpose(1, 2)
        read = (a * before.exp()) @ initial_state + pairs(a, k, before, earlier) @ v
        eye = torch.eye(q.shape[2], dtype=q.dtype, device=q.device)
        u = torch.linalg.solve_triangular(eye - pairs(a, b, before, earlier), read, upper=False)  # u_t = a_t^T S_{t-1}
        out = out + pairs(q, b, grown, upto) @ u
        state = state + (b * left).transpose(2, 3) @ u
    if bonus is not None:
        out = out + torch.einsum("bhtk,hk,bhtk->bht", q, bonus, k)[..., None] * v
    return scale * out.transpose(1, 2), state
