"""The linear recurrence in chunks: inside a chunk as matrix products, between chunks one small product per chunk.

Decay is kept in log space and subtracted before the exponential, so nothing overflows however long the sequence; cumulative sums
are
fp64. For decay per channel a chunk is cut into sub-chunks: pairs in different sub-chunks are factored at the later one's start
(both factors
are at most 1), pairs inside one sub-chunk are factored only where the decay across it stays far from the range of fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUB = 16  # tokens of a sub-chunk
SAFE_RANGE = 60.0  # exp(+-60) and their products stay inside fp32


def _segments(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, ...] with T a multiple of chunk -> [B, H, T // chunk, chunk, ...], contiguous."""
    x = x.transpose(1, 2)
    return x.reshape(*x.shape[:2], x.shape[2] // chunk, chunk, *x.shape[3:]).contiguous()


def _tri(n: int, device: torch.device, *, strict: bool) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril(-1 if strict else 0)


class _Decay:
    """Decay of one chunking: total (inclusive) and before (exclusive) log decay, fp64, [B, H, N, C, 1 or K]."""

    def __init__(self, log_decay: Tensor, dtype: torch.dtype):
        self.total = log_decay.double().cumsum(3)
        self.before = self.total - log_decay.double()
        self.dtype = dtype
        self.per_channel = log_decay.shape[-1] > 1

    def from_start(self, *, inclusive: bool) -> Tensor:
        return (self.total if inclusive else self.before).to(self.dtype).exp()

    def to_end(self) -> Tensor:
        return (self.total[..., -1:, :] - self.total).to(self.dtype).exp()

    def whole(self) -> Tensor:
        return self.total[..., -1, :].to(self.dtype).exp()

    def pairs(self, x: Tensor, y: Tensor, *, inclusive: bool) -> Tensor:
        """sum_k x_ik y_jk exp(grown_ik - total_jk): j <= i with grown = total, or j < i with grown = before."""
        grown = self.total if inclusive else self.before
        if not self.per_channel:
            allowed = _tri(x.shape[3], x.device, strict=not inclusive)
            gap = (grown - self.total.transpose(-1, -2)).to(self.dtype)
            return (x @ y.transpose(-1, -2)) * gap.masked_fill(~allowed, float("-inf")).exp()
        return self._pairs_per_channel(x, y, grown, inclusive)

    def _pairs_per_channel(self, x: Tensor, y: Tensor, grown: Tensor, inclusive: bool) -> Tensor:
        length = x.shape[3]
        rows = []
        for lo in range(0, length, SUB):
            hi = min(lo + SUB, length)
            here = slice(lo, hi)
            start = self.before[..., lo : lo + 1, :]
            xs = x[..., here, :] * (grown[..., here, :] - start).to(self.dtype).exp()
            parts = []
            if lo:
                ys = y[..., :lo, :] * (start - self.total[..., :lo, :]).to(self.dtype).exp()
                parts.append(xs @ ys.transpose(-1, -2))
            parts.append(
                self._inside(x[..., here, :], y[..., here, :], grown[..., here, :], self.total[..., here, :], start, inclusive)
            )
            if hi < length:
                parts.append(x.new_zeros(*x.shape[:3], hi - lo, length - hi))
            rows.append(torch.cat(parts, -1))
        return torch.cat(rows, -2)

    def _inside(self, x: Tensor, y: Tensor, grown: Tensor, total: Tensor, start: Tensor, inclusive: bool) -> Tensor:
        allowed = _tri(x.shape[-2], x.device, strict=not inclusive)
        span = (start - total[..., -1:, :]).amax() if total.numel() else torch.zeros(())
        if float(span.detach()) <= SAFE_RANGE:
            xs = x * (grown - start).to(self.dtype).exp()
            ys = y * (start - total).to(self.dtype).exp()
            return (xs @ ys.transpose(-1, -2)).masked_fill(~allowed, 0)
        gap = (grown[..., :, None, :] - total[..., None, :, :]).to(self.dtype)
        gap = gap.masked_fill(~allowed[..., None], float("-inf"))
        return torch.einsum("...ik,...jk,...ijk->...ij", x, y, gap.exp())


def _states(transition: Tensor, added: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """S_{n+1} = transition_n S_n + added_n: the state before every chunk [B, H, N, K, V], and the last one.

    transition: [B, H, N, K, K] (matrix) or [B, H, N, K or 1] (diagonal)."""
    diagonal = transition.dim() == 4
    state, entry = initial, []
    # unbind, not indexing: the gradient of every x[:, :, n] would be a full-size tensor of zeros
    for move, add in zip(transition.unbind(2), added.unbind(2), strict=True):
        entry.append(state)
        state = (move[..., None] * state if diagonal else move @ state) + add
    return torch.stack(entry, 2), state


def chunk_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    bonus: Tensor | None,
    initial_state: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.linear.scan_recurrent; log_decay None, [B, T, H, 1] or [B, T, H, K]. O(T (C + K) V) time."""
    length = q.shape[1]
    pad = -length % chunk_size

    def cut(x: Tensor) -> Tensor:  # padding tokens decay by exp(0) and write nothing: the final state is untouched
        return _segments(torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad)) if pad else x, chunk_size)

    q, k, v = cut(q * scale), cut(k), cut(v)
    decay = _Decay(cut(log_decay) if log_decay is not None else q.new_zeros(*q.shape[:4], 1), q.dtype)
    read_after = bonus is None
    inner = decay.pairs(q, k, inclusive=read_after) @ v
    write = (k * decay.to_end()).transpose(-1, -2) @ v
    reach = q * decay.from_start(inclusive=read_after)
    if a is None or b is None:
        entry, last = _states(decay.whole(), write, initial_state)
        out = inner + reach @ entry
    else:
        a, b = cut(a), cut(b)
        eye = torch.eye(chunk_size, dtype=q.dtype, device=q.device)
        known = torch.cat([a * decay.from_start(inclusive=False), decay.pairs(a, k, inclusive=False) @ v], -1)
        solved = torch.linalg.solve_triangular(eye - decay.pairs(a, b, inclusive=False), known, upper=False, unitriangular=True)
        from_state, from_chunk = solved.split([a.shape[-1], v.shape[-1]], -1)  # u_t = from_state_t S + from_chunk_t
        erase = (b * decay.to_end()).transpose(-1, -2)
        whole = decay.whole().expand(*decay.whole().shape[:3], a.shape[-1])
        entry, last = _states(torch.diag_embed(whole) + erase @ from_state, write + erase @ from_chunk, initial_state)
        out = inner + reach @ entry + decay.pairs(q, b, inclusive=read_after) @ (from_state @ entry + from_chunk)
    if bonus is not None:
        out = out + torch.einsum("bhnck,hk,bhnck->bhnc", q, bonus, k)[..., None] * v
    out = out.flatten(2, 3)[:, :, :length].transpose(1, 2)
    return out, last
