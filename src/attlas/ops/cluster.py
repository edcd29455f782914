"""Attention by clusters: queries that share one result (clustered), clusters that pick their queries and keys (routing)."""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError
from attlas.numerics import full_precision, widened
from attlas.ops.attention import attention
from attlas.ops.groups import attend_groups, take, token_rows
from attlas.shapes import AuxRequest, describe

_NUMBERS = 1 << 22  # distances of tokens to centres that are held at a time
_TILE = 32  # queries of one cluster that are attended to together


def sign_bits(x: Tensor, planes: Tensor) -> Tensor:
    """On which side of each plane the tokens lie: x [B, T, H, D], planes [n, D + 1] (normal, then offset) -> bool [B, T, H,
    n]."""
    (wide,) = widened(x.detach())
    planes = planes.to(wide.dtype)
    with full_precision(x):
        return wide @ planes[:, :-1].T + planes[:, -1] > 0


def hamming_kmeans(bits: Tensor, clusters: int, iterations: int) -> Tensor:
    """Clusters of signatures by their Hamming distance: bool [G, T, n] -> int64 [G, T] in 0 ... clusters - 1, clusters <= T.

    The first centres are the signatures of the tokens floor(c T / clusters); then `iterations` times each centre becomes the
    majority of its members, bit by bit (0 where they are even; unchanged without members). Of equally near centres the first one
    counts. A function of each row of `bits` alone. Cost: 2 G T clusters n (iterations + 1).
    """
    t = bits.shape[1]
    step = max(1, _NUMBERS // (t * clusters))
    first = torch.div(torch.arange(clusters, device=bits.device) * t, clusters, rounding_mode="floor")
    with full_precision(bits):
        return torch.cat([_kmeans(part.float() * 2 - 1, first, iterations) for part in bits.split(step)])


def _kmeans(signs: Tensor, first: Tensor, iterations: int) -> Tensor:
    """signs +-1 [G, T, n]: products of signatures fall as their distance grows, and are exact in fp32."""
    centres = signs[:, first]
    g, clusters, n = centres.shape
    offset = torch.arange(g, device=signs.device)[:, None] * clusters
    of = (signs @ centres.mT).argmax(-1)
    for _ in range(iterations):
        rows = (of + offset).flatten()
        votes = signs.new_zeros(g * clusters, n).index_add_(0, rows, signs.flatten(0, 1)).view_as(centres)
        members = torch.bincount(rows, minlength=g * clusters).view(g, clusters, 1)
        centres = torch.where(members > 0, (votes > 0).to(signs.dtype) * 2 - 1, centres)
        of = (signs @ centres.mT).argmax(-1)
    return of


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    *,
    clusters: int,
    iterations: int = 10,
    topk: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention of the mean query of each cluster, in place of that of its members.

    q, k, v [B, T, H, D]; bits bool [B, T, H, n], the signatures that are clustered (`hamming_kmeans`) -> [B, T, H, D].

    topk  with V^c the centroid's result, V^c_top its attention over its own `topk` heaviest keys, m their share of the mass:
          out_i = V^c + m (V_top(q_i) - V^c_top), where q_i attends to the same keys. Weights still sum to 1.
    A sequence of at most `clusters` tokens gets softmax attention. Clusters carry no gradient, means do. Bidirectional.
    Cost: 4 T (clusters + topk) D flops per head and the clustering. Memory: T clusters numbers per head where topk is given.
    Errors: ShapeError, OptionError. Vyas et al. 2020, arXiv:2007.04825.
    """
    call = f"clustered_attention({describe(q=q, k=k, v=v, bits=bits)}, clusters={clusters}, topk={topk})"
    if q.ndim != 4 or not q.shape == k.shape == v.shape or bits.shape[:-1] != q.shape[:-1] or bits.dtype != torch.bool:
        raise ShapeError(f"{call}: q, k and v must be [B, T, H, D], bits bool [B, T, H, n]")
    if clusters < 1 or iterations < 0 or (topk is not None and topk < 1):
        raise OptionError(f"{call}: clusters and topk must be at least 1, iterations={iterations} at least 0")
    b, t, h, d = q.shape
    if clusters >= t or not q.numel():
        return attention(q, k, v, scale=scale, impl=impl)
    of = hamming_kmeans(bits.transpose(1, 2).flatten(0, 1), clusters, iterations)  # [G, T]
    offset = torch.arange(b * h, device=q.device)[:, None] * clusters
    rows = (of + offset).view(b, h, t).transpose(1, 2)  # of each token among the [B, H, C] centroids
    members = torch.bincount(rows.flatten(), minlength=b * h * clusters)
    sums = q.new_zeros(b * h * clusters, d).index_add(0, rows.flatten(), q.reshape(-1, d))
    centroids = (sums / members.clamp(min=1)[:, None]).view(b, h, clusters, d)
    whole, aux = attention(centroids.transpose(1, 2), k, v, scale=scale, impl=impl, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    whole, lse = whole.transpose(1, 2).reshape(-1, d), aux.lse.transpose(1, 2).reshape(-1)
    if topk is None:
        return take(whole, rows)
    with torch.no_grad(), full_precision(k):
        heavy = torch.einsum("bhcd,bthd->bhct", centroids, k).topk(min(topk, t), dim=-1).indices.flatten(0, 1)
    keys, values = (take(x, token_rows(heavy, t, h).flatten(0, 1)) for x in (k, v))
    near, near_lse = attend_groups(centroids.flatten(0, 2)[:, None], keys, values, scale=scale, impl=impl)
    mass = torch.exp(near_lse[:, 0] - lse)[:, None].to(q.dtype)
    tiles = _Tiles(of, clusters)
    pick = (tiles.cluster + offset).flatten()
    own, _ = attend_groups(
        take(q, token_rows(tiles.tokens, t, h).flatten(0, 1)), keys[pick], values[pick], scale=scale, impl=impl
    )
    own = take(own, tiles.slots.view(b, h, t).transpose(1, 2))
    return take(whole - mass * near[:, 0], rows) + take(mass, rows) * own


class _Tiles:
    """Members of each cluster in tiles of one size, filled up with -1. of [G, T]."""

    def __init__(self, of: Tensor, clusters: int) -> None:
        g, t = of.shape
        size = min(_TILE, t)
        count = (t + clusters * (size - 1)) // size  # enough, whatever the sizes of the clusters
        ordered, order = of.sort(dim=-1, stable=True)
        members = torch.zeros(g, clusters, dtype=torch.int64, device=of.device).scatter_add_(1, of, torch.ones_like(of))
        ends = torch.div(members + size - 1, size, rounding_mode="floor").cumsum(-1)
        begin, first = ends - torch.div(members + size - 1, size, rounding_mode="floor"), members.cumsum(-1) - members
        at = torch.arange(t, device=of.device) - first.gather(-1, ordered) + begin.gather(-1, ordered) * size
        places = torch.empty_like(of).scatter_(-1, order, at)
        self.tokens = torch.full((g, count * size), -1, device=of.device).scatter_(-1, at, order).view(g, count, size)
        self.slots = places + torch.arange(g, device=of.device)[:, None] * count * size  # of each token, [G, T]
        tile = torch.arange(count, device=of.device).expand(g, count).contiguous()
        self.cluster = torch.searchsorted(ends, tile, right=True).clamp(max=clusters - 1)  # of each tile, [G, count]


def nearest_mean(x: Tensor, means: Tensor) -> Tensor:
    """x [B, T, H, D], means [H, C, D] -> int64 [B, T, H]: the mean with the largest product."""
    return _closeness(x, means).argmax(2).transpose(1, 2)


def _closeness(x: Tensor, means: Tensor) -> Tensor:
    """[B, H, C, T]"""
    (wide,) = widened(x.detach())
    with full_precision(x):
        return torch.einsum("bthd,hcd->bhct", wide, means.to(wide.dtype))


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    *,
    window: int,
    causal: bool = False,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Each mean takes its `window` nearest queries and its `window` nearest keys; these queries attend to these keys.

    q, k, v [B, T, H, D], means [H, C, D]; near = large product, so q and k should have one length -> [B, T, H, D]: the mean over
    the clusters that took a token as a query, 0 for a token that none took. causal: keys at or before the query only, and then q
    must be k, so that a query sees itself; which tokens a cluster takes still depends on later ones. The choice carries no
    gradient. Cost: 4 T C D (choice) and 4 C window^2 D flops per head. Errors: ShapeError, OptionError. Roy et al. 2021,
    arXiv:2003.05997."""
    call = f"routed_attention({describe(q=q, k=k, v=v, means=means)}, window={window}, causal={causal})"
    if q.ndim != 4 or not q.shape == k.shape == v.shape or means.ndim != 3 or means.shape[::2] != q.shape[2:]:
        raise ShapeError(f"{call}: q, k and v must be [B, T, H, D], means [H, C, D]")
    b, t, h, d = q.shape
    if window < 1:
        raise OptionError(f"{call}: window must be at least 1")
    if not q.numel():
        return q * v
    w = min(window, t)
    queries = _closeness(q, means).topk(w, dim=-1).indices.flatten(0, 1)  # [G, C, w]
    keys = queries if causal else _closeness(k, means).topk(w, dim=-1).indices.flatten(0, 1)
    allowed = (keys[..., None, :] <= queries[..., None]).flatten(0, 1) if causal else None
    rows, from_rows = (token_rows(x, t, h).flatten(0, 1) for x in (queries, keys))
    out, _ = attend_groups(take(q, rows), take(k, from_rows), take(v, from_rows), allowed=allowed, scale=scale, impl=impl)
    sums = out.new_zeros(b * t * h, d).index_add(0, rows.flatten(), out.flatten(0, 1))
    taken = torch.bincount(rows.flatten(), minlength=b * t * h)
    return (sums / taken.clamp(min=1)[:, None]).view(b, t, h, d)
