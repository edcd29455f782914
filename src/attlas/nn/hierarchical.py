"""Hierarchical attention: near tokens one by one, far ones in groups that grow with the distance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attlas.cache.grouped import GroupedPart
from attlas.cache.layer import Cache
from attlas.cache.part import Part, PartSpec
from attlas.errors import OptionError, ShapeError
from attlas.masks.cell_patterns import BlockWindow
from attlas.masks.expr import Mask
from attlas.masks.geometry import Grid
from attlas.masks.leaves import Causal
from attlas.masks.pooled import pooled
from attlas.nn.attention import check_heads, make_rope
from attlas.nn.rows import RowMixer
from attlas.numerics import wide_dtype
from attlas.ops.attention import attention
from attlas.ops.cached import attention_cached
from attlas.ops.groups import group_means, log_counts
from attlas.ops.merge import merge
from attlas.positions.rope import Rope
from attlas.reference import multiscale as truth
from attlas.shapes import AuxRequest, SeqInfo

_LSE = AuxRequest(lse=True)
CACHED_LEVELS = 24  # the cache reaches over block * 2 ** 25 tokens
NOTHING = -1e9  # weight, as a logarithm, of a group without tokens

Partial = tuple[Tensor, Tensor]


class HierarchicalAttention(RowMixer):
    """y = o(softmax over groups g of (q . mean k_g / sqrt(head_dim) + log |g|) mean v_g): every other token is in one group g.

    Level 0: single tokens, those of the query's block of `block` tokens and of the neighbouring blocks. Level l: groups of 2^l
    tokens, `block` of them in a block; the neighbouring blocks, as far as no lower level covers them. Levels are added until all
    tokens are covered: softmax attention where block >= T / 2, and log2(T / block) levels above that.

    block   tokens (groups) per block, even
    causal  blocks and groups that lie before the query only
    coarse_queries  at level l the mean query of 2^l tokens asks for all of them (the paper; O(T block) in all). False: every
            token asks with its own query (O(T block log(T / block))). None = not causal: the mean query of a group looks at
            tokens after the first of the group, so that the causal form of the paper leaks, and is refused

    The levels are joined by their log-sum-exp. Groups are counted from the first token of the sequence; the last one of each
    level may be short (not causal). Cache (causal): 2 block groups of every level, 2 block (log2(T / block) + 1) keys and values.
    Source: Zhu and Soricut 2021, arXiv 2107.11906.
    """

    name = "hierarchical"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block: int = 16,
        causal: bool = False,
        coarse_queries: bool | None = None,
        head_dim: int | None = None,
        rope: bool | float | Rope = True,
        bias: bool | Literal["qkv"] = False,
    ) -> None:
        super().__init__(dim)
        call = f"hierarchical(dim={dim}, num_heads={num_heads}, block={block}, causal={causal}, coarse_queries={coarse_queries})"
        _, self.head_dim = check_heads(call, dim, num_heads, None, head_dim)
        if block < 2 or block % 2 or bias not in (True, False, "qkv"):
            raise OptionError(f"{call}: block must be even and at least 2, bias True, False or 'qkv'")
        if causal and coarse_queries:
            raise OptionError(f"{call}: the mean query of a group looks at later tokens, so the causal form needs fine queries")
        self.num_heads, self.block, self.causal = num_heads, block, causal
        self.coarse_queries = not causal if coarse_queries is None else coarse_queries
        self._near = self.level_mask(0)  # kept: a compiled graph names the masks that it was traced with
        self.rope = make_rope(call, rope, self.head_dim)
        self.uses_positions = self.rope is not None
        inner = num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=bool(bias)) for _ in range(3))
        self.o_proj = nn.Linear(inner, dim, bias=bias is True)

    def level_mask(self, level: int) -> Mask:
        """Which groups of a level (keys) are for which groups (queries)."""
        after = 0 if self.causal else 1
        mask: Mask = BlockWindow(self.block, 1, after)
        if level:
            mask = mask & ~BlockWindow(self.block // 2, 1, after)
        return mask & Causal() if self.causal else mask

    def _levels(self, length: int) -> range:
        """The levels above 0 that a sequence has: those with more than two half blocks."""
        half, count = self.block // 2, 1
        while -(-length // (half << count)) > 2:
            count += 1
        return range(1, count)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope is None:
            return q, k, v
        cos_sin = self.rope.cos_sin(positions, wide_dtype(x.dtype))
        return self.rope.rotate(q, *cos_sin), self.rope.rotate(k, *cos_sin), v

    # ---- whole sequences ----------------------------------------------------------------------------------------------------

    def mix_rows(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self._project(x, positions)
        if self.impl == "reference":
            y = truth.hierarchical(q, k, v, self.block, self.causal, self.coarse_queries)
            return self.o_proj(y.flatten(-2))
        dtype = wide_dtype(x.dtype)
        q, k, v = (t.to(dtype) for t in (q, k, v))
        out, aux = attention(q, k, v, mask=self._near, impl=self.impl, return_aux=_LSE)
        assert aux.lse is not None
        parts = [(out, aux.lse), *(self._level(level, q, k, v) for level in self._levels(x.shape[1]))]
        return self.o_proj(merge(parts)[0].to(x.dtype).flatten(-2))

    def _level(self, level: int, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """What level `level` adds, for all tokens: out [B, T, H, D] and lse [B, T, H]."""
        size, length, half = 1 << level, q.shape[1], self.block // 2
        weights = log_counts(length, size, k).view(1, -1, 1, 1)
        fine = 1 if self.coarse_queries else size  # queries per group
        queries = group_means(q, size) if self.coarse_queries else q
        blocks = -(-length // (size * self.block))
        q_blocks = _pad(queries, blocks * self.block * fine).unflatten(1, (blocks, 2, half * fine))
        # a query feature of 1 meets log |g|: short and missing groups weigh what they hold
        q_blocks = nn.functional.pad(q_blocks * self.head_dim**-0.5, (0, 1), value=1.0)
        keys = torch.cat([group_means(k, size), weights.expand(k.shape[0], -1, self.num_heads, 1)], -1)
        keys = _pad(keys, blocks * self.block, last=NOTHING).unflatten(1, (blocks, 2, half))
        values = _pad(group_means(v, size), blocks * self.block).unflatten(1, (blocks, 2, half))
        outs, lses = zip(*(self._half(side, q_blocks, keys, values) for side in (0, 1)), strict=True)
        out, lse = (torch.stack(t, 2).flatten(1, 3) for t in (outs, lses))
        if self.coarse_queries:
            out, lse = (t.repeat_interleave(size, 1) for t in (out, lse))
        return out[:, :length], lse[:, :length]

    def _half(self, side: int, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """The queries of one half of every block, q [B, blocks, 2, n, H, D + 1], k and v [B, blocks, 2, half, H, ...]: the first
        half reads the first half of the block before and the whole block after, the second half the other way round."""
        before, after = ([(-1, 0)], [(1, 0), (1, 1)]) if side == 0 else ([(-1, 0), (-1, 1)], [(1, 1)])
        wanted = before if self.causal else before + after
        k = torch.cat([_shifted(k[:, :, part], step, last=NOTHING) for step, part in wanted], 2)
        v = torch.cat([_shifted(v[:, :, part], step) for step, part in wanted], 2)
        rows, count = q.shape[:2]
        flat = (t.flatten(0, 1) for t in (q[:, :, side], k, v))
        out, aux = attention(*flat, scale=1.0, impl=self.impl, return_aux=_LSE)
        assert aux.lse is not None
        return out.unflatten(0, (rows, count)), aux.lse.unflatten(0, (rows, count))

    # ---- decoding -----------------------------------------------------------------------------------------------------------

    def cache_specs(self) -> tuple[PartSpec, ...]:
        if not self.causal:
            return super().cache_specs()
        held = (("k", (self.num_heads, self.head_dim)), ("v", (self.num_heads, self.head_dim)))
        return tuple(PartSpec("kv", held, window=2 * self.block, group=1 << level) for level in range(CACHED_LEVELS + 1))

    def mix_cached(self, x: Tensor, positions: Tensor, seq: SeqInfo, cache: Cache) -> Tensor:
        end = max(first + n for first, n in zip(seq.first, seq.lengths, strict=True))
        if end > self.block << (CACHED_LEVELS + 1):
            raise ShapeError(f"{self}: its cache reaches over {self.block << (CACHED_LEVELS + 1)} tokens, x ends at {end}")
        q, *new = self._project(x, positions)
        q = q.to(wide_dtype(x.dtype))
        for level, part in enumerate(cache.parts):
            part.write(tuple(new), seq)
            new = _means_of_pairs(part, seq, level + 1, new)
        done = list(q.split(seq.lengths))
        alike: dict[int, list[int]] = {}  # position -> sequences that bring one token, which stands there
        chunks = [i for i, n in enumerate(seq.lengths) if n > 1]
        for i, (first, n) in enumerate(zip(seq.first, seq.lengths, strict=True)):
            if n == 1:
                alike.setdefault(first, []).append(i)
        for first, members in alike.items():
            out = self._read_token(torch.stack([done[i] for i in members]), first, [seq.rows[i] for i in members], cache)
            for i, y in zip(members, out, strict=True):
                done[i] = y
        if chunks:
            lengths, starts, ids = (tuple(t[i] for i in chunks) for t in (seq.lengths, seq.first, seq.rows))
            y = self._read_chunks(torch.cat([done[i] for i in chunks]), SeqInfo(lengths, starts=starts, ids=ids), cache)
            for i, piece in zip(chunks, y.split(lengths), strict=True):
                done[i] = piece
        return self.o_proj(torch.cat(done).to(x.dtype).flatten(-2))

    def _read_token(self, q: Tensor, position: int, rows: Sequence[int], cache: Cache) -> Tensor:
        """One query of each row, q [rows, 1, H, D], all at one position: its groups of every level are one run of entries each,
        and all of them together the keys of one softmax."""
        keys, values, weights = [], [], []
        for level, low, end in self._runs(position):
            k, v = _entries(cache.parts[level], rows, low, end)
            keys.append(k)
            values.append(v)
            weights += [level * math.log(2)] * (end - low)  # a group weighs as many tokens as it holds
        k, v = (torch.cat(t, 1).to(q.dtype) for t in (keys, values))
        log_weights = torch.tensor(weights, dtype=q.dtype, device=q.device).view(1, -1, 1, 1).expand(*k.shape[:3], 1)
        asking = nn.functional.pad(q * self.head_dim**-0.5, (0, 1), value=1.0)
        return attention(asking, torch.cat([k, log_weights], -1), v, scale=1.0, impl=self.impl)

    def _runs(self, position: int) -> Iterator[tuple[int, int, int]]:
        """(level, first, end) of the entries that the causal query at `position` reads."""
        half, level = self.block // 2, 0
        yield 0, max(0, (position // self.block - 1) * self.block), position + 1
        while (place := (position >> (level := level + 1)) // half) >= 2:
            yield level, (place - 2 - place % 2) * half, (place - 1) * half

    def _read_chunks(self, q: Tensor, seq: SeqInfo, cache: Cache) -> Tensor:
        """Packed queries, several of each sequence, level by level."""
        parts: list[Partial] = []
        end = max(first + n for first, n in zip(seq.first, seq.lengths, strict=True))
        for level in (0, *self._levels(end)):
            mask, part = pooled(self.level_mask(level), 1 << level), cache.parts[level]
            entries = part.entries if isinstance(part, GroupedPart) else part
            out, aux = attention_cached(q, entries, seq=seq, mask=mask, impl=self.impl, return_aux=_LSE)
            assert aux.lse is not None
            parts.append((out, aux.lse + level * math.log(2)))
        return merge(parts)[0]

    # ---- what it costs ------------------------------------------------------------------------------------------------------

    def flops(self, seq_len: int) -> int:
        inner, half = self.num_heads * self.head_dim, self.block // 2
        pairs = self.level_mask(0).count(Grid.dense(seq_len, seq_len))
        for level in self._levels(seq_len):
            size = 1 << level
            groups = -(-seq_len // size)
            asking, width = (groups, half) if self.coarse_queries else (seq_len, half * size)
            for a in range(-(-groups // half)):
                others = (a - 2, *((a - 3,) if a % 2 else ()))
                others += () if self.causal else (a + 2, *(() if a % 2 else (a + 3,)))
                keys = sum(min(max(groups - b * half, 0), half) for b in others if b >= 0)
                pairs += keys * min(width, asking - a * width)
        return 8 * seq_len * self.dim * inner + 4 * pairs * inner

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, block={self.block}"
        return f"{shown}, causal={self.causal}, coarse_queries={self.coarse_queries}, rope={self.rope}, impl={self.impl}"


def _entries(part: Part, rows: Sequence[int], low: int, end: int) -> tuple[Tensor, ...]:
    """The entries low ... end - 1 of several rows, [rows, end - low, ...] each, in order."""
    part = part.entries if isinstance(part, GroupedPart) else part
    together = part.read_dense(rows, (low, end - 1)) if len(rows) > 1 else None
    if together is None and len(rows) > 1:
        alone = [_entries(part, [row], low, end) for row in rows]
        return tuple(torch.cat(t) for t in zip(*alone, strict=True))
    held = part.read(rows[0], (low, end - 1)) if together is None else together
    pieces, at = [], 0
    for run in held.axis.segments:
        a, b = max(low - run.position, 0), min(end - run.position, run.length)
        if a < b:
            pieces.append((run.position, at + a, at + b))
        at += run.length
    tensors = (t[None] for t in held.tensors) if together is None else held.tensors
    return tuple(torch.cat([t[:, a:b] for _, a, b in sorted(pieces)], 1) for t in tensors)


def _means_of_pairs(part: Part, seq: SeqInfo, level: int, like: Sequence[Tensor]) -> list[Tensor]:
    """The groups of 2^level tokens that the new tokens complete, packed, from the groups of half the size in `part`."""
    found: list[list[Tensor]] = [[t[:0]] for t in like]
    for row, first, n in zip(seq.rows, seq.first, seq.lengths, strict=True):
        low, end = first >> level, (first + n) >> level
        if low < end:
            for pieces, t in zip(found, _entries(part, [row], 2 * low, 2 * end), strict=True):
                pieces.append(t[0].unflatten(0, (-1, 2)).mean(1).to(pieces[0].dtype))
    return [torch.cat(pieces) for pieces in found]


def _empty(x: Tensor, axis: int, count: int, last: float | None) -> Tensor:
    """`count` places of zeros along `axis`; `last`: the value of their last feature."""
    shape = [*x.shape]
    shape[axis] = count
    out = x.new_zeros(shape)
    if last is not None:
        out[..., -1] = last
    return out


def _pad(x: Tensor, length: int, last: float | None = None) -> Tensor:
    return x if x.shape[1] == length else torch.cat([x, _empty(x, 1, length - x.shape[1], last)], 1)


def _shifted(x: Tensor, step: int, last: float | None = None) -> Tensor:
    """x [B, blocks, ...] whose block i is block i + step."""
    gone = _empty(x, 1, 1, last)
    return torch.cat([gone, x[:, :-1]], 1) if step < 0 else torch.cat([x[:, 1:], gone], 1)
