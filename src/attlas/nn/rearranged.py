"""Periodic patterns at their true cost. Block-wise implementations skip whole tiles; a pattern with gaps smaller than a tile
touches every tile. Tokens that a periodic pattern connects are therefore brought side by side first.

This is how dense sequences that start at position 0 are computed; packed batches, decoding and other positions go through the
mask, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from attlas.masks import Causal, Fixed, Local, Mask, Prefix, Window
from attlas.nn.attention import Attention
from attlas.ops.merge import merge
from attlas.shapes import AuxRequest

_LSE = AuxRequest(lse=True)
EARLIER: Mask = Causal() & ~Window.last(1)


def to_classes(x: Tensor, period: int) -> Tensor:
    """[B, T, H, D] -> [B * period, ceil(T / period), H, D]: row b * period + r holds the tokens r, r + period, r + 2 period, ...
    Rows that are one token short end with a zero token, which a causal mask hides from the others."""
    b, t, h, d = x.shape
    steps = -(-t // period)
    x = functional.pad(x, (0, 0, 0, 0, 0, steps * period - t))
    return x.view(b, steps, period, h, d).transpose(1, 2).reshape(b * period, steps, h, d)


def from_classes(x: Tensor, period: int, length: int) -> Tensor:
    """The inverse of `to_classes`, for tensors with any trailing dimensions: [B * period, steps, ...] -> [B, length, ...]."""
    steps = x.shape[1]
    x = x.view(-1, period, steps, *x.shape[2:]).transpose(1, 2)
    return x.reshape(x.shape[0], steps * period, *x.shape[3:])[:, :length]


class DilatedAttention(Attention):
    """Attention with the mask Causal() & Dilated(left, 0, dilation): a plain window inside each residue class of positions."""

    rearranges = True
    dilation: int = 0  # 0: always through the mask
    near: Mask  # the window inside a class. Made once: a mask is a constant of a graph that torch.compile traces

    def rearrange(self, dilation: int, window: int) -> None:
        """Compute by residue classes from now on: `window` keys of a token's own class, its own included."""
        self.dilation, self.near = dilation, Causal() & Window.last(window)

    def _rearranged(self, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor | None:
        if not self.dilation or not q.numel():
            return None
        out = self.attend(*(to_classes(t, self.dilation) for t in (q, k, v)), mask=self.near, **options)
        return from_classes(out, self.dilation, q.shape[1])


class StridedAttention(Attention):
    """Attention with the mask Causal() & (Window.last(stride) | Strided(stride)): the window, and the earlier tokens of the
    query's residue class, joined by their log-sum-exp. No pair is in both: a class has one token in the window, the query
    itself."""

    rearranges = True
    stride: int = 0  # 0: always through the mask
    near: Mask

    def rearrange(self, stride: int) -> None:
        """Compute by window and residue classes from now on."""
        self.stride, self.near = stride, Causal() & Window.last(stride)

    def _rearranged(self, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor | None:
        if not self.stride or not q.numel():
            return None
        near, near_aux = self.attend(q, k, v, mask=self.near, return_aux=_LSE, **options)
        classes = (to_classes(t, self.stride) for t in (q, k, v))
        far, far_aux = self.attend(*classes, mask=EARLIER, return_aux=_LSE, **options)
        far, far_lse = (from_classes(t, self.stride, q.shape[1]) for t in (far, far_aux.lse))
        return merge([(near, near_aux.lse), (far, far_lse)])[0]


class FixedAttention(Attention):
    """Attention with the mask Causal() & Fixed(block, summary): the query's own block, and the summary tokens of the blocks
    before it, gathered into a short sequence of which block b sees the first b * summary."""

    rearranges = True
    pattern: Fixed | None = None  # None: always through the mask

    def _rearranged(self, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor | None:
        pattern = self.pattern
        if pattern is None or not pattern.summary or q.shape[1] <= pattern.block or not q.numel():
            return None
        size, length = pattern.block, q.shape[1]
        near, near_aux = self.attend(q, k, v, mask=Causal() & Local(size), return_aux=_LSE, **options)
        queries = _in_blocks(q, size)
        rows, blocks = queries.shape[0], queries.shape[1]
        keys, values = (_summaries(t, size, pattern.summary) for t in (k, v))
        seen = Prefix(tuple(b * pattern.summary for b in range(blocks)) * rows)
        shared = (t[:, None].expand(-1, blocks, -1, -1, -1).flatten(0, 1) for t in (keys, values))
        far, far_aux = self.attend(queries.flatten(0, 1), *shared, mask=seen, return_aux=_LSE, **options)
        far, far_lse = (t.reshape(rows, blocks * size, *t.shape[2:])[:, :length] for t in (far, far_aux.lse))
        return merge([(near, near_aux.lse), (far, far_lse)])[0]


def _in_blocks(x: Tensor, size: int) -> Tensor:
    """[B, T, H, D] -> [B, blocks, size, H, D], the last block filled up with zero tokens."""
    b, t, h, d = x.shape
    blocks = -(-t // size)
    return functional.pad(x, (0, 0, 0, 0, 0, blocks * size - t)).view(b, blocks, size, h, d)


def _summaries(x: Tensor, size: int, summary: int) -> Tensor:
    """The last `summary` tokens of every block but the last: [B, (blocks - 1) * summary, H, D]."""
    return _in_blocks(x, size)[:, :-1, size - summary :].flatten(1, 2)
