"""Attention inside torch.compile: the whole call as one custom operator, chosen and run outside the graph.

Masks are compiled to BlockMaps, and implementations chosen, by code that reads numbers; neither can be traced. So a graph
holds `attlas::attention`, with the mask by its handle, the score modification by its structure and its tensors, and
the sequences as numbers. What runs is what would have run without the compiler, with the same results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attlas.errors import UnsupportedError
from attlas.kernels.cpu import attention as cpu
from attlas.masks.base import Mask
from attlas.numerics import wide_dtype
from attlas.ops.call import AttentionCall, make_call
from attlas.ops.select import choose, run_call
from attlas.scores import Alibi, Chain, DenseBias, RelativeBias, ScoreMod, Softcap
from attlas.shapes import SeqInfo

_UNNAMED = ""  # the handle of no mask
_SAVES = "cpu"  # the implementation whose backward pass starts from (out, lse); the others run again


def traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None,
    score_mod: ScoreMod | None,
    scale: float | None,
    sink: Tensor | None,
    seq: SeqInfo | None,
    impl: str,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse) as from `run_call`, as one node of the graph that is being made."""
    tensors = [] if score_mod is None else list(score_mod.tensors())
    out, lse = attention_op(
        q,
        k,
        v,
        tensors,
        sink,
        _UNNAMED if mask is None else mask.handle,
        _structure(score_mod),
        scale,
        _numbers(seq),
        impl,
        need_lse,
        torch.is_grad_enabled(),
    )
    return out, lse if need_lse else None


# ---- what travels through the graph ------------------------------------------------------------------------------------------


def _structure(mod: ScoreMod | None) -> str:
    """A mod without its tensors, as text: kinds and numbers."""
    if mod is None:
        return ""
    links = mod.mods if isinstance(mod, Chain) else (mod,)
    words = []
    for link in links:
        if isinstance(link, Softcap):
            words.append(f"softcap {link.cap}")
        elif isinstance(link, RelativeBias):
            words.append(f"relative {int(link.bidirectional)} {link.max_distance}")
        elif isinstance(link, Alibi):
            words.append("alibi")
        elif isinstance(link, DenseBias):
            words.append("dense")
        else:
            raise UnsupportedError(f"attention(score_mod={type(link).__name__}): not inside torch.compile")
    return ",".join(words)


def _mod(structure: str, tensors: Sequence[Tensor]) -> ScoreMod | None:
    """The inverse of `_structure`."""
    rest, links = list(tensors), list[ScoreMod]()
    for word in structure.split(",") if structure else []:
        kind, *numbers = word.split()
        if kind == "softcap":
            links.append(Softcap(float(numbers[0])))
        elif kind == "relative":
            links.append(RelativeBias(rest.pop(0), bidirectional=numbers[0] == "1", max_distance=int(numbers[1])))
        else:
            links.append(Alibi(rest.pop(0)) if kind == "alibi" else DenseBias(rest.pop(0)))
    return None if not links else links[0] if len(links) == 1 else Chain(tuple(links))


def _numbers(seq: SeqInfo | None) -> list[int]:
    """[] for dense tensors; else the number of sequences, whether keys and starts follow, and the lengths."""
    if seq is None:
        return []
    k, starts = seq.lengths_k, seq.starts
    return [len(seq.lengths), int(k is not None), int(starts is not None), *seq.lengths, *(k or ()), *(starts or ())]


def _seq(numbers: Sequence[int]) -> SeqInfo | None:
    if not numbers:
        return None
    n, has_k, has_starts, *rest = numbers
    lengths, rest = tuple(rest[:n]), rest[n:]
    lengths_k, rest = (tuple(rest[:n]), rest[n:]) if has_k else (None, rest)
    return SeqInfo(lengths, lengths_k, tuple(rest) if has_starts else None)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensors: Sequence[Tensor],
    sink: Tensor | None,
    options: tuple[str, str, float | None, Sequence[int], bool],
) -> AttentionCall:
    handle, structure, scale, numbers, need_lse = options
    mask = None if handle == _UNNAMED else Mask.of_handle(handle)
    mod, seq = _mod(structure, tensors), _seq(numbers)
    return make_call(q, k, v, mask=mask, score_mod=mod, scale=scale, sink=sink, seq=seq, need_lse=need_lse)


