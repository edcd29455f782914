"""Lambda layers: the context becomes linear maps, one for all queries and one per position, that are applied to the queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attlas.cache.layer import Cache
from attlas.errors import OptionError, UnsupportedError
from attlas.nn.attention import check_heads
from attlas.nn.recurrent import RecurrentMixer, Rows, States, scan_flops
from attlas.reference import multiscale as truth
from attlas.shapes import SeqInfo

BLOCK = 32  # tokens whose values are weighted by one matrix
FAR = -1e30  # a key that no softmax sees; finite, so that rows of nothing but padding have finite gradients


class LambdaLayer(RecurrentMixer):
    """y_n = (sum_m softmax_m(k)_m v_m^T + sum_m E_{m-n} v_m^T)^T q_n for every head; the heads share keys, values and E
    (multi-query).

    dim, num_heads  width of x and number of query heads; values are dim / num_heads wide
    dim_k           width of queries and keys
    dim_u           intra-depth: so many keys, values and tables E, whose lambdas are added up
    scope           the position lambdas reach over `scope` tokens (odd: as many on both sides): a convolution of the values. E is
                    a function of m - n alone. 2 T - 1 covers everything
    causal          not in the paper: the scope lies before the token (its own included), and the softmax over the context is the
                    running one, a recurrence lambda_n = exp(Z_{n-1} - Z_n) lambda_{n-1} + exp(k_n - Z_n) v_n^T with Z the
                    running log-sum-exp of the keys
    norm            batch norm on queries and values, as in the paper; None = not causal (its statistics look at the whole batch
                    while it trains). In eval mode it is a fixed scale and shift

    The heads are put side by side without an output projection, as in the paper. Cost: O(T dim_u dim_k V (scope + 1)) flops for
    the lambdas and O(T H dim_k V) to use them; no T x T map. Cache (causal), whatever the length: dim_u (dim_k V + dim_k +
    (scope - 1) V) numbers and a flag. Source: Bello 2021, arXiv 2102.08602.
    """

    name = "lambda"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        dim_k: int = 16,
        dim_u: int = 1,
        scope: int = 23,
        causal: bool = False,
        norm: bool | None = None,
    ) -> None:
        super().__init__(dim)
        call = f"lambda(dim={dim}, num_heads={num_heads}, dim_k={dim_k}, dim_u={dim_u}, scope={scope}, causal={causal})"
        _, self.dim_v = check_heads(call, dim, num_heads, None, None)
        if min(dim_k, dim_u, scope) < 1 or (scope % 2 == 0 and not causal):
            raise OptionError(f"{call}: dim_k, dim_u and scope must be at least 1, and scope odd unless causal")
        self.num_heads, self.dim_k, self.dim_u, self.scope, self.causal = num_heads, dim_k, dim_u, scope, causal
        self.q_proj = nn.Linear(dim, num_heads * dim_k, bias=False)
        self.k_proj = nn.Linear(dim, dim_u * dim_k, bias=False)
        self.v_proj = nn.Linear(dim, dim_u * self.dim_v, bias=False)
        self.E = nn.Parameter(torch.randn(scope, dim_k, dim_u) * (scope * dim_u) ** -0.5)
        with_norm = not causal if norm is None else norm
        self.q_norm = nn.BatchNorm1d(num_heads * dim_k) if with_norm else None
        self.v_norm = nn.BatchNorm1d(dim_u * self.dim_v) if with_norm else None

    def _project(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None and self.v_norm is not None:
            q, v = _normalised(q, self.q_norm, valid), _normalised(v, self.v_norm, valid)
        q = q.unflatten(-1, (self.num_heads, self.dim_k))
        return q, k.unflatten(-1, (self.dim_u, self.dim_k)), v.unflatten(-1, (self.dim_u, self.dim_v))

    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        if self.impl != "reference" or cache is not None or x.numel() == 0:
            if self.impl not in ("auto", "reference") and not self.causal:
                raise UnsupportedError(f"{self}: only the causal form runs an op; got impl {self.impl!r}")
            return super().mix(x, memory=memory, positions=positions, seq=seq, cache=cache)
        rows = x.split(1) if seq is None else [row[None] for row in x.split(seq.lengths)]
        done = [truth.lambda_layer(*self._project(row, None), self.E, self.causal).flatten(2) for row in rows if row.shape[1]]
        return torch.cat(done) if seq is None else torch.cat([y[0] for y in done])

    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        u, k, v = self.dim_u, self.dim_k, self.dim_v
        return ("lambda", (u, k, v)), ("log_norm", (u, k)), ("seen", (1,)), ("tail", (self.scope - 1, u * v))

    def run(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        q, k, v = (s.to(states[0].dtype) for s in self._project(x, rows.valid))
        v = rows.mask(v)
        if rows.valid is not None:
            k = k.masked_fill(~rows.valid[..., None, None], FAR)
        if self.causal:
            content, states = self._running(q, k, v, states, rows)
        else:
            total = torch.einsum("nmuk,nmuv->nkv", torch.softmax(k, 1), v)
            content = torch.einsum("nthk,nkv->nthv", q, total)
        y = content + self._by_position(q, v.flatten(2), states[3])
        states = (*states[:3], rows.last(v.flatten(2), states[3]))
        return y.flatten(2).to(x.dtype), states

    def _by_position(self, q: Tensor, v: Tensor, tail: Tensor) -> Tensor:
        """The position lambdas, a convolution of v [N, T, U V] along the tokens, applied to q [N, T, H, K]: K V numbers of
        lambdas per token, or, where those are fewer, H U scope weights of the values around it."""
        n, t = v.shape[:2]
        before = tail.to(v.dtype) if self.causal else v.new_zeros(n, self.scope // 2, v.shape[2])
        after = v.new_zeros(n, 0 if self.causal else self.scope // 2, v.shape[2])
        padded = torch.cat([before, v, after], 1).unflatten(-1, (self.dim_u, self.dim_v))
        if self.num_heads * self.dim_u * self.scope <= self.dim_k * self.dim_v:
            return banded(torch.einsum("nthk,jku->nuhtj", q, self.E.to(v.dtype)), padded)
        rows = padded.permute(0, 3, 2, 1).flatten(0, 1)  # [N V, U, T + scope - 1]
        lambdas = F.conv1d(rows, self.E.to(v.dtype).permute(1, 2, 0)).view(n, self.dim_v, self.dim_k, t)
        return q @ lambdas.permute(0, 3, 2, 1).contiguous()

    def _running(self, q: Tensor, k: Tensor, v: Tensor, states: States, rows: Rows) -> tuple[Tensor, States]:
        held, log_norm, seen, tail = states
        n, t = k.shape[:2]
        fresh = seen[..., None, None] == 0
        before = log_norm[:, None].masked_fill(fresh, FAR)
        norm = torch.logaddexp(torch.logcumsumexp(k, 1), before)  # Z, of all keys so far
        before = torch.where(fresh, norm[:, :1], before)  # nothing is held yet that could decay
        decay = (torch.cat([before, norm[:, :-1]], 1) - norm).clamp(max=0)
        heads = (self.dim_u, self.num_heads, self.dim_k)  # the heads share what they read: each recurrence runs once per head
        queries = q[:, :, None].expand(n, t, *heads).flatten(2, 3)
        writes = (rows.mask((k - norm).exp()), rows.mask(decay))
        keys, decays = (s[:, :, :, None].expand(n, t, *heads).flatten(2, 3) for s in writes)
        values = v[:, :, :, None].expand(n, t, *heads[:2], self.dim_v).flatten(2, 3)
        start = held[:, :, None].expand(n, *heads, self.dim_v).flatten(1, 2)
        out, end = self.recur(queries, keys, values, start, log_decay=decays, scale=1.0)
        filled = torch.full_like(seen, 1.0) if rows.valid is None else rows.valid.any(1, keepdim=True).to(seen.dtype)
        states = (end.unflatten(1, heads[:2])[:, :, 0], norm[:, -1], torch.maximum(seen, filled), tail)
        return out.unflatten(2, heads[:2]).sum(2), states

    def flops(self, seq_len: int) -> int:
        lambdas = scan_flops(seq_len, self.dim_u, self.dim_k, self.dim_v) // 2
        taps = sum(min(i + 1, self.scope) for i in range(min(seq_len, self.scope))) + self.scope * max(0, seq_len - self.scope)
        if not self.causal:
            half = self.scope // 2
            taps = sum(min(i + half + 1, seq_len) - max(i - half, 0) for i in range(seq_len))
        positions = 2 * taps * self.dim_u * self.dim_k * self.dim_v
        used = scan_flops(seq_len, self.num_heads, self.dim_k, self.dim_v) // 2
        width = self.num_heads * self.dim_k + self.dim_u * (self.dim_k + self.dim_v)
        return 2 * seq_len * self.dim * width + lambdas + positions + used

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, dim_k={self.dim_k}, dim_u={self.dim_u}, scope={self.scope}"
        return f"{shown}, causal={self.causal}, norm={self.q_norm is not None}, impl={self.impl}"


def banded(weights: Tensor, values: Tensor) -> Tensor:
    """out[n, t, h] = sum_u sum_j weights[n, u, h, t, j] values[n, t + j, u]: weights [N, U, H, T, J], values [N, T + J - 1, U, V]
    -> [N, T, H, V]. Blocks of tokens are one product each, of a matrix whose rows are the weights, each one place further."""
    h, t, j = weights.shape[2:]
    block = min(BLOCK, t)
    count, width = -(-t // block), block + j - 1
    fill = count * block - t
    rows = F.pad(weights, (0, block, 0, fill)).unflatten(3, (count, block)).permute(0, 3, 1, 2, 4, 5)
    band = rows.flatten(-2)[..., : block * width].unflatten(-1, (block, width))  # row i from place i on: rows were width + 1 long
    near = F.pad(values, (0, 0, 0, 0, 0, fill)).unfold(1, width, block).permute(0, 1, 2, 4, 3)  # [N, count, U, width, V]
    out = (band.flatten(3, 4) @ near).sum(2)
    return out.unflatten(2, (h, block)).transpose(2, 3).flatten(1, 2)[:, :t]


def _normalised(x: Tensor, norm: nn.BatchNorm1d, valid: Tensor | None) -> Tensor:
    """Batch norm over the tokens of x [N, T, C] that exist."""
    if valid is None:
        return norm(x.flatten(0, 1)).view_as(x)
    return torch.zeros_like(x).masked_scatter(valid[..., None], norm(x[valid]))
