"""The patterns of the Sparse Transformer, and block-sparse attention with a given layout.

Options that all of them share are described at `attlas.nn.attention.Attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from attlas.errors import OptionError
from attlas.masks import Blocks, Causal, Fixed, Local, Mask, PerHead, Strided, Window
from attlas.nn.attention import Attend, Attention
from attlas.nn.rearranged import FixedAttention, StridedAttention
from attlas.ops.attention import attention
from attlas.positions.rope import Rope


def strided(
    dim: int,
    num_heads: int,
    *,
    stride: int,
    per_head: bool = False,
    causal: bool = True,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    attend: Attend = attention,
) -> Attention:
    """The last `stride` keys and every `stride`-th key before them, in one softmax; with per_head, even heads take the window
    and odd heads the column of strides.

    mask Causal() & (Window.last(stride) | Strided(stride)); cache grows; about T (stride + T / (2 stride)) pairs, least for a
    stride near the square root of T. Source: Child et al. 2019, arXiv 1904.10509.
    """
    if stride < 1:
        raise OptionError(f"strided(dim={dim}, num_heads={num_heads}, stride={stride}): stride must be at least 1")
    near, far = Window(stride - 1, 0 if causal else stride - 1), Strided(stride)
    pattern: Mask = near | far
    if per_head:
        pattern = PerHead(tuple(far if h % 2 else near for h in range(num_heads)))
    mixer = StridedAttention(
        dim, num_heads, mask=Causal() & pattern if causal else pattern, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope,
        scale=scale, bias=bias, qk_norm=qk_norm, attend=attend,
    ).named("strided")  # fmt: skip
    if causal and not per_head:
        mixer.rearrange(stride)
    return mixer


def fixed(
    dim: int,
    num_heads: int,
    *,
    block: int,
    summary: int | tuple[int, int] = 1,
    causal: bool = True,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    attend: Attend = attention,
) -> Attention:
    """The query's own block of `block` tokens and the last `summary` tokens of every block, in one softmax.

    summary  (tokens, columns): each head has summaries of its own, as in the released code: head h the tokens before the last
             tokens * (h mod columns) ones of a block

    mask Causal() & Fixed(block, summary); cache grows; about T (block / 2 + T summary / (2 block)) pairs.
    Source: Child et al. 2019, arXiv 1904.10509.
    """
    call = f"fixed(dim={dim}, num_heads={num_heads}, block={block}, summary={summary})"
    tokens, columns = (summary, 1) if isinstance(summary, int) else summary
    if block < 1 or tokens < 0 or columns < 1 or tokens * columns > block:
        raise OptionError(f"{call}: block must be at least 1, summary (times columns) between 0 and block")
    pattern: Mask = Fixed(block, tokens)
    if columns > 1:
        pattern = PerHead(tuple(_column(block, tokens, h % columns) for h in range(num_heads)))
    mixer = FixedAttention(
        dim, num_heads, mask=Causal() & pattern if causal else pattern, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope,
        scale=scale, bias=bias, qk_norm=qk_norm, attend=attend,
    ).named("fixed")  # fmt: skip
    mixer.pattern = pattern if causal and isinstance(pattern, Fixed) else None
    return mixer


def _column(block: int, tokens: int, column: int) -> Mask:
    """The query's own block, and of the others the `tokens` tokens before their last column * tokens ones."""
    wide = Fixed(block, tokens * (column + 1))
    return wide if not column else Local(block) | (wide & ~Fixed(block, tokens * column))


def block_sparse(
    dim: int,
    num_heads: int,
    *,
    layout: Tensor | Sequence[object],
    block_size: int,
    causal: bool = True,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    attend: Attend = attention,
) -> Attention:
    """Blocks of `block_size` queries see the blocks of keys that `layout` marks: bool [query blocks, key blocks], or with a
    leading dimension one layout per head; also rows written as strings, ("100", "110", "011").

    mask Causal() & Blocks(layout, block_size); tokens past the layout see nothing and are not seen; cache grows (a layout says
    nothing about a bounded reach); marked blocks times block_size^2 pairs. Source: Qiu et al. 2019, arXiv 1911.02972.
    """
    pattern = Blocks(layout, block_size)
    return Attention(
        dim, num_heads, mask=Causal() & pattern if causal else pattern, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope,
        scale=scale, bias=bias, qk_norm=qk_norm, attend=attend,
    ).named("block-sparse")  # fmt: skip