# ---- the operators -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("attlas::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mod_tensors: list[Tensor],
    sink: Tensor | None,
    mask: str,
    mod: str,
    scale: float | None,
    seq: list[int],
    impl: str,
    need_lse: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """`ops.attention` -> (out, lse). lse is empty unless it is asked for or a backward pass may follow; where nobody asks for it
    and the implementation that runs does not save it either, it is zeros."""
    call = _call(q, k, v, mod_tensors, sink, (mask, mod, scale, seq, need_lse))
    if with_grad and choose(call, impl).name == _SAVES:
        call = replace(call, need_lse=True)
    out, lse = run_call(call, impl)
    if lse is None:
        lse = q.new_zeros(q.shape[:-1] if with_grad else (0,), dtype=call.dtype)
    return out.contiguous(), lse.contiguous()


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mod_tensors: list[Tensor], sink: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = wide_dtype(q.dtype)
    need_lse, with_grad = rest[-2:]
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1] if need_lse or with_grad else (0,), dtype=dtype)


def _differentiable() -> Any:
    """Operators run below the autograd layer; this puts it back, for an implementation that differentiates itself."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.ADInplaceOrView
    )
    return torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set() - keys
    )


@torch.library.custom_op("attlas::attention_backward", mutates_args=())
def backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mod_tensors: list[Tensor],
    sink: Tensor | None,
    mask: str,
    mod: str,
    scale: float | None,
    seq: list[int],
    impl: str,
    need_lse: bool,
    saved: list[Tensor],
) -> list[Tensor]:
    """saved = (out, lse, dout, dlse) -> gradients of q, k, v, the mod's tensors and (if there is one) the sink."""
    fq, fk, fv, *mods = leaves = [x.detach().requires_grad_() for x in (q, k, v, *mod_tensors)]
    sink_leaf = None if sink is None else sink.detach().requires_grad_()
    with torch.enable_grad(), _differentiable():
        call = _call(fq, fk, fv, mods, sink_leaf, (mask, mod, scale, seq, need_lse))
        if choose(call, impl).name == _SAVES and not mods and not call.packed:
            rules: dict[str, Any] = {"mask": call.mask, "grid": call.grid, "score_mod": call.score_mod}
            return [g.contiguous() for g in cpu.backward(q, k, v, **rules, scale=call.scale, sink=sink, saved=saved)]
        out, lse = run_call(call, impl)
        wanted = leaves if sink_leaf is None else [*leaves, sink_leaf]
        results = (out,) if lse is None else (out, lse)
        grads = torch.autograd.grad(results, wanted, saved[2 : 2 + len(results)], allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(grads, wanted, strict=True)]


@backward_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mod_tensors: list[Tensor], sink: Tensor | None, *rest: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, *mod_tensors, *([] if sink is None else [sink]))]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mod_tensors, sink, *options, with_grad = inputs
    assert with_grad, "a gradient was not announced"
    ctx.save_for_backward(q, k, v, sink, *output, *mod_tensors)
    ctx.options = options


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    q, k, v, sink, out, lse, *mod_tensors = ctx.saved_tensors
    dq, dk, dv, *rest = backward_op(q, k, v, mod_tensors, sink, *ctx.options, [out, lse, dout, dlse])
    n = len(mod_tensors)
    numbers: list | None = None if ctx.options[3] else []  # torch takes an empty list for a list of tensors
    return dq, dk, dv, rest[:n], rest[n] if sink is not None else None, None, None, None, numbers, None, None, None


attention_op.register_autograd(_backward, setup_context=_save)
