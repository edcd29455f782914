"""Attention among tokens that are alike, by the letter: every pair is looked at, every cluster is a loop. fp64 inputs are
computed in fp64, all others in fp32; gradients come from autograd."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attlas.numerics import widened

Causal = Literal[False, True, "content-leaks"]


def reformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hashes: Tensor,
    *,
    chunk: int,
    before: int = 1,
    after: int = 0,
    causal: Causal = False,
    rule: Literal["paper", "trax"] = "paper",
    own: Literal["last", "always"] = "last",
    scale: float | None = None,
) -> Tensor:
    """softmax_j(scale q_i . k_j + log n_ij) v_j, where n_ij says how often key j counts for query i (see `hashed_pairs`).

    q, k, v [B, T, H, D], hashes int64 [B, T, H, R] -> [B, T, H, D]. Kitaev et al. 2020, arXiv:2001.04451.
    """
    Q, K, V = widened(q, k, v)
    B, T, H, D = q.shape
    options = {"chunk": chunk, "before": before, "after": after, "causal": causal, "rule": rule, "own": own}
    n = torch.stack([hashed_pairs(hashes[b, :, h], **options) for b in range(B) for h in range(H)])  # type: ignore[arg-type]
    S = torch.einsum("bihd,bjhd->bhij", Q, K) * (D**-0.5 if scale is None else scale)
    P = torch.softmax(S + n.view(B, H, T, T).to(S.dtype).log(), dim=-1)
    return torch.einsum("bhij,bjhd->bihd", P, V).to(q.dtype)


def hashed_pairs(hashes: Tensor, *, chunk: int, before: int, after: int, causal: Causal, rule: str, own: str = "last") -> Tensor:
    """How often key j counts for query i, [T, T], from the hashes [T, R] of one sequence and head.

    Every round sorts the tokens by (hash, position) and cuts the list into chunks; a query looks at its own chunk, `before`
    chunks before it and `after` chunks behind it.

    rule "paper"   keys of the query's own bucket, each once, in however many rounds it is found
    rule "trax"    keys of any bucket, once for every time they are found; the chunks of all rounds form a ring; a sequence of
                   at most one chunk is one bucket
    causal True    instead of chunks: the before * chunk nearest earlier tokens of the query's own bucket
    causal "content-leaks"  keys j <= i of the chunks above
    own "last"     a token attends to itself only where it sees no other; "always": it is one of the nearest (causal=True)
    """
    T, R = hashes.shape
    n = torch.zeros(T, T, device=hashes.device)
    if rule == "trax" and chunk >= T:
        n += 1
    elif causal is True:
        for i in range(T):
            for r in range(R):
                earlier = [j for j in range(i + (own == "always")) if hashes[j, r] == hashes[i, r]]
                n[i, earlier[max(0, len(earlier) - before * chunk) :]] = 1
    else:
        chunks = -(-T // chunk)
        place = torch.stack([_ranks(hashes[:, r]) // chunk for r in range(R)])  # [R, T]
        for r in range(R):
            if rule == "paper":
                apart = place[r][:, None] - place[r]
                same = hashes[:, r][:, None] == hashes[:, r]
                n[same & (apart <= before) & (apart >= -after)] = 1
                continue
            for other in range(R):
                for offset in range(-before, after + 1):
                    wanted = (place[r] + r * chunks + offset) % (R * chunks)
                    n += wanted[:, None] == place[other] + other * chunks
    if causal:
        n = n.tril()
    if own == "last":
        n.fill_diagonal_(0)
        n += torch.diag((n.sum(1) == 0).to(n.dtype))
    return n


def _ranks(buckets: Tensor) -> Tensor:
    """Place of each token when sorted by (bucket, position)."""
    order = sorted(range(len(buckets)), key=lambda j: (int(buckets[j]), j))
    ranks = torch.empty_like(buckets)
    ranks[order] = torch.arange(len(order), device=buckets.device)
    return ranks


def clustered(q: Tensor, k: Tensor, v: Tensor, bits: Tensor, clusters: int, iterations: int, topk: int | None) -> Tensor:
    """Every query gets the result of the mean query of its cluster, over all keys:  V^c = softmax(Q^c K^T / sqrt(D)) V.

    topk: the `topk` heaviest keys of the centroid are attended by the query itself, with the mass m that the centroid gives them:
    m softmax(q_i K_top^T / sqrt(D)) V_top + the centroid's sum over all other keys.

    q, k, v [B, T, H, D]; bits bool [B, T, H, n], the signatures that are clustered -> [B, T, H, D]. A sequence of at most
    `clusters` tokens gets softmax attention. Vyas et al. 2020, arXiv:2007.04825.
    """
    Q, K, V = (t.transpose(1, 2) for t in widened(q, k, v))
    T, D = Q.shape[-2:]
    if clusters >= T:
        return (torch.softmax(Q @ K.mT * D**-0.5, -1) @ V).transpose(1, 2).to(q.dtype)
    out = torch.zeros_like(V)
    for b in range(Q.shape[0]):
        for h in range(Q.shape[1]):
            of = hamming_clusters(bits[b, :, h], clusters, iterations)
            S = torch.nn.functional.one_hot(of, clusters).to(Q.dtype)  # [T, C]: who belongs where
            centroids = S.T @ Q[b, h] / S.sum(0).clamp(min=1)[:, None]
            A = torch.softmax(centroids @ K[b, h].T * D**-0.5, -1)
            if topk is None:
                out[b, h] = (A @ V[b, h])[of]
                continue
            top = A.topk(min(topk, T)).indices
            rest = A.scatter(1, top, 0.0) @ V[b, h]
            for c in of.unique():
                members = (of == c).nonzero()[:, 0]
                own = torch.softmax(Q[b, h, members] @ K[b, h, top[c]].T * D**-0.5, -1) @ V[b, h, top[c]]
                out[b, h, members] = A[c, top[c]].sum() * own + rest[c]
    return out.transpose(1, 2).to(q.dtype)


def hamming_clusters(bits: Tensor, clusters: int, iterations: int) -> Tensor:
    """K-means of bool signatures [T, n] by their Hamming distance -> int64 [T].

    The first centres are the signatures of the tokens floor(c T / clusters); a centre becomes the majority of its members, bit by
    bit (0 where they are even), and stays where it has none; of centres equally near, the first one takes the token.
    """
    centres = bits[[c * len(bits) // clusters for c in range(clusters)]].clone()
    for step in range(iterations + 1):
        of = (bits[:, None] != centres).sum(-1).argmin(-1)
        if step < iterations:
            for c in of.unique():
                centres[c] = bits[of == c].double().mean(0) > 0.5
    return of


def routing(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor, *, window: int, causal: bool = False, scale: float | None = None
) -> Tensor:
    """Every cluster takes the `window` queries and the `window` keys nearest to its mean, and these queries attend to these keys.

    q, k, v [B, T, H, D], q and k layer-normed, means [H, C, D] -> [B, T, H, D]: the mean over the clusters that took the token as
    a query, 0 where none did. causal: only keys at or before the query. Roy et al. 2021, arXiv:2003.05997.
    """
    Q, K, V, M = widened(q, k, v, means)
    B, T, H, D = q.shape
    w, scale = min(window, T), D**-0.5 if scale is None else scale
    out, taken = torch.zeros_like(V), torch.zeros(B, T, H, 1, dtype=V.dtype, device=V.device)
    for b in range(B):
        for h in range(H):
            queries, keys = ((M[h] @ x[b, :, h].T).topk(w).indices for x in (Q, K))  # [C, w]
            for i, j in zip(queries, keys, strict=True):
                S = Q[b, i, h] @ K[b, j, h].T * scale
                if causal:
                    S = S.masked_fill(j > i[:, None], -torch.inf)
                out[b, i, h] = out[b, i, h] + torch.softmax(S, -1) @ V[b, j, h]
                taken[b, i, h] += 1
    return (out / taken.clamp(min=1)).to(q.dtype)
