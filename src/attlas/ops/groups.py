"""Attention inside many small groups of tokens that were picked from the data: picking, attending, putting back."""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.ops.attention import attention
from attlas.scores import RelativeBias
from attlas.shapes import AuxRequest


def token_rows(tokens: Tensor, length: int, heads: int, *, first: int = 0) -> Tensor:
    """Tokens [G, ...], of `first` and the following of the B * H pairs of a batch row and a head (negative = none, then token 0)
    -> their rows in x.reshape(-1, D) of a token-major x [B, T, H, D]."""
    g = torch.arange(first, first + len(tokens), device=tokens.device).view(-1, *(1,) * (tokens.ndim - 1))
    return (torch.div(g, heads, rounding_mode="floor") * length + tokens.clamp(min=0)) * heads + g % heads


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x.reshape(-1, D)[rows]: [*rows.shape, D], for x [..., D]."""
    return x.reshape(-1, x.shape[-1]).index_select(0, rows.flatten()).view(*rows.shape, x.shape[-1])


def attend_groups(
    q: Tensor, k: Tensor, v: Tensor, *, allowed: Tensor | None = None, scale: float | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Softmax attention of q [N, m, D] over k [N, n, D], v [N, n, Dv], group by group -> (out [N, m, Dv], lse [N, m]).

    allowed  bool [N, m, n], None = every pair. Masks are rules on positions, which tokens picked by content do not keep, so it is
             handed on as a bias of 0 and -inf: a NaN in a key reaches every query of its group.
    An empty row gives 0 and lse -inf. Cost: 4 N m n D flops; memory N m n fp32 numbers where `allowed` is given.
    """
    q, k, v = (x[:, :, None] for x in (q, k, v))
    bias = None if allowed is None else RelativeBias.dense(torch.where(allowed, 0.0, -torch.inf)[:, None])
    out, aux = attention(q, k, v, score_mod=bias, scale=scale, impl=impl, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    return out[:, :, 0], aux.lse[..., 0]
