"""Clustered attention: queries that are alike share the result of their mean."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from attlas.errors import OptionError, UnsupportedError
from attlas.nn.derived import register_derived
from attlas.nn.lowrank import LowRankMixer
from attlas.numerics import widened
from attlas.ops.cluster import clustered_attention, sign_bits
from attlas.reference import content as truth


def _planes(bits: int, head_dim: int, hash_bias: bool, seed: int) -> Tensor:
    drawn = torch.randn(bits, head_dim + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn[:, -1] *= hash_bias
    return drawn


class Clustered(LowRankMixer):
    """y_i = o( softmax(Q^c K^T / sqrt(head_dim)) V ) with Q^c the mean of the queries of i's cluster; see the two factories."""

    uses_positions = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        clusters: int,
        topk: int | None,
        bits: int,
        iterations: int,
        hash_bias: bool,
        seed: int,
        head_dim: int | None,
        bias: bool,
        causal: bool,
    ) -> None:
        name, own = ("clustered", "") if topk is None else ("improved-clustered", f"topk={topk}, ")
        call = f"{name}(dim={dim}, num_heads={num_heads}, clusters={clusters}, {own}bits={bits}, iterations={iterations})"
        if causal:
            raise UnsupportedError(
                f"{call}: clusters are made of all queries, so which ones share a result depends on later tokens: no causal form"
            )
        super().__init__(dim, num_heads, head_dim, bias, call)
        self.name = name
        if clusters < 1 or bits < 1 or iterations < 0 or (topk is not None and topk < 1):
            raise OptionError(f"{call}: clusters, bits and topk must be at least 1, iterations at least 0")
        self.clusters, self.topk, self.iterations = clusters, topk, iterations
        self.planes: Tensor
        register_derived(self, "planes", partial(_planes, bits, self.head_dim, hash_bias, seed))

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        bits = sign_bits(q, self.planes)
        if self.impl == "reference":
            return truth.clustered(q, k, v, bits, self.clusters, self.iterations, self.topk)
        wide_q, wide_k, wide_v = widened(q, k, v)
        c, n = self.clusters, self.iterations
        out = clustered_attention(wide_q, wide_k, wide_v, bits, clusters=c, iterations=n, topk=self.topk, impl=self.impl)
        return out.to(q.dtype)

    def flops(self, seq_len: int) -> int:
        inner = self.num_heads * self.head_dim
        total = self._projection_flops(seq_len) + 2 * seq_len * len(self.planes) * inner
        if seq_len <= self.clusters:
            return total + 4 * seq_len**2 * inner
        return total + 4 * seq_len * (self.clusters + min(self.topk or 0, seq_len)) * inner

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, clusters={self.clusters}"
        return f"{shown}, topk={self.topk}, bits={len(self.planes)}, iterations={self.iterations}, impl={self.impl}"


def clustered(
    dim: int,
    num_heads: int,
    *,
    clusters: int = 100,
    bits: int = 32,
    iterations: int = 10,
    hash_bias: bool = False,
    seed: int = 0,
    head_dim: int | None = None,
    bias: bool = False,
    causal: Literal[False] = False,
) -> Clustered:
    """Every query gets the result of the mean query of its cluster.

    clusters    per head; a sequence of at most that many tokens gets softmax attention
    bits        sign bits of a query (random planes, a function of seed and head_dim) that are clustered by K-means in Hamming
                distance, `iterations` times; no randomness depends on the input or the batch
    hash_bias   planes that miss the origin, so that the length of a query counts (the authors' code); the paper's go through it
    causal      refused: clusters depend on later tokens

    16-bit inputs are computed in fp32. Cost: 4 T clusters inner flops, and T clusters bits iterations for K-means.
    Source: Vyas et al. 2020, arXiv 2007.04825.
    """
    return Clustered(
        dim, num_heads, clusters=clusters, topk=None, bits=bits, iterations=iterations, hash_bias=hash_bias, seed=seed,
        head_dim=head_dim, bias=bias, causal=causal,
    )  # fmt: skip


def improved_clustered(
    dim: int,
    num_heads: int,
    *,
    clusters: int = 100,
    topk: int = 32,
    bits: int = 32,
    iterations: int = 10,
    hash_bias: bool = False,
    seed: int = 0,
    head_dim: int | None = None,
    bias: bool = False,
    causal: Literal[False] = False,
) -> Clustered:
    """`clustered`, where each query attends by itself to the `topk` keys that are heaviest for its centroid; they keep the mass
    that the centroid gives them, and the other keys the centroid's weights.

    The other options are those of `clustered`. Cost: 4 T (clusters + topk) inner flops, and K-means; memory T clusters per head.
    Source: Vyas et al. 2020, arXiv 2007.04825, section 3.3.
    """
    return Clustered(
        dim, num_heads, clusters=clusters, topk=topk, bits=bits, iterations=iterations, hash_bias=hash_bias, seed=seed,
        head_dim=head_dim, bias=bias, causal=causal,
    )  # fmt: skip
