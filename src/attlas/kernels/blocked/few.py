"""Attention of a few queries (decoding, speculation, short suffixes): one product over the keys that can be reached at all.

Nothing is compiled and nothing is saved for a backward pass; what counts here is the cost of a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.kernels.blocked.block_scores import LN2, LOG2E
from attlas.kernels.blocked.layout import few_queries
from attlas.kernels.reach import Rectangle, rectangles
from attlas.masks.expr import Mask
from attlas.masks.geometry import Grid
from attlas.scores import ScoreMod

MOST_SCORES = 1 << 22  # beyond this many scores at once the slabs of the general path use less memory and stay in cache


def is_few(q: Tensor, k: Tensor, grid: Grid) -> bool:
    """Whether `attend_few` is meant for the call."""
    return few_queries(grid) and q.numel() // q.shape[-1] * k.shape[1] <= MOST_SCORES


def attend_few(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None,
    grid: Grid,
    score_mod: ScoreMod | None,
    scale: float,
    sink: Tensor | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """As `blocked.softmax.attention`; None when the general path has to do it (see `careful` there, or a scattered grid)."""
    found = rectangles(mask, grid)
    if found is None:
        return None
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, tq, h, _ = q.shape
    whole = len(found) == 1
    out = None if whole else q.new_empty(b, tq, h, v.shape[-1])
    lse = None if whole or not need_lse else torch.empty(b, tq, h, dtype=dtype, device=q.device)
    for r in found:
        part = q if whole else q[:, r.q0 : r.q1]
        o, l = _rectangle(part, k[:, r.k0 : r.k1], v[:, r.k0 : r.k1], r, score_mod, scale, sink, need_lse)
        if r.mask is not None and not bool(o.sum(dtype=dtype).isfinite()):
            return None
        if out is None:
            return o, l
        out[:, r.q0 : r.q1] = o
        if lse is not None and l is not None:
            lse[:, r.q0 : r.q1] = l
    if out is None:  # no query at all
        return q.new_empty(b, tq, h, v.shape[-1]), torch.empty(b, tq, h, dtype=dtype, device=q.device) if need_lse else None
    return out, lse


def _rectangle(
    q: Tensor, k: Tensor, v: Tensor, r: Rectangle, mod: ScoreMod | None, scale: float, sink: Tensor | None, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, tq, h, d = q.shape
    tk, hkv, dv = v.shape[1:]
    if tk == 0:
        return q.new_zeros(b, tq, h, dv), _lse_without_keys(q, sink, dtype) if need_lse else None
    plain = mod is None and r.mask is None and sink is None and not need_lse
    queries = q.to(dtype) * (scale if plain or mod is not None else scale * LOG2E)
    if tq > 1:
        queries = queries.transpose(1, 2)
    together = h // hkv * tq  # said, as it cannot be inferred where there are no sequences
    s = _products(queries.reshape(b, hkv, together, d), k.to(dtype).permute(0, 2, 3, 1))  # [B, Hkv, G * tq, tk]
    if plain:
        o = _products(torch.softmax(s, -1), v.to(dtype).transpose(1, 2)).view(b, h, tq, dv)
        return o.transpose(1, 2).to(q.dtype), None
    s = s.view(b, h, tq, tk)
    if mod is not None:
        s = mod(s, r.grid.q.positions(q.device), r.grid.k.positions(q.device)) * LOG2E
    if r.mask is not None:
        s = s.masked_fill_(~r.mask.dense(r.grid, device=q.device), -torch.inf)
    top = s.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
    if sink is not None:
        sink = sink.to(dtype).view(h, 1, 1) * LOG2E
        top = torch.maximum(top, sink)
    p = s.sub_(top).exp2_()
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        total += torch.exp2(sink - top)
    o = _products(p.reshape(b, hkv, together, tk), v.to(dtype).transpose(1, 2)).view(b, h, tq, dv)
    o = o.div_(total.clamp(min=1.0))  # 0 without keys, at least 1 with any
    lse = total.log2().add_(top).mul_(LN2)[..., 0].transpose(1, 2) if need_lse else None
    return o.transpose(1, 2).to(q.dtype), lse


def _lse_without_keys(q: Tensor, sink: Tensor | None, dtype: torch.dtype) -> Tensor:
    fill = torch.full((), -torch.inf, dtype=dtype, device=q.device) if sink is None else sink.to(dtype)
    return fill.expand(q.shape[:-1]).clone()


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left [B, Hkv, M, K] @ right [B, Hkv, K, N]. Batch rows one by one when that spares a copy of the keys."""
    b = left.shape[0]
    if b == 1:
        return torch.bmm(left[0], right[0])[None]
    if right.shape[-1] * right.shape[-2] <= 1 << 14:
        return torch.matmul(left, right)
    out = left.new_empty(*left.shape[:-1], right.shape[-1])
    for i in range(b):
        torch.bmm(left[i], right[i], out=out[i])
    return out
