"""The reading verb of mixers: attention of packed queries over what a cache part holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError, UnsupportedError
from attlas.masks.box import EMPTY
from attlas.masks.explicit import PerHead
from attlas.masks.expr import And, Mask, Or
from attlas.masks.geometry import Axis, Grid, Segment
from attlas.ops.call import make_call
from attlas.ops.select import run_call
from attlas.scores import ScoreMod
from attlas.shapes import Aux, AuxRequest, SeqInfo, describe

Span = tuple[int | None, int | None]
NO_KEYS: Span = (0, -1)


class Held(Protocol):
    """Keys [n, Hkv, D] and values [n, Hkv, Dv] (a dense read: [rows, n, ...]), and the positions of the n tokens."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...
    @property
    def axis(self) -> Axis: ...


class Table(Protocol):
    """Storage [P, page_size, ...] of keys and values, and the int32 [rows, blocks] that says where each row's tokens lie."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...
    @property
    def block_table(self) -> Tensor: ...


class KeyValuePart(Protocol):
    """What `attention_cached` asks of a cache part (attlas.cache.part.Part has it)."""

    @property
    def rows(self) -> int: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    def read(self, row: int, span: Span | None = None) -> Held: ...
    def read_dense(self, rows: Sequence[int], span: Span | None = None) -> Held | None: ...
    def read_table(self, rows: Sequence[int]) -> Table | None: ...
    def missing(self, row: int) -> tuple[int, int]: ...


@overload
def attention_cached(
    q: Tensor,
    part: KeyValuePart,
    *,
    seq: SeqInfo,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    impl: str = "auto",
    return_aux: None = None,
) -> Tensor: ...


@overload
def attention_cached(
    q: Tensor,
    part: KeyValuePart,
    *,
    seq: SeqInfo,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    impl: str = "auto",
    return_aux: AuxRequest,
) -> tuple[Tensor, Aux]: ...


def attention_cached(
    q: Tensor,
    part: KeyValuePart,
    *,
    seq: SeqInfo,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    impl: str = "auto",
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """`ops.attention` of packed queries q [T, H, D] over the keys and values in a cache part -> [T, H, Dv].

    The caller has written this step's keys and values to the part; every held token is a key, the new ones included.

    seq        seq.lengths queries of each sequence; seq.rows the part's row that each reads; seq.first the absolute position of
               each first query. Without starts and keys the queries are the last ones that their row has seen. seq.lengths_k,
               when given, must be what the rows have seen
    mask       None = every token of the row; else a value over absolute positions. Only the hull of the keys that the queries may
               attend to is read, where the part can narrow a read. A mask written for a batch takes sequence i as batch row i
    score_mod, scale, sink, impl
               as in `ops.attention`
    return_aux `AuxRequest(lse=True)` -> (out, Aux(lse)), lse [T, H] fp32 (fp64 for fp64 q), natural log

    Keys and values of another dtype than q are converted as they are read. No gradient reaches the cache; q, sink and score_mod
    get theirs. A query without keys gives 0 and lse -inf.
    Cost: one call for all sequences when they stand at one position and the part has one view of their rows; else one call per
    sequence, so that a result never depends on which other sequences are in the batch.
    Raises ShapeError, OptionError, UnsupportedError (also when the mask allows tokens that the part has dropped).
    """
    need_lse = _wants_lse(return_aux)
    first = _check(q, part, seq)
    _check_batch(q, part, seq, mask, score_mod)
    reader = _Reader(q, part, seq, first, mask, score_mod, scale, sink, impl, need_lse)
    out, lse = reader.together() or reader.one_by_one()
    return out if return_aux is None else (out, Aux(lse=lse))


@dataclass(frozen=True, eq=False)
class _Reader:
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

    def run(self) -> tuple[Tensor, Tensor | None]:
        """Decode over the storage where the kernel can; the others in one dense call, or one by one."""
        results = self._over_storage()
        if not results:
            dense = self._together()
            if dense is not None:
                return dense
        results |= self._one_by_one([i for i in range(self.seq.num_sequences) if i not in results])
        if not results:
            return self._nothing()
        outs = [results[i] for i in sorted(results)]
        if len(outs) == 1:
            return outs[0]
        return torch.cat([out for out, _ in outs]), torch.cat([lse for _, lse in outs if lse is not None]) if self.need_lse else None

    def _over_storage(self) -> Results:
        """Sequences whose queries are their last few tokens, by one kernel call for each number of queries. Which way a sequence
        takes depends on itself alone."""
        few = [i for i, n in enumerate(self.seq.lengths) if 0 < n <= FEW_QUERIES]
        seen = self.part.lengths
        few = [i for i in few if self.first[i] + self.seq.lengths[i] == seen[self.seq.rows[i]]]
        if not few or (self.mask is not None and self.mask.batch is not None):
            return {}
        options = {"mask": self.mask, "score_mod": self.score_mod, "scale": self.scale, "sink": self.sink}
        rule = rule_for(self.q, impl=self.impl, **options)  # type: ignore[arg-type]
        if rule is None:
            return {}
        offsets = [0, *accumulate(self.seq.lengths)]
        results: Results = {}
        for n in sorted({self.seq.lengths[i] for i in few}):
            group = [i for i in few if self.seq.lengths[i] == n and self.part.missing(self.seq.rows[i]) == (0, 0)]
            rows = [self.seq.rows[i] for i in group]
            table = self.part.read_table(rows) if group else None
            if table is None or len(table.tensors) != 2 or any(t.dtype != self.q.dtype for t in table.tensors):
                continue
            whole = len(group) == self.seq.num_sequences
            q = self.q.unflatten(0, (-1, n)) if whole else torch.stack([self.q[offsets[i] : offsets[i] + n] for i in group])
            self._call(q[:1, :0], tuple(t[:1, :0] for t in table.tensors), 0, Axis(()), None, None)  # checks shapes and options
            out, lse = decode_pages(q, (table.tensors[0], table.tensors[1]), table.block_table, tuple(seen[r] for r in rows), rule)
            if whole and n:
                return {0: (out.flatten(0, 1), lse.flatten(0, 1) if self.need_lse else None)}
            results |= {i: (out[j], lse[j] if self.need_lse else None) for j, i in enumerate(group)}
        return results

    def _nothing(self) -> tuple[Tensor, Tensor | None]:
        """The result of a call without sequences."""
        width = self.part.read(0, NO_KEYS).tensors[-1].shape[-1]
        dtype = torch.float64 if self.q.dtype == torch.float64 else torch.float32
        lse = self.q.new_zeros(self.q.shape[:-1], dtype=dtype) if self.need_lse else None
        return self.q.new_zeros(*self.q.shape[:-1], width), lse

    def _run(
        self, q: Tensor, held: tuple[Tensor, ...], first: int, keys: Axis, mask: Mask | None, score_mod: ScoreMod | None
    ) -> tuple[Tensor, Tensor | None]:
        if len(held) != 2:
            raise ShapeError(
                f"{_restate(self.q, self.part, self.seq)}: the part holds {len(held)} tensors per token, wanted keys and values"
            )
        k, v = (t if t.dtype == q.dtype else t.to(q.dtype) for t in held)
        grid = Grid(Axis((Segment(q.shape[1], first, 0, first),)), keys)
        options = {"mask": mask, "score_mod": score_mod, "scale": self.scale, "sink": self.sink}
        return run_call(make_call(q, k, v, grid=grid, need_lse=self.need_lse, **options), self.impl)  # type: ignore[arg-type]

    @staticmethod
    def _span(mask: Mask | None, first: int, count: int) -> Span | None:
        if mask is None or not count:
            return None
        hull = mask.key_span(first, first + count - 1)
        return NO_KEYS if hull is None else hull

    def _check_dropped(self, mask: Mask | None, row: int, first: int, count: int) -> None:
        begin, end = self.part.missing(row)
        if (
            begin == end
            or not count
            or (mask is not None and not _allows_some(mask, (first, first + count - 1), (begin, end - 1)))
        ):
            return
        raise UnsupportedError(
            f"{_restate(self.q, self.part, self.seq)}, mask={mask!r}: the queries at {first} ... {first + count - 1} may attend "
            f"to positions that row {row} of {self.part!r} no longer holds ({begin} ... {end - 1} are gone); "
            "the mask must stay inside the part's window and sinks"
        )


def _check(q: Tensor, part: KeyValuePart, seq: SeqInfo) -> tuple[int, ...]:
    """The position of each sequence's first query; raises when q, seq and the part do not fit together."""
    call = lambda: _restate(q, part, seq)  # noqa: E731
    if not isinstance(seq, SeqInfo):
        raise OptionError(f"attention_cached(seq={seq!r}): wanted a SeqInfo that says which rows are read")
    if q.dim() != 3 or q.shape[0] != seq.total:
        raise ShapeError(f"{call()}: q must be packed [T, H, D] with the {seq.total} tokens of seq")
    lengths, rows = part.lengths, seq.rows
    if any(not 0 <= row < len(lengths) for row in rows):
        raise ShapeError(f"{call()}: the part has the rows 0 ... {len(lengths) - 1}")
    seen = tuple(lengths[row] for row in rows)
    if seq.lengths_k is not None and seq.lengths_k != seen:
        raise ShapeError(f"{call()}: the rows have seen {seen} tokens, seq.lengths_k says {seq.lengths_k}")
    if seq.starts is not None:
        return seq.starts
    if any(n > s for n, s in zip(seq.lengths, seen, strict=True)):
        raise ShapeError(
            f"{call()}: the rows have seen {seen} tokens, fewer than there are queries; write first, or give seq.starts"
        )
    return tuple(s - n for n, s in zip(seq.lengths, seen, strict=True))


