"""The linear recurrence as one op: linear attention, RetNet, GLA, DeltaNet, Mamba-2 and RWKV are settings of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError, UnknownNameError, UnsupportedError
from attlas.kernels.blocked.scan import chunk_scan
from attlas.kernels.cpu import scan as cpu
from attlas.numerics import full_precision, wide_dtype
from attlas.reference.linear import scan_parallel, scan_recurrent
from attlas.registry import suggest
from attlas.shapes import Aux, AuxRequest, SeqInfo, describe

FORMS = ("auto", "recurrent", "chunk", "parallel")
CHUNK = 64
FEW_TOKENS = 4  # up to here "auto" goes token by token, unless the compiled core takes the call


@dataclass(frozen=True)
class ScanCall:
    """A validated call: q, k [B, T, H, K], v [B, T, H, V], initial_state [B, H, K, V] in the computing dtype; log_decay None,
    [B, T, H, 1] or
    [B, T, H, K]; (a, b) the low-rank transition or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None
    bonus: Tensor | None
    initial_state: Tensor
    scale: float
    form: str

    def restate(self) -> str:
        given = describe(q=self.q, k=self.k, v=self.v, log_decay=self.log_decay)
        return f"scan({given}, low_rank={self.low_rank is not None}, bonus={self.bonus is not None}, form={self.form!r})"


Result = tuple[Tensor, Tensor]  # out [B, T, H, V], final state [B, H, K, V]


@dataclass(frozen=True)
class ScanImpl:
    """supports: why the call cannot be run, None = it can."""

    name: str
    supports: Callable[[ScanCall], str | None]
    run: Callable[[ScanCall], Result]


def _cpu_supports(call: ScanCall) -> str | None:
    if call.form != "chunk":
        return f"it has the chunk form only, not {call.form!r}"
    return cpu.unsupported(call.q, call.v, low_rank=call.low_rank is not None, bonus=call.bonus is not None)


def _cpu_run(call: ScanCall) -> Result:
    return cpu.scan(call.q, call.k, call.v, log_decay=call.log_decay, initial_state=call.initial_state, scale=call.scale)


def _blocked_supports(call: ScanCall) -> str | None:
    return None if call.form == "chunk" else f"it has the chunk form only, not {call.form!r}"


def _blocked_run(call: ScanCall) -> Result:
    a, b = call.low_rank or (None, None)
    return chunk_scan(
        call.q,
        call.k,
        call.v,
        log_decay=call.log_decay,
        a=a,
        b=b,
        bonus=call.bonus,
        initial_state=call.initial_state,
        scale=call.scale,
        chunk_size=CHUNK,
    )


def _reference_supports(call: ScanCall) -> str | None:
    return "it has the recurrent and the parallel form, not 'chunk'" if call.form == "chunk" else None


def _reference_run(call: ScanCall) -> Result:
    a, b = call.low_rank or (None, None)
    decay = torch.zeros_like(call.k) if call.log_decay is None else call.log_decay.expand_as(call.k)
    run = scan_parallel if call.form == "parallel" else scan_recurrent
    return run(
        call.q, call.k, call.v, log_decay=decay, a=a, b=b, bonus=call.bonus, initial_state=call.initial_state, scale=call.scale
    )


IMPLS = (
    ScanImpl("cpu", _cpu_supports, _cpu_run),
    ScanImpl("blocked", _blocked_supports, _blocked_run),
    ScanImpl("reference", _reference_supports, _reference_run),
)


