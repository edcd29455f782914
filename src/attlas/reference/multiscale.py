"""Attention that looks at groups of tokens or replaces the scores altogether, as the papers write it. fp64 inputs are computed in
fp64, all others in fp32; gradients come from autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attlas.numerics import widened


def hierarchical(q: Tensor, k: Tensor, v: Tensor, block: int, causal: bool, coarse_queries: bool) -> Tensor:
    """softmax over j of s_ij, times v_j, where s_ij is the score between groups: level l(i, j) is the least l at which the blocks
    of block * 2^l tokens of i and j are neighbours (or one), and s_ij = q . mean(k of the 2^l tokens around j) / sqrt(D), q that
    of token i, or, `coarse_queries`, the mean of the 2^l tokens around i. Groups at the end may be short.

    q, k, v [B, T, H, D] -> [B, T, H, D]. Zhu and Soricut 2021, arXiv:2107.11906 (their sums of values over sums of ones).
    """
    Q, K, V = widened(q, k, v)
    n = Q.shape[1]
    i, j = torch.arange(n, device=q.device)[:, None], torch.arange(n, device=q.device)
    scores = Q.new_full((*Q.shape[::2], n, n), -math.inf)
    undecided, level = torch.ones(n, n, dtype=torch.bool, device=q.device), 0
    while undecided.any():
        near = undecided & ((i // (block << level) - j // (block << level)).abs() <= 1)
        left = _group_means(Q, 1 << level) if coarse_queries else Q
        S = torch.einsum("bihd,bjhd->bhij", left, _group_means(K, 1 << level)) * Q.shape[-1] ** -0.5
        scores = torch.where(near & (j <= i) if causal else near, S, scores)
        undecided, level = undecided & ~near, level + 1
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1), V).to(q.dtype)


def multi_resolution(
    q: Tensor, k: Tensor, v: Tensor, block: int, per_row: int, coarse: bool, ranking: str, diagonal: int, first: int
) -> Tensor:
    """softmax over j of s_ij, times v_j: s_ij is the score of the tokens where their blocks x and y of `block` tokens are among
    the best, else that of their blocks, S_xy = mean q . mean k / sqrt(D) (coarse), or -inf.

    The best are, of all n^2 pairs of n blocks, the n * per_row with the largest S_xy (ranking "absolute") or S_xy - max_y S_xy
    ("relative"); before them come the pairs |x - y| <= diagonal // 2, and those with x or y < first. The last block may be short.
    q, k, v [B, T, H, D] -> [B, T, H, D]. Zeng et al. 2022, arXiv:2207.10284.
    """
    Q, K, V = widened(q, k, v)
    fine = torch.einsum("bihd,bjhd->bhij", Q, K) * Q.shape[-1] ** -0.5
    low = torch.einsum("bihd,bjhd->bhij", _group_means(Q, block), _group_means(K, block)) * Q.shape[-1] ** -0.5
    scores = torch.full_like(fine, -math.inf)
    for b in range(Q.shape[0]):
        for h in range(Q.shape[2]):
            S = low[b, h, ::block, ::block].detach()
            if ranking == "relative":
                S = S - S.max(-1, keepdim=True).values
            n = len(S)
            forced = [(x, y) for x in range(n) for y in range(n) if 2 * abs(x - y) < diagonal or x < first or y < first]
            rest = {(x, y): float(S[x, y]) for x in range(n) for y in range(n) if (x, y) not in forced}
            others = sorted(rest, key=rest.__getitem__, reverse=True)
            if coarse:
                scores[b, h] = low[b, h]
            for x, y in (forced + others)[: n * per_row]:
                here = (b, h, slice(x * block, (x + 1) * block), slice(y * block, (y + 1) * block))
                scores[here] = fine[here]
    sees = scores.isfinite().any(-1, keepdim=True)
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(scores.masked_fill(~sees, 0.0), -1) * sees, V).to(q.dtype)


def _group_means(x: Tensor, size: int) -> Tensor:
    """Every token of x [B, T, H, D] replaced by the mean of its group of `size` tokens."""
    groups = [g.mean(1, keepdim=True).expand_as(g) for g in x.split(size, dim=1)]
    return torch.cat(groups, 1)


def compress(x: Tensor, weight: Tensor, bias: Tensor, factor: int) -> Tensor:
    """Convolution with as many taps as its stride: entry m = bias + sum_i weight[:, :, i] x[m factor + i], for the full groups.

    x [B, T, H, D]; weight [H D, C, factor], C = H D (all channels) or D (those of the head). -> [B, T // factor, H, D].
    """
    b, t, h, d = x.shape
    X, W, bias = widened(x[:, : t // factor * factor].reshape(b, t // factor, factor, h * d), weight, bias)
    if W.shape[1] == h * d:
        Y = torch.einsum("bmfc,ocf->bmo", X, W)
    else:
        Y = torch.einsum("bmfhc,hocf->bmho", X.unflatten(-1, (h, d)), W.unflatten(0, (h, d))).flatten(-2)
    return (Y + bias).unflatten(-1, (h, d)).to(x.dtype)


def memory_compressed(
    q: Tensor, k: Tensor, v: Tensor, factor: int | None, lag: int, k_0: Tensor | None, v_0: Tensor | None
) -> Tensor:
    """softmax(q K'^T / sqrt(D)) V' over compressed keys k and values v [B, M, H, D]; entry m stands for the tokens m factor ...
    (m + 1) factor - 1 and is seen by the queries from token (m + 1) factor - 1 + lag on; factor None: by all. k_0, v_0 [B, 1, H,
    D]: one more entry, seen by all. A query that sees nothing gives 0. q [B, T, H, D] -> [B, T, H, D].

    Liu et al. 2018, arXiv:1801.10198.
    """
    Q, K, V = widened(q, k, v)
    S = torch.einsum("bihd,bjhd->bhij", Q, K) * Q.shape[-1] ** -0.5
    if factor is not None:
        i, m = torch.arange(Q.shape[1], device=q.device)[:, None], torch.arange(K.shape[1], device=q.device)
        S = S.masked_fill((m + 1) * factor - 1 + lag > i, -math.inf)
    if k_0 is not None and v_0 is not None:
        first, value = widened(k_0, v_0)
        S = torch.cat([torch.einsum("bihd,bjhd->bhij", Q, first) * Q.shape[-1] ** -0.5, S], -1)
        V = torch.cat([value, V], 1)
    sees = S.isfinite().any(-1, keepdim=True)
    P = torch.softmax(S.masked_fill(~sees, 0.0), -1) * sees
    return torch.einsum("bhij,bjhd->bihd", P, V).to(q.dtype)


def synthesizer(scores: Sequence[Tensor], shares: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """softmax(sum_p shares_p S_p) v: the scores S_p [B or 1, H, T, T] need not come from products of queries and keys.

    allowed: bool [T, T], True = may attend, None = every pair. v [B, T, H, D] -> [B, T, H, D]. Tay et al. 2020, arXiv:2005.00743.
    """
    shares, V = widened(shares, v)
    S = torch.stack([s.to(V.dtype).expand(V.shape[0], -1, -1, -1) * a for s, a in zip(scores, shares, strict=True)]).sum(0)
    if allowed is not None:
        S = S.masked_fill(~allowed, -math.inf)
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(S, -1), V).to(v.dtype)


def lambda_layer(q: Tensor, k: Tensor, v: Tensor, E: Tensor, causal: bool) -> Tensor:
    """y_n = (content lambda + position lambda of n)^T q_n for every head, with the lambdas written out:

        content    sum_m sum_u softmax_m(k)_mu v_mu^T                 (causal: m <= n, and the softmax over them)
        position   sum_m sum_u E[m - n + offset]_u v_mu^T             for |m - n| <= scope // 2 (causal: n - scope < m <= n)

    q [B, T, H, K], k [B, T, U, K], v [B, T, U, V], E [scope, K, U] -> [B, T, H, V]. Bello 2021, arXiv:2102.08602.
    """
    Q, keys, V, table = widened(q, k, v, E)
    n, scope = Q.shape[1], E.shape[0]
    outs = []
    for t in range(n):
        seen = t + 1 if causal else n
        content = torch.einsum("bmuk,bmuv->bkv", torch.softmax(keys[:, :seen], 1), V[:, :seen])
        low = t - (scope - 1 if causal else scope // 2)
        first, end = max(low, 0), min(low + scope, n)
        position = torch.einsum("mku,bmuv->bkv", table[first - low : end - low], V[:, first:end])
        outs.append(torch.einsum("bhk,bkv->bhv", Q[:, t], content + position))
    return torch.stack(outs, 1).to(q.dtype)
