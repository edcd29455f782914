"""Joining partial softmax results by their log-sum-exp."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from attlas.errors import ShapeError
from attlas.shapes import describe

_SMALL = 1 << 16  # numbers up to which operator calls cost more than the memory of intermediates


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from the results over each set.

    lse = log sum_r exp(lse_r)      out = sum_r exp(lse_r - lse) out_r

    parts: (out_r [..., H, Dv], lse_r [..., H]) with natural-log lse, e.g. `[B, Tq, H, Dv]` and `[B, Tq, H]`; any number, at least
    one. Computed in fp32 (fp64 when a lse is fp64); out in the parts' dtype, lse in the computing dtype. A part with lse = -inf
    has no keys: its out is not read. Where all parts are empty: out 0, lse -inf, zero gradient. Differentiable in every out and
    lse, twice. A key that is in two parts counts twice. A sink must be in one part only. Memory: log2(parts) outs. ShapeError.
    Online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    parts = list(parts)
    _check(parts)
    dtype = torch.float64 if any(lse.dtype == torch.float64 for _, lse in parts) else torch.float32
    each = torch.stack([lse.to(dtype) for _, lse in parts])
    top = each.detach().amax(0)
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = torch.exp(each - top)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + total.log()).masked_fill(empty, -math.inf)
    shares = weights / total
    merged = _pairwise_sum(
        weighted(out.to(dtype), share, own == -math.inf) for (out, own), share in zip(parts, shares, strict=True)
    )
    return merged.to(parts[0][0].dtype), lse


def weighted(out: Tensor, share: Tensor, empty: Tensor) -> Tensor:
    """out [..., D] times share [...], 0 in the rows that are `empty` (bool [...]), whatever out holds there. Of large tensors it
    keeps no copy for the gradient."""
    if torch.compiler.is_compiling() or out.numel() <= _SMALL:
        return out.masked_fill(empty[..., None], 0.0) * share[..., None]
    product = _Weighted.apply(out, share, empty)
    assert isinstance(product, Tensor)
    return product


class _Weighted(torch.autograd.Function):
    """The product first, its empty rows overwritten in place; the gradient is made of operators that have one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, share: Tensor, empty: Tensor) -> Tensor:
        return (out * share[..., None]).masked_fill_(empty[..., None], 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, share, empty = ctx.saved_tensors
        if torch.is_grad_enabled():  # the second gradient multiplies by `out`, of which empty rows may hold a NaN
            out = out.masked_fill(empty[..., None], 0.0)
        of_out = weighted(grads[0], share, empty) if ctx.needs_input_grad[0] else None
        of_share = (grads[0] * out).sum(-1).masked_fill(empty, 0.0) if ctx.needs_input_grad[1] else None
        return of_out, of_share, None


def _pairwise_sum(terms: Iterable[Tensor]) -> Tensor:
    """Sum of a tree of pairs: the rounding error grows with the logarithm of the number of terms, as does the memory."""
    sums: list[tuple[int, Tensor]] = []  # (terms summed, sum), sizes falling
    for term in terms:
        size = 1
        while sums and sums[-1][0] == size:
            term = sums.pop()[1] + term
            size *= 2
        sums.append((size, term))
    total = sums.pop()[1]
    while sums:
        total = sums.pop()[1] + total
    return total


def _check(parts: list[tuple[Tensor, Tensor]]) -> None:
    if not parts:
        raise ShapeError("merge([]): needs at least one part")
    first = parts[0][0]
    for out, lse in parts:
        same = out.shape == first.shape and out.dtype == first.dtype and out.device == first.device == lse.device
        if not same or lse.shape != out.shape[:-1] or not lse.is_floating_point():
            said = "; ".join(describe(out=o, lse=l) for o, l in parts)
            raise ShapeError(f"merge([{said}]): every out must have one shape, dtype and device, and lse that shape without Dv")
