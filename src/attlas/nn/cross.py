"""Cross-attention: queries from x, keys and values from a memory."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from attlas.cache.layer import Cache
from attlas.errors import ShapeError
from attlas.nn.attention import Attend, Attention
from attlas.ops.attention import attention
from attlas.ops.cached import attention_cached
from attlas.shapes import SeqInfo


class CrossAttention(Attention):
    """y = o(softmax(scale * q(x) k(memory)^T) v(memory)): every query may attend to every valid token of its own memory.

    memory [B, S, memory_dim] (seq.lengths_k valid tokens in each row) or packed [S_total, memory_dim]. No position code and no
    causal mask, so explicit positions are an error. With a cache, memory is projected once, in the call that brings it; later
    calls pass memory=None, and memory that is given again replaces what the cache held. A memory of zero tokens gives 0
    (before the output bias). Cost: 4 T dim^2 + 4 S memory_dim dim flops for projections, 4 dim T S for attention; cache 2
    num_kv_heads head_dim per memory token. Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.2.3.
    """

    memory_use = "required"

    def __init__(
        self,
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
    ) -> None:
        options: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "scale": scale, "bias": bias}
        super().__init__(dim, num_heads, rope=False, qk_norm=qk_norm, sink=sink, attend=attend, **options)
        self.causal = True  # no output depends on a later token of x
        if memory_dim is not None and memory_dim != dim:
            self.memory_dim = memory_dim
            self._make_projections(bias)

    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        q = self._queries(x)
        options: dict[str, Any] = {"scale": self.scale, "sink": self.sink, "impl": self.impl}
        if cache is None:
            assert memory is not None, "checked by the base class"
            out = self.attend(q, *self._keys_values(memory), seq=seq, **options)
            return self.o_proj(out.flatten(-2))
        assert seq is not None, "a cache comes with the packed form"
        part = cache.parts[0]
        if memory is not None:
            part.reset(seq.rows)
            part.write(self._keys_values(memory), SeqInfo(seq.keys, starts=(0,) * seq.num_sequences, ids=seq.rows))
        elif any(n and not part.lengths[i] for n, i in zip(seq.lengths, seq.rows, strict=True)):
            raise ShapeError(
                f"{self}: the cache holds no memory for some of the rows {seq.rows}; pass memory= (it may have no tokens)"
            )
        out = attention_cached(q, part, seq=seq, **options)
        return self.o_proj(out.flatten(-2))

    def _cache_starts(
        self, cache: Cache, ids: tuple[int, ...], given: tuple[int, ...] | None, lengths: tuple[int, ...], call: object
    ) -> tuple[int, ...]:
        """The cache counts memory tokens, which say nothing about where the queries stand."""
        return given if given is not None else (0,) * len(ids)

    def flops(self, seq_len: int, memory_len: int | None = None) -> int:
        """Of `seq_len` queries over `memory_len` memory tokens (None = as many)."""
        keys = seq_len if memory_len is None else memory_len
        return self._projection_flops(seq_len, keys) + 4 * self.num_heads * self.head_dim * seq_len * keys
