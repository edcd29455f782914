"""Which batch rows and heads are worked on together, and how their slices are taken from token-major tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.kernels.blocked.layout import SCORES, SLAB_KEYS, Layout

NARROW = 16  # products with fewer columns: BLAS adds their terms one by one to what they are accumulated on


def add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
    """total += factor * left @ right, [N, M, C], with the rounding error of the product and of one addition."""
    if right.shape[-1] < NARROW:
        return total.add_(torch.bmm(left, right), alpha=factor)
    return total.baddbmm_(left, right, alpha=factor)


@dataclass(frozen=True)
class Shape:
    """batch, query heads, key heads of a call, and the dtype that it is computed in."""

    batch: int
    heads: int
    kv_heads: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Chunk:
    """Batch rows b0..b1-1, key heads h0..h1-1 and their query heads a0..a1-1; map_b, map_h: which rows of the layout are worked
    through: map_h None means those that all heads have in common.

    In a chunk, one unit is one key head of one batch row: tensors become [units, group * queries, ...] with the query heads of
    a group stacked under each other, so that keys and values are never repeated.
    """

    b0: int
    b1: int
    h0: int
    h1: int
    a0: int
    a1: int
    map_b: int
    map_h: int | None

    @property
    def units(self) -> int:
        return (self.b1 - self.b0) * (self.h1 - self.h0)

    @property
    def group(self) -> int:
        return (self.a1 - self.a0) // (self.h1 - self.h0)

    def keys(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys or values [B, Tk, Hkv, D] as [units, Tk, D]: a view wherever strides allow it."""
        x = x[self.b0 : self.b1, :, self.h0 : self.h1].transpose(1, 2).to(dtype)
        if x.stride(-1) != 1:
            x = x.contiguous()
        return x[0] if x.shape[0] == 1 else x.flatten(0, 1)  # not reshape(-1, ...): there may be no elements

    def rows(self, x: Tensor, q0: int, q1: int, dtype: torch.dtype) -> Tensor:
        """Query-side [B, Tq, H, D] as [units, group * queries, D], to be read only: a view where strides allow it."""
        part = self._part(x, q0, q1)
        if part.dtype != dtype or part.shape[0] > 1 or self.group > 1 or part.stride(-1) != 1:
            return self.load(x, q0, q1, dtype)
        return part[0]

    def load(self, x: Tensor, q0: int, q1: int, dtype: torch.dtype) -> Tensor:
        """Query-side [B, Tq, H, D] as a fresh [units, group * queries, D]."""
        part = self._part(x, q0, q1)
        return torch.empty(part.shape, dtype=dtype, device=x.device).copy_(part).view(self.units, -1, x.shape[-1])

    def store(self, x: Tensor, q0: int, q1: int, value: Tensor, over: Tensor | float = 1.0) -> None:
        """Write value / over, [units, group * queries, D], to the rows of x [B, Tq, H, D]."""
        part = self._part(x, q0, q1)
        divisor = over.view(*part.shape[:-1], 1) if isinstance(over, Tensor) else over
        torch.div(value.view(part.shape), divisor, out=part)

    def _part(self, x: Tensor, q0: int, q1: int) -> Tensor:
        """[batch rows, heads, queries, D]"""
        return x[self.b0 : self.b1, q0:q1, self.a0 : self.a1].transpose(1, 2)

    def by_head(self, scores: Tensor) -> Tensor:
        """[units, group * queries, w] as [batch rows, query heads, queries, w]."""
        return scores.view(self.b1 - self.b0, self.a1 - self.a0, -1, scores.shape[-1])

    def add_keys(self, total: Tensor, k0: int, k1: int, left: Tensor, right: Tensor, factor: float) -> None:
        """total[:, k0:k1] += factor * left @ right for the chunk.

        total [B, Tk, Hkv, D], left [units, k1-k0, M], right [units, M, D]."""
        part = total[self.b0 : self.b1, k0:k1, self.h0 : self.h1].transpose(1, 2)
        if part.shape[0] == 1:
            add_product(part[0], left, right, factor)
        else:
            part.add_(torch.bmm(left, right).view(part.shape), alpha=factor)


def chunks(shape: Shape, layout: Layout) -> Iterator[Chunk]:
    """All (batch row, head) pairs, as few chunks as the score buffer allows: once for the rows that all heads have in common, and
    head by head for the others."""
    yield from _all_heads(shape, layout)
    if layout.heads > 1:
        g = shape.group
        for i in range(shape.batch):
            for a in range(shape.heads):
                yield Chunk(i, i + 1, a // g, a // g + 1, a, a + 1, i if layout.batch > 1 else 0, a)


def _all_heads(shape: Shape, layout: Layout) -> Iterator[Chunk]:
    b, h, hkv, g = shape.batch, shape.heads, shape.kv_heads, shape.group
    widest = min(layout.mean_keys, SLAB_KEYS) if layout.heads == 1 else SLAB_KEYS
    fit = max(1, int(SCORES // (g * layout.block_q * max(1.0, widest))))
    if layout.batch == 1 and fit >= 2 * hkv and b > 1:
        step = fit // hkv
        for i in range(0, b, step) if layout.has_common(0) else ():
            yield Chunk(i, min(b, i + step), 0, hkv, 0, h, 0, None)
        return
    parts = -(-hkv // min(fit, hkv))
    step = -(-hkv // parts)
    for i in range(b):
        row = i if layout.batch > 1 else 0
        for j in range(0, hkv, step) if layout.has_common(row) else ():
            end = min(hkv, j + step)
            yield Chunk(i, i + 1, j, end, j * g, end * g, row, None)
