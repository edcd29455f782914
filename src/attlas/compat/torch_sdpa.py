"""The spelling of torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError, UnsupportedError
from attlas.masks import Causal, Dense, Mask
from attlas.ops.attention import attention
from attlas.scores import RelativeBias, ScoreMod
from attlas.shapes import describe


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`ops.attention` in torch's head-major spelling: query [B, H, L, E], key and value [B, Hkv, S, E], or all without B.

    attn_mask   bool (True = may attend) or additive float, broadcastable to [B, H, L, S]; an entry of -inf forbids the pair.
                Other entries, e.g. finfo.min, are ordinary biases and get gradients
    is_causal   aligned to the start, as torch does: query i sees keys 0 ... i even when there are more keys than queries. For
                decoding use `ops.attention` with Causal(), which is aligned to the end
    enable_gqa  allow fewer key/value heads than query heads
    dropout_p   must be 0

    Inputs are read as strided views, without a copy. A query that may attend to nothing gives 0.
    Returns [B, H, L, Ev] in the layout of a transposed token-major tensor. Raises ShapeError, OptionError, UnsupportedError.
    """
    call = f"sdpa({describe(query=query, key=key, value=value, attn_mask=attn_mask)}, is_causal={is_causal}"
    call += f", enable_gqa={enable_gqa})"
    if dropout_p:
        raise UnsupportedError(f"{call}: dropout_p={dropout_p}: attention weights are never dropped here; pass 0")
    if is_causal and attn_mask is not None:
        raise OptionError(f"{call}: is_causal and attn_mask exclude each other, as in torch")
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (3, 4):
        raise ShapeError(f"{call}: wanted [B, H, L, E] or [H, L, E] for all three")
    if query.shape[-3] != key.shape[-3] and not enable_gqa:
        raise ShapeError(f"{call}: different numbers of heads need enable_gqa=True")
    batched = query.dim() == 4
    q, k, v = (t.transpose(-2, -3) if batched else t.transpose(-2, -3)[None] for t in (query, key, value))
    mask: Mask | None = Causal(align="start") if is_causal else None
    bias: ScoreMod | None = None
    if attn_mask is not None:
        mask, bias = _spread(call, attn_mask, query, key)
    out = attention(q, k, v, mask=mask, score_mod=bias, scale=scale).transpose(1, 2)
    return out if batched else out[0]


def _spread(call: str, attn_mask: Tensor, query: Tensor, key: Tensor) -> tuple[Mask | None, ScoreMod | None]:
    """(mask, score_mod) of an attn_mask: a bool mask, or a bias whose entries of -inf become a mask."""
    full = (*query.shape[:-1], key.shape[-2])
    lead = attn_mask.shape[:-2]
    fits = attn_mask.dim() <= len(full) and all(
        a in (1, b) for a, b in zip(reversed(attn_mask.shape), reversed(full), strict=False)
    )
    if attn_mask.dim() < 2 or not fits:
        raise ShapeError(f"{call}: attn_mask does not broadcast to {list(full)}")
    attn_mask = attn_mask.expand(*lead, *full[-2:])
    while attn_mask.dim() > 2 and attn_mask.shape[0] == 1:
        attn_mask = attn_mask[0]
    if attn_mask.dtype == torch.bool:
        return Dense(attn_mask), None
    if not attn_mask.is_floating_point():
        raise ShapeError(f"{call}: attn_mask must be bool or floating point")
    bias = attn_mask if attn_mask.dim() > 2 else attn_mask[None]
    forbidden = attn_mask.detach() == -math.inf
    if not forbidden.any():
        return None, RelativeBias.dense(bias)
    return Dense(~forbidden), RelativeBias.dense(bias.masked_fill(forbidden, 0.0))
