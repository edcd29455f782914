"""Interleaved head attention as its paper writes it. fp64 inputs are computed in fp64, all others in fp32; gradients come from
autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attlas.numerics import wide_dtype


def interleaved_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixing: tuple[Tensor, Tensor, Tensor],
    R: Tensor,
    *,
    allowed: Tensor,
    scale: float,
    rotate: Callable[[Tensor], Tensor] = lambda t: t,
) -> Tensor:
    """O_h = sum_{h', p} R[h, h', p] A_{h', p}, where A_h is one softmax attention over the N P virtual tokens of head h; virtual
    token n P + p is the mixture mixing[:, h, p] of all heads of token n.

    q, k, v   [B, N, H, D]
    mixing    alpha^Q, alpha^K, alpha^V, each [H source heads, H target heads, P]
    R         [H, H, P], or [H, P] for O_h = sum_p R[h, p] A_{h, p}
    allowed   bool [N P, N P]: which virtual key a virtual query may attend to
    rotate    the position code of virtual queries and keys [B, N P, H, D]
    -> [B, N, H, D]. Duvvuri et al. 2026, arXiv:2602.21371.
    """
    dtype = wide_dtype(q.dtype)
    B, N, H, D = q.shape
    P = mixing[0].shape[2]
    Q, K, V = (torch.einsum("bnmd,mhp->bnphd", x.to(dtype), a.to(dtype)) for x, a in zip((q, k, v), mixing, strict=True))
    Q, K, V = (x.reshape(B, N * P, H, D) for x in (Q, K, V))
    Q, K, V = (x.transpose(1, 2) for x in (rotate(Q), rotate(K), V))
    S = (Q @ K.transpose(-1, -2) * scale).masked_fill(~allowed, float("-inf"))
    A = (torch.softmax(S, dim=-1) @ V).reshape(B, H, N, P, D)
    O = torch.einsum("bgnpd,hgp->bnhd" if R.dim() == 3 else "bhnpd,hp->bnhd", A, R.to(dtype))
    return O.to(q.dtype)