def _check_batch(q: Tensor, part: KeyValuePart, seq: SeqInfo, mask: Mask | None, score_mod: ScoreMod | None) -> None:
    if mask is not None and not isinstance(mask, Mask):
        raise OptionError(f"{_restate(q, part, seq)}: mask must be an attlas mask, not {type(mask).__name__}")
    if score_mod is not None and not isinstance(score_mod, ScoreMod):
        raise OptionError(f"{_restate(q, part, seq)}: score_mod must be an attlas score mod, not {type(score_mod).__name__}")
    for rule in (mask, score_mod):
        if rule is not None and rule.batch not in (None, seq.num_sequences):
            raise ShapeError(
                f"{_restate(q, part, seq)}: {rule!r} is written for {rule.batch} batch rows, not for {seq.num_sequences}"
            )


def _restate(q: Tensor, part: KeyValuePart, seq: SeqInfo) -> str:
    return f"attention_cached({describe(q=q)}, {part!r}, seq={seq})"


def _wants_lse(return_aux: AuxRequest | None) -> bool:
    if return_aux is None:
        return False
    if not isinstance(return_aux, AuxRequest):
        raise OptionError(f"attention_cached(return_aux={return_aux!r}): pass AuxRequest(lse=True)")
    if return_aux.state:
        raise UnsupportedError(f"attention_cached(return_aux={return_aux!r}): softmax attention has no recurrent state")
    return return_aux.lse


def _row_mask(mask: Mask | None, row: int) -> Mask | None:
    """The mask of one batch row, for all heads."""
    if mask is None or mask.batch is None:
        return mask
    return mask.at(row, 0) if mask.heads is None else PerHead(tuple(mask.at(row, head) for head in range(mask.heads)))


def _row_mod(score_mod: ScoreMod | None, row: int) -> ScoreMod | None:
    return score_mod if score_mod is None or score_mod.batch is None else score_mod.rows(row, row + 1)


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
