"""Which implementation runs: the ordered list per op, and the only place where one is chosen.

"auto" takes the first implementation that supports the call and does not step aside for a later one. A name is taken at its
word: it runs, or UnsupportedError says why not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from attlas.errors import UnknownNameError, UnsupportedError
from attlas.kernels.adapters import sdpa
from attlas.kernels.blocked import softmax as blocked
from attlas.kernels.cpu import attention as cpu
from attlas.masks.expr import All
from attlas.numerics import full_precision
from attlas.ops.call import AttentionCall
from attlas.reference import softmax as reference
from attlas.registry import suggest

Result = tuple[Tensor, Tensor | None]  # out, and lse where the call asks for it


def _never(call: AttentionCall) -> str | None:
    return None


@dataclass(frozen=True)
class Impl:
    """supports: why the call cannot be run, None = it can. steps_aside: why "auto" should go on to the next one."""

    name: str
    supports: Callable[[AttentionCall], str | None]
    run: Callable[[AttentionCall], Result]
    steps_aside: Callable[[AttentionCall], str | None] = _never


def _sdpa_supports(call: AttentionCall) -> str | None:
    if call.packed and call.grid.packed:
        return "it has no packed sequences"
    if call.score_mod is not None:
        return "it has no score modification"
    if call.sink is not None:
        return "it has no sink"
    if call.need_lse:
        return "it does not return the log-sum-exp"
    return sdpa.unsupported(call.q, call.k, call.v, mask=call.mask, grid=call.grid, needs_grad=call.needs_grad)


def _sdpa_run(call: AttentionCall) -> Result:
    q, k, v = (x[None] if call.packed else x for x in (call.q, call.k, call.v))
    out = sdpa.attention(q, k, v, mask=call.mask, grid=call.grid, scale=call.scale)
    return out[0] if call.packed else out, None


def _sdpa_steps_aside(call: AttentionCall) -> str | None:
    return sdpa.slower_here(call.q, call.k, call.v)


def _cpu_supports(call: AttentionCall) -> str | None:
    return cpu.unsupported(
        call.q, call.k, call.v, mask=call.mask, grid=call.grid, score_mod=call.score_mod, needs_grad=call.needs_grad
    )


def _cpu_run(call: AttentionCall) -> Result:
    q, k, v = (x[None] if call.packed else x for x in (call.q, call.k, call.v))
    out, lse = cpu.attention(
        q,
        k,
        v,
        mask=call.mask,
        grid=call.grid,
        score_mod=call.score_mod,
        scale=call.scale,
        sink=call.sink,
        needs_grad=call.needs_grad,
    )
    lse_wanted = lse if call.need_lse else None
    return (out[0], None if lse_wanted is None else lse_wanted[0]) if call.packed else (out, lse_wanted)


def _blocked_run(call: AttentionCall) -> Result:
    q, k, v = (x[None] if call.packed else x for x in (call.q, call.k, call.v))
    out, lse = blocked.attention(
        q,
        k,
        v,
        mask=call.mask,
        grid=call.grid,
        score_mod=call.score_mod,
        scale=call.scale,
        sink=call.sink,
        need_lse=call.need_lse,
    )
    return (out[0], None if lse is None else lse[0]) if call.packed else (out, lse)


def _reference_run(call: AttentionCall) -> Result:
    mask = All() if call.mask is None and call.grid.packed else call.mask
    device = call.q.device
    out, lse = reference.attention(
        call.q,
        call.k,
        call.v,
        mask_bool=None if mask is None else mask.dense(call.grid, device=device),
        score_mod=call.score_mod,
        q_pos=call.grid.q.positions(device),
        k_pos=call.grid.k.positions(device),
        scale=call.scale,
        sink=call.sink,
    )
    return out, lse if call.need_lse else None


IMPLS: dict[str, tuple[Impl, ...]] = {
    "attention": (
        Impl("cpu", _cpu_supports, _cpu_run),
        Impl("sdpa", _sdpa_supports, _sdpa_run, _sdpa_steps_aside),
        Impl("blocked", _never, _blocked_run),
        Impl("reference", _never, _reference_run),
    )
}


def choose(call: AttentionCall, impl: str = "auto", op: str = "attention") -> Impl:
    """The implementation that runs. UnknownNameError, UnsupportedError."""
    table, call = IMPLS[op], call.folded()
    if impl == "auto":
        for candidate in table:
            if candidate.steps_aside(call) is None and candidate.supports(call) is None:
                return candidate
        reasons = "; ".join(f"{c.name}: {c.supports(call)}" for c in table)
        raise UnsupportedError(f"{call.restate()}: no implementation can run this ({reasons})")
    for candidate in table:
        if candidate.name == impl:
            reason = candidate.supports(call)
            if reason is not None:
                raise UnsupportedError(f"{call.restate()}: impl={impl!r} cannot run this: {reason}")
            return candidate
    raise UnknownNameError(f"unknown impl {impl!r} for {op}; {suggest(str(impl), ['auto', *(c.name for c in table)])}")


def run_call(call: AttentionCall, impl: str = "auto") -> Result:
    """Run a call: (out, lse), lse None unless the call asks for it.

    out [B, Tq, H, Dv] or packed [Tq, H, Dv]; lse [B, Tq, H] or [Tq, H], natural log.
    """
    inner = call.folded()
    with full_precision(call.q):
        out, lse = choose(inner, impl).run(inner)
    if inner is call:
        return out, lse
    return out.flatten(0, 1), None if lse is None else lse.flatten(0, 1)
