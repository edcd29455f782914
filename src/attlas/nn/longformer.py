"""Longformer: a window and global tokens, with projections of their own for what the global tokens read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attlas.cache.layer import Cache
from attlas.cache.part import PartSpec
from attlas.errors import OptionError
from attlas.masks.explicit import Dense
from attlas.masks.expr import Mask
from attlas.masks.geometry import Grid
from attlas.masks.leaves import Causal, Dilated, Prefix, Sinks, Window
from attlas.masks.position_sets import Global
from attlas.nn.attention import Angles, Attend, Attention
from attlas.nn.reach import reach
from attlas.ops.attention import attention
from attlas.ops.cached import attention_cached
from attlas.positions.rope import Rope
from attlas.shapes import SeqInfo

# read(side, q, k, v, mask): side 0 is the local, side 1 the global attention; each has its own keys and values.
SideRead = Callable[[int, Tensor, Tensor, Tensor, Mask], Tensor]


class LongformerAttention(Attention):
    """Attention over a window and over global tokens, in one softmax; the global tokens themselves read every token, through
    query, key and value projections of their own.

        i not global:  y_i = o(softmax_j(q_i . k_j) v_j)      over j in the window of i or global; each key once
        i global:      y_i = o(softmax_j(q'_i . k'_j) v'_j)   over all j (j <= i when causal), by the global projections

    window    keys including the token's own (causal), or a Window(left, right), which with right > 0 is bidirectional
    tokens    positions of the global tokens; none: a window alone, and the global projections are not used
    dilation  the window takes every dilation-th key, and so reaches dilation times further

    The other options are those of Attention. Cost: 4 dim flops per pair of the mask (window | global), and the global keys and
    values of all tokens; few global tokens without rotary positions spare those (see `_absorbed`). Cache (causal only): window +
    len(tokens) tokens of local and len(tokens) + 1 of global keys and values when the global tokens are the first ones, else both
    grow. Source: Beltagy et al. 2020, arXiv 2004.05150.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int | Window,
        tokens: Sequence[int] = (0,),
        dilation: int = 1,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool | float | Rope = True,
        scale: float | None = None,
        bias: bool | Literal["qkv"] = False,
        attend: Attend = attention,
    ) -> None:
        call = f"longformer(dim={dim}, num_heads={num_heads}, window={window!r}, tokens={tokens!r}, dilation={dilation})"
        if not isinstance(window, Window):
            if isinstance(window, bool) or not isinstance(window, int) or window < 1:
                raise OptionError(f"{call}: window must be at least 1 key (the token's own) or a Window value")
            window = Window.last(window)
        if dilation < 1 or any(t < 0 for t in tokens):
            raise OptionError(f"{call}: dilation must be at least 1, and no global position may be below 0")
        causal, chosen = window.right == 0, Global(tuple(tokens))
        near: Mask = window
        if dilation > 1:
            if window.left is None or window.right is None:
                raise OptionError(f"{call}: a dilated window must be bounded on both sides")
            near = Dilated(window.left, window.right, dilation)
        whole = near | chosen if chosen.tokens else near
        super().__init__(
            dim, num_heads, mask=Causal() & whole if causal else whole, num_kv_heads=num_kv_heads,
            head_dim=head_dim, rope=rope, scale=scale, bias=bias, attend=attend,
        )  # fmt: skip
        self.tokens, self.global_mask = chosen.tokens, Causal() & chosen if causal else chosen
        self.local_mask = _local_mask(near, chosen, causal)
        inner, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_global_proj = nn.Linear(dim, inner, bias=bool(bias))
        self.k_global_proj = nn.Linear(dim, kv, bias=bool(bias))
        self.v_global_proj = nn.Linear(dim, kv, bias=bool(bias))
        keep = reach(self.mask)
        held = (("k", (self.num_kv_heads, self.head_dim)), ("v", (self.num_kv_heads, self.head_dim)))
        # Only global tokens ask for global keys, and for none after themselves: the sinks, when those are the global tokens.
        self._second = PartSpec("kv", held, window=None if keep.window is None else 1, sinks=keep.sinks)

    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        if cache is None and seq is not None:
            if any(seq.first):
                return self.mix_irregular(x, memory=memory, positions=positions, seq=seq)
            seq = SeqInfo(seq.lengths)
        options: dict[str, Any] = {"scale": self.scale, "seq": seq, "impl": self.impl}

        def read(side: int, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
            if cache is None:
                return self.attend(q, k, v, mask=mask, **options)
            assert seq is not None, "a cache comes with the packed form"
            cache.parts[side].write((k, v), seq)
            return attention_cached(q, cache.parts[side], mask=mask, **options)

        if cache is None and seq is None and self.attend is attention:
            return self._dense(x, positions, read)
        spans = [(0, x.shape[-2])] if seq is None else list(zip(seq.first, seq.lengths, strict=True))
        if any(first <= t < first + n for first, n in spans for t in self.tokens):
            return self._both(x, positions, read)
        if cache is not None:
            self._write_global(x, positions, seq, cache)
        return self.o_proj(self._local(x, self._angles(positions, x), read).flatten(-2))

    def _write_global(self, x: Tensor, positions: Tensor, seq: SeqInfo | None, cache: Cache) -> None:
        """Global keys and values of tokens none of which is global; zeros where no global token can follow."""
        assert seq is not None, "a cache comes with the packed form"
        if self.tokens and any(first <= self.tokens[-1] for first in seq.first):
            k, v = self._global_keys(x, self._angles(positions, x))
        else:
            k = v = x.new_zeros(x.shape[0], self.num_kv_heads, self.head_dim)
        cache.parts[1].write((k, v), seq)

    def _global_keys(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        k, v = (p(x).unflatten(-1, (self.num_kv_heads, self.head_dim)) for p in (self.k_global_proj, self.v_global_proj))
        return self._rotate(k, angles), v

    def _local(self, x: Tensor, angles: Angles, read: SideRead) -> Tensor:
        q, (k, v) = self._queries(x), self._keys_values(x)
        return read(0, self._rotate(q, angles), self._rotate(k, angles), v, self.local_mask)

    def _dense(self, x: Tensor, positions: Tensor, read: SideRead) -> Tensor:
        """Rows from position 0 on: the global tokens alone are the queries of the second read."""
        angles, end = self._angles(positions, x), x.shape[1]
        out = self._local(x, angles, read)
        found = [t for t in self.tokens if t < end]
        if not found or not x.numel():
            return self.o_proj(out.flatten(-2))
        rows = torch.tensor(found, device=x.device)
        last = found[-1] + 1 if self.causal else end
        q = self.q_global_proj(x.index_select(1, rows)).unflatten(-1, (self.num_heads, self.head_dim))
        if self.rope is None and len(found) * self.num_heads < self.num_kv_heads * self.head_dim:
            whole = self._absorbed(q, x if last == end else x[:, :last], tuple(found))
        else:
            at = None if angles is None else (angles[0][rows], angles[1][rows])
            until = None if angles is None else (angles[0][:last], angles[1][:last])
            mask = _seen(tuple(found), 1, x.device) if self.causal else None
            keys, values = self._global_keys(x[:, :last], until)
            whole = self.attend(self._rotate(q, at), keys, values, mask=mask, scale=self.scale, impl=self.impl)
        out = out.index_copy(1, rows, whole) if out.requires_grad or whole.requires_grad else out.index_copy_(1, rows, whole)
        return self.o_proj(out.flatten(-2))

    def _absorbed(self, q: Tensor, x: Tensor, tokens: tuple[int, ...]) -> Tensor:
        """What queries q [B, G, H, D] read of x [B, T, dim] without making global keys and values: W_k goes to the queries and
        W_v to the outputs, and x itself is the one key and value of all heads. 4 T dim G H flops, not 4 T dim D H for keys and
        values."""
        group, (rows, count) = self.num_heads // self.num_kv_heads, q.shape[:2]
        up_k, up_v = (p.weight.unflatten(0, (self.num_kv_heads, self.head_dim)) for p in (self.k_global_proj, self.v_global_proj))
        wide = torch.einsum("bghqd,hdc->bghqc", q.unflatten(2, (self.num_kv_heads, group)), up_k)
        if self.k_global_proj.bias is not None:  # the same for every key of a softmax, so it cancels; its gradient is 0, not None
            wide = wide + 0.0 * self.k_global_proj.bias.sum()
        wide = wide.reshape(rows, count * self.num_heads, 1, self.dim)
        mask = _seen(tokens, self.num_heads, x.device) if self.causal else None
        source, scale = x.unsqueeze(2), self.head_dim**-0.5 if self.scale is None else self.scale
        mean = self.attend(wide, source, source, mask=mask, scale=scale, impl=self.impl)
        mean = mean.view(rows, count, self.num_kv_heads, group, self.dim)
        out = torch.einsum("bghqc,hdc->bghqd", mean, up_v).flatten(2, 3)
        bias = self.v_global_proj.bias
        return out if bias is None else out + bias.view(self.num_kv_heads, -1).repeat_interleave(group, 0)

    def _both(self, x: Tensor, positions: Tensor, read: SideRead) -> Tensor:
        """The local rows, with those of the global tokens replaced."""
        angles, axis = self._angles(positions, x), x.dim() - 2
        out = self._local(x, angles, read)
        rows = (
            torch.isin(positions, torch.tensor(self.tokens, dtype=positions.dtype, device=positions.device)).nonzero().flatten()
        )
        if not len(rows):
            return self.o_proj(out.flatten(-2))
        chosen = self.q_global_proj(x.index_select(axis, rows)).unflatten(-1, (self.num_heads, self.head_dim))
        q = chosen.new_zeros(*x.shape[:-1], *chosen.shape[-2:]).index_copy(axis, rows, chosen)
        whole = read(1, self._rotate(q, angles), *self._global_keys(x, angles), self.global_mask)
        return self.o_proj(out.index_copy(axis, rows, whole.index_select(axis, rows)).flatten(-2))

    def _mix_at(self, x: Tensor, positions: Tensor) -> Tensor:
        grid = Grid.at(positions, positions)

        def read(side: int, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
            return self.attend(q, k, v, mask=Dense(mask.dense(grid, device=x.device)), scale=self.scale, impl=self.impl)

        return self._both(x[None], positions, read)[0]

    def cache_specs(self) -> tuple[PartSpec, ...]:
        return (*super().cache_specs(), self._second)

    def flops(self, seq_len: int) -> int:
        """The projections of Attention, the global ones that are used, and every pair of the mask once."""
        found = sum(t < seq_len for t in self.tokens)
        inner, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        extra = 2 * self.dim * (found * inner + 2 * seq_len * kv) if found else 0
        return super().flops(seq_len) + extra


@lru_cache(maxsize=32)
def _seen(tokens: tuple[int, ...], times: int, device: torch.device) -> Mask:
    """The keys up to each of the tokens, `times` rows for each: bits [len(tokens) * times, last token + 1]."""
    rows = torch.tensor(tokens, device=device).repeat_interleave(times)
    return Dense(torch.arange(tokens[-1] + 1, device=device) <= rows[:, None])


def _local_mask(near: Mask, chosen: Global, causal: bool) -> Mask:
    """The keys of the tokens that are not global. What it allows the global tokens does not matter: their rows are replaced, so
    nothing is spent on them."""
    tokens = chosen.tokens
    if not tokens:
        return Causal() & near if causal else near
    if len(tokens) != tokens[-1] + 1:
        return Causal() & (near | chosen) if causal else near | chosen
    return Causal() & (near | Sinks(len(tokens))) if causal else near | Prefix(len(tokens))


def longformer(
    dim: int,
    num_heads: int,
    *,
    window: int | Window,
    tokens: Sequence[int] = (0,),
    dilation: int = 1,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope: bool | float | Rope = True,
    scale: float | None = None,
    bias: bool | Literal["qkv"] = False,
    attend: Attend = attention,
) -> Attention:
    """A window plus global tokens that read through projections of their own (see LongformerAttention). About T (window + 2
    len(tokens)) pairs. Source: Beltagy et al. 2020, arXiv 2004.05150."""
    return LongformerAttention(
        dim, num_heads, window=window, tokens=tokens, dilation=dilation, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope,
        scale=scale, bias=bias, attend=attend,
    ).named("longformer")  # fmt: skip
