"""Fixed patterns of the softmax family: the mask is a value known before any data, and the cache follows from it.

Options that all of them share are described at `attlas.nn.attention.Attention`. Windows given as an int count keys including
the query's own (Window.last); a Window value may also reach to the right, which makes the mixer bidirectional (and without a
cache).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attlas.errors import OptionError
from attlas.masks.expr import Mask
from attlas.masks.leaves import Causal, Dilated, Local, Window
from attlas.masks.position_sets import Global
from attlas.nn.attention import Attend, Attention
from attlas.nn.rearranged import DilatedAttention
from attlas.nn.streaming import StreamingAttention
from attlas.ops.attention import attention
from attlas.positions.rope import Rope
from attlas.scores import Alibi, ScoreMod


def _window(call: str, window: int | Window) -> Window:
    if isinstance(window, Window):
        return window
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise OptionError(f"{call}: window must be at least 1 key (the query's own) or a Window value, not {window!r}")
    return Window.last(window)


def _causal(mask: Mask, right: int | None) -> Mask:
    return Causal() & mask if right == 0 else mask


def local(
    dim: int,
    num_heads: int,
    *,
    block: int,
    causal: bool = True,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    attend: Attend = attention,
) -> Attention:
    """Blocks of `block` tokens that do not see each other. mask Local(block), & Causal(); cache at most `block` tokens;
    about T block / 2 pairs (T block when bidirectional). Source: Child et al. 2019, arXiv 1904.10509; the chunks of Llama 4."""
    if block < 1:
        raise OptionError(f"local(dim={dim}, num_heads={num_heads}, block={block}): block must be at least 1")
    return Attention(
        dim, num_heads, mask=Causal() & Local(block) if causal else Local(block), num_kv_heads=num_kv_heads, head_dim=head_dim,
        rope=rope, score_mod=score_mod, scale=scale, bias=bias, qk_norm=qk_norm, attend=attend,
    ).named("local")  # fmt: skip


def sliding_window(
    dim: int,
    num_heads: int,
    *,
    window: int | Window,
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
    """The last `window` keys, or a Window(left, right). mask Causal() & Window.last(window); cache a rolling buffer of
    `window` tokens; T window pairs. Source: Beltagy et al. 2020, arXiv 2004.05150; Jiang et al. 2023, arXiv 2310.06825 (the
    rolling buffer)."""
    span = _window(f"sliding-window(dim={dim}, num_heads={num_heads}, window={window!r})", window)
    return Attention(
        dim, num_heads, mask=_causal(span, span.right), num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope,
        score_mod=score_mod, scale=scale, bias=bias, qk_norm=qk_norm, sink=sink, attend=attend,
    ).named("sliding-window")  # fmt: skip


def dilated_window(
    dim: int,
    num_heads: int,
    *,
    window: int,
    dilation: int,
    causal: bool = True,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    attend: Attend = attention,
) -> Attention:
    """Every `dilation`-th key: `window` of them back to (window - 1) dilation, its own included; bidirectional: as many to the
    right. mask Dilated(window - 1, 0 or window - 1, dilation); cache (window - 1) dilation + 1 tokens; T window pairs.
    Source: Beltagy et al. 2020, arXiv 2004.05150."""
    if window < 1 or dilation < 1:
        raise OptionError(
            f"dilated-window(dim={dim}, num_heads={num_heads}, window={window}, dilation={dilation}): both at least 1"
        )
    pattern = Dilated(window - 1, 0 if causal else window - 1, dilation)
    mixer = DilatedAttention(
        dim, num_heads, mask=_causal(pattern, pattern.right), num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope,
        scale=scale, bias=bias, qk_norm=qk_norm, attend=attend,
    ).named("dilated-window")  # fmt: skip
    if causal and dilation > 1:
        mixer.rearrange(dilation, window)
    return mixer


def global_tokens(
    dim: int,
    num_heads: int,
    *,
    window: int | Window,
    tokens: Sequence[int] = (0,),
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    attend: Attend = attention,
) -> Attention:
    """A window plus global tokens (positions): they see and are seen by every token, as far as causality lets them; each key
    counts once. mask Causal() & (Window.last(window) | Global(tokens)), without Causal() when the window reaches right. Cache:
    window + len(tokens) tokens when the global tokens are the first ones of the sequence, otherwise it grows. About T (window
    + 2 len(tokens)) pairs. Source: Beltagy et al. 2020, arXiv 2004.05150; Zaheer et al. 2020, arXiv 2007.14062."""
    call = f"global(dim={dim}, num_heads={num_heads}, window={window!r}, tokens={tokens!r})"
    if any(t < 0 for t in tokens):
        raise OptionError(f"{call}: tokens are positions, none below 0")
    span = _window(call, window)
    return Attention(
        dim, num_heads, mask=_causal(span | Global(tuple(tokens)), span.right), num_kv_heads=num_kv_heads, head_dim=head_dim,
        rope=rope, score_mod=score_mod, scale=scale, bias=bias, qk_norm=qk_norm, attend=attend,
    ).named("global")  # fmt: skip


def streaming(
    dim: int,
    num_heads: int,
    *,
    window: int,
    sinks: int = 4,
    sink_positions: Literal["cache", "absolute"] = "cache",
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    attend: Attend = attention,
) -> StreamingAttention:
    """The first `sinks` tokens and the last `window`, positions counted inside the cache (see StreamingAttention). Cache sinks
    + window tokens; T (window + sinks) pairs. Source: Xiao et al. 2023, arXiv 2309.17453."""
    return StreamingAttention(
        dim, num_heads, window=window, sinks=sinks, sink_positions=sink_positions, num_kv_heads=num_kv_heads, head_dim=head_dim,
        rope=rope, scale=scale, bias=bias, qk_norm=qk_norm, attend=attend,
    ).named("streaming")  # fmt: skip


def alibi(
    dim: int,
    num_heads: int,
    *,
    causal: bool = True,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    sink: bool = False,
    attend: Attend = attention,
) -> Attention:
    """No rotation; scores fall linearly with distance, at a fixed slope per head: score - slope_h |q - k|. mask Causal() or
    None; cache grows. Source: Press et al. 2021, arXiv 2108.12409."""
    return Attention(
        dim, num_heads, mask=Causal() if causal else None, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=False,
        score_mod=Alibi.for_heads(max(num_heads, 1), device="cpu"), scale=scale, bias=bias, qk_norm=qk_norm, sink=sink,
        attend=attend,
    ).named("alibi")  # fmt: skip


def flash(
    dim: int,
    num_heads: int,
    *,
    causal: bool = True,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    attend: Attend = attention,
) -> Attention:
    """Exact attention, pinned to the block-wise implementation: online softmax over tiles, probabilities never stored,
    recomputed in the backward pass; extra memory O(T). mask Causal() or None; cache grows. Source: Dao et al. 2022, arXiv
    2205.14135."""
    mixer = Attention(
        dim, num_heads, mask=Causal() if causal else None, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope,
        score_mod=score_mod, scale=scale, bias=bias, qk_norm=qk_norm, attend=attend,
    ).named("flash")  # fmt: skip
    mixer.use("blocked")
    return mixer


def learned_sink(
    dim: int,
    num_heads: int,
    *,
    window: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    qk_norm: bool = False,
    attend: Attend = attention,
) -> Attention:
    """Causal attention with a learned logit z_h per head in the denominator: p_j = exp(s_j) / (exp(z_h) + sum exp(s)). With
    `window`, over the last `window` keys (cache a rolling buffer), else over all earlier ones (cache grows). Source: gpt-oss,
    OpenAI 2025, arXiv 2508.10925."""
    call = f"learned-sink(dim={dim}, num_heads={num_heads}, window={window!r})"
    mask = Causal() if window is None else Causal() & _window(call, window)
    return Attention(
        dim, num_heads, mask=mask, sink=True, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope, score_mod=score_mod,
        scale=scale, bias=bias, qk_norm=qk_norm, attend=attend,
    ).named("learned-sink")  # fmt: skip
