"""Scores of one block of queries against one slab of keys: product, score modification, mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attlas.kernels.blocked.chunks import Chunk
from attlas.kernels.blocked.layout import Layout, Row, Slab
from attlas.masks.geometry import Grid
from attlas.scores import ScoreMod

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


class Buffer:
    """Memory that is used again for every slab, so that it stays in cache."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        self.flat = torch.empty(0, dtype=dtype, device=like.device)

    def shaped(self, n: int, m: int, w: int) -> Tensor:
        size = n * m * w
        if size > self.flat.numel():
            self.flat = torch.empty(size, dtype=self.flat.dtype, device=self.flat.device)
        return self.flat[:size].view(n, m, w)


class BlockScores:
    """Makes the scores of slabs, in units of log 2 (exp2 is several times faster than exp in torch's CPU code).

    careful: mask by selection instead of by adding -inf, so that NaN at a masked pair disappears.
    """

    def __init__(self, layout: Layout, mod: ScoreMod | None, grid: Grid, *, scale: float, dtype: torch.dtype, careful: bool):
        self.layout, self.dtype, self.careful = layout, dtype, careful
        self.mod = mod
        self.factor = scale * LOG2E if mod is None else scale  # a score mod is given natural units
        if mod is not None:
            self.q_pos = grid.q.positions(layout.device)
            self.k_pos = grid.k.positions(layout.device)

    def start_chunk(self, chunk: Chunk, heads: int) -> None:
        """heads: query heads of the whole call."""
        self.chunk = chunk
        self.heads: Tensor | None = None
        if self.mod is None:
            return
        self.chunk_mod = self.mod if self.mod.batch is None else self.mod.rows(chunk.b0, chunk.b1)
        if chunk.a1 - chunk.a0 != heads:
            self.heads = torch.arange(chunk.a0, chunk.a1, device=self.layout.device)

    def keys_of(self, x: Tensor, slab: Slab) -> Tensor:
        """Keys or values [units, Tk, D] of the slab: a view, or a copy when the slab is made of several runs."""
        if len(slab.runs) == 1:
            a, b = slab.runs[0]
            return x[:, a:b]
        return torch.cat([x[:, a:b] for a, b in slab.runs], dim=1)

    def key_positions(self, slab: Slab) -> Tensor:
        if len(slab.runs) == 1:
            a, b = slab.runs[0]
            return self.k_pos[a:b]
        return torch.cat([self.k_pos[a:b] for a, b in slab.runs])

    def __call__(
        self, queries: Tensor, keys: Tensor, row: Row, slab: Slab, buffer: Buffer, spare: Buffer
    ) -> tuple[Tensor, Tensor]:
        """(scores in log 2 units with -inf at masked pairs [units, M, w], what the score mod was given)."""
        n, m = queries.shape[:2]
        out = buffer.shaped(n, m, slab.width)
        torch.baddbmm(out, queries, keys.transpose(1, 2), beta=0, alpha=self.factor, out=out)
        raw = out
        if self.mod is not None:
            if self.careful:
                self.fill(raw, row, slab, 0.0)
            changed = self.chunk_mod(self.chunk.by_head(raw), self.q_pos[row.q0 : row.q1], self.key_positions(slab), self.heads)
            out = spare.shaped(n, m, slab.width)
            torch.mul(changed.reshape(out.shape), LOG2E, out=out)
        if self.careful:
            self.fill(out, row, slab, -math.inf)
        elif slab.tiles:
            queries_in = row.q1 - row.q0
            stacked = out.view(-1, queries_in, slab.width)
            for offset, width, tile in slab.tiles:
                stacked[..., offset : offset + width] += self.layout.bias(tile, self.dtype)[:queries_in, :width]
        return out, raw

    def fill(self, scores: Tensor, row: Row, slab: Slab, value: float) -> None:
        """Write `value` at the masked pairs."""
        queries_in = row.q1 - row.q0
        stacked = scores.view(-1, queries_in, slab.width)
        for offset, width, tile in slab.tiles:
            stacked[..., offset : offset + width].masked_fill_(~self.layout.seen(tile)[:queries_in, :width], value)

    def seen(self, row: Row, slab: Slab) -> Tensor:
        """bool [group * queries, w] of a slab that has a tile, for `masked_product`."""
        queries_in = row.q1 - row.q0
        seen = torch.ones(queries_in, slab.width, dtype=torch.bool, device=self.layout.device)
        for offset, width, tile in slab.tiles:
            seen[:, offset : offset + width] = self.layout.seen(tile)[:queries_in, :width]
        return seen.repeat(self.chunk.group, 1)

    def mod_backward(self, raw: Tensor, grad: Tensor, row: Row, slab: Slab, sums: list[Tensor | None]) -> Tensor:
        """Gradient of the score mod's input; adds the gradients of its tensors onto `sums`."""
        assert self.mod is not None
        if self.mod.batch is not None:
            sums = self.mod.narrow(sums, self.chunk.b0, self.chunk.b1)
        given = self.chunk_mod.backward(
            self.chunk.by_head(raw),
            self.chunk.by_head(grad),
            self.q_pos[row.q0 : row.q1],
            self.key_positions(slab),
            self.heads,
            sums,
        )
        return given.reshape(grad.shape)
