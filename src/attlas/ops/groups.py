"""Attention inside many small groups of tokens that were picked from the data: picking, averaging, attending, putting back."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from attlas.ops.attention import attention
from attlas.ops.merge import weighted
from attlas.scores import RelativeBias
from attlas.shapes import AuxRequest


def token_rows(tokens: Tensor, length: int, heads: int, *, first: int = 0) -> Tensor:
    """Tokens [G, ...], of `first` and the following of the B * H pairs of a batch row and a head (negative = none, then token 0)
    -> their rows in x.reshape(-1, D) of a token-major x [B, T, H, D]."""
    g = torch.arange(first, first + len(tokens), device=tokens.device).view(-1, *(1,) * (tokens.ndim - 1))
    return (torch.div(g, heads, rounding_mode="floor") * length + tokens.clamp(min=0)) * heads + g % heads


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x.reshape(-1, D)[rows]: [*rows.shape, D], for x [..., D]."""
    return x.reshape(-1, x.shape[-1]).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])


def group_means(x: Tensor, size: int) -> Tensor:
    """[B, T, ...] -> [B, ceil(T / size), ...]: the mean of each group of `size` tokens, the last one possibly short."""
    groups = -(-x.shape[1] // size)
    padded = functional.pad(x, (*(0, 0) * (x.ndim - 2), 0, groups * size - x.shape[1]))
    counts = torch.tensor([size] * (groups - 1) + [x.shape[1] - (groups - 1) * size], device=x.device)
    return padded.unflatten(1, (groups, size)).sum(2) / counts.view(-1, *(1,) * (x.ndim - 2))


def log_counts(length: int, size: int, like: Tensor) -> Tensor:
    """log of the number of tokens of each of the groups of `group_means`: [groups], in `like`'s dtype and on its device."""
    groups = -(-length // size)
    counts = torch.full((groups,), float(size), dtype=like.dtype, device=like.device)
    counts[-1] = length - (groups - 1) * size
    return counts.log()


def attend_groups(
    q: Tensor, k: Tensor, v: Tensor, *, allowed: Tensor | None = None, scale: float | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Softmax attention of q [N, m, D] over k [N, n, D], v [N, n, Dv], group by group -> (out [N, m, Dv], lse [N, m]).

    allowed  bool [N, m, n], None = every pair. Masks are rules on positions, which tokens picked by content do not keep, so it is
             handed on as a bias of 0 and -inf: a NaN in a key reaches every query of its group.
    An empty row gives 0 and lse -inf. Cost: 4 N m n D flops; memory N m n fp32 numbers where `allowed` is given.
    """
    q, k, v = (x[:, :, None] for x in (q, k, v))
    bias = None if allowed is None else RelativeBias.dense(torch.where(allowed, 0.0, -torch.inf)[:, None])
    out, aux = attention(q, k, v, score_mod=bias, scale=scale, impl=impl, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    return out.squeeze(2), aux.lse.squeeze(-1)  # views: a selection would write its gradient into zeros


def merge_rows(out: Tensor, lse: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Partial softmax results out [..., D], lse [...], which belong to `rows` [...], joined by their log-sum-exp: out [count, D],
    lse [count]. A row may have any number of parts; one without gives 0 and -inf. A part with lse -inf is not read.
    Differentiable in out and lse."""
    out, lse, rows = out.flatten(0, -2), lse.flatten(), rows.flatten()
    top = torch.full((count,), -math.inf, dtype=lse.dtype, device=lse.device)
    top = top.scatter_reduce(0, rows, lse.detach(), "amax").clamp(min=torch.finfo(lse.dtype).min)
    weights = torch.exp(lse - top[rows])
    total = torch.zeros_like(top).index_add(0, rows, weights)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    parts = weighted(out, (weights / total[rows]).to(out.dtype), lse == -math.inf)
    joined = out.new_zeros(count, out.shape[-1]).index_add(0, rows, parts)
    return joined, (top + total.log()).masked_fill(empty, -math.inf)
