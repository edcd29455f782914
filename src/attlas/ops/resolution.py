"""Attention at two resolutions: the pairs of blocks that matter most token by token, the others by their means."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError
from attlas.numerics import full_precision
from attlas.ops.attention import attention
from attlas.ops.groups import attend_groups, group_means, log_counts, merge_rows, take, token_rows
from attlas.ops.merge import merge
from attlas.scores import RelativeBias
from attlas.shapes import AuxRequest, describe

Ranking = Literal["absolute", "relative"]


def multi_resolution_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    blocks_per_row: int,
    coarse: bool = True,
    ranking: Ranking = "absolute",
    diagonal: int = 0,
    first: int = 0,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """out_i = sum_j softmax_j(s_ij) v_j with s_ij = scale q_i . k_j where the blocks of i and j are among the best pairs, else
    S_xy = scale mean(q of i's block x) . mean(k of j's block y).

    q, k, v [B, T, H, D] -> [B, T, H, D]. Blocks have `block` tokens, the last one may be short. Of the n^2 pairs of n blocks,
    each head takes the n * blocks_per_row best; with blocks_per_row >= n it is softmax attention.

    coarse    False: pairs that are not among the best are left out; a query without any gives 0
    ranking   best by S_xy ("absolute"), or by S_xy - max_y S_xy ("relative"): the best pair of every row comes before all others
    diagonal  pairs that are taken before all others: |x - y| <= diagonal // 2, for an odd number; 0 = none
    first     the same for pairs with x < first or y < first. Needs diagonal + 2 first <= blocks_per_row, and one more where
              "relative" shall leave each row its best pair: these tie with each other
    scale     None = 1 / sqrt(D)

    The choice carries no gradient, the means do. A NaN reaches everything. Bidirectional: means look at later tokens.
    Cost per head: 4 T block blocks_per_row D flops, and 2 (coarse: 4) n^2 D. Memory: 3 T blocks_per_row D and n^2 numbers.
    Errors: ShapeError, OptionError. Zeng et al. 2022, arXiv:2207.10284.
    """
    _check(q, k, v, block, blocks_per_row, ranking, diagonal, first)
    b, t, h, d = q.shape
    n = -(-t // block)
    if blocks_per_row >= n or not q.numel():
        return attention(q, k, v, scale=scale, impl=impl)
    scale = d**-0.5 if scale is None else scale
    low_q, low_k = group_means(q, block), group_means(k, block)
    with torch.no_grad(), full_precision(q):
        best = _best(torch.einsum("bihd,bjhd->bhij", low_q, low_k) * scale, n * blocks_per_row, ranking, diagonal, first)
    fine, fine_lse = _token_by_token(q, k, v, best, block, scale, impl)
    if not coarse:
        return fine
    weights = log_counts(t, block, low_q).expand(b * h, n, n).flatten(1).scatter(1, best, -math.inf).view(b, h, n, n)
    bias = RelativeBias.dense(weights)
    means, aux = attention(
        low_q, low_k, group_means(v, block), score_mod=bias, scale=scale, impl=impl, return_aux=AuxRequest(lse=True)
    )
    assert aux.lse is not None
    rest, rest_lse = (x.repeat_interleave(block, 1)[:, :t] for x in (means, aux.lse))
    return merge([(fine, fine_lse), (rest, rest_lse)])[0]


def _best(scores: Tensor, count: int, ranking: Ranking, diagonal: int, first: int) -> Tensor:
    """The `count` best pairs of blocks of scores [B, H, n, n], as x * n + y: int64 [B * H, count]."""
    n = scores.shape[-1]
    if ranking == "relative":
        scores = scores - scores.amax(-1, keepdim=True)
    at = torch.arange(n, device=scores.device)
    forced = ((at[:, None] - at).abs() * 2 < diagonal) | (at[:, None] < first) | (at < first)
    return scores.masked_fill(forced, math.inf).flatten(-2).topk(count, sorted=False).indices.flatten(0, 1)


def _token_by_token(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, block: int, scale: float, impl: str) -> tuple[Tensor, Tensor]:
    """Softmax attention over the blocks that `pairs` [B * H, count] names: out [B, T, H, D], lse [B, T, H]."""
    b, t, h, d = q.shape
    n = -(-t // block)
    within = torch.arange(block, device=q.device)
    asking, asked = (x[..., None] * block + within for x in (torch.div(pairs, n, rounding_mode="floor"), pairs % n))
    # what a short block lacks is filled up with its own last token, so that a NaN goes no further than without it
    rows, keys = (token_rows(x.clamp(max=t - 1), t, h).flatten(0, 1) for x in (asking, asked))
    allowed = (asked < t).flatten(0, 1)[:, None].expand(-1, block, -1) if t % block else None
    out, lse = attend_groups(take(q, rows), take(k, keys), take(v, keys), allowed=allowed, scale=scale, impl=impl)
    lse = lse.masked_fill((asking >= t).flatten(0, 1), -math.inf)
    out, lse = merge_rows(out, lse, rows, b * t * h)
    return out.view(b, t, h, d), lse.view(b, t, h)


def _check(q: Tensor, k: Tensor, v: Tensor, block: int, per_row: int, ranking: str, diagonal: int, first: int) -> None:
    options = f"block={block}, blocks_per_row={per_row}, ranking={ranking!r}, diagonal={diagonal}, first={first}"
    call = f"multi_resolution_attention({describe(q=q, k=k, v=v)}, {options})"
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ShapeError(f"{call}: q, k and v must be [B, T, H, D]")
    if wrong := wrong_blocks(block, per_row, ranking, diagonal, first):
        raise OptionError(f"{call}: {wrong}")


def wrong_blocks(block: int, per_row: int, ranking: str, diagonal: int, first: int) -> str | None:
    """What is wrong with the choice of blocks; None = nothing."""
    if block < 1 or per_row < 1:
        return "block and blocks_per_row must be at least 1"
    if ranking not in ("absolute", "relative"):
        return "ranking must be 'absolute' or 'relative'"
    if diagonal < 0 or first < 0 or (diagonal and diagonal % 2 == 0):
        return "diagonal must be odd or 0, first at least 0"
    if diagonal + 2 * first > per_row:
        return f"diagonal + 2 first = {diagonal + 2 * first} blocks are asked for in every row, blocks_per_row allows {per_row}"
    return None