def choose(call: ScanCall, impl: str) -> ScanImpl:
    """ "auto": the first that supports the call. A name is taken at its word: it runs, or UnsupportedError says why not."""
    if impl == "auto":
        return next(candidate for candidate in IMPLS if candidate.supports(call) is None)
    for candidate in IMPLS:
        if candidate.name == impl:
            reason = candidate.supports(call)
            if reason is not None:
                raise UnsupportedError(f"{call.restate()}: impl={impl!r} cannot run this: {reason}")
            return candidate
    raise UnknownNameError(f"unknown impl {impl!r} for scan; {suggest(str(impl), ['auto', *(c.name for c in IMPLS)])}")


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    delta: Tensor | tuple[Tensor, Tensor] | None = None,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    seq: SeqInfo | None = None,
    form: str = "auto",
    impl: str = "auto",
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """Linear recurrence with decay, delta rule or low-rank transition:

        S_t = Diag(exp(log_decay_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    o_t = scale * S_t^T q_t

    Shapes      q, k [B, T, H, K], v [B, T, H, V] -> [B, T, H, V]; packed with seq=SeqInfo(...): drop B, every sequence starts
                from its own
                row of `initial_state` (or zero).
    log_decay   natural log, <= 0, per token (not cumulative): [H] (constant), [B, T, H] or per channel [B, T, H, K]; None = no
                decay.
    delta       beta [B, T, H]: delta rule on the decayed state, S <- D S - beta k (k^T D S) + beta k v^T; or (a, b), each
                [B, T, H, K]: any rank-one transition of the undecayed state (RWKV-7).
    bonus       [H, K]: read before write, o_t = scale * (S_{t-1} + Diag(bonus) k_t v_t^T)^T q_t (RWKV-6).
    initial_state  [B, H, K, V] (packed: [N, H, K, V]); `return_aux=AuxRequest(state=True)` also returns `Aux(state=final state)`.
    scale       None = 1 / sqrt(K).
    form        "recurrent" (token by token), "chunk" (training, prefill), "parallel" (quadratic, for short inputs), or "auto":
                recurrent up to 4 tokens where the compiled core does not take the call, else chunk. All give the same numbers up
                to rounding. impl says who computes it: "cpu" (compiled, chunk form without delta and bonus), "blocked" (torch,
                chunk form), "reference" (the other two forms); an explicit one runs or raises UnsupportedError.
    Numerics    computed and accumulated in fp32 (fp64 for fp64 inputs), state in that dtype, out in q's dtype. Decay is never
                factored
                outside of log space, so it neither overflows nor underflows at any length.
    Cost        chunk form: time O(T (C + K) V) per head, memory O(T (C + K + V)); one step O(K V).
    Raises      ShapeError, OptionError (both restate the call).
    Source      Katharopoulos et al. 2020 (arXiv 2006.16236); Yang et al. 2024 (2406.06484) for the chunked delta rule.
    """
    _check(q, k, v, log_decay, delta, bonus, form, seq)
    if seq is not None:
        return _packed(q, k, v, log_decay, delta, bonus, initial_state, scale, seq, (form, impl), return_aux)
    out_dtype, dtype = q.dtype, wide_dtype(q.dtype)
    batch, length, heads, dim_k = q.shape
    state_shape = (batch, heads, dim_k, v.shape[-1])
    if initial_state is None:
        initial_state = q.new_zeros(state_shape, dtype=dtype)
    elif tuple(initial_state.shape) != state_shape:
        raise ShapeError(
            f"scan: initial_state must be [B, H, K, V] = {list(state_shape)}; got {describe(initial_state=initial_state)}"
        )
    q, k, v, initial_state = (x.to(dtype) for x in (q, k, v, initial_state))
    decay = _expand_decay(log_decay, q, dtype)
    low_rank = None
    if isinstance(delta, tuple):
        low_rank = (delta[0].to(dtype), delta[1].to(dtype))
    elif delta is not None:
        weight = delta.to(dtype)[..., None]
        low_rank = (k if decay is None else decay.exp() * k, -weight * k)
        k = weight * k
    if form == "auto":
        compiled = impl == "auto" and cpu.unsupported(q, v, low_rank=low_rank is not None, bonus=bonus is not None) is None
        chunk = compiled or impl in ("cpu", "blocked") or (length > FEW_TOKENS and v.numel())
        form = "chunk" if chunk else "recurrent"
    scale = dim_k**-0.5 if scale is None else scale
    call = ScanCall(q, k, v, decay, low_rank, None if bonus is None else bonus.to(dtype), initial_state, scale, form)
    chosen = choose(call, impl)
    with full_precision(q):
        out, state = chosen.run(call) if v.numel() else (v.new_zeros(v.shape), initial_state)
    out = out.to(out_dtype)
    return (out, Aux(state=state)) if return_aux is not None and return_aux.state else out


