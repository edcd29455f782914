"""The core of the softmax family: who attends to whom (full, causal, cross) and how heads share keys and values.

Every function builds one mixer; its signature is the list of options that `attlas.build` takes. Options that all of them share
are described at `attlas.nn.attention.Attention`.
"""

from __future__ import annotations

from typing import Literal

from attlas.masks.leaves import Causal
from attlas.nn.attention import Attend, Attention
from attlas.nn.cross import CrossAttention
from attlas.ops.attention import attention
from attlas.positions.rope import Rope
from attlas.scores import ScoreMod


def full(
    dim: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    sink: bool = False,
    attend: Attend = attention,
) -> Attention:
    """Bidirectional: every token attends to every token of its sequence. mask None; no cache; T^2 pairs."""
    return Attention(
        dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope, score_mod=score_mod, scale=scale, bias=bias,
        qk_norm=qk_norm, sink=sink, attend=attend,
    ).named("full")  # fmt: skip


def causal(
    dim: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    sink: bool = False,
    attend: Attend = attention,
) -> Attention:
    """Every token attends to itself and to all earlier ones. mask Causal(); cache grows; T (T + 1) / 2 pairs."""
    return Attention(
        dim, num_heads, mask=Causal(), num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope, score_mod=score_mod, scale=scale,
        bias=bias, qk_norm=qk_norm, sink=sink, attend=attend,
    ).named("causal")  # fmt: skip


def cross(
    dim: int,
    num_heads: int,
    *,
    memory_dim: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    sink: bool = False,
    attend: Attend = attention,
) -> CrossAttention:
    """Queries from x, keys and values from `memory`. mask None; cache holds the memory, written once; T S pairs."""
    return CrossAttention(
        dim, num_heads, memory_dim=memory_dim, num_kv_heads=num_kv_heads, head_dim=head_dim, scale=scale, bias=bias,
        qk_norm=qk_norm, sink=sink, attend=attend,
    ).named("cross")  # fmt: skip


def multi_head(
    dim: int,
    num_heads: int,
    *,
    causal: bool = True,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    sink: bool = False,
    attend: Attend = attention,
) -> Attention:
    """Every query head has its own key and value head. mask Causal() or None; cache 2 num_heads head_dim per token."""
    return Attention(
        dim, num_heads, mask=Causal() if causal else None, head_dim=head_dim, rope=rope, score_mod=score_mod, scale=scale,
        bias=bias, qk_norm=qk_norm, sink=sink, attend=attend,
    ).named("multi-head")  # fmt: skip


def multi_query(
    dim: int,
    num_heads: int,
    *,
    causal: bool = True,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    sink: bool = False,
    attend: Attend = attention,
) -> Attention:
    """All query heads read one key head and one value head. mask Causal() or None; cache 2 head_dim per token.
    Source: Shazeer 2019, arXiv 1911.02150."""
    return Attention(
        dim, num_heads, num_kv_heads=1, mask=Causal() if causal else None, head_dim=head_dim, rope=rope, score_mod=score_mod,
        scale=scale, bias=bias, qk_norm=qk_norm, sink=sink, attend=attend,
    ).named("multi-query")  # fmt: skip


def grouped_query(
    dim: int,
    num_heads: int,
    *,
    num_kv_heads: int,
    causal: bool = True,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    sink: bool = False,
    attend: Attend = attention,
) -> Attention:
    """Groups of num_heads / num_kv_heads neighbouring query heads read one key and value head. mask Causal() or None; cache
    2 num_kv_heads head_dim per token. Source: Ainslie et al. 2023, arXiv 2305.13245."""
    return Attention(
        dim, num_heads, num_kv_heads=num_kv_heads, mask=Causal() if causal else None, head_dim=head_dim, rope=rope,
        score_mod=score_mod, scale=scale, bias=bias, qk_norm=qk_norm, sink=sink, attend=attend,
    ).named("grouped-query")  # fmt: skip
