"""Which implementation runs a call, why each other one does not, and what the call costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attlas.errors import ShapeError, UnknownNameError, UnsupportedError
from attlas.kernels.reach import rectangles
from attlas.masks.expr import All, Mask
from attlas.ops.call import AttentionCall, make_call
from attlas.ops.select import IMPLS, Impl, choose
from attlas.registry import suggest
from attlas.scores import ScoreMod
from attlas.shapes import AuxRequest, SeqInfo


@dataclass(frozen=True)
class Verdict:
    """One implementation: `runs`, or the reason why it does not. `supported` False = it could not run even if asked by name."""

    impl: str
    runs: bool
    supported: bool
    reason: str

    def __str__(self) -> str:
        return f"{'->' if self.runs else '  '} {self.impl:<10} {self.reason}"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. useful_flops: multiplications and additions for the pairs that the mask allows (2 (D + Dv) a pair).

    kv_bytes: bytes of the keys and values that some query can reach, read once.
    """

    op: str
    call: str
    impl: str | None
    verdicts: tuple[Verdict, ...]
    useful_flops: int
    kv_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for json."""
        return {
            "op": self.op,
            "call": self.call,
            "impl": self.impl,
            "verdicts": [vars(v) for v in self.verdicts],
            "useful_flops": self.useful_flops,
            "kv_bytes": self.kv_bytes,
        }

    def __str__(self) -> str:
        costs = f"{self.useful_flops:.3e} useful flops, {self.kv_bytes:.3e} bytes of keys and values"
        return "\n".join([self.call, *map(str, self.verdicts), costs])


def explain(
    op: str = "attention",
    q: Tensor | Sequence[int] | None = None,
    k: Tensor | Sequence[int] | None = None,
    v: Tensor | Sequence[int] | None = None,
    *,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    seq: SeqInfo | None = None,
    impl: str = "auto",
    return_aux: AuxRequest | None = None,
    dtype: torch.dtype = torch.float32,
) -> Explanation:
    """Explain `attention(q, k, v, ...)` without running it.

    q, k, v: tensors, or shapes of tensors of `dtype` on the CPU (without memory for them). k None = q's shape with the same
    heads, v None = k. Raises the same errors as the op for arguments that do not fit together; an `impl` that cannot run is no
    error here: `impl` is None in the answer.
    """
    if op not in IMPLS:
        raise UnknownNameError(f"explain knows no op {op!r}; {suggest(op, IMPLS)}")
    if q is None:
        raise ShapeError(f"explain({op!r}): q is missing: pass a tensor or a shape")
    k = q if k is None else k
    q, k, v = (_tensor(x, dtype) for x in (q, k, k if v is None else v))
    need_lse = return_aux is not None and return_aux.lse
    call = make_call(q, k, v, mask=mask, score_mod=score_mod, scale=scale, sink=sink, seq=seq, need_lse=need_lse)
    try:
        chosen: Impl | None = choose(call, impl, op)
    except UnsupportedError:
        chosen = None
    verdicts = _verdicts(op, call, impl, chosen)
    return Explanation(op, call.restate(), None if chosen is None else chosen.name, verdicts, useful_flops(call), kv_bytes(call))


def _tensor(x: Tensor | Sequence[int], dtype: torch.dtype) -> Tensor:
    return x if isinstance(x, Tensor) else torch.zeros((), dtype=dtype).expand(tuple(x))


def _verdicts(op: str, call: AttentionCall, impl: str, chosen: Impl | None) -> tuple[Verdict, ...]:
    call = call.folded()
    found, seen = [], False
    for candidate in IMPLS[op]:
        refusal = candidate.supports(call)
        if candidate is chosen:
            seen = True
            reason = "runs: asked for by name" if impl != "auto" else "runs: first in the order that can and does not step aside"
        elif refusal is not None:
            reason = f"cannot: {refusal}"
        elif impl != "auto":
            reason = f"can run it, but {impl!r} was asked for"
        elif seen:
            assert chosen is not None
            reason = f"can run it, comes after {chosen.name!r}"
        else:
            reason = f"can run it, steps aside: {candidate.steps_aside(call)}"
        found.append(Verdict(candidate.name, candidate is chosen, refusal is None, reason))
    return tuple(found)


def useful_flops(call: AttentionCall) -> int:
    """2 (D + Dv) for each allowed pair, head and batch row: the two products of the forward pass, masked pairs not counted."""
    mask = All() if call.mask is None else call.mask
    heads = call.q.shape[-2] // (mask.heads or 1)
    batch = (1 if call.packed else call.q.shape[0]) // (mask.batch or 1)
    return 2 * (call.q.shape[-1] + call.v.shape[-1]) * mask.count(call.grid) * heads * batch


def kv_bytes(call: AttentionCall) -> int:
    """Bytes of keys and values inside the hull of what each sequence's queries may attend to."""
    found = rectangles(call.mask, call.grid)
    tokens = call.k.shape[-3] if found is None else sum(r.k1 - r.k0 for r in found)
    batch = 1 if call.packed else call.k.shape[0]
    return batch * tokens * call.k.shape[-2] * (call.k.shape[-1] + call.v.shape[-1]) * call.k.element_size()
