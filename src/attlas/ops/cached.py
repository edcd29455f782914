"""The reading verb of mixers: attention of packed queries over what a cache part holds."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from attlas.errors import OptionError, ShapeError, UnsupportedError
from attlas.masks.expr import Mask
from attlas.ops.reader import KeyValuePart, Reader, restate
from attlas.scores import ScoreMod
from attlas.shapes import Aux, AuxRequest, SeqInfo


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
    Cost: a few queries per sequence run as one kernel call over the storage, whatever the lengths, where the kernel knows the
    mask and the part still holds every token (see `attlas.ops.decode`); else one dense call when all sequences stand at one
    position and the part has one view of their rows; else one call per sequence. Which of them a sequence gets never changes what
    it computes, and sequences do not see each other. A part with `cascade` set reads pages that all rows share (a common prefix)
    once for all queries; the results then differ by rounding.
    Raises ShapeError, OptionError, UnsupportedError (also when the mask allows tokens that the part has dropped).
    """
    need_lse = _wants_lse(return_aux)
    first = _check(q, part, seq)
    _check_batch(q, part, seq, mask, score_mod)
    out, lse = Reader(q, part, seq, first, mask, score_mod, scale, sink, impl, need_lse).run()
    return out if return_aux is None else (out, Aux(lse=lse))


def _check(q: Tensor, part: KeyValuePart, seq: SeqInfo) -> tuple[int, ...]:
    """The position of each sequence's first query; raises when q, seq and the part do not fit together."""
    call = lambda: restate(q, part, seq)  # noqa: E731
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
        raise OptionError(f"{restate(q, part, seq)}: mask must be an attlas mask, not {type(mask).__name__}")
    if score_mod is not None and not isinstance(score_mod, ScoreMod):
        raise OptionError(f"{restate(q, part, seq)}: score_mod must be an attlas score mod, not {type(score_mod).__name__}")
    for rule in (mask, score_mod):
        if rule is not None and rule.batch not in (None, seq.num_sequences):
            raise ShapeError(
                f"{restate(q, part, seq)}: {rule!r} is written for {rule.batch} batch rows, not for {seq.num_sequences}"
            )


def _wants_lse(return_aux: AuxRequest | None) -> bool:
    if return_aux is None:
        return False
    if not isinstance(return_aux, AuxRequest):
        raise OptionError(f"attention_cached(return_aux={return_aux!r}): pass AuxRequest(lse=True)")
    if return_aux.state:
        raise UnsupportedError(f"attention_cached(return_aux={return_aux!r}): softmax attention has no recurrent state")
    return return_aux.lse
