"""Block-wise softmax attention in plain torch: any mask, any score modification, any device, O(T) memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attlas.kernels.blocked.backward import Backward
from attlas.kernels.blocked.chunks import Shape
from attlas.kernels.blocked.few import attend_few, is_few
from attlas.kernels.blocked.forward import Forward, log_sum_exp
from attlas.kernels.blocked.layout import Layout, make_layout
from attlas.masks.expr import Mask
from attlas.masks.geometry import Grid
from attlas.numerics import first_order
from attlas.scores import ScoreMod


def attention(
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
) -> tuple[Tensor, Tensor | None]:
    """q [B, Tq, H, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv] -> (out [B, Tq, H, Dv], lse [B, Tq, H] or None).

    A packed batch comes as B = 1 with a packed grid. Nothing is validated here. Time: proportional to the blocks of pairs that
    the mask touches. Memory beside inputs and outputs: lse, and a few MiB.
    """
    tensors = () if score_mod is None else score_mod.tensors()
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, sink, *tensors))
    if not wants_grad and is_few(q, k, grid):
        found = attend_few(q, k, v, mask=mask, grid=grid, score_mod=score_mod, scale=scale, sink=sink, need_lse=need_lse)
        if found is not None:
            return found
    call = _Call(q, k, mask, grid, score_mod, scale)
    if wants_grad:
        out, lse = _Attention.apply(call, q, k, v, sink, *tensors)
        return out, lse if need_lse else None
    out, stats = call.forward(q, k, v, sink, need_lse)
    return out, None if stats is None else log_sum_exp(stats)


class _Call:
    """What forward and backward share beside tensors."""

    def __init__(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid, mod: ScoreMod | None, scale: float):
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.shape = Shape(q.shape[0], q.shape[2], k.shape[2], dtype)
        self.grid, self.mod, self.scale = grid, mod, scale
        self.layout: Layout = make_layout(mask, grid, group=self.shape.group, device=q.device)
        self.masked = mask is not None or grid.packed

    def forward(self, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, need_stats: bool) -> tuple[Tensor, Tensor | None]:
        work = Forward(q, k, v, shape=self.shape, scale=self.scale, sink=sink)
        out, stats = work.run(self.layout, self.mod, self.grid, need_stats=need_stats, careful=False)
        # 0 * NaN taints every row that shares a tile with a masked NaN, so a finite output proves that nothing leaked.
        if self.masked and not bool(out.sum(dtype=self.shape.dtype).isfinite()):
            out, stats = work.run(self.layout, self.mod, self.grid, need_stats=need_stats, careful=True)
        return out, stats


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        out, stats = call.forward(q, k, v, sink, True)
        assert stats is not None
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, stats, sink, *tensors)
        return out, log_sum_exp(stats)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        call: _Call = ctx.call
        q, k, v, out, stats, sink, *tensors = saved
        mod = call.mod if call.mod is None else call.mod.replace_tensors(tensors)
        work = Backward(q, k, v, out, stats, shape=call.shape, scale=call.scale)
        for careful in (False, True):
            work.run(call.layout, mod, call.grid, grad_out, grad_lse, mod_wanted=tuple(ctx.needs_input_grad[5:]), careful=careful)
            if not call.masked or work.finite:
                break
        dsink = work.sink_gradient(sink) if sink is not None and ctx.needs_input_grad[4] else None
        sums = [None if s is None else s.to(t.dtype) for s, t in zip(work.mod_sums, tensors, strict=True)]
        return None, work.dq, work.dk.to(k.dtype), work.dv.to(v.dtype), dsink, *sums
