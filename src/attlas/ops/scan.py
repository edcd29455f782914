"""The linear recurrence as one op: linear attention, RetNet, GLA, DeltaNet, Mamba-2 and RWKV are settings of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError
from attlas.kernels.blocked.scan import chunk_scan
from attlas.reference.linear import scan_parallel, scan_recurrent
from attlas.registry import suggest
from attlas.shapes import Aux, AuxRequest, SeqInfo, describe

FORMS = ("auto", "recurrent", "chunk", "parallel")


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    seq: SeqInfo | None = None,
    form: str = "auto",
    chunk_size: int = 64,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """Linear recurrence with decay, delta rule or low-rank transition:

        S_t = Diag(exp(log_decay_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    o_t = scale * S_t^T q_t

    Shapes      q, k [B, T, H, K], v [B, T, H, V] -> [B, T, H, V]; packed with seq=SeqInfo(...): drop B, every sequence starts from its own
                row of `initial_state` (or zero).
    log_decay   natural log, <= 0, per token (not cumulative): [H] (constant), [B, T, H] or per channel [B, T, H, K]; None = no decay.
    beta        [B, T, H]: delta rule on the decayed state, S <- D S - beta k (k^T D S) + beta k v^T.
    low_rank    (a, b), each [B, T, H, K], in place of beta: any rank-one transition of the undecayed state (RWKV-7).
    bonus       [H, K]: read before write, o_t = scale * (S_{t-1} + Diag(bonus) k_t v_t^T)^T q_t (RWKV-6).
    initial_state  [B, H, K, V] (packed: [N, H, K, V]); `return_aux=AuxRequest(state=True)` also returns `Aux(state=final state)`.
    scale       None = 1 / sqrt(K).
    form        "recurrent" (token by token), "chunk" (training, prefill), "parallel" (quadratic, for short inputs), or "auto": recurrent
                up to 4 tokens, else chunk. All give the same numbers up to rounding.
    Numerics    computed and accumulated in fp32 (fp64 for fp64 inputs), state in that dtype, out in q's dtype. Decay is never factored
                outside of log space, so it neither overflows nor underflows at any length.
    Cost        chunk form: time O(T (C + K) V) per head, memory O(T (C + K + V)); one step O(K V).
    Raises      ShapeError, OptionError (both restate the call).
    Source      Katharopoulos et al. 2020 (arXiv 2006.16236); Yang et al. 2024 (2406.06484) for the chunked delta rule.
    """
    _check(q, k, v, log_decay, beta, low_rank, bonus, form, chunk_size, seq)
    if seq is not None:
        return _packed(q, k, v, log_decay, beta, low_rank, bonus, initial_state, scale, seq, form, chunk_size, return_aux)
    out_dtype, dtype = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, _, heads, dim_k = q.shape
    state_shape = (batch, heads, dim_k, v.shape[-1])
    if initial_state is None:
        initial_state = q.new_zeros(state_shape, dtype=dtype)
    elif tuple(initial_state.shape) != state_shape:
        raise ShapeError(f"scan: initial_state must be [B, H, K, V] = {list(state_shape)}; got {describe(initial_state=initial_state)}")
    q, k, v, initial_state = (x.to(dtype) for x in (q, k, v, initial_state))
    decay = _expand_decay(log_decay, q, dtype)
    a, b = (x.to(dtype) for x in low_rank) if low_rank is not None else (None, None)
    if beta is not None:
        weight = beta.to(dtype)[..., None]
        a = k if decay is None else decay.exp() * k
        b, k = -weight * k, weight * k
    scale = dim_k**-0.5 if scale is None else scale
    options = {"a": a, "b": b, "bonus": None if bonus is None else bonus.to(dtype), "initial_state": initial_state, "scale": scale}
    if form == "auto":
        form = "recurrent" if q.shape[1] <= 4 else "chunk"
    if form == "chunk" and v.numel():
        out, state = chunk_scan(q, k, v, log_decay=decay, chunk_size=chunk_size, **options)
    else:
        full = torch.zeros_like(k) if decay is None else decay.expand_as(k)
        run = scan_parallel if form == "parallel" else scan_recurrent
        out, state = run(q, k, v, log_decay=full, **options)
    out = out.to(out_dtype)
    return (out, Aux(state=state)) if return_aux is not None and return_aux.state else out


def _expand_decay(log_decay: Tensor | None, q: Tensor, dtype: torch.dtype) -> Tensor | None:
    """-> None, [B, T, H, 1] or [B, T, H, K]."""
    if log_decay is None:
        return None
    if bool((log_decay > 0).any()):
        raise OptionError(f"scan: log_decay must be <= 0 (natural log of a factor in (0, 1]); its maximum is {log_decay.max().item():.4g}")
    log_decay = log_decay.to(dtype)
    if log_decay.dim() == 1:
        return log_decay[None, None, :, None].expand(*q.shape[:3], 1)
    return log_decay[..., None] if log_decay.dim() == 3 else log_decay


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    bonus: Tensor | None,
    form: str,
    chunk_size: int,
    seq: SeqInfo | None,
) -> None:
    if form not in FORMS:
        raise OptionError(f"scan: unknown form {form!r}; {suggest(form, FORMS)}")
    if chunk_size < 1:
        raise OptionError(f"scan: chunk_size must be at least 1, got {chunk_size}")
    if beta is not None and low_rank is not None:
        raise OptionError("scan: give beta (delta rule) or low_rank (a, b), not both")
    given = describe(q=q, k=k, v=v, log_decay=log_decay, beta=beta, bonus=bonus)
    token_dims = 3 if seq is not None else 4
    lead = tuple(q.shape[:-1])
    if q.dim() != token_dims or k.shape != q.shape or v.dim() != token_dims or tuple(v.shape[:-1]) != lead:
        want = "q, k [T, H, K], v [T, H, V] (packed)" if seq is not None else "q, k [B, T, H, K], v [B, T, H, V]"
        raise ShapeError(f"scan: {want} expected; got {given}")
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        raise ShapeError(f"scan: q, k, v must share dtype and device; got {given}")
    if seq is not None and seq.total != q.shape[0]:
        raise ShapeError(f"scan: seq has {seq.total} tokens, the tensors {q.shape[0]}; got {given}")
    heads = q.shape[-2]
    if log_decay is not None and tuple(log_decay.shape) not in ((heads,), lead, tuple(q.shape)):
        raise ShapeError(f"scan: log_decay must be [H], [B, T, H] or [B, T, H, K] (packed: without B); got {given}")
    if beta is not None and tuple(beta.shape) != lead:
        raise ShapeError(f"scan: beta must be [B, T, H] (packed: [T, H]); got {given}")
    if low_rank is not None and any(x.shape != q.shape for x in low_rank):
        raise ShapeError(f"scan: low_rank (a, b) must each have q's shape; got {given}, {describe(a=low_rank[0], b=low_rank[1])}")
    if bonus is not None and tuple(bonus.shape) != (heads, q.shape[-1]):
        raise ShapeError(f"scan: bonus must be [H, K]; got {given}")


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    scale: float | None,
    seq: SeqInfo,
    form: str,
    chunk_size: int,
    return_aux: AuxRequest | None,
) -> Tensor | tuple[Tensor, Aux]:
    """Sequences of equal length are one batch; others are padded at the end with tokens that neither decay nor write."""
    if initial_state is not None and initial_state.shape[0] != seq.num_sequences:
        raise ShapeError(f"scan: initial_state must have one row per sequence ({seq.num_sequences}); got {describe(initial_state=initial_state)}")

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else pad_packed(x, seq.lengths)

    decay = log_decay
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(q.shape[:-1])
    result = scan(
        pad_packed(q, seq.lengths),
        pad_packed(k, seq.lengths),
        pad_packed(v, seq.lengths),
        log_decay=rows(decay),
        beta=rows(beta),
        low_rank=None if low_rank is None else (pad_packed(low_rank[0], seq.lengths), pad_packed(low_rank[1], seq.lengths)),
        bonus=bonus,
        initial_state=initial_state,
        scale=scale,
        form=form,
        chunk_size=chunk_size,
        return_aux=AuxRequest(state=True),
    )
    out, aux = result
    out = unpad_packed(out, seq.lengths)
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
