"""Softmax attention as the paper writes it: one matrix of scores, one softmax, one product. Slow, and right.

Everything is ordinary differentiable torch code, so first and second derivatives come from autograd. fp64 inputs are computed in
fp64, all others in fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attlas.numerics import wide_dtype
from attlas.scores import ScoreMod


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask_bool: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(mod(scale * q k^T) + log mask) v, and the natural log of the denominator.

    q `[..., Tq, H, D]`, k `[..., Tk, Hkv, D]`, v `[..., Tk, Hkv, Dv]` -> out `[..., Tq, H, Dv]` in q's dtype, lse `[..., Tq, H]`.
    mask_bool: bool, broadcast to `[..., H, Tq, Tk]`, True = may attend. q_pos, k_pos: absolute positions for `score_mod`
    (default: queries are the last Tq of Tk). sink `[H]`: an extra logit in the denominator of each head, included in lse.
    A query that may attend to nothing gives out 0, lse -inf (lse = sink if there is one). O(Tq Tk) memory.
    Vaswani et al. 2017, arXiv:1706.03762.
    """
    dtype = wide_dtype(q.dtype)
    tq, h, d = q.shape[-3:]
    tk, hkv = k.shape[-3:-1]
    scale = 1.0 / math.sqrt(d) if scale is None else scale
    Q = q.movedim(-2, -3).to(dtype)  # [..., H, Tq, D]
    K, V = (x.movedim(-2, -3).to(dtype).repeat_interleave(h // hkv, dim=-3) for x in (k, v))
    if mask_bool is None:
        mask_bool = torch.ones(tq, tk, dtype=torch.bool, device=q.device)
    if q_pos is None:
        q_pos = torch.arange(tk - tq, tk, device=q.device)
    if k_pos is None:
        k_pos = torch.arange(tk, device=q.device)

    S = scale * _inner(Q, K, mask_bool)  # [..., H, Tq, Tk]
    if score_mod is not None:
        S = score_mod(S.masked_fill(~mask_bool, 0.0), q_pos, k_pos)
    S = S.masked_fill(~mask_bool, -math.inf)

    top = S.detach().amax(-1) if tk else S.new_full(S.shape[:-1], -math.inf)
    if sink is not None:
        top = torch.maximum(top, sink.detach().to(dtype)[:, None])
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = torch.exp(S - top[..., None])
    total = weights.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink.to(dtype)[:, None] - top)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    P = weights / total[..., None]
    lse = (top + total.log()).masked_fill(empty, -math.inf)
    return _average(P, V, mask_bool).movedim(-3, -2).to(q.dtype), lse.transpose(-1, -2)


def _inner(Q: Tensor, K: Tensor, mask: Tensor) -> Tensor:
    """Q K^T. Pairs that the mask forbids contribute nothing to any gradient, also where 0 * NaN would."""
    if bool(Q.isfinite().all()) and bool(K.isfinite().all()):
        return Q @ K.transpose(-1, -2)
    seen = mask[..., None]
    return (Q[..., :, None, :].where(seen, 0.0) * K[..., None, :, :].where(seen, 0.0)).sum(-1)


def _average(P: Tensor, V: Tensor, mask: Tensor) -> Tensor:
    """P V, where a weight of a forbidden pair is nothing rather than zero times the value."""
    if bool(P.isfinite().all()) and bool(V.isfinite().all()):
        return P @ V
    seen = mask[..., None]
    return (P[..., None].where(seen, 0.0) * V[..., None, :, :].where(seen, 0.0)).sum(-2)