def _expand_decay(log_decay: Tensor | None, q: Tensor, dtype: torch.dtype) -> Tensor | None:
    """-> None, [B, T, H, 1] or [B, T, H, K]."""
    if log_decay is None:
        return None
    if log_decay.numel() and log_decay.detach().amax() > 0:
        raise OptionError(
            f"scan: log_decay must be <= 0 (natural log of a factor in (0, 1]); its maximum is {log_decay.max().item():.4g}"
        )
    log_decay = log_decay.to(dtype)
    if log_decay.dim() == 1:
        return log_decay[None, None, :, None].expand(*q.shape[:3], 1)
    return log_decay[..., None] if log_decay.dim() == 3 else log_decay


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    delta: Tensor | tuple[Tensor, Tensor] | None,
    bonus: Tensor | None,
    form: str,
    seq: SeqInfo | None,
) -> None:
    if form not in FORMS:
        raise OptionError(f"scan: unknown form {form!r}; {suggest(str(form), FORMS)}")
    beta = delta if isinstance(delta, Tensor) else None

    def given() -> str:  # said only when something is wrong: a decode step has no time for words
        return describe(q=q, k=k, v=v, log_decay=log_decay, delta=beta, bonus=bonus)

    token_dims = 3 if seq is not None else 4
    lead = tuple(q.shape[:-1])
    if q.dim() != token_dims or k.shape != q.shape or v.dim() != token_dims or tuple(v.shape[:-1]) != lead:
        want = "q, k [T, H, K], v [T, H, V] (packed)" if seq is not None else "q, k [B, T, H, K], v [B, T, H, V]"
        raise ShapeError(f"scan: {want} expected; got {given()}")
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        raise ShapeError(f"scan: q, k, v must share dtype and device; got {given()}")
    if seq is not None and seq.total != q.shape[0]:
        raise ShapeError(f"scan: seq has {seq.total} tokens, the tensors {q.shape[0]}; got {given()}")
    heads = q.shape[-2]
    if log_decay is not None and tuple(log_decay.shape) not in ((heads,), lead, tuple(q.shape)):
        raise ShapeError(f"scan: log_decay must be [H], [B, T, H] or [B, T, H, K] (packed: without B); got {given()}")
    if beta is not None and tuple(beta.shape) != lead:
        raise ShapeError(f"scan: delta must be [B, T, H] (packed: [T, H]) or a pair (a, b); got {given()}")
    if isinstance(delta, tuple) and (len(delta) != 2 or any(x.shape != q.shape for x in delta)):
        shapes = ", ".join(str(list(x.shape)) for x in delta)
        raise ShapeError(f"scan: delta=(a, b) must both have q's shape; got {given()}, delta=({shapes})")
    if bonus is not None and tuple(bonus.shape) != (heads, q.shape[-1]):
        raise ShapeError(f"scan: bonus must be [H, K]; got {given()}")


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    delta: Tensor | tuple[Tensor, Tensor] | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    scale: float | None,
    seq: SeqInfo,
    how: tuple[str, str],
    return_aux: AuxRequest | None,
) -> Tensor | tuple[Tensor, Aux]:
    """Sequences of equal length are one batch; others are padded at the end with tokens that neither decay nor write."""
    if initial_state is not None and initial_state.shape[0] != seq.num_sequences:
        raise ShapeError(
            f"scan: initial_state must have one row per sequence ({seq.num_sequences}); got "
            f"{describe(initial_state=initial_state)}"
        )
    lengths = seq.lengths
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(q.shape[:-1])
    if isinstance(delta, tuple):
        delta = (pad_packed(delta[0], lengths), pad_packed(delta[1], lengths))
    elif delta is not None:
        delta = pad_packed(delta, lengths)
    form, impl = how
    result = scan(
        pad_packed(q, lengths), pad_packed(k, lengths), pad_packed(v, lengths),
        log_decay=None if log_decay is None else pad_packed(log_decay, lengths), delta=delta, bonus=bonus,
        initial_state=initial_state,
        scale=scale, form=form, impl=impl, return_aux=AuxRequest(state=True),
    )  # fmt: skip
    out, aux = result
    out = unpad_packed(out, lengths)
    return (out, aux) if return_aux is not None and return_aux.state else out


def pad_packed(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Packed [T, ...] -> [N, max length, ...], zeros after each sequence's end (a view when all lengths are equal)."""
    if len(set(lengths)) <= 1:
        return x.reshape(len(lengths), -1 if x.numel() else max(lengths, default=0), *x.shape[1:])
    return torch.nn.utils.rnn.pad_sequence(list(x.split(list(lengths))), batch_first=True)


def unpad_packed(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """[N, max length, ...] -> packed [T, ...]."""
    if len(set(lengths)) <= 1:
        return x.reshape(-1, *x.shape[2:]) if x.numel() else x.new_zeros(sum(lengths), *x.shape[2:])
    return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])
