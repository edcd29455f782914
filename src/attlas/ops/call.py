"""A validated attention call: what every implementation is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError
from attlas.masks.expr import Mask
from attlas.masks.geometry import Axis, Grid
from attlas.numerics import wide_dtype
from attlas.scores import ScoreMod
from attlas.shapes import SeqInfo, describe

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Softmax attention of queries at `grid.q` over keys at `grid.k`.

    q [B, Tq, H, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv]; packed: without B, and the grid separates the sequences.
    The grid may hold any absolute positions: a chunk of a prefill, the slots of a rolling cache. scale is a number here.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask | None
    score_mod: ScoreMod | None
    scale: float
    sink: Tensor | None
    grid: Grid
    packed: bool
    need_lse: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of scores, weights and lse."""
        return wide_dtype(self.q.dtype)

    @property
    def needs_grad(self) -> bool:
        if not torch.is_grad_enabled():
            return False
        if self.q.requires_grad or self.k.requires_grad or self.v.requires_grad:
            return True
        mods = () if self.score_mod is None else self.score_mod.tensors()
        return (self.sink is not None and self.sink.requires_grad) or any(t.requires_grad for t in mods)

    def folded(self) -> AttentionCall:
        """A packed call whose sequences all look alike as a dense call [N, T, heads, dim], by views; any other call as it is.

        The results of the folded call, flattened over its first two dimensions, are those of the packed one.
        """
        rows = _alike(self.grid) if self.packed else None
        if rows is None or (self.score_mod is not None and self.score_mod.batch is not None):
            return self
        q, k, v = (x.unflatten(0, (rows, x.shape[0] // rows)) for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, grid=_first_sequence(self.grid) if rows > 1 else self.grid, packed=False)

    def restate(self) -> str:
        """The call in words, for error messages."""
        options = {"mask": self.mask, "score_mod": self.score_mod, "scale": self.scale}
        return restate(self.q, self.k, self.v, self.sink, options, "lse" if self.need_lse else "")


def restate(q: Tensor, k: Tensor, v: Tensor, sink: object, options: Mapping[str, object], extra: str = "") -> str:
    tensors = {"q": q, "k": k, "v": v, "sink": sink}
    said = [describe(**{n: t}) if isinstance(t, Tensor) else f"{n}={t!r}" for n, t in tensors.items() if t is not None]
    said += [f"{name}={value!r}" for name, value in options.items() if value is not None]
    return f"attention({', '.join(said)}{', ' + extra if extra else ''})"


@lru_cache(maxsize=256)
def _alike(grid: Grid) -> int | None:
    """Number of sequences of a packed grid if all have the same lengths and positions, one after the other."""
    if grid.num_sequences == 1 and len(grid.q) and len(grid.k):
        return 1
    q, k = grid.q.segments, grid.k.segments
    if len(q) != len(k) or not q:
        return None
    same = all(a.sequence == b.sequence for a, b in zip(q, k, strict=True)) and len(grid.q.ids) == len(q)
    kinds = {(s.length, s.position, s.index) for s in q}, {(s.length, s.position, s.index) for s in k}
    return len(q) if same and len(kinds[0]) == len(kinds[1]) == 1 else None


def _first_sequence(grid: Grid) -> Grid:
    return Grid(Axis(grid.q.segments[:1]), Axis(grid.k.segments[:1]))


@lru_cache(maxsize=1024)
def dense_grid(tq: int, tk: int) -> Grid:
    return Grid.dense(tq, tk)


@lru_cache(maxsize=256)
def packed_grid(seq: SeqInfo) -> Grid:
    return Grid.packed(seq)


def make_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    seq: SeqInfo | None = None,
    grid: Grid | None = None,
    need_lse: bool = False,
) -> AttentionCall:
    """Check the arguments of a call and fill in the defaults.

    grid None: `Grid.dense` for dense tensors, `Grid.packed(seq)` for packed ones. An explicit grid says where queries and keys
    stand (then `seq` is not needed, and tensors without a batch dimension are packed). Raises ShapeError, OptionError.
    """
    wrong = _wrong_tensors(q, k, v, seq, grid) or _wrong_options(q, k, mask, score_mod, scale, sink)
    if wrong:
        options = {"mask": mask, "score_mod": score_mod, "scale": scale, "seq": seq, "grid": grid}
        kind, reason = wrong
        raise kind(f"{restate(q, k, v, sink, options)}: {reason}")
    packed = q.ndim == 3
    if grid is None:
        grid = dense_grid(q.shape[1], k.shape[1]) if seq is None else packed_grid(seq)
    if mask is not None:
        try:
            mask.check_on(grid)
        except ShapeError as misfit:
            raise ShapeError(f"{restate(q, k, v, sink, {'mask': mask, 'seq': seq})}: {misfit}") from None
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return AttentionCall(q, k, v, mask, score_mod, scale, sink, grid, packed, need_lse)


Wrong = tuple[type[ShapeError] | type[OptionError], str]


def _wrong_tensors(q: Tensor, k: Tensor, v: Tensor, seq: SeqInfo | None, grid: Grid | None) -> Wrong | None:
    """What is wrong with shapes, dtypes and devices; None = nothing."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            return ShapeError, f"{name} must be a tensor, not {type(x).__name__}"
    if not q.dtype == k.dtype == v.dtype:
        return ShapeError, "q, k and v must have one dtype"
    if q.dtype not in FLOATS:
        return ShapeError, f"dtype {q.dtype} is not one of {', '.join(str(d) for d in FLOATS)}"
    if not q.device == k.device == v.device:
        return ShapeError, "q, k and v must be on one device"
    if not q.ndim == k.ndim == v.ndim or q.ndim not in (3, 4):
        return ShapeError, "q, k and v must all be [B, T, heads, dim], or all [T, heads, dim] with seq=SeqInfo(...)"
    if q.ndim == 4 and seq is not None:
        return ShapeError, "seq describes packed tensors [T, heads, dim]; these have a batch dimension"
    if q.ndim == 3 and seq is None and grid is None:
        return ShapeError, "tensors without a batch dimension are packed: pass seq=SeqInfo(lengths)"
    if seq is not None and grid is not None:
        return OptionError, "seq and grid both say where the tokens stand: pass one"
    qs, ks, vs = q.shape, k.shape, v.shape
    if ks[:-1] != vs[:-1]:
        return ShapeError, "k and v must agree in all but the last dimension"
    if q.ndim == 4 and qs[0] != ks[0]:
        return ShapeError, f"batch sizes differ: q has {qs[0]}, k has {ks[0]}"
    if qs[-1] != ks[-1] or qs[-1] == 0:
        return ShapeError, f"head_dim of q ({qs[-1]}) and k ({ks[-1]}) must be equal and positive"
    if vs[-1] == 0:
        return ShapeError, "head_dim of v must be positive"
    if ks[-2] == 0 or qs[-2] % ks[-2]:
        return ShapeError, f"the {qs[-2]} query heads cannot be shared out evenly among {ks[-2]} key heads"
    tq, tk = qs[-3], ks[-3]
    if seq is not None and (seq.total != tq or seq.total_k != tk):
        return ShapeError, f"seq counts {seq.total} queries and {seq.total_k} keys, the tensors hold {tq} and {tk}"
    if grid is not None and grid.shape != (tq, tk):
        return ShapeError, f"the grid is {grid.shape[0]} x {grid.shape[1]}, the tensors hold {tq} queries and {tk} keys"
    return None


def _wrong_options(q: Tensor, k: Tensor, mask: object, score_mod: object, scale: object, sink: object) -> Wrong | None:
    h, b = q.shape[-2], q.shape[0] if q.ndim == 4 else 1
    if mask is not None:
        if not isinstance(mask, Mask):
            hint = "; wrap a bool tensor in attlas.masks.Dense" if isinstance(mask, Tensor) else ""
            return OptionError, f"mask must be an attlas mask, not {type(mask).__name__}{hint}"
        if mask.heads not in (None, h) or mask.batch not in (None, b):
            return ShapeError, f"the mask is written for batch {mask.batch} and heads {mask.heads}, the call has {b} and {h}"
    if score_mod is not None:
        if not isinstance(score_mod, ScoreMod):
            return OptionError, f"score_mod must be an attlas score mod, not {type(score_mod).__name__}"
        if score_mod.heads not in (None, h) or score_mod.batch not in (None, b):
            return (
                ShapeError,
                f"the score mod is made for batch {score_mod.batch} and heads {score_mod.heads}, the call has {b} and {h}",
            )
        if any(t.device != q.device for t in score_mod.tensors()):
            return ShapeError, "the tensors of the score mod must be on the device of q"
    if scale is not None and (
        isinstance(scale, (bool, Tensor)) or not isinstance(scale, (int, float)) or not math.isfinite(scale)
    ):
        return OptionError, "scale must be a finite number"
    if sink is not None:
        if not isinstance(sink, Tensor) or sink.shape != (h,) or not sink.is_floating_point():
            return ShapeError, f"sink must be a float tensor [H] = [{h}]"
        if sink.device != q.device:
            return ShapeError, "sink must be on the device of q"
    return None
