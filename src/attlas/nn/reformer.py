"""Attention among tokens that hash alike: Reformer, and the base of mixers that read a hash per token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from attlas.cache.layer import Cache
from attlas.cache.part import PartSpec
from attlas.errors import OptionError
from attlas.nn.attention import check_heads
from attlas.nn.derived import register_derived
from attlas.nn.rows import RowMixer
from attlas.ops.lsh import (
    Causal,
    Own,
    Rule,
    lsh_attention,
    lsh_attention_after,
    lsh_hash,
    make_rotations,
    unit_keys,
    wrong_window,
)
from attlas.reference import content as truth
from attlas.shapes import SeqInfo


class HashMixer(RowMixer):
    """Base of mixers with shared queries and keys and a hash of each token. A mechanism writes `encode`; with causal=True it
    decodes: the cache grows, a step reads the hashes and keys of all tokens held, and masks those that it may not see."""

    uses_positions = False

    def __init__(self, dim: int, num_heads: int, head_dim: int | None, causal: Causal, scale: float | None, call: str) -> None:
        super().__init__(dim)
        self.num_heads = num_heads
        _, self.head_dim = check_heads(call, dim, num_heads, None, head_dim)
        inner = num_heads * self.head_dim
        self.q_proj, self.v_proj = (nn.Linear(dim, inner, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(inner, dim, bias=False)
        self.order, self.scale, self.causal = causal, scale, causal is True

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, dim] -> q, k, v [B, T, H, D] and hashes [B, T, H, R]."""

    window: int  # earlier tokens of the bucket that a causal query sees
    own: Own = "last"
    rounds: int = 1

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def cache_specs(self) -> tuple[PartSpec, ...]:
        if not self.causal:
            return super().cache_specs()
        shape = (self.num_heads, self.head_dim)
        return (
            PartSpec("kv", (("k", shape), ("v", shape))),
            PartSpec("kv", (("hash", (self.num_heads, self.rounds)),), dtype=torch.int32),
        )

    def mix_cached(self, x: Tensor, positions: Tensor, seq: SeqInfo, cache: Cache) -> Tensor:
        q, k, v, hashes = (t[0] for t in self.encode(x[None]))
        pairs, codes = cache.parts
        pairs.write((k, v), seq)
        codes.write((hashes.int(),), seq)
        out = [q[:0]]
        for row, queries in zip(seq.rows, q.split(seq.lengths), strict=True):
            if len(queries):
                held_k, held_v = (t.to(q.dtype) for t in pairs.read(row).tensors)  # autocast: the cache is in 32 bits
                (held,) = codes.read(row).tensors
                out.append(
                    lsh_attention_after(
                        queries, held_k, held_v, held, window=self.window, own=self.own, scale=self.scale, impl=self.impl
                    )
                )
        return self.o_proj(torch.cat(out).flatten(-2))

    def _projection_flops(self, seq_len: int) -> int:
        return 6 * seq_len * self.dim * self.num_heads * self.head_dim


class Reformer(HashMixer):
    """LSH attention: y_i = o( sum_j softmax_j(q_i . q_j / |q_j|) v_j ) over tokens j whose query hashes as that of i.

    Queries and keys are one projection; a token attends to itself only where it sees no other.

    chunk    tokens of a chunk of the list sorted by (hash, position)
    before   chunks looked at before the query's own, `after` behind it
    rounds   of hashing; they are joined by their log-sum-exp
    buckets  even number of buckets of a round, or several even factors of it (hashes are then made of as many digits)
    causal   False; True: the before * chunk nearest earlier tokens of the bucket in each round, which no later token changes, and
             it decodes; "content-leaks": the paper's language model, keys j <= i inside the chunks. Its outputs depend on later
             tokens, which move the edges of the chunks: it cannot decode, and losses measured with it flatter
    rule     "paper": only keys of the query's bucket, each counted once. "trax": every key of the chunks, counted for each round
             that finds it, chunk 0 of a round looks at the last one of the round before (trax, transformers)
    seed     of the hashes, which depend on it and the sizes alone
    scale    of the scores; keys have length 1, so it is 1 (reformer-pytorch has head_dim ** -0.5)

    Positions enter through the order of tokens alone. Cost: 4 T rounds chunk (1 + before + after) inner flops, and
    T rounds inner sum(buckets) for the hashes; cache (causal=True) 2 inner numbers and a hash per token.
    Source: Kitaev et al. 2020, arXiv 2001.04451.
    """

    name = "reformer"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        chunk: int = 64,
        before: int = 1,
        after: int = 0,
        rounds: int = 4,
        buckets: int | Sequence[int] = 64,
        causal: Causal = False,
        rule: Rule = "paper",
        seed: int = 0,
        scale: float = 1.0,
        head_dim: int | None = None,
    ) -> None:
        factors = (buckets,) if isinstance(buckets, int) else tuple(buckets)
        call = (
            f"reformer(dim={dim}, num_heads={num_heads}, chunk={chunk}, before={before}, after={after}, rounds={rounds}, "
            f"buckets={buckets}, causal={causal!r}, rule={rule!r})"
        )
        super().__init__(dim, num_heads, head_dim, causal, scale, call)
        wrong = wrong_window(chunk, before, after, causal, rule)
        if wrong is None and rounds < 1:
            wrong = "rounds must be at least 1"
        if wrong is None and (not factors or any(b < 2 or b % 2 for b in factors) or prod(factors) > 2**31):
            wrong = "buckets must be even and at least 2: a hash and its opposite come in pairs"
        if wrong:
            raise OptionError(f"{call}: {wrong}")
        self.chunk, self.before, self.after, self.rounds = chunk, before, after, rounds
        self.buckets, self.rule, self.window = factors, rule, before * chunk
        self.rotations: Tensor
        register_derived(self, "rotations", partial(make_rotations, num_heads, self.head_dim, rounds, factors, seed))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, v = self._heads(self.q_proj(x)), self._heads(self.v_proj(x))
        return q, unit_keys(q), v, lsh_hash(q, self.rotations, self.buckets)

    def mix_rows(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v, hashes = self.encode(x)
        options: dict[str, Any] = {"chunk": self.chunk, "before": self.before, "after": self.after, "scale": self.scale}
        options |= {"causal": self.order, "rule": self.rule}
        if self.impl == "reference":
            out = truth.reformer(q, k, v, hashes, **options)
        else:
            out = lsh_attention(q, k, v, hashes, **options, impl=self.impl)
        return self.o_proj(out.flatten(-2))

    def flops(self, seq_len: int) -> int:
        inner = self.num_heads * self.head_dim
        seen = self.before if self.causal else 1 + self.before + self.after
        keys = min(seq_len, self.rounds * seen * self.chunk)
        hashing = seq_len * inner * self.rounds * sum(self.buckets)
        return self._projection_flops(seq_len) + hashing + 4 * seq_len * keys * inner

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, chunk={self.chunk}, before={self.before}"
        shown += f", after={self.after}, rounds={self.rounds}, buckets={self.buckets}, causal={self.order!r}"
        return f"{shown}, rule={self.rule}, impl={self.impl}"
