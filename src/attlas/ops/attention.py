"""The softmax attention primitive."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from attlas.errors import OptionError, UnsupportedError
from attlas.masks.expr import Mask
from attlas.ops.call import make_call
from attlas.ops.select import run_call
from attlas.ops.traced import traced
from attlas.scores import ScoreMod
from attlas.shapes import Aux, AuxRequest, SeqInfo


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    seq: SeqInfo | None = None,
    impl: str = "auto",
    return_aux: None = None,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    seq: SeqInfo | None = None,
    impl: str = "auto",
    return_aux: AuxRequest,
) -> tuple[Tensor, Aux]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    seq: SeqInfo | None = None,
    impl: str = "auto",
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """out_i = sum_j softmax_j( mod(scale * q_i . k_j) ) v_j over the keys j that the mask allows.

    Dense: q [B, Tq, H, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv] -> out [B, Tq, H, Dv]. Packed (`seq`): the same without B, and
    sequences do not see each other. Head h reads key head h // (H // Hkv). Any strides.

    mask       None = every pair. Masks are functions of absolute positions: keys stand at 0 ... Tk-1 and queries at
               Tk-Tq ... Tk-1, so `Causal()` is aligned to the end; in a packed batch `seq.first` says where queries start.
    score_mod  applied to the scaled scores before the mask, see `attlas.scores`; its tensors get exact gradients.
    scale      None = 1 / sqrt(D).
    sink       [H]: an extra logit in each head's denominator, without a value. lse includes it.
    impl       "auto", or a name (see `explain`), which runs or raises UnsupportedError.
    return_aux `AuxRequest(lse=True)` -> (out, Aux(lse)): natural log of the denominator, [B, Tq, H] or packed [T, H], fp32.
               It is differentiable.

    Scores, softmax and lse are in fp32 (fp64 for fp64 inputs); out has q's dtype. A query that may attend to nothing gives
    out 0, lse -inf (with a sink: lse = sink) and zero gradient. NaN or inf in a masked key or value reaches neither the rows that
    do not see it nor their gradients.

    Inside torch.compile the call is one operator of the graph, forward and backward; make masks outside the compiled function.

    Time: the allowed pairs, in blocks. Memory: O(T) with every implementation but "reference".
    Errors: ShapeError, OptionError, UnsupportedError, UnknownNameError. Vaswani et al. 2017, arXiv:1706.03762.
    """
    need_lse = False
    if return_aux is not None:
        if not isinstance(return_aux, AuxRequest):
            raise OptionError(f"attention(return_aux={return_aux!r}): pass AuxRequest(lse=True)")
        if return_aux.state:
            raise UnsupportedError(f"attention(return_aux={return_aux!r}): softmax attention has no recurrent state")
        need_lse = return_aux.lse
    if torch.compiler.is_compiling():
        out, lse = traced(q, k, v, mask=mask, score_mod=score_mod, scale=scale, sink=sink, seq=seq, impl=impl, need_lse=need_lse)
        return out if return_aux is None else (out, Aux(lse=lse))
    call = make_call(q, k, v, mask=mask, score_mod=score_mod, scale=scale, sink=sink, seq=seq, need_lse=need_lse)
    out, lse = run_call(call, impl)
    return out if return_aux is None else (out, Aux(lse=lse))
