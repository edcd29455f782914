"""Gradients of attention by recomputing each slab's weights from saved row statistics (Dao et al. 2022, arXiv:2205.14135).

    P = exp(S - lse)    D = rowsum(dO * O) - dlse    dV = P^T dO    dS = P * (dO V^T - D)    dQ = scale dS K    dK = scale dS^T Q

The weights are kept as P = E / total with E = 2^(S - top), and 1 / total goes into dO and D: no rounding of lse enters, and no
pass over a block is spent on the division.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attlas.kernels.blocked.block_scores import LOG2E, BlockScores, Buffer
from attlas.kernels.blocked.careful import masked_product
from attlas.kernels.blocked.chunks import Chunk, Shape, add_product, chunks
from attlas.kernels.blocked.gangs import Gang, blocks_of, gathered, put, taken
from attlas.kernels.blocked.layout import Layout, Row, Slab
from attlas.masks.geometry import Grid
from attlas.scores import ScoreMod


class Backward:
    """One backward pass. out, stats are the forward's; grad_out, grad_lse may be None (zero)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, *, shape: Shape, scale: float):
        self.q, self.k, self.v, self.out, self.stats = q, k, v, out, stats
        self.shape, self.scale = shape, scale
        self.scores, self.spare, self.weights, self.gathered = (Buffer(q, shape.dtype) for _ in range(4))
        self.sums = (Buffer(q, shape.dtype), Buffer(q, shape.dtype))

    def run(
        self,
        layout: Layout,
        mod: ScoreMod | None,
        grid: Grid,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        *,
        mod_wanted: tuple[bool, ...],
        careful: bool,
    ) -> None:
        """Leaves dq, dk, dv, mod_sums and delta [B, Tq, H, 1] (D / total) on self."""
        dtype = self.shape.dtype
        self.grad_out, self.grad_lse = grad_out, None if grad_lse is None else grad_lse.unsqueeze(-1)
        self.dq = torch.empty_like(self.q, memory_format=torch.contiguous_format)
        self.dk = torch.zeros(self.k.shape, dtype=dtype, device=self.k.device)
        self.dv = torch.zeros(self.v.shape, dtype=dtype, device=self.v.device)
        self.delta = torch.empty_like(self.stats[..., :1])
        tensors = () if mod is None else mod.tensors()
        self.mod_sums: list[Tensor | None] = [
            torch.zeros(t.shape, dtype=dtype, device=t.device) if wanted else None
            for t, wanted in zip(tensors, mod_wanted, strict=True)
        ]
        self.score = BlockScores(layout, mod, grid, scale=self.scale, dtype=dtype, careful=careful)
        for chunk in chunks(self.shape, layout):
            self.score.start_chunk(chunk, self.shape.heads)
            keys, values = chunk.keys(self.k, dtype), chunk.keys(self.v, dtype)
            together: Sequence[Gang] = ()
            rows: Iterable[Row]
            if careful or mod is not None:
                rows = layout.rows(chunk.map_b, chunk.map_h, isolate=careful)
            else:
                together, rows = layout.shared_out(chunk.map_b, chunk.map_h)
            if together:
                self._gangs(chunk, together, keys[0], values[0])
            for row in rows:
                self._row(chunk, row, keys, values)

    def _gangs(self, chunk: Chunk, together: Sequence[Gang], keys: Tensor, values: Tensor) -> None:
        """What `_row` does, for several rows at a time of one slab without masked pairs. keys, values [Tk, D]."""
        size = self.score.layout.block_k
        dk, dv = (x.shaped(len(y) // size, size, y.shape[-1]).zero_() for x, y in zip(self.sums, (keys, values), strict=True))
        for gang in together:
            self._gang(chunk, gang, keys, values, dk, dv)
        for total, found in ((self.dk, dk), (self.dv, dv)):
            blocks_of(total[chunk.b0, :, chunk.h0], size).add_(found)

    def _gang(self, chunk: Chunk, gang: Gang, keys: Tensor, values: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Adds to dk, dv [blocks, block_k, D]: contiguous, as index_add_ is several times slower where they are not. The gathered
        values, the gathered keys and the parts of dv and dk take turns in one buffer."""
        dtype, size, size_k = self.shape.dtype, self.score.layout.block_q, self.score.layout.block_k
        queries = taken(self.q, chunk, gang, size, dtype)
        top, total = taken(self.stats, chunk, gang, size, dtype).split(1, -1)
        share = 1.0 / total
        if self.grad_out is None:
            grad, delta = torch.zeros_like(queries[..., :1]).expand(*queries.shape[:2], dv.shape[-1]), torch.zeros_like(share)
        else:
            grad = taken(self.grad_out, chunk, gang, size, dtype) * share
            delta = (taken(self.out, chunk, gang, size, dtype) * grad).sum(-1, keepdim=True)
        if self.grad_lse is not None:
            delta.addcmul_(taken(self.grad_lse, chunk, gang, size, dtype), share, value=-1)
        put(self.delta, chunk, gang, delta)
        shape = len(gang.rows), size, gang.each * size_k
        value = gathered(values, gang, size_k, self.gathered)
        ds = torch.bmm(grad, value.transpose(1, 2), out=self.weights.shaped(*shape)).sub_(delta)
        key, s = gathered(keys, gang, size_k, self.gathered), self.scores.shaped(*shape)
        p = torch.baddbmm(s, queries, key.transpose(1, 2), beta=0, alpha=self.score.factor, out=s).sub_(top).exp2_()
        put(self.dq, chunk, gang, torch.bmm(ds.mul_(p), key).mul_(self.scale))
        for to, weights, right, factor in ((dv, p, grad, 1.0), (dk, ds, queries, self.scale)):
            part = self.gathered.shaped(len(gang.rows), gang.each * size_k, right.shape[-1])
            torch.baddbmm(part, weights.transpose(1, 2), right, beta=0, alpha=factor, out=part)
            to.index_add_(0, gang.cols, part.view(-1, *to.shape[1:]))

    def _row(self, chunk: Chunk, row: Row, keys: Tensor, values: Tensor) -> None:
        dtype, q0, q1 = self.shape.dtype, row.q0, row.q1
        queries = chunk.rows(self.q, q0, q1, dtype)
        top, total = chunk.rows(self.stats, q0, q1, dtype).split(1, -1)
        share = (1.0 / total).masked_fill_(total == 0, 0.0)  # rows without keys
        if self.grad_out is None:
            grad = torch.zeros(chunk.units, queries.shape[1], self.v.shape[-1], dtype=dtype, device=queries.device)
            delta = torch.zeros_like(share)
        else:
            grad = chunk.load(self.grad_out, q0, q1, dtype).mul_(share)
            delta = (chunk.rows(self.out, q0, q1, dtype) * grad).sum(-1, keepdim=True)
        if self.grad_lse is not None:
            delta.addcmul_(chunk.rows(self.grad_lse, q0, q1, dtype), share, value=-1)
        chunk.store(self.delta, q0, q1, delta)
        dq: Tensor | None = None
        for slab in row.slabs:
            key, value = self.score.keys_of(keys, slab), self.score.keys_of(values, slab)
            s, raw = self.score(queries, key, row, slab, self.scores, self.spare)
            p = s.sub_(top).exp2_()
            ds = torch.bmm(grad, value.transpose(1, 2), out=self.weights.shaped(*s.shape)).sub_(delta)
            if self.score.careful and slab.tiles:
                dq = self._careful(chunk, row, slab, (queries, grad, key), (p, ds, raw), dq)
                continue
            self._add(chunk, slab, self.dv, p, grad, 1.0)
            ds.mul_(p)
            if self.score.mod is not None:
                ds = self.score.mod_backward(raw, ds, row, slab, self.mod_sums)
            self._add(chunk, slab, self.dk, ds, queries, self.scale)
            dq = torch.bmm(ds, key) if dq is None else add_product(dq, ds, key)
        if dq is None:
            dq = torch.zeros_like(queries)
        chunk.store(self.dq, q0, q1, dq.mul_(self.scale))

    def _add(self, chunk: Chunk, slab: Slab, total: Tensor, weights: Tensor, right: Tensor, factor: float) -> None:
        """total[keys of the slab] += factor * weights^T right."""
        at = 0
        for a, b in slab.runs:
            chunk.add_keys(total, a, b, weights[:, :, at : at + b - a].transpose(1, 2), right, factor)
            at += b - a

    def _careful(
        self,
        chunk: Chunk,
        row: Row,
        slab: Slab,
        given: tuple[Tensor, Tensor, Tensor],
        block: tuple[Tensor, Tensor, Tensor],
        dq: Tensor | None,
    ) -> Tensor:
        """The same for a slab with masked pairs where something is not finite: masked pairs are nothing, not zero times it."""
        (queries, grad, key), (p, ds, raw) = given, block
        seen = self.score.seen(row, slab)
        self.score.fill(p, row, slab, 0.0)
        ds.mul_(p)
        self.score.fill(ds, row, slab, 0.0)
        if self.score.mod is not None:
            ds = self.score.mod_backward(raw, ds, row, slab, self.mod_sums).contiguous()
            self.score.fill(ds, row, slab, 0.0)
        ((a, b),) = slab.runs
        for total, weights, right, factor in ((self.dv, p, grad, 1.0), (self.dk, ds, queries, self.scale)):
            part = masked_product(weights.transpose(1, 2), right, seen.t())
            to = total[chunk.b0 : chunk.b1, a:b, chunk.h0 : chunk.h1].transpose(1, 2)
            to.add_(part.view(to.shape), alpha=factor)
        part = masked_product(ds, key, seen)
        return part if dq is None else dq.add_(part)

    @property
    def finite(self) -> bool:
        found = [self.dq, self.dk, self.dv, *(s for s in self.mod_sums if s is not None)]
        return all(bool(t.sum(dtype=self.shape.dtype).isfinite()) for t in found)

    def sink_gradient(self, sink: Tensor) -> Tensor:
        """A sink is a key with value 0: its weight times -D, summed over queries."""
        weight = torch.exp2(sink.to(self.shape.dtype) * LOG2E - self.stats[..., 0])
        return -(weight * self.delta[..., 0]).sum((0, 1)).to(sink.dtype)
