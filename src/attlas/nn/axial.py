"""Axial attention: tokens of a grid attend along one axis after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from attlas.cache.grouped import GroupedPart
from attlas.cache.layer import Cache
from attlas.cache.part import PartSpec
from attlas.errors import OptionError, ShapeError, UnsupportedError
from attlas.masks.expr import All, Mask, disjunction
from attlas.masks.leaves import Causal, Local, Padding, Strided
from attlas.masks.options import integers
from attlas.nn.attention import Angles, Attend, Attention
from attlas.nn.mixer import Mixer
from attlas.ops.attention import attention
from attlas.positions.rope import Rope
from attlas.shapes import SeqInfo


class AlongAxis(Attention):
    """Attention along one axis of a grid whose cells are numbered row by row: position p has the coordinate p // stride % size on
    an axis of `size` cells that are `stride` positions apart. Rotary positions are the coordinates."""

    rearranges = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        size: int,
        stride: int,
        whole: bool,
        causal: bool,
        head_dim: int | None,
        rope: bool | float | Rope,
        bias: bool | Literal["qkv"],
        attend: Attend,
    ) -> None:
        mask: Mask = All() if whole else Local(size * stride)  # `whole`: the axis is the outermost, every cell lies along it
        if stride > 1:
            mask = mask & Strided(stride)
        if causal:
            mask = mask & Causal()
        super().__init__(dim, num_heads, head_dim=head_dim, mask=mask, rope=rope, bias=bias, attend=attend)
        self.size, self.stride = size, stride

    def _angles(self, positions: Tensor, like: Tensor) -> Angles:
        return super()._angles(torch.div(positions, self.stride, rounding_mode="floor") % self.size, like)

    def _rearranged(self, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor | None:
        """Every line of cells as a row of a batch."""
        if not q.numel():
            return None
        length, lines = q.shape[1], min(self.size, -(-q.shape[1] // self.stride))
        span = lines * self.stride
        spans = -(-length // span)

        def to_lines(x: Tensor) -> Tensor:
            x = functional.pad(x, (0, 0, 0, 0, 0, spans * span - length))
            return x.unflatten(1, (spans, lines, self.stride)).transpose(2, 3).flatten(0, 2)

        mask: Mask | None = Causal() if self.causal else None
        if not self.causal and length % span:  # cells that no token fills
            ends = torch.arange(spans)[:, None] * span + torch.arange(self.stride)
            filled = torch.div(length - ends + self.stride - 1, self.stride, rounding_mode="floor").clamp(0, lines)
            mask = Padding(tuple(filled.flatten().tolist()) * q.shape[0])
        out = self.attend(*map(to_lines, (q, k, v)), mask=mask, **options)
        return out.unflatten(0, (q.shape[0], spans, self.stride)).transpose(2, 3).flatten(1, 3)[:, :length]


class AxialAttention(Mixer):
    """Attention over a grid of cells, one axis at a time; each axis has its own projections, with an output projection.

    shape    cells along each axis, (rows, columns) or (planes, rows, columns); tokens are cells in raster order, the last axis
             first. A sequence may end before the grid is full
    combine  "sequence": last axis, ..., first axis, each reading the outputs of the one before: a token reaches every cell;
             "sum": every axis reads x, the outputs are added;
             "shifted" (causal, two axes): whole rows, then columns down to the row, shifted down by one row and added to x, then
             the row up to the token: every earlier cell is reached. Shifting keeps the later tokens of a row out of its outputs
    causal   no output depends on a later token in raster order. "sequence" and "sum" then mask every axis: a token reaches the
             cells that are neither below nor to the right of it

    The other options are those of Attention. Rotary positions are the coordinates along the axis. Cost: per axis the projections
    and 4 inner flops per pair, T (rows + columns) pairs in all instead of T^2. Cache (causal): the lines that later cells still
    read; the first axis grows. Source: Ho et al. 2019, arXiv 1912.12180.
    """

    name = "axial"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shape: Sequence[int],
        combine: Literal["sequence", "sum", "shifted"] = "sequence",
        causal: bool = False,
        head_dim: int | None = None,
        rope: bool | float | Rope = True,
        bias: bool | Literal["qkv"] = False,
        attend: Attend = attention,
    ) -> None:
        super().__init__(dim)
        call = f"axial(dim={dim}, num_heads={num_heads}, shape={shape!r}, combine={combine!r}, causal={causal})"
        self.shape = integers(call, "shape", shape)
        if len(self.shape) not in (2, 3) or min(self.shape) < 1 or combine not in ("sequence", "sum", "shifted"):
            raise OptionError(f"{call}: shape has two or three axes of at least 1, combine is 'sequence', 'sum' or 'shifted'")
        if combine == "shifted" and not (causal and len(self.shape) == 2):
            raise OptionError(f"{call}: 'shifted' is a causal form over two axes")
        self.combine, self.causal, self.max_len = combine, causal, math.prod(self.shape)

        def along(axis: int, masked: bool) -> AlongAxis:
            stride = math.prod(self.shape[axis + 1 :])
            try:
                return AlongAxis(
                    dim, num_heads, size=self.shape[axis], stride=stride, whole=axis == 0, causal=masked, head_dim=head_dim,
                    rope=rope, bias=bias, attend=attend,
                )  # fmt: skip
            except OptionError as error:
                raise OptionError(f"{call}: {error}") from error

        if combine == "shifted":
            self.axes = nn.ModuleList([along(1, False), along(0, True), along(1, True)])
        else:
            self.axes = nn.ModuleList(along(axis, causal) for axis in reversed(range(len(self.shape))))

    @property
    def stages(self) -> list[AlongAxis]:
        return list(self.axes)  # type: ignore[arg-type]

    def describe_mask(self) -> Mask | None:
        """The pairs of all axes. With "sequence" and "shifted" a token reaches more of them indirectly."""
        return disjunction(stage.mask for stage in self.stages if stage.mask is not None and stage.causal == self.causal)

    def _check_end(self, end: int) -> None:
        if self.max_len is not None and end > self.max_len:
            raise ShapeError(f"{self}: the grid has {self.max_len} cells, x ends at {end}")

    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        if seq is None:
            self._check_end(x.shape[1])
        else:
            self._check_end(max((a + n for a, n in zip(seq.first, seq.lengths, strict=True)), default=0))
        if self.combine == "shifted":
            return self._shifted(x, positions, seq, cache)
        outs, y = [], x
        for i, stage in enumerate(self.stages):
            own = None if cache is None else Cache([cache.parts[i]])
            y = stage.mix(x if self.combine == "sum" else y, memory=None, positions=positions, seq=seq, cache=own)
            outs.append(y)
        return torch.stack(outs).sum(0) if self.combine == "sum" else y

    def mix_irregular(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None) -> Tensor:
        if self.combine == "shifted":
            return super().mix_irregular(x, memory=memory, positions=positions, seq=seq)
        if positions.numel():
            self._check_end(int(positions.max()) + 1)
        outs, y = [], x
        for stage in self.stages:
            y = stage.mix_irregular(x if self.combine == "sum" else y, memory=None, positions=positions, seq=seq)
            outs.append(y)
        return torch.stack(outs).sum(0) if self.combine == "sum" else y

    # ---- shifted ------------------------------------------------------------------------------------------------------------

    def _shifted(self, x: Tensor, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        rows, columns, row = self.stages
        width = self.shape[1]
        if cache is not None:
            assert seq is not None, "a cache comes with the packed form"
            above = self._above_cached(x, seq, cache)
            return row.mix(x + above, memory=None, positions=positions, seq=seq, cache=Cache([cache.parts[0]]))
        if seq is not None and any(first % width for first in seq.first):
            raise UnsupportedError(f"{self}: 'shifted' needs sequences that start at the beginning of a row; got {seq.first}")
        above = x
        for stage in (rows, columns):
            above = stage.mix(above, memory=None, positions=positions, seq=seq, cache=None)
        if seq is None:
            above = functional.pad(above, (0, 0, width, 0))[:, : x.shape[1]]
        elif seq.lengths:
            above = torch.cat([functional.pad(a, (0, 0, width, 0))[: len(a)] for a in above.split(seq.lengths)])
        return row.mix(x + above, memory=None, positions=positions, seq=seq, cache=None)

    def _above_cached(self, x: Tensor, seq: SeqInfo, cache: Cache) -> Tensor:
        """For every new token the column's output one row above it, and the cache brought up to date."""
        pending, lines, last = cache.parts[1:]
        assert isinstance(lines, GroupedPart) and isinstance(last, GroupedPart)
        found: list[tuple[Tensor, ...]] = []
        above = []
        for index, first, new in zip(seq.rows, seq.first, x.split(seq.lengths), strict=True):
            k, v, outs = self._finished_rows(index, first, new, pending, lines)
            found.append((k, v, outs))
            row = first // self.shape[1]
            before = outs.new_zeros(1, *outs.shape[1:])
            if row:
                held = last.read(index, (row - 1, row - 1))
                before = held.tensors[0][held.axis.positions(x.device) == row - 1]
            known = torch.cat([before.to(x.dtype), outs]).flatten(0, 1)  # of the rows row - 1, row, ...
            above.append(known[first - row * self.shape[1] :][: len(new)])
        pending.write((x,), seq)
        k, v, outs = (torch.cat(t) for t in zip(*found, strict=True))
        lines.write((k, v), seq)
        last.write((outs,), seq)
        return torch.cat(above)

    def _finished_rows(self, index: int, first: int, new: Tensor, pending: Any, lines: GroupedPart) -> tuple[Tensor, ...]:
        """Column keys and values [n, width, H, D] and outputs [n, width, dim] of the n grid rows that the new tokens complete."""
        whole, columns, _ = self.stages
        width, started = self.shape[1], first % self.shape[1]
        count = (started + len(new)) // width
        held = pending.read(index)
        where = held.axis.positions(new.device)
        order = where.argsort()[len(where) - started :]
        cells = torch.cat([held.tensors[0][order].to(new.dtype), new])[: count * width].unflatten(0, (count, width))
        at = torch.arange(width, device=new.device)
        u = whole.mix(cells, memory=None, positions=at, seq=None, cache=None)
        rows = torch.arange(count, device=new.device) + first // width
        angles = columns._angles(rows * width, u)
        q, (k, v) = columns._queries(u).transpose(0, 1), columns._keys_values(u)
        k = columns._rotate(k.transpose(0, 1), angles).transpose(0, 1)
        old_k, old_v = (t.to(new.dtype) for t in lines.read(index).tensors)
        keys, values = (torch.cat(pair).transpose(0, 1) for pair in ((old_k, k), (old_v, v)))
        out = columns.attend(columns._rotate(q, angles), keys, values, mask=Causal(), impl=self.impl)
        return k, v, columns.o_proj(out.flatten(-2)).transpose(0, 1)

    # ---- cache and cost -----------------------------------------------------------------------------------------------------

    def cache_specs(self) -> tuple[PartSpec, ...]:
        if not self.causal:
            return super().cache_specs()
        if self.combine != "shifted":
            return tuple(spec for stage in self.stages for spec in stage.cache_specs())
        width, stage = self.shape[1], self.stages[2]
        held = tuple((name, (width, stage.num_kv_heads, stage.head_dim)) for name in ("k", "v"))
        return (
            *stage.cache_specs(),
            PartSpec("tokens", (("x", (self.dim,)),), window=width),  # of the unfinished row
            PartSpec("kv", held, group=width),  # columns, one grid row an entry
            PartSpec("tokens", (("above", (width, self.dim)),), window=2, group=width),  # columns' outputs of the last row
        )

    def flops(self, seq_len: int) -> int:
        return sum(stage.flops(seq_len) for stage in self.stages)

    def extra_repr(self) -> str:
        stage = self.stages[0]
        shown = f"dim={self.dim}, num_heads={stage.num_heads}, head_dim={stage.head_dim}, shape={self.shape}"
        return f"{shown}, combine={self.combine!r}, causal={self.causal}, impl={self.impl}"
