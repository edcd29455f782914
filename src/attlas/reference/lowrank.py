"""Low-rank approximations of attention as their papers write them, one matrix after the other. fp64 inputs are computed in fp64,
all others in fp32; gradients come from autograd."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from attlas.numerics import widened


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, T, H, D] -> [B, H, T, D] in the working dtype."""
    return tuple(t.transpose(1, 2) for t in widened(*tensors))


def linformer(q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor) -> Tensor:
    """softmax(Q (E K)^T / sqrt(D)) (F V) for every head. q, k, v [B, T, H, D], E and F [H or 1, r, T] -> [B, T, H, D].

    Wang et al. 2020, arXiv:2006.04768.
    """
    Q, K, V = _heads_first(q, k, v)
    P = torch.softmax(Q @ (E.to(Q.dtype) @ K).transpose(-1, -2) * Q.shape[-1] ** -0.5, dim=-1)
    return (P @ (F.to(Q.dtype) @ V)).transpose(1, 2).to(q.dtype)


def nystromformer(
    q: Tensor, k: Tensor, v: Tensor, landmarks: int, iterations: int, conv: Tensor | None, shared: bool = False
) -> Tensor:
    """softmax(Q K~^T) Z softmax(Q~ K^T) V + conv(V), all products scaled by 1 / sqrt(D); Q~ and K~ are the means of `landmarks`
    segments, Z the iterated pseudo-inverse of softmax(Q~ K~^T). With at most `landmarks` tokens: softmax(Q K^T) V + conv(V).

    q, k, v [B, T, H, D]; conv [H, odd width] runs along the tokens of each head, zeros outside; shared: see `pseudo_inverse`.
    -> [B, T, H, D].
    Xiong et al. 2021, arXiv:2102.03902.
    """
    Q, K, V = _heads_first(q, k, v)
    n, scale = Q.shape[-2], Q.shape[-1] ** -0.5
    if n <= landmarks:
        out = torch.softmax(Q @ K.transpose(-1, -2) * scale, dim=-1) @ V
    else:
        ends = [j * n // landmarks for j in range(landmarks + 1)]
        Ql, Kl = (torch.stack([x[..., a:b, :].mean(-2) for a, b in pairwise(ends)], dim=-2) for x in (Q, K))
        kernel_1 = torch.softmax(Q @ Kl.transpose(-1, -2) * scale, dim=-1)
        kernel_2 = torch.softmax(Ql @ Kl.transpose(-1, -2) * scale, dim=-1)
        kernel_3 = torch.softmax(Ql @ K.transpose(-1, -2) * scale, dim=-1)
        out = kernel_1 @ pseudo_inverse(kernel_2, iterations, shared) @ (kernel_3 @ V)
    if conv is not None:
        offset = torch.arange(n, device=q.device) - torch.arange(n, device=q.device)[:, None] + conv.shape[1] // 2
        inside = (offset >= 0) & (offset < conv.shape[1])
        band = conv.to(Q.dtype)[:, offset.clamp(0, conv.shape[1] - 1)] * inside  # [H, T, T]
        out = out + band @ V
    return out.transpose(1, 2).to(q.dtype)


def pseudo_inverse(A: Tensor, iterations: int, shared: bool = False) -> Tensor:
    """Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from Z = A^T / (|A|_1 |A|_inf), for each row-stochastic A [..., m, m] by
    itself (|A|_inf = 1); shared: with the largest |A|_1 of all."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    norms = A.sum(-2).amax(-1)[..., None, None]
    Z = A.transpose(-1, -2) / (norms.amax() if shared else norms)
    for _ in range(iterations):
        AZ = A @ Z
        Z = 0.25 * Z @ (13 * eye - AZ @ (15 * eye - AZ @ (7 * eye - AZ)))
    return Z
