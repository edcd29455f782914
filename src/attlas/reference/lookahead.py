"""Causal attention with lookahead keys (CASTLE) as its paper writes it, in the parallel and in the recurrent form. fp64 inputs
are computed in fp64, all others in fp32; gradients come from autograd. Song et al. 2025, arXiv:2509.07301."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from attlas.numerics import widened

Projections = tuple[Tensor, Tensor, Tensor]


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, T, H, D] -> [B, H, T, D] in the working dtype."""
    return tuple(t.transpose(1, 2) for t in widened(*tensors))


def castle_parallel(ahead: Projections, own: Projections, window: int | None = None) -> Tensor:
    """Theorem 1: S^U = (Q^C V^U^T / sqrt(D), at j <= t) (sigmoid(Q^U K^U^T / sqrt(D)), at s < j <= s + window)^T,
    O = softmax(Q^C K^C^T / sqrt(D) - silu(S^U), at s <= t) V^C. O(T^3) time, O(T^2) memory.

    ahead  Q^U, K^U, V^U, each [B, T, H, D]: what the keys gather from later tokens
    own    Q^C, K^C, V^C, each [B, T, H, D]
    window tokens that a key looks ahead, None = all
    -> [B, T, H, D].
    """
    QU, KU, VU, QC, KC, VC = _heads_first(*ahead, *own)
    T, scale = QC.shape[-2], QC.shape[-1] ** -0.5
    apart = torch.arange(T, device=QC.device) - torch.arange(T, device=QC.device)[:, None]  # [s, j]: j - s
    later = (apart > 0) & (apart <= (T if window is None else window))
    seen = torch.sigmoid(QU @ KU.transpose(-1, -2) * scale).masked_fill(~later, 0.0)
    asked = (QC @ VU.transpose(-1, -2) * scale).masked_fill(apart > 0, 0.0)
    SU = asked @ seen.transpose(-1, -2)
    SC = (QC @ KC.transpose(-1, -2) * scale).masked_fill(apart > 0, float("-inf"))
    return (torch.softmax(SC - silu(SU), dim=-1) @ VC).transpose(1, 2).to(own[0].dtype)


def castle_recurrent(ahead: Projections, own: Projections, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Token by token: u_s += sigmoid(q^U_s . k^U_t / sqrt(D)) v^U_t for the s in t - window ... t - 1, u_t = 0, and then
    o_t = softmax_s((q^C_t . k^C_s) / sqrt(D) - silu(q^C_t . u_s / sqrt(D))) v^C_s over s <= t.

    Arguments as in `castle_parallel` -> (O [B, T, H, D], U after the last token [B, T, H, D]).
    """
    QU, KU, VU, QC, KC, VC = _heads_first(*ahead, *own)
    T, scale = QC.shape[-2], QC.shape[-1] ** -0.5
    U, rows = QC.new_zeros(*QC.shape[:-2], 0, QC.shape[-1]), []
    for t in range(T):
        gates = torch.sigmoid((QU[..., :t, :] * KU[..., t : t + 1, :]).sum(-1, keepdim=True) * scale)
        if window is not None:
            gates = torch.where((torch.arange(t, device=QC.device) >= t - window)[:, None], gates, 0.0)
        U = torch.cat([U + gates * VU[..., t : t + 1, :], torch.zeros_like(QC[..., :1, :])], dim=-2)
        q = QC[..., t : t + 1, :]
        scores = (q * KC[..., : t + 1, :]).sum(-1) * scale - silu((q * U).sum(-1) * scale)
        rows.append((torch.softmax(scores, dim=-1)[..., None] * VC[..., : t + 1, :]).sum(-2))
    out = torch.stack(rows, dim=-2) if rows else torch.zeros_like(QC)
    return out.transpose(1, 2).to(own[0].dtype), U.transpose(1, 2)
