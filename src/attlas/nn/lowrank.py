"""Attention of low rank: Linformer projects keys and values along the sequence, Nystromformer goes through landmarks."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from attlas.errors import OptionError
from attlas.nn.attention import check_heads
from attlas.nn.rows import RowMixer
from attlas.numerics import full_precision, widened
from attlas.ops.attention import attention
from attlas.reference import lowrank as truth

SHARES = ("none", "heads", "key-value")


class LowRankMixer(RowMixer):
    """Base of mixers that compress a whole sequence. A mechanism writes `attend_rows`. `use("reference")` computes the
    brute-force matrices of attlas.reference.lowrank."""

    def __init__(self, dim: int, num_heads: int, head_dim: int | None, bias: bool, call: str) -> None:
        super().__init__(dim)
        self.num_heads = num_heads
        _, self.head_dim = check_heads(call, dim, num_heads, None, head_dim)
        inner = num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(inner, dim, bias=bias)

    @abstractmethod
    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """q, k, v [B, T, H, D] whose tokens stand at `positions` [T] -> [B, T, H, D]."""

    def mix_rows(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(self.attend_rows(q, k, v, positions).flatten(-2))

    mix_irregular = RowMixer.mix_anywhere

    def _projection_flops(self, seq_len: int) -> int:
        return 8 * seq_len * self.dim * self.num_heads * self.head_dim


class Linformer(LowRankMixer):
    """y = o( softmax(q (E k)^T / sqrt(head_dim)) F v ): learned E and F shorten the sequence to `proj_len` keys and values.

    max_len   positions that E and F are made for; shorter sequences use their first columns
    proj_len  number of projected keys and values
    share     "none": E and F of their own for every head; "heads": one E and one F; "key-value": one matrix for both

    Token j weighs in with column j of E and F, so positions matter without any position code. The weights of a row of E are free:
    a constant v does not give a constant y. Bidirectional only.
    Cost: 8 T proj_len inner flops. Source: Wang et al. 2020, arXiv 2006.04768.
    """

    name = "linformer"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_len: int,
        proj_len: int = 256,
        share: Literal["none", "heads", "key-value"] = "heads",
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        call = f"linformer(dim={dim}, num_heads={num_heads}, max_len={max_len}, proj_len={proj_len}, share={share!r})"
        super().__init__(dim, num_heads, head_dim, bias, call)
        if max_len < 1 or proj_len < 1 or share not in SHARES:
            raise OptionError(f"{call}: max_len and proj_len must be at least 1, share one of {', '.join(SHARES)}")
        self.max_len, self.proj_len, self.share = max_len, proj_len, share
        shape = (num_heads if share == "none" else 1, proj_len, max_len)
        self.E = nn.Parameter(torch.empty(shape).uniform_(-(max_len**-0.5), max_len**-0.5))
        self.F = None if share == "key-value" else nn.Parameter(torch.empty(shape).uniform_(-(max_len**-0.5), max_len**-0.5))

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        first = self.E[..., positions]
        second = first if self.F is None else self.F[..., positions]
        if self.impl == "reference":
            return truth.linformer(q, k, v, first, second)
        short_k, short_v = (_along_tokens(m, x) for m, x in ((first, k), (second, v)))
        return attention(q, short_k, short_v, impl=self.impl)

    def flops(self, seq_len: int) -> int:
        return self._projection_flops(seq_len) + 8 * seq_len * self.proj_len * self.num_heads * self.head_dim

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, max_len={self.max_len}"
        return f"{shown}, proj_len={self.proj_len}, share={self.share}, impl={self.impl}"


class Nystromformer(LowRankMixer):
    """y = o( softmax(q l_k^T) Z softmax(l_q k^T) v + conv(v) ): `landmarks` means of segments stand for all queries and keys.

    l_q and l_k are the means of q and k over `landmarks` segments of equal length (to within one token), Z the pseudo-inverse of
    softmax(l_q l_k^T) by `iterations` steps of order three; every product is scaled by head_dim ** -0.5. A sequence of at most
    `landmarks` tokens gets exact softmax attention.

    conv_kernel  odd width of a depthwise convolution of the values along the sequence, one kernel per head; None = without
    iterations   too few leave Z short of the inverse where the landmarks' matrix is badly conditioned
    start        of the iteration: "each" matrix of landmarks is scaled by its own norm (the paper), or all by the largest one of
                 the "batch" and the heads (transformers' default), so that outputs depend on the other rows of the batch

    Nothing in it looks at positions. Bidirectional only: a landmark averages over later tokens. 16-bit inputs are computed in
    fp32, as the inversion amplifies rounding. Cost: 8 T landmarks inner flops, and 8 iterations landmarks^3 per head.
    Source: Xiong et al. 2021, arXiv 2102.03902.
    """

    name = "nystromformer"
    uses_positions = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        landmarks: int = 64,
        conv_kernel: int | None = 65,
        iterations: int = 6,
        start: Literal["each", "batch"] = "each",
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        call = (
            f"nystromformer(dim={dim}, num_heads={num_heads}, landmarks={landmarks}, conv_kernel={conv_kernel}, start={start!r})"
        )
        super().__init__(dim, num_heads, head_dim, bias, call)
        if landmarks < 1 or iterations < 0 or (conv_kernel is not None and (conv_kernel < 1 or conv_kernel % 2 == 0)):
            raise OptionError(f"{call}: landmarks must be at least 1, iterations at least 0, conv_kernel odd or None")
        if start not in ("each", "batch"):
            raise OptionError(f"{call}: start must be 'each' or 'batch'")
        self.shared = start == "batch"
        self.landmarks, self.iterations, self.conv_kernel = landmarks, iterations, conv_kernel
        width = conv_kernel or 1
        drawn = torch.empty(num_heads, width).uniform_(-(width**-0.5), width**-0.5)
        self.conv = None if conv_kernel is None else nn.Parameter(drawn)

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        if self.impl == "reference":
            return truth.nystromformer(q, k, v, self.landmarks, self.iterations, self.conv, self.shared)
        q, k, v = widened(q, k, v)
        with full_precision(q):
            out = attention(q, k, v, impl=self.impl) if q.shape[1] <= self.landmarks else self._through_landmarks(q, k, v)
            if self.conv is not None:
                out = out + _depthwise(v, self.conv.to(v.dtype))
        return out.to(self.o_proj.weight.dtype)

    def _through_landmarks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        marks_q, marks_k = segment_means(q, self.landmarks), segment_means(k, self.landmarks)
        scores = torch.einsum("bmhd,bnhd->bhmn", marks_q, marks_k) * self.head_dim**-0.5
        inverse = truth.pseudo_inverse(torch.softmax(scores, -1), self.iterations, self.shared)
        values = attention(marks_q, k, v, impl=self.impl)  # [B, landmarks, H, D]
        return attention(q, marks_k, torch.einsum("bhmn,bnhd->bmhd", inverse, values), impl=self.impl)

    def flops(self, seq_len: int) -> int:
        inner, m = self.num_heads * self.head_dim, self.landmarks
        total = self._projection_flops(seq_len) + 2 * seq_len * min(self.conv_kernel or 0, seq_len) * inner
        if seq_len <= m:
            return total + 4 * seq_len**2 * inner
        return total + 8 * seq_len * m * inner + 4 * m * m * inner + 8 * self.iterations * m**3 * self.num_heads

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, landmarks={self.landmarks}"
        shown += f", conv_kernel={self.conv_kernel}, iterations={self.iterations}"
        return f"{shown}, start={'batch' if self.shared else 'each'}, impl={self.impl}"


def segment_means(x: Tensor, count: int) -> Tensor:
    """[B, T, H, D] -> [B, count, H, D], count <= T: the mean of each segment; segment j starts at token floor(j T / count)."""
    n = x.shape[1]
    if n % count == 0:
        return x.unflatten(1, (count, -1)).mean(2)
    segment = torch.div((torch.arange(n, device=x.device) + 1) * count - 1, n, rounding_mode="floor")
    sizes = torch.bincount(segment, minlength=count).to(x.dtype)
    sums = x.new_zeros(x.shape[0], count, *x.shape[2:]).index_add(1, segment, x)
    return sums / sizes[:, None, None]


def _along_tokens(matrix: Tensor, x: Tensor) -> Tensor:
    """matrix [H or 1, r, T] times x [B, T, H, D] along the tokens -> [B, r, H, D]."""
    if matrix.shape[0] == 1:
        return torch.einsum("rt,bthd->brhd", matrix[0], x)
    return torch.einsum("hrt,bthd->brhd", matrix, x)


def _depthwise(v: Tensor, kernel: Tensor) -> Tensor:
    """v [B, T, H, D], kernel [H, odd width]: sum_i kernel[h, i] v[t + i - width // 2], zeros outside of the sequence."""
    b, t, h, d = v.shape
    channels = v.permute(0, 3, 2, 1).reshape(b * d, h, t)
    out = functional.conv1d(channels, kernel[:, None], padding=kernel.shape[1] // 2, groups=h)
    return out.view(b, d, h, t).permute(0, 3, 2, 1)
