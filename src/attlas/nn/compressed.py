"""Memory-compressed attention: a strided convolution shortens the keys and values."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from attlas.cache.grouped import GroupedPart
from attlas.cache.layer import Cache
from attlas.cache.part import Part, PartSpec
from attlas.errors import OptionError
from attlas.masks.leaves import Causal, Window
from attlas.masks.pooled import pooled
from attlas.nn.attention import check_heads
from attlas.nn.rows import RowMixer
from attlas.ops.attention import attention
from attlas.ops.cached import attention_cached
from attlas.ops.merge import merge
from attlas.reference import multiscale as truth
from attlas.shapes import AuxRequest, SeqInfo

_LSE = AuxRequest(lse=True)


class MemoryCompressedAttention(RowMixer):
    """y = o(softmax(q K'^T / sqrt(head_dim)) V'),  K' and V' = convolutions of k and v with kernel and stride `factor`

    factor    tokens per compressed entry, at least 2
    causal    an entry is seen by the queries from its last token on; the tokens of an unfinished group are seen by nobody, so
              that the layer wants local layers beside it (catalogue: local), as in the paper. Not causal: everybody sees every
              entry, the last group is filled up with zeros
    strict    an entry is seen only after its last token (the first author's code), causal only
    start     what else every query sees: "none"; "first", the first token, uncompressed (the first author's code); "null", a
              learned key and value. With "none" the first factor - 1 queries of a causal layer see nothing and give 0
    per_head  the convolutions mix the channels of one head only, instead of all

    Groups are counted from the first token of the sequence; there are no position codes: add them to the input. Cost: 4 inner
    T^2 / (2 factor) flops causal. Cache (causal): T / factor compressed keys and values, factor uncompressed ones (and the
    first). Source: Liu et al. 2018, arXiv 1801.10198.
    """

    name = "memory-compressed"
    uses_positions = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        factor: int = 3,
        causal: bool = True,
        strict: bool = False,
        start: Literal["none", "first", "null"] = "none",
        per_head: bool = False,
        head_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(dim)
        call = f"memory-compressed(dim={dim}, num_heads={num_heads}, factor={factor}, causal={causal}, start={start!r})"
        _, self.head_dim = check_heads(call, dim, num_heads, None, head_dim)
        if factor < 2 or start not in ("none", "first", "null"):
            raise OptionError(f"{call}: factor must be at least 2, start 'none', 'first' or 'null'")
        if strict and not causal:
            raise OptionError(f"{call}: strict={strict} says from when on an entry is seen, which only a causal layer asks")
        self.num_heads, self.factor, self.causal, self.lag, self.start = num_heads, factor, causal, int(strict), start
        inner = num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        groups = num_heads if per_head else 1
        self.k_conv, self.v_conv = (nn.Conv1d(inner, inner, factor, stride=factor, groups=groups) for _ in range(2))
        shape = (num_heads, self.head_dim)
        self.null_k = nn.Parameter(torch.randn(shape) * self.head_dim**-0.5) if start == "null" else None
        self.null_v = nn.Parameter(torch.zeros(shape)) if start == "null" else None
        self.o_proj = nn.Linear(inner, dim, bias=bias)
        # groups before the query's own; one position earlier when the last token of a group sees it already
        self.mask = pooled(Causal() & ~Window.last(1), factor, 1 - self.lag) if causal else None

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(x).unflatten(-1, (self.num_heads, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def _compress(self, x: Tensor, conv: nn.Conv1d) -> Tensor:
        """[B, T, H, D] -> [B, T // factor, H, D]."""
        if self.impl == "reference":
            assert conv.bias is not None
            return truth.compress(x, conv.weight, conv.bias, self.factor)
        if x.shape[1] < self.factor:
            return x[:, :0]
        return conv(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(-1, x.shape[2:])

    def _always(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """The key and value [B, 1, H, D] that everybody sees."""
        if self.start == "first":
            return k[:, :1], v[:, :1]
        if self.null_k is None or self.null_v is None:
            return None
        null_k, null_v = (t.to(k.dtype).expand(k.shape[0], 1, -1, -1) for t in (self.null_k, self.null_v))
        return null_k, null_v

    def mix_rows(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = self._project(x)
        always, (b, t) = self._always(k, v), q.shape[:2]
        if not self.causal:
            k, v = (nn.functional.pad(s, (0, 0, 0, 0, 0, -t % self.factor)) for s in (k, v))
        short = self._compress(k, self.k_conv), self._compress(v, self.v_conv)
        if self.impl == "reference":
            k_0, v_0 = always or (None, None)
            y = truth.memory_compressed(q, *short, self.factor if self.causal else None, self.lag, k_0, v_0)
            return self.o_proj(y.flatten(-2))
        seq = SeqInfo((t,) * b, (short[0].shape[1],) * b, (0,) * b)
        flat = (s.flatten(0, 1) for s in (q, *short))
        out, aux = attention(*flat, mask=self.mask, seq=seq, impl=self.impl, return_aux=_LSE)
        assert aux.lse is not None
        return self.o_proj(self._with_always(q, out.view_as(q), aux.lse.view(b, t, -1), always).flatten(-2))

    def _with_always(self, q: Tensor, out: Tensor, lse: Tensor, always: tuple[Tensor, Tensor] | None) -> Tensor:
        if always is None:
            return out
        more, aux = attention(q, *always, impl=self.impl, return_aux=_LSE)
        assert aux.lse is not None
        return merge([(out, lse), (more, aux.lse)])[0]

    # ---- decoding -----------------------------------------------------------------------------------------------------------

    def cache_specs(self) -> tuple[PartSpec, ...]:
        if not self.causal:
            return super().cache_specs()
        held = (("k", (self.num_heads, self.head_dim)), ("v", (self.num_heads, self.head_dim)))
        tail = PartSpec("tokens", held, window=self.factor, sinks=int(self.start == "first"))
        return tail, PartSpec("kv", held, group=self.factor)

    def mix_cached(self, x: Tensor, positions: Tensor, seq: SeqInfo, cache: Cache) -> Tensor:
        q, k, v = self._project(x)
        tail, entries = cache.parts
        assert isinstance(entries, GroupedPart), entries
        tail.write((k, v), seq)
        groups = [self._groups(tail, *span) for span in zip(seq.rows, seq.first, seq.lengths, strict=True)]
        whole = (torch.cat(parts)[None].to(x.dtype) for parts in zip(*groups, strict=True))
        short = tuple(self._compress(s, conv)[0] for s, conv in zip(whole, (self.k_conv, self.v_conv), strict=True))
        entries.write(short, seq)
        where = SeqInfo(seq.lengths, starts=seq.first, ids=seq.rows)
        out, aux = attention_cached(q, entries.entries, seq=where, mask=self.mask, impl=self.impl, return_aux=_LSE)
        assert aux.lse is not None
        return self.o_proj(self._with_first(q, out, aux.lse, tail, seq).flatten(-2))

    def _groups(self, tail: Part, row: int, first: int, count: int) -> tuple[Tensor, ...]:
        """Keys and values of the groups that `count` new tokens of a row complete; all as the cache holds them, so that an entry
        does not depend on which of its tokens came in which step."""
        begin, end = first - first % self.factor, (first + count) // self.factor * self.factor
        held = tail.read(row, (begin, end - 1))
        at = held.axis.positions(held.tensors[0].device)
        order = at.argsort()
        order = order[(at[order] >= begin) & (at[order] < end)]
        return tuple(t[order] for t in held.tensors)

    def _with_first(self, q: Tensor, out: Tensor, lse: Tensor, tail: Part, seq: SeqInfo) -> Tensor:
        if self.start == "none":
            return out
        done, lengths = [], seq.lengths
        for row, *piece in zip(seq.rows, q.split(lengths), out.split(lengths), lse.split(lengths), strict=True):
            if not len(piece[0]):
                continue
            held = tail.read(row, (0, 0))
            first = (held.axis.positions(q.device) == 0).nonzero().flatten()[:1]
            k, v = (t[first][None].to(q.dtype) for t in held.tensors)
            queries, local, weight = (t[None] for t in piece)
            done.append(self._with_always(queries, local, weight, self._always(k, v))[0])
        return torch.cat(done)

    def flops(self, seq_len: int) -> int:
        inner, f = self.num_heads * self.head_dim, self.factor
        groups = seq_len // f if self.causal else -(-seq_len // f)
        pairs = _sum_of_quotients(seq_len + 1 - self.lag, f) if self.causal else seq_len * groups
        pairs += seq_len * (self.start != "none")
        convolutions = 4 * groups * f * inner * self.k_conv.weight.shape[1]
        return 8 * seq_len * self.dim * inner + convolutions + 4 * pairs * inner

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, factor={self.factor}"
        return f"{shown}, causal={self.causal}, strict={bool(self.lag)}, start={self.start!r}, impl={self.impl}"


def _sum_of_quotients(n: int, f: int) -> int:
    """sum of i // f over i < n."""
    m = n // f
    return f * m * (m - 1) // 2 + m * (n - m * f)
