"""Online softmax over slabs of keys (Milakov and Gimelshein 2018; Dao et al. 2022, arXiv:2205.14135)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attlas.kernels.blocked.block_scores import LN2, LOG2E, BlockScores, Buffer
from attlas.kernels.blocked.careful import masked_product
from attlas.kernels.blocked.chunks import Chunk, Shape, add_product, chunks
from attlas.kernels.blocked.gangs import Gang, gathered, put, taken
from attlas.kernels.blocked.layout import Layout, Row
from attlas.masks.geometry import Grid
from attlas.scores import ScoreMod


class Forward:
    """One forward pass. q, k, v [B, T, heads, D], any strides."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, *, shape: Shape, scale: float, sink: Tensor | None):
        self.q, self.k, self.v, self.shape, self.scale = q, k, v, shape, scale
        self.sink = None if sink is None else sink.detach().to(shape.dtype) * LOG2E
        self.scores = Buffer(q, shape.dtype)
        self.spare = Buffer(q, shape.dtype)
        self.gathered = Buffer(q, shape.dtype)

    def run(
        self, layout: Layout, mod: ScoreMod | None, grid: Grid, *, need_stats: bool, careful: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(out [B, Tq, H, Dv] in q's dtype, stats [B, Tq, H, 2] in the computing dtype or None).

        stats: each row's maximum, in units of log 2, and the sum of 2^(score - maximum); see `log_sum_exp`.
        """
        b, tq, h, _ = self.q.shape
        out = self.q.new_empty(b, tq, h, self.v.shape[-1])
        self.out = out
        self.stats = torch.empty(b, tq, h, 2, dtype=self.shape.dtype, device=out.device) if need_stats else None
        self.score = BlockScores(layout, mod, grid, scale=self.scale, dtype=self.shape.dtype, careful=careful)
        for chunk in chunks(self.shape, layout):
            self.score.start_chunk(chunk, self.shape.heads)
            keys, values = chunk.keys(self.k, self.shape.dtype), chunk.keys(self.v, self.shape.dtype)
            together: Sequence[Gang] = ()
            rows: Iterable[Row]
            if careful or mod is not None or self.sink is not None:
                rows = layout.rows(chunk.map_b, chunk.map_h, isolate=careful)
            else:
                together, rows = layout.shared_out(chunk.map_b, chunk.map_h)
            if together:
                self._gangs(chunk, together, keys[0], values[0])
            for row in rows:
                self._row(chunk, row, keys, values)
        return out, self.stats

    def _gangs(self, chunk: Chunk, together: Sequence[Gang], keys: Tensor, values: Tensor) -> None:
        """What `_row` does, for several rows at a time of one slab without masked pairs. keys, values [Tk, D]."""
        size, size_k = self.score.layout.block_q, self.score.layout.block_k
        for gang in together:
            queries = taken(self.q, chunk, gang, size, self.shape.dtype)
            s = self.scores.shaped(queries.shape[0], size, gang.each * size_k)
            key = gathered(keys, gang, size_k, self.gathered)
            torch.baddbmm(s, queries, key.transpose(1, 2), beta=0, alpha=self.score.factor, out=s)
            top = s.amax(-1, keepdim=True)
            weights = s.sub_(top).exp2_()
            total = weights.sum(-1, keepdim=True)
            value = gathered(values, gang, size_k, self.gathered)
            put(self.out, chunk, gang, torch.bmm(weights, value).div_(total))
            if self.stats is not None:
                put(self.stats, chunk, gang, torch.cat([top, total], -1))

    def _row(self, chunk: Chunk, row: Row, keys: Tensor, values: Tensor) -> None:
        dtype = self.shape.dtype
        queries = chunk.rows(self.q, row.q0, row.q1, dtype)
        top, total = self._start(chunk, queries)
        acc: Tensor | None = None
        for slab in row.slabs:
            s, _ = self.score(queries, self.score.keys_of(keys, slab), row, slab, self.scores, self.spare)
            peak = s.amax(-1, keepdim=True)
            if slab.tiles or self.score.mod is not None:  # all scores may be -inf: from a finite maximum exp2 makes 0, not NaN
                peak.clamp_(min=torch.finfo(dtype).min)
            if top is not None:
                peak = torch.maximum(top, peak)
                rescale = torch.exp2(top.sub_(peak))
                total = None if total is None else total.mul_(rescale)
                acc = None if acc is None else acc.mul_(rescale)
            top = peak
            weights = s.sub_(top).exp2_()
            mass = weights.sum(-1, keepdim=True)
            total = mass if total is None else total.add_(mass)
            value = self.score.keys_of(values, slab)
            if self.score.careful and slab.tiles:
                self.score.fill(weights, row, slab, 0.0)
                part = masked_product(weights, value, self.score.seen(row, slab))
                acc = part if acc is None else acc.add_(part)
            else:
                acc = torch.bmm(weights, value) if acc is None else add_product(acc, weights, value)
        self._finish(chunk, row, acc, top, total)

    def _start(self, chunk: Chunk, queries: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Running maximum and sum [units, M, 1] before any key: the sink's, or nothing yet."""
        if self.sink is None:
            return None, None
        per_query = queries.shape[1] // chunk.group
        sink = self.sink[chunk.a0 : chunk.a1].view(1, -1, chunk.group, 1)
        sink = sink.expand(chunk.b1 - chunk.b0, -1, -1, per_query).reshape(chunk.units, -1, 1)
        top = sink.clamp(min=torch.finfo(sink.dtype).min)
        return top, torch.exp2(sink - top)

    def _finish(self, chunk: Chunk, row: Row, acc: Tensor | None, top: Tensor | None, total: Tensor | None) -> None:
        queries = chunk.group * (row.q1 - row.q0)
        zero = torch.zeros((), dtype=self.shape.dtype, device=self.out.device)
        if acc is None or total is None:
            chunk.store(self.out, row.q0, row.q1, zero.expand(chunk.units, queries, self.out.shape[-1]))
        else:  # the largest weight is 1, so the sum is at least 1, or 0 where there is no key
            chunk.store(self.out, row.q0, row.q1, acc, total.clamp(min=1.0))
        if self.stats is not None:
            both = zero.expand(chunk.units, queries, 2) if top is None or total is None else torch.cat([top, total], -1)
            chunk.store(self.stats, row.q0, row.q1, both)


def log_sum_exp(stats: Tensor) -> Tensor:
    """Natural log of the denominator [B, Tq, H] from `stats`; -inf for a row without keys."""
    top, total = stats.unbind(-1)
    return total.log2().add_(top).mul_(LN2)
