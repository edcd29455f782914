"""Longformer: a window and global tokens, with projections of their own for what the global tokens read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attlas.cache.layer import Cache
from attlas.cache.part import PartSpec
from attlas.errors import OptionError
from attlas.masks.explicit import Dense
from attlas.masks.expr import Mask
from attlas.masks.geometry import Grid
from attlas.masks.leaves import Causal, Dilated, Window
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
    tokens    positions of the global tokens
    dilation  the window takes every dilation-th key, and so reaches dilation times further

    The other options are those of Attention. Cost: 4 dim flops per pair of the mask (window | global); the reading of the global
    tokens passes over their column as well, 4 dim T len(tokens) more. Cache (causal only): window + len(tokens) tokens of local
    and len(tokens) + 1 of global keys and values when the global tokens are the first ones, else both grow.
    Source: Beltagy et al. 2020, arXiv 2004.05150.
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
        if dilation < 1 or not len(tokens) or any(t < 0 for t in tokens):
            raise OptionError(f"{call}: dilation must be at least 1, and at least one position, none below 0, must be global")
        causal, chosen = window.right == 0, Global(tuple(tokens))
        near: Mask = window
        if dilation > 1:
            if window.left is None or window.right is None:
                raise OptionError(f"{call}: a dilated window must be bounded on both sides")
            near = Dilated(window.left, window.right, dilation)
        super().__init__(
            dim, num_heads, mask=Causal() & (near | chosen) if causal else near | chosen, num_kv_heads=num_kv_heads,
            head_dim=head_dim, rope=rope, scale=scale, bias=bias, attend=attend,
        )  # fmt: skip
        self.tokens, self.global_mask = chosen.tokens, Causal() & chosen if causal else chosen
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

        spans = [(0, x.shape[-2])] if seq is None else list(zip(seq.first, seq.lengths, strict=True))
        if any(first <= t < first + n for first, n in spans for t in self.tokens):
            return self._both(x, positions, read)
        if cache is not None:
            self._write_global(x, positions, seq, cache)
        return self.o_proj(self._local(x, self._angles(positions, x), read).flatten(-2))

    def _write_global(self, x: Tensor, positions: Tensor, seq: SeqInfo | None, cache: Cache) -> None:
        """Global keys and values of tokens none of which is global; zeros where no global token can follow."""
        assert seq is not None, "a cache comes with the packed form"
        if any(first <= self.tokens[-1] for first in seq.first):
            k, v = self._global_keys(x, self._angles(positions, x))
        else:
            k = v = x.new_zeros(x.shape[0], self.num_kv_heads, self.head_dim)
        cache.parts[1].write((k, v), seq)

    def _global_keys(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        k, v = (p(x).unflatten(-1, (self.num_kv_heads, self.head_dim)) for p in (self.k_global_proj, self.v_global_proj))
        return self._rotate(k, angles), v

    def _local(self, x: Tensor, angles: Angles, read: SideRead) -> Tensor:
        assert self.mask is not None
        k, v = self._keys_values(x)
        return read(0, self._rotate(self._queries(x), angles), self._rotate(k, angles), v, self.mask)

    def _both(self, x: Tensor, positions: Tensor, read: SideRead) -> Tensor:
        """The local rows, with those of the global tokens replaced."""
        angles, axis = self._angles(positions, x), x.dim() - 2
        out = self._local(x, angles, read)
        rows = torch.isin(positions, torch.tensor(self.tokens, device=positions.device)).nonzero().flatten()
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
