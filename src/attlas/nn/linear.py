"""Kernelised attention: softmax's exp(q . k) replaced by a product of features, so that the sum over keys is a state."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attlas.errors import OptionError
from attlas.nn.attention import check_heads
from attlas.nn.recurrent import RecurrentMixer, Rows, States, scan_flops
from attlas.numerics import full_precision, wide_dtype

LARGEST_FEATURE = 40.0  # log of the largest key feature: a sum of a million of them stays inside fp32


class LinearTransformer(RecurrentMixer):
    """y_t = o( sum_{s <= t} phi(q_t) . phi(k_s) v_s / (sum_{s <= t} phi(q_t) . phi(k_s) + eps) ),   phi(x) = elu(x) + 1

    dim, num_heads  width of x and number of heads;   head_dim  None = dim / num_heads
    causal          False: the sums run over the whole sequence (no cache)
    eps             keeps the denominator off zero
    State: H x K x (V + 1) in fp32: the sum of phi(k) v^T, and of phi(k). Cost O(T K V) per head.
    Source: Katharopoulos et al. 2020, arXiv 2006.16236.
    """

    name = "linear-transformer"

    def __init__(
        self, dim: int, num_heads: int, *, head_dim: int | None = None, causal: bool = True, eps: float = 1e-6, bias: bool = False
    ) -> None:
        super().__init__(dim)
        self.num_heads, self.causal, self.eps = num_heads, causal, eps
        call = f"{type(self).__name__}(dim={dim}, num_heads={num_heads}, head_dim={head_dim})"
        _, self.head_dim = check_heads(call, dim, num_heads, None, head_dim)
        inner = num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(inner, dim, bias=bias)

    @property
    def feature_dim(self) -> int:
        return self.head_dim

    def features(self, x: Tensor, *, query: bool) -> Tensor:
        """phi [N, T, H, head_dim] -> [N, T, H, feature_dim], not negative."""
        return F.elu(x) + 1

    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return (("state", (self.num_heads, self.feature_dim, self.head_dim + 1)),)

    def run(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.features(q, query=True), rows.mask(self.features(k, query=False))
        v = rows.mask(v).to(q.dtype)
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # the column of ones sums phi(k): the denominator
        if self.causal:
            out, state = self.recur(q, k, v, states[0], scale=1.0)
            states = (state,)
        else:
            wide = wide_dtype(x.dtype)
            total = torch.einsum("nthk,nthv->nhkv", k.to(wide), v.to(wide))
            out = torch.einsum("nthk,nhkv->nthv", q.to(wide), total)
        y = out[..., :-1] / (out[..., -1:] + self.eps)
        return self.o_proj(y.to(x.dtype).flatten(-2)), states

    def flops(self, seq_len: int) -> int:
        inner = self.num_heads * self.head_dim
        return 8 * seq_len * self.dim * inner + scan_flops(seq_len, self.num_heads, self.feature_dim, self.head_dim + 1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}"


class Performer(LinearTransformer):
    """Linear attention whose features estimate the softmax kernel exp(q . k / sqrt(d)) without bias (FAVOR+).

    num_features   m, number of random features; None = head_dim * ln(head_dim), at least 1
    features_kind  "positive": phi(x) = m^-1/2 exp(w x - |x|^2 / 2), never negative;
                   "trigonometric": random Fourier features exp(|x|^2 / 2) m^-1/2 [cos(w x), sin(w x)]: signed, higher variance;
                   with x scaled by d^-1/4 and rows w drawn from N(0, I), orthogonal in blocks of d
    seed           of the draw; `redraw(seed)` draws anew (between sequences: a state belongs to one draw)

    The shift that keeps exp() in range is a constant of the draw for keys (w x - |x|^2 / 2 is at most |w|^2 / 2) and per token
    for
    queries, where it cancels in the division: nothing looks at later tokens, unlike a maximum over all keys.
    Source: Choromanski et al. 2020, arXiv 2009.14794; Rahimi and Recht 2007 for the trigonometric features.
    """

    name = "performer"

    projection: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_features: int | None = None,
        features_kind: Literal["positive", "trigonometric"] = "positive",
        causal: bool = True,
        eps: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__(dim, num_heads, head_dim=head_dim, causal=causal, eps=eps)
        if features_kind not in ("positive", "trigonometric") or (num_features is not None and num_features < 1):
            raise OptionError(
                f"Performer(features_kind={features_kind!r}, num_features={num_features}): the kind is "
                f"'positive' or 'trigonometric', "
                "num_features at least 1"
            )
        self.features_kind = features_kind
        width = self.head_dim
        self.num_features = max(1, int(width * torch.tensor(float(width)).log())) if num_features is None else num_features
        self.register_buffer("projection", orthogonal_gaussian(self.num_features, width, seed))

    @property
    def feature_dim(self) -> int:
        return self.num_features * (2 if self.features_kind == "trigonometric" else 1)

    def redraw(self, seed: int) -> None:
        """Draw new random features in place."""
        self.projection.copy_(orthogonal_gaussian(self.num_features, self.head_dim, seed))

    def features(self, x: Tensor, *, query: bool) -> Tensor:
        wide = wide_dtype(x.dtype)
        x = x.to(wide) * self.head_dim**-0.25
        w = self.projection.to(wide)
        with full_precision(x):  # what follows takes the exponential of it
            angle, half_norm = x @ w.T, x.square().sum(-1, keepdim=True) / 2
        if self.features_kind == "trigonometric":
            # exp(+|x|^2 / 2) of a query cancels in the division
            size = torch.ones_like(half_norm) if query else half_norm.clamp(max=LARGEST_FEATURE).exp()
            return size * self.num_features**-0.5 * torch.cat([angle.cos(), angle.sin()], -1)
        if query:  # exp(-|x|^2 / 2) cancels too
            shift = angle.detach().amax(-1, keepdim=True)
        else:
            shift = half_norm + (w.square().sum(-1).amax() / 2 - LARGEST_FEATURE).clamp(min=0)
        return (angle - (shift + math.log(self.num_features) / 2)).exp()


def orthogonal_gaussian(rows: int, width: int, seed: int) -> Tensor:
    """[rows, width] with N(0, I) rows that are orthogonal within blocks of `width`: directions from QR, lengths of fresh
    Gaussians.

    The signs of R's diagonal go to Q: without them the directions that QR returns are not uniform, and the estimate is biased."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-rows // width)):
        q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        blocks.append((q * r.diagonal().sign()).T)
    lengths = torch.randn(rows, width, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:rows] * lengths).to(torch.get_default_dtype())
