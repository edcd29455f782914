"""Causal attention with lookahead keys: keys that go on gathering from the tokens that come after them."""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError, UnknownNameError, UnsupportedError
from attlas.kernels.blocked import lookahead as blocked
from attlas.numerics import full_precision, wide_dtype
from attlas.reference import lookahead as reference
from attlas.registry import suggest
from attlas.shapes import describe

IMPLS = ("auto", "blocked", "reference")
Projections = tuple[Tensor, Tensor, Tensor]


def lookahead_attention(
    ahead: Projections, own: Projections, *, window: int | None = None, state: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """u_s^t = sum_{s < j <= t, j <= s + window} sigmoid(q^U_s . k^U_j / sqrt(D)) v^U_j,
    o_t = softmax_{s <= t}(q_t . k_s / sqrt(D) - silu(q_t . u_s^t / sqrt(D))) v_s.

    ahead   q^U [B, M + T, H, D], k^U and v^U [B, T, H, D]
    own     q [B, T, H, D], k and v [B, M + T, H, D]
    window  how many tokens a key looks ahead, None = all
    state   u of the M tokens that came before, [B, M, H, D]; None = there were none
    impl    "blocked" (also "auto"): blocks of queries in turn. "reference": the paper's equations, whole sequences only, and the
            lookahead keys are then left out

    Returns o [B, T, H, D] in q's dtype, and u after the last token [B, M + T, H, D] in the computing dtype, without gradient. It
    replaces `state`: a later token changes the keys of all (or the last `window`) earlier ones.
    Computed in fp32 (fp64 for fp64 q). First-order gradients. Cost: about 5 D T^2 flops per head, like 2.5 times causal
    attention; with a window less. Kept for the backward pass: the inputs, o, u and the log-sum-exp, O(T D) per head; temporary
    memory 64 T scores per head and a handful of them. The reference takes O(T^3) time and O(T^2) memory.
    Raises ShapeError, OptionError, UnsupportedError, UnknownNameError. Source: Song et al. 2025, arXiv:2509.07301.
    """
    call = f"lookahead_attention({_shown(ahead, own)}, window={window}, impl={impl!r})"
    _check(call, ahead, own, window, state)
    if impl not in IMPLS:
        raise UnknownNameError(f"unknown impl {impl!r} for lookahead_attention; {suggest(str(impl), IMPLS)}")
    q, before = own[0], own[1].shape[1] - own[0].shape[1]
    dtype = wide_dtype(q.dtype)
    if impl == "reference":
        if before:
            raise UnsupportedError(f"{call}: impl='reference' computes whole sequences, {before} tokens came before")
        with full_precision(q):
            out = reference.castle_parallel(ahead, own, window)
        return out, q.new_zeros(q.shape[0], 0, *q.shape[2:], dtype=dtype)
    if state is None:
        state = q.new_zeros(q.shape[0], before, *q.shape[2:], dtype=dtype)
    rows = [_rows(t, dtype) for t in (*ahead, *own, state)]
    with full_precision(q):
        out, gathered = blocked.lookahead(tuple(rows[:3]), tuple(rows[3:6]), rows[6], window)
    return _tokens(out, q).to(q.dtype), _tokens(gathered, q)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, H, D] -> [B H, T, D]."""
    return x.transpose(1, 2).to(dtype).flatten(0, 1)


def _tokens(x: Tensor, like: Tensor) -> Tensor:
    """[B H, T, D] -> [B, T, H, D]."""
    return x.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def _shown(ahead: Projections, own: Projections) -> str:
    return describe(**dict(zip(("q_u", "k_u", "v_u", "q", "k", "v"), (*ahead, *own), strict=True)))


def _check(call: str, ahead: Projections, own: Projections, window: int | None, state: Tensor | None) -> None:
    (q_u, k_u, v_u), (q, k, v) = ahead, own
    if q.dim() != 4 or k.dim() != 4 or k.shape[1] < q.shape[1]:
        raise ShapeError(f"{call}: q must be [B, T, H, D], k [B, M + T, H, D]")
    held = (q.shape[0], k.shape[1] - q.shape[1], *q.shape[2:])
    if not (q_u.shape == k.shape == v.shape and k_u.shape == v_u.shape == q.shape and k.shape[2:] == q.shape[2:]):
        raise ShapeError(f"{call}: k_u and v_u must be like q; q_u and v like k; and k like q but for its tokens")
    if (tuple(state.shape) != held) if state is not None else held[1]:
        raise ShapeError(f"{call}: state must be {list(held)}; got {'none' if state is None else list(state.shape)}")
    if len({t.dtype for t in (*ahead, *own)}) > 1:
        raise ShapeError(f"{call}: all six must have one dtype")
    if window is not None and window < 1:
        raise OptionError(f"{call}: window must be at least 1")
