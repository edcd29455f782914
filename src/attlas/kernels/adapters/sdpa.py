"""torch's scaled_dot_product_attention, where it computes exactly what is asked.

SDPA's causal mask compares array indices ("start" alignment), and its kernels multiply masked weights of 0 by masked values: a
NaN there reaches rows that do not see it, forwards through v and backwards through k. Such calls are refused.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.kernels.reach import allows_all
from attlas.masks.expr import Mask
from attlas.masks.geometry import Grid
from attlas.masks.leaves import Causal

LONG = 1536 * 1536  # pairs from which block-wise code, nearer to the GEMM rate, beats torch's CPU kernel
LONG_DECODE = 1024  # keys from which it does so for few queries whose heads share keys, which torch's kernel reads once per head


def unsupported(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None, grid: Grid, needs_grad: bool) -> str | None:
    """Why SDPA cannot run the call exactly, None = it can."""
    kind = _kind(mask, grid)
    if kind is None:
        return f"it can only do no mask and Causal() where the first query and the first key stand at one position, not {mask!r}"
    if kind == "causal" and not all(_finite(x) for x in ((k, v) if needs_grad else (v,))):
        return "k or v holds NaN or inf, which it lets through to rows that do not see them"
    return None


def _finite(x: Tensor) -> bool:
    """Whether the sum is finite, which proves that every element is (a sum that overflows is only a needless refusal)."""
    if x.is_meta:
        return True
    once = x[tuple(slice(None) if stride else slice(0, 1) for stride in x.stride())]  # expanded dimensions hold one value
    return bool(once.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite())


def slower_here(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why a later implementation is faster on this device, None = none is."""
    if q.device.type != "cpu":
        return None
    (tq, h), (tk, hkv) = q.shape[-3:-1], k.shape[-3:-1]
    if tq * tk > LONG:
        return f"on the CPU block-wise code is faster beyond {LONG} pairs"
    if tq <= 32 and h > hkv and tk >= LONG_DECODE:
        return f"on the CPU block-wise code is faster for few queries over {LONG_DECODE} or more shared keys"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None, grid: Grid, scale: float) -> Tensor:
    """q [B, Tq, H, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv] -> [B, Tq, H, Dv]; the caller has asked `unsupported`."""
    if k.shape[1] == 0 or q.numel() == 0:
        nothing = [x.flatten()[:0].sum() for x in (q, k, v)]  # zeros that belong to the graph: gradients are zeros, not missing
        return q.new_zeros(*q.shape[:-1], v.shape[-1]) + nothing[0] + nothing[1] + nothing[2]
    qh, kh, vh = (x.transpose(1, 2) if x.stride(-1) == 1 else x.contiguous().transpose(1, 2) for x in (q, k, v))
    causal = _kind(mask, grid) == "causal"
    grouped = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(qh, kh, vh, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _kind(mask: Mask | None, grid: Grid) -> str | None:
    """ "full", "causal" (row i sees columns 0 ... i), or None for anything else."""
    if grid.packed:
        return None
    if mask is None or grid.q.span is None or grid.k.span is None or allows_all(mask, grid.q.span, grid.k.span):
        return "full"
    if not isinstance(mask, Causal) or len(grid.q.segments) > 1 or len(grid.k.segments) > 1:
        return None
    first_q, first_k = grid.q.segments[0], grid.k.segments[0]
    same = first_q.position == first_k.position if mask.align == "end" else first_q.index == first_k.index
    return "causal" if same else None
