"""How attention_cached reads: over the storage itself, as one dense batch, or sequence by sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from attlas.errors import ShapeError, UnsupportedError
from attlas.kernels.cpu.attention import FEW_QUERIES
from attlas.kernels.reach import allows_all
from attlas.masks.box import EMPTY
from attlas.masks.explicit import PerHead
from attlas.masks.expr import And, Mask, Or
from attlas.masks.geometry import Axis, Grid, Segment
from attlas.numerics import wide_dtype
from attlas.ops.call import AttentionCall, make_call
from attlas.ops.decode import DecodeRule, cascade_pages, decode_pages, readable, rule_for, shared_tokens
from attlas.ops.select import run_call
from attlas.scores import ScoreMod
from attlas.shapes import SeqInfo, describe

Span = tuple[int | None, int | None]
Result = tuple[Tensor, Tensor | None]  # out, and lse where it is asked for
NO_KEYS: Span = (0, -1)
NOWHERE = Axis(())


class Held(Protocol):
    """Keys [n, Hkv, D] and values [n, Hkv, Dv] (a dense read: [rows, n, ...]), and the positions of the n tokens."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...
    @property
    def axis(self) -> Axis: ...


class Table(Protocol):
    """Storage [P, page_size, ...] of keys and values, the int32 [rows, blocks] that says where each row's tokens lie, and the
    scales [P, page_size, Hkv] of 8-bit storage, else none."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...
    @property
    def block_table(self) -> Tensor: ...
    @property
    def scales(self) -> tuple[Tensor, ...]: ...


class KeyValuePart(Protocol):
    """What reading asks of a cache part; attlas.cache.part.Part has it."""

    @property
    def cascade(self) -> bool: ...
    @property
    def rows(self) -> int: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    def read(self, row: int, span: Span | None = None) -> Held: ...
    def read_dense(self, rows: Sequence[int], span: Span | None = None) -> Held | None: ...
    def read_table(self, rows: Sequence[int]) -> Table | None: ...
    def missing(self, row: int) -> tuple[int, int]: ...


@dataclass(frozen=True, eq=False)
class Reader:
    """One call of attention_cached, checked. `first` is the position of each sequence's first query."""

    q: Tensor
    part: KeyValuePart
    seq: SeqInfo
    first: tuple[int, ...]
    mask: Mask | None
    score_mod: ScoreMod | None
    scale: float | None
    sink: Tensor | None
    impl: str
    need_lse: bool

    def run(self) -> Result:
        """Every sequence by the first way that fits it. For a given part, that choice looks at the sequence alone."""
        if not self.seq.lengths:
            return self._nothing()
        results: dict[int, Result] = {}
        for group, table, rule in self._decodable():
            out, lse = self._decode(group, table, rule)
            if len(group) == self.seq.num_sequences:
                return out.flatten(0, 1), None if lse is None else lse.flatten(0, 1)
            results |= {i: (out[j], None if lse is None else lse[j]) for j, i in enumerate(group)}
        if not results:
            together = self._together()
            if together is not None:
                return together
        offsets = self._offsets()
        for i, n in enumerate(self.seq.lengths):
            if i not in results and (n or not self.seq.total):
                results[i] = self._alone(i, self.q[offsets[i] : offsets[i] + n])
        ordered = [results[i] for i in sorted(results)]
        if len(ordered) == 1:
            return ordered[0]
        return torch.cat([out for out, _ in ordered]), torch.cat(
            [lse for _, lse in ordered if lse is not None]
        ) if self.need_lse else None

    def _offsets(self) -> list[int]:
        return [0, *accumulate(self.seq.lengths)]

    def _nothing(self) -> Result:
        """The result of a call without sequences."""
        width = self.part.read(0, NO_KEYS).tensors[-1].shape[-1]
        dtype = wide_dtype(self.q.dtype)
        lse = self.q.new_zeros(self.q.shape[:-1], dtype=dtype) if self.need_lse else None
        return self.q.new_zeros(*self.q.shape[:-1], width), lse

    # ---- over the storage ---------------------------------------------------------------------------------------------------

    def _decodable(self) -> list[tuple[list[int], Table, DecodeRule]]:
        """Groups of sequences with equally many queries, which are their last few tokens, over rows that hold every token."""
        q = self.q
        rule = rule_for(q, mask=self.mask, score_mod=self.score_mod, scale=self.scale, sink=self.sink, impl=self.impl)
        if rule is None:
            return []
        seen, groups = self.part.lengths, dict[int, list[int]]()
        for i, (row, first, n) in enumerate(zip(self.seq.rows, self.first, self.seq.lengths, strict=True)):
            if 0 < n <= FEW_QUERIES and first + n == seen[row]:
                groups.setdefault(n, []).append(i)
        return [
            (group, table, rule)
            for group, table in map(self._table, groups.values())
            if table is not None and readable(table.tensors, table.scales, q.dtype)
        ]

    def _table(self, group: list[int]) -> tuple[list[int], Table | None]:
        """The sequences of a group whose rows are laid out by position, and their storage."""
        table = self.part.read_table([self.seq.rows[i] for i in group])
        if table is None:
            group = [i for i in group if self.part.read_table([self.seq.rows[i]]) is not None]
            table = self.part.read_table([self.seq.rows[i] for i in group]) if group else None
        return group, table

    def _decode(self, group: list[int], table: Table, rule: DecodeRule) -> Result:
        n, offsets = self.seq.lengths[group[0]], self._offsets()
        if len(group) == self.seq.num_sequences:
            q = self.q.unflatten(0, (-1, n))
        else:
            q = torch.stack([self.q[offsets[i] : offsets[i] + n] for i in group])
        k, v = table.tensors
        self._call(q[:1, :0], (k[:1, :0], v[:1, :0]), NOWHERE, NOWHERE, self.mask, self.score_mod)  # the kernel checks nothing
        lengths, pages = tuple(self.part.lengths[self.seq.rows[i]] for i in group), (k, v, *table.scales)
        shared = shared_tokens(table.block_table, k.shape[1], lengths, n, rule) if self.part.cascade else 0
        if shared:
            out, lse = cascade_pages(q, pages, table.block_table, lengths, rule, shared)
        else:
            out, lse = decode_pages(q, pages, table.block_table, lengths, rule)
        return out, lse if self.need_lse else None

    # ---- by reading ---------------------------------------------------------------------------------------------------------

    def _together(self) -> Result | None:
        """One dense call over all rows; None when they do not stand alike or have no common view."""
        lengths, rows = self.seq.lengths, self.seq.rows
        if len(rows) < 2 or not lengths[0] or len(set(lengths)) > 1 or len(set(self.first)) > 1:
            return None
        held = self.part.read_dense(rows, _span(self.mask, self.first[0], lengths[0]))
        if held is None:
            return None
        self._check_dropped(self.mask, rows[0], self.first[0], lengths[0])  # rows with a common view lack the same positions
        q = self.q.unflatten(0, (len(rows), lengths[0]))
        out, lse = self._attend(q, held.tensors, self.first[0], held.axis, self.mask, self.score_mod)
        return out.flatten(0, 1), None if lse is None else lse.flatten(0, 1)

    def _alone(self, i: int, q: Tensor) -> Result:
        """Sequence i by itself; q [n, H, D]."""
        row, first, n = self.seq.rows[i], self.first[i], self.seq.lengths[i]
        mask = _row_mask(self.mask, i)
        score_mod = self.score_mod if self.score_mod is None or self.score_mod.batch is None else self.score_mod.rows(i, i + 1)
        self._check_dropped(mask, row, first, n)
        held = self.part.read(row, _span(mask, first, n))
        out, lse = self._attend(q[None], tuple(t[None] for t in held.tensors), first, held.axis, mask, score_mod)
        return out[0], None if lse is None else lse[0]

    def _attend(
        self, q: Tensor, held: tuple[Tensor, ...], first: int, keys: Axis, mask: Mask | None, score_mod: ScoreMod | None
    ) -> Result:
        """q [B, n, H, D] at first ... first + n - 1 over held tokens [B, tokens, ...]."""
        n = q.shape[1]
        queries = Axis((Segment(n, first, 0, first),))
        if mask is not None and n and _allows_every(mask, (first, first + n - 1), keys):
            mask = None
        if mask is None and score_mod is None and len(keys.segments) > 1:
            # Nothing looks at positions any more: call the slots of a rolling buffer one run, which every kernel takes.
            queries, keys = Axis((Segment(n, len(keys) - n),)), Axis((Segment(len(keys), 0),))
        return run_call(self._call(q, held, queries, keys, mask, score_mod), self.impl)

    def _call(
        self, q: Tensor, held: tuple[Tensor, ...], queries: Axis, keys: Axis, mask: Mask | None, score_mod: ScoreMod | None
    ) -> AttentionCall:
        if len(held) != 2:
            raise ShapeError(f"{restate(self.q, self.part, self.seq)}: the part holds {len(held)} tensors per token, not k and v")
        k, v = (t if t.dtype == q.dtype else t.to(q.dtype) for t in held)
        grid, scale, sink = Grid(queries, keys), self.scale, self.sink
        return make_call(q, k, v, mask=mask, score_mod=score_mod, scale=scale, sink=sink, grid=grid, need_lse=self.need_lse)

    def _check_dropped(self, mask: Mask | None, row: int, first: int, count: int) -> None:
        begin, end = self.part.missing(row)
        if begin == end or not count:
            return
        queries = (first, first + count - 1)
        if mask is None or _allows_some(mask, queries, (begin, end - 1)):
            raise UnsupportedError(
                f"{restate(self.q, self.part, self.seq)}, mask={mask!r}: the queries at {queries[0]} ... {queries[1]} may attend "
                f"to positions that row {row} of {self.part!r} no longer holds ({begin} ... {end - 1} are gone); "
                "the mask must stay inside the part's window and sinks"
            )


