"""Synthesizer: attention weights that are predicted from a token alone, or learned outright, instead of compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from attlas.cache.layer import Cache
from attlas.cache.part import PartSpec
from attlas.errors import OptionError
from attlas.masks.explicit import Dense
from attlas.masks.expr import Mask
from attlas.masks.leaves import Causal
from attlas.nn.attention import check_heads
from attlas.nn.rows import RowMixer
from attlas.numerics import wide_dtype
from attlas.ops.attention import attention
from attlas.reference import multiscale as truth
from attlas.scores import RelativeBias
from attlas.shapes import SeqInfo

KINDS = ("dense", "factorised-dense", "random", "fixed-random", "factorised-random", "dot-product")


@dataclass(frozen=True, eq=False)
class Product:
    """Scores q_i . k_j: q [B or 1, Tq, H, w], k [B or 1, Tk, H, w]; `extra` [Tk, H] is added to every query's."""

    q: Tensor
    k: Tensor
    extra: Tensor | None = None

    def matrix(self) -> Tensor:
        scores = torch.einsum("bihw,bjhw->bhij", self.q, self.k.expand(self.q.shape[0], -1, -1, -1))
        return scores if self.extra is None else scores + self.extra.T[:, None]


class Synthesizer(RowMixer):
    """y = o(softmax(S) v), S = sum_p alpha_p S_p over the chosen kinds of scores, alpha = softmax(mix)

        dense              S_ij = W2_j . relu(W1 x_i + b1) + b2_j, for every head its own; W2_j belongs to position j
        factorised-dense   S_ij = A_i[j // b] B_i[j % b], A and B like dense with a and b outputs, a b >= max_len
        random             S_ij = R_ij, learned
        fixed-random       S_ij = R_ij, drawn once (a buffer)
        factorised-random  S_ij = R1_i . R2_j, of width `rank`
        dot-product        S_ij = scale q_i . k_j

    kinds     one of them, or several to mix
    max_len   positions that the learned scores are made for
    hidden    width of relu(...) per head, for the dense kinds; None = head_dim
    rank      of factorised-random; None = 8
    scale     of dot-product; None = 1 / sqrt(head_dim)
    combine   several kinds: "shares" learns alpha, "sum" has alpha = 1 for each
    causal    only j <= i

    All but random and factorised-dense are products of a feature of i and a feature of j, so that no T x T matrix is kept. Cost:
    4 head_dim flops per pair and head, with hidden or rank in place of head_dim for the scores. Cache (causal): v, and k for
    dot-product. Source: Tay et al. 2020, arXiv 2005.00743.
    """

    name = "synthesizer"
    R_fixed: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_len: int,
        kinds: str | Sequence[str] = "dense",
        hidden: int | None = None,
        rank: int | None = None,
        scale: float | None = None,
        combine: Literal["shares", "sum"] = "shares",
        causal: bool = False,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(dim)
        self.kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        call = f"synthesizer(dim={dim}, num_heads={num_heads}, max_len={max_len}, kinds={kinds!r}, hidden={hidden}, rank={rank})"
        _, self.head_dim = check_heads(call, dim, num_heads, None, head_dim)
        if not self.kinds or len(set(self.kinds)) != len(self.kinds) or not set(self.kinds) <= set(KINDS):
            raise OptionError(f"{call}: kinds are different ones of {', '.join(KINDS)}")
        dense = {"dense", "factorised-dense"} & set(self.kinds)
        if (hidden is not None and not dense) or (rank is not None and "factorised-random" not in self.kinds):
            raise OptionError(f"{call}: hidden belongs to the dense kinds, rank to factorised-random")
        if (scale is not None and "dot-product" not in self.kinds) or combine not in ("shares", "sum"):
            raise OptionError(f"{call}: scale={scale} belongs to dot-product, combine={combine!r} is 'shares' or 'sum'")
        if combine == "sum" and len(self.kinds) == 1:
            raise OptionError(f"{call}: combine='sum' needs several kinds")
        self.scale, self.combine = self.head_dim**-0.5 if scale is None else float(scale), combine
        self.num_heads, self.max_len, self.causal = num_heads, max_len, causal
        self.hidden, self.rank = self.head_dim if hidden is None else hidden, 8 if rank is None else rank
        if min(max_len, self.hidden, self.rank) < 1:
            raise OptionError(f"{call}: max_len, hidden and rank must be at least 1")
        inner = num_heads * self.head_dim
        self.v_proj, self.o_proj = nn.Linear(dim, inner, bias=bias), nn.Linear(inner, dim, bias=bias)
        learned = len(self.kinds) > 1 and combine == "shares"
        self.mix_logits = nn.Parameter(torch.zeros(len(self.kinds))) if learned else None
        self.sides = (math.isqrt(max_len - 1) + 1, -(-max_len // (math.isqrt(max_len - 1) + 1)))
        self._make_scores(max_len, bias)

    def _make_scores(self, n: int, bias: bool) -> None:
        h, width, inner = self.num_heads, self.hidden, self.num_heads * self.head_dim
        if "dense" in self.kinds:
            self.dense = TwoLayers(self.dim, h, width, n)
        if "factorised-dense" in self.kinds:
            self.dense_a, self.dense_b = (TwoLayers(self.dim, h, width, side) for side in self.sides)
        if "random" in self.kinds:
            self.R = nn.Parameter(torch.randn(h, n, n))
        if "fixed-random" in self.kinds:
            self.register_buffer("R_fixed", torch.randn(h, n, n))
        if "factorised-random" in self.kinds:
            self.R1, self.R2 = (nn.Parameter(torch.randn(n, h, self.rank) * self.rank**-0.25) for _ in range(2))
        if "dot-product" in self.kinds:
            self.q_proj, self.k_proj = (nn.Linear(self.dim, inner, bias=bias) for _ in range(2))

    # ---- scores -------------------------------------------------------------------------------------------------------------

    def _keys(self, x: Tensor) -> Tensor | None:
        """The keys of dot-product, the only scores that look at the other token."""
        return self.k_proj(x).unflatten(-1, (self.num_heads, -1)) if "dot-product" in self.kinds else None

    def _scores(self, kind: str, x: Tensor, keys: Tensor | None, at: Tensor, to: Tensor) -> Product | Tensor:
        """Scores of queries x [B, Tq, dim] at positions `at` for keys at positions `to`: a Product, or [B or 1, H, Tq, Tk]."""
        if kind == "dense":
            return Product(self.dense.features(x), self.dense.weight[to][None], self.dense.bias[to])
        if kind == "factorised-random":
            return Product(self.R1[at][None].expand(x.shape[0], -1, -1, -1), self.R2[to][None])
        if kind == "dot-product":
            assert keys is not None
            return Product(self.q_proj(x).unflatten(-1, (self.num_heads, -1)) * self.scale, keys)
        if kind == "factorised-dense":
            a, b = self.dense_a(x), self.dense_b(x)  # [B, Tq, H, sides]
            scores = a[..., torch.div(to, self.sides[1], rounding_mode="floor")] * b[..., to % self.sides[1]]
            return scores.transpose(1, 2)
        table = self.R if kind == "random" else self.R_fixed
        return table[:, at][:, :, to][None]

    def _attend(self, x: Tensor, keys: Tensor | None, v: Tensor, at: Tensor, to: Tensor, mask: Mask | None) -> Tensor:
        """x [B, Tq, dim] at positions `at`, keys and v [B, Tk, H, D] at positions `to` -> [B, Tq, H, D]."""
        shares = x.new_ones(len(self.kinds)) if self.mix_logits is None else torch.softmax(self.mix_logits, 0)
        scores = [self._scores(kind, x, keys, at, to) for kind in self.kinds]
        if self.impl == "reference" and len(at) == len(to):
            allowed = None if mask is None else mask.to_bool(len(at), len(to), device=x.device)
            return truth.synthesizer([s.matrix() if isinstance(s, Product) else s for s in scores], shares, v, allowed)
        dtype = wide_dtype(x.dtype)
        q, k, table = [], [], None
        for share, s in zip(shares.to(dtype), scores, strict=True):
            if isinstance(s, Product):
                one = () if s.extra is None else (torch.ones_like(s.q[..., :1]),)
                q.append(share * torch.cat([s.q, *one], -1).to(dtype))
                k.append(torch.cat([s.k, *(() if s.extra is None else (s.extra[None, ..., None],))], -1).to(dtype))
            else:
                table = share * s.to(dtype) if table is None else table + share * s.to(dtype)
        rows = (x.shape[0], -1, -1, -1)
        queries = torch.cat(q, -1) if q else v.new_zeros(x.shape[0], len(at), self.num_heads, 1, dtype=dtype)
        others = torch.cat([t.expand(rows) for t in k], -1) if k else v.new_zeros(*v.shape[:-1], 1, dtype=dtype)
        bias = None if table is None else RelativeBias.dense(table[0] if len(table) == 1 else table)
        return attention(queries, others, v.to(dtype), mask=mask, score_mod=bias, scale=1.0, impl=self.impl).to(v.dtype)

    # ---- rows ---------------------------------------------------------------------------------------------------------------

    def _values(self, x: Tensor) -> Tensor:
        return self.v_proj(x).unflatten(-1, (self.num_heads, -1))

    def mix_rows(self, x: Tensor, positions: Tensor) -> Tensor:
        mask: Mask | None = None
        if self.causal:
            consecutive = bool((positions.diff() == 1).all())
            mask = Causal() if consecutive else Dense(positions[:, None] >= positions)
        return self.o_proj(self._attend(x, self._keys(x), self._values(x), positions, positions, mask).flatten(-2))

    mix_irregular = RowMixer.mix_anywhere

    def cache_specs(self) -> tuple[PartSpec, ...]:
        if not self.causal:
            return super().cache_specs()
        shape = (self.num_heads, self.head_dim)
        names = ("k", "v") if "dot-product" in self.kinds else ("v",)
        return (PartSpec("tokens", tuple((name, shape) for name in names)),)

    def mix_cached(self, x: Tensor, positions: Tensor, seq: SeqInfo, cache: Cache) -> Tensor:
        part, keys = cache.parts[0], self._keys(x)
        part.write((self._values(x),) if keys is None else (keys, self._values(x)), seq)
        done = []
        for row, new, at in zip(seq.rows, x.split(seq.lengths), positions.split(seq.lengths), strict=True):
            if not len(new):
                continue
            held = tuple(t[None].to(x.dtype) for t in part.read(row).tensors)
            to = torch.arange(held[0].shape[1], device=x.device)
            done.append(self._attend(new[None], held[0] if keys is not None else None, held[-1], at, to, Causal())[0])
        return self.o_proj(torch.cat(done).flatten(-2))

    def flops(self, seq_len: int) -> int:
        t, h, width = seq_len, self.num_heads, self.hidden
        inner, pairs = h * self.head_dim, t * (t + 1) // 2 if self.causal else t * t
        dense = 2 * t * self.dim * h * width
        each = {
            "dense": dense + 2 * pairs * h * width,
            "factorised-dense": 2 * dense + 2 * t * h * width * sum(self.sides),
            "factorised-random": 2 * pairs * h * self.rank,
            "dot-product": 4 * t * self.dim * inner + 2 * pairs * inner,
        }
        return 4 * t * self.dim * inner + 2 * pairs * inner + sum(each.get(kind, 0) for kind in self.kinds)

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, max_len={self.max_len}"
        shown += f", kinds={self.kinds}, hidden={self.hidden}, rank={self.rank}, combine={self.combine}, scale={self.scale:.6g}"
        return f"{shown}, causal={self.causal}, impl={self.impl}"


class TwoLayers(nn.Module):
    """W2 relu(W1 x + b1) + b2 for every head: features [..., H, hidden], weight [outputs, H, hidden], bias [outputs, H]."""

    def __init__(self, dim: int, heads: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(dim, heads * hidden)
        self.weight = nn.Parameter(torch.randn(outputs, heads, hidden) * hidden**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs, heads))

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)).unflatten(-1, self.weight.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., H, outputs]."""
        return torch.einsum("...hw,ohw->...ho", self.features(x), self.weight) + self.bias.T
