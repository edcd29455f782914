"""Causal attention with lookahead keys (CASTLE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attlas.cache.layer import Cache
from attlas.cache.lookahead import LookaheadPart
from attlas.cache.part import Part, PartSpec
from attlas.errors import OptionError
from attlas.masks.expr import Mask
from attlas.masks.leaves import Causal
from attlas.nn.attention import check_heads, make_rope
from attlas.nn.rows import RowMixer
from attlas.numerics import wide_dtype
from attlas.ops.lookahead import lookahead_attention
from attlas.positions.rope import Rope
from attlas.shapes import SeqInfo

AHEAD, OWN = ("ahead_q", "ahead_k", "ahead_v"), ("q", "k", "v")


class Castle(RowMixer):
    """Causal attention whose keys are renewed: beside a causal key, every token has a lookahead key that goes on gathering from
    the tokens that come after it, so far as the query may see them.

        u_s^t = sum_{s < j <= t} sigmoid(q^U_s . k^U_j / sqrt(d)) v^U_j            lookahead key of token s when t tokens exist
        y_t = o(softmax_{s <= t}(q_t . k_s / sqrt(d) - silu(q_t . u_s^t / sqrt(d))) v_s)

    window  how many tokens a key looks ahead (CASTLE-SWL), None = all; the causal keys reach back without limit either way
    rope    rotates q, k, q^U, k^U and v^U: u is a sum of rotated v^U, so q_t . v^U_j depends on t - j alone

    Seven projections where multi-head attention has four: equal numbers of parameters need 4/7 of the heads.
    Cost: about 5 inner flops per pair of tokens in the square, 2.5 times causal attention (see ops.lookahead_attention). Cache
    4 num_heads head_dim per token: q^U, k, v, and u in fp32, which every new token rewrites; it cannot be truncated.
    Source: Song et al. 2025, arXiv 2509.07301.
    """

    causal = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int | None = None,
        head_dim: int | None = None,
        rope: bool | float | Rope = True,
        bias: bool = False,
        name: str = "castle",
    ) -> None:
        super().__init__(dim)
        call = f"{name}(dim={dim}, num_heads={num_heads}, window={window}, head_dim={head_dim}, rope={rope})"
        self.name, self.num_heads, self.window = name, num_heads, window
        _, self.head_dim = check_heads(call, dim, num_heads, None, head_dim)
        if window is not None and window < 1:
            raise OptionError(f"{call}: window must be at least 1: the tokens that a key looks ahead")
        self.rope = make_rope(call, rope, self.head_dim)
        self.uses_positions = self.rope is not None
        inner = num_heads * self.head_dim
        for projection in (*AHEAD, *OWN):
            setattr(self, f"{projection}_proj", nn.Linear(dim, inner, bias=bias))
        self.o_proj = nn.Linear(inner, dim, bias=bias)

    def _project(self, x: Tensor, positions: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """(q^U, k^U, v^U), (q, k, v), each [..., T, H, D]; all but v rotated."""
        heads = (self.num_heads, self.head_dim)
        made = [getattr(self, f"{name}_proj")(x).unflatten(-1, heads) for name in (*AHEAD, *OWN)]
        if self.rope is not None:
            angles = self.rope.cos_sin(positions, wide_dtype(x.dtype))
            made[:5] = [self.rope.rotate(t, *angles) for t in made[:5]]
        return (made[0], made[1], made[2]), (made[3], made[4], made[5])

    def mix_rows(self, x: Tensor, positions: Tensor) -> Tensor:
        ahead, own = self._project(x, positions)
        out, _ = lookahead_attention(ahead, own, window=self.window, impl=self.impl)
        return self.o_proj(out.flatten(-2))

    def mix_cached(self, x: Tensor, positions: Tensor, seq: SeqInfo, cache: Cache) -> Tensor:
        """Sequences that hold equally many tokens and bring equally many go together."""
        (ahead_q, ahead_k, ahead_v), (q, k, v) = self._project(x, positions)
        tokens, gathered = cache.parts
        assert isinstance(gathered, LookaheadPart), gathered
        tokens.write((ahead_q, k, v), seq)
        groups: dict[tuple[int, int], list[int]] = {}
        for i, alike in enumerate(zip(seq.first, seq.lengths, strict=True)):
            if alike[1]:
                groups.setdefault(alike, []).append(i)
        new = [t.split(seq.lengths) for t in (ahead_k, ahead_v, q)]
        outs: list[Tensor] = [q[:0]] * len(seq.lengths)
        for (first, count), group in groups.items():
            rows = [seq.rows[i] for i in group]
            fresh = [torch.stack([t[i] for i in group]) for t in new]
            for i, out in zip(group, self._step(rows, (first, count), fresh, tokens, gathered), strict=True):
                outs[i] = out
        return self.o_proj(torch.cat(outs).flatten(-2))

    def _step(
        self, rows: Sequence[int], span: tuple[int, int], fresh: Sequence[Tensor], tokens: Part, gathered: LookaheadPart
    ) -> Tensor:
        """`span` = (tokens before, new tokens) of each row; fresh = k^U, v^U, q [rows, new, H, D] -> out of that shape."""
        (first, count), (ahead_k, ahead_v, q) = span, fresh
        ahead_q, k, v = (t.to(q.dtype) for t in _read(tokens, rows))
        (before,) = _read(gathered, rows)
        out, u = lookahead_attention((ahead_q, ahead_k, ahead_v), (q, k, v), window=self.window, state=before, impl=self.impl)
        changed = 0 if self.window is None else max(0, first - self.window)
        gathered.put(rows, changed, (u[:, changed:],), count)
        return out

    # ---- what it costs ------------------------------------------------------------------------------------------------------

    def cache_specs(self) -> tuple[PartSpec, ...]:
        shape = (self.num_heads, self.head_dim)
        dtype = wide_dtype(self.o_proj.weight.dtype)
        return (
            PartSpec("tokens", (("ahead_q", shape), ("k", shape), ("v", shape))),
            PartSpec("lookahead", (("u", shape),), dtype=dtype),
        )

    def describe_mask(self) -> Mask | None:
        return Causal()

    def flops(self, seq_len: int) -> int:
        """2 per multiply-add: seven projections; q k and p v for s <= t; q u for s < t; q^U k^U and the sum u for s < j <= s +
        window."""
        inner = self.num_heads * self.head_dim
        earlier = seq_len * (seq_len - 1) // 2
        reach = seq_len if self.window is None else min(self.window, seq_len)
        gathering = reach * (seq_len - reach) + reach * (reach - 1) // 2
        pairs = 4 * (earlier + seq_len) + 2 * earlier + 4 * gathering
        return 14 * seq_len * self.dim * inner + pairs * inner

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, window={self.window}"
        return f"{shown}, rope={self.rope}, impl={self.impl}"


def _read(part: Part, rows: Sequence[int]) -> tuple[Tensor, ...]:
    """What rows that stand alike hold, [rows, n, ...] each."""
    together = part.read_dense(rows)
    if together is not None:
        return together.tensors
    return tuple(torch.stack(row) for row in zip(*(part.read(row).tensors for row in rows), strict=True))


def castle(
    dim: int, num_heads: int, *, head_dim: int | None = None, rope: bool | float | Rope = True, bias: bool = False
) -> Castle:
    """Lookahead keys that gather from all later tokens. Source: Song et al. 2025, arXiv 2509.07301."""
    return Castle(dim, num_heads, head_dim=head_dim, rope=rope, bias=bias)


def castle_swl(
    dim: int, num_heads: int, *, window: int, head_dim: int | None = None, rope: bool | float | Rope = True, bias: bool = False
) -> Castle:
    """Lookahead keys that gather from the `window` tokens that follow. Source: Song et al. 2025, arXiv 2509.07301."""
    return Castle(dim, num_heads, window=window, head_dim=head_dim, rope=rope, bias=bias, name="castle-swl")