def restate(q: Tensor, part: KeyValuePart, seq: SeqInfo) -> str:
    """The call in words, for error messages."""
    return f"attention_cached({describe(q=q)}, {part!r}, seq={seq})"


def _span(mask: Mask | None, first: int, count: int) -> Span | None:
    """Positions worth reading for queries at first ... first + count - 1."""
    if mask is None or not count:
        return None
    hull = mask.key_span(first, first + count - 1)
    return NO_KEYS if hull is None else hull


def _row_mask(mask: Mask | None, row: int) -> Mask | None:
    """The mask of one batch row, for all heads."""
    if mask is None or mask.batch is None:
        return mask
    return mask.at(row, 0) if mask.heads is None else PerHead(tuple(mask.at(row, head) for head in range(mask.heads)))


def _allows_every(mask: Mask, q_span: tuple[int, int], keys: Axis) -> bool:
    """Whether the mask certainly allows every pair; segment by segment, since a rolling buffer's positions have a gap."""
    return all(allows_all(mask, q_span, (s.position, s.position + s.length - 1)) for s in keys.segments)


def _allows_some(mask: Mask, q_span: tuple[int, int], k_span: tuple[int, int]) -> bool:
    """Whether some query of one range of positions may attend to some key of another; both inclusive. Scalar arithmetic where it
    suffices (every decode step asks), exact counting of blocks where it does not."""
    if not _may_allow(mask, q_span, k_span):
        return False
    bounds = [torch.tensor([x]) for x in (*q_span, *k_span)]
    if int(mask.classify(*bounds)) == EMPTY:
        return False
    axes = (Axis((Segment(hi - lo + 1, lo, 0, lo),)) for lo, hi in (q_span, k_span))
    return mask.count(Grid(*axes)) > 0


def _may_allow(mask: Mask, q_span: tuple[int, int], k_span: tuple[int, int]) -> bool:
    hull = mask.key_span(*q_span)
    if hull is None or (hull[0] is not None and hull[0] > k_span[1]) or (hull[1] is not None and hull[1] < k_span[0]):
        return False
    if isinstance(mask, Or):
        return any(_may_allow(m, q_span, k_span) for m in mask.operands)
    return not isinstance(mask, And) or all(_may_allow(m, q_span, k_span) for m in mask.operands)
