"""Softmax attention as a mixer. Every pattern, head layout and position code of the softmax family is this class with other
values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from attlas.cache.layer import Cache
from attlas.cache.part import PartSpec
from attlas.errors import OptionError, UnsupportedError
from attlas.masks.explicit import Dense
from attlas.masks.expr import Mask
from attlas.masks.geometry import Grid
from attlas.masks.options import shorten
from attlas.nn.irregular import AtPositions
from attlas.nn.mixer import Mixer
from attlas.nn.projection import project
from attlas.nn.reach import is_causal, is_shift_invariant, reach
from attlas.numerics import wide_dtype
from attlas.ops.attention import attention
from attlas.ops.cached import attention_cached
from attlas.positions.rope import Rope
from attlas.scores import ScoreMod
from attlas.shapes import AuxRequest, SeqInfo

Self = TypeVar("Self", bound="Attention")
Attend = Callable[..., Any]
Read = Callable[..., Any]
Angles = tuple[Tensor, Tensor] | None


def check_heads(call: str, dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """The resolved (num_kv_heads, head_dim); raises OptionError when they do not fit together."""
    if dim < 1 or num_heads < 1:
        raise OptionError(f"{call}: dim and num_heads must be at least 1")
    if head_dim is None:
        if dim % num_heads:
            raise OptionError(f"{call}: dim {dim} is not divisible by num_heads {num_heads}; give head_dim, or other sizes")
        head_dim = dim // num_heads
    if head_dim < 1:
        raise OptionError(f"{call}: head_dim must be at least 1")
    kv = num_heads if num_kv_heads is None else num_kv_heads
    if kv < 1 or num_heads % kv:
        raise OptionError(f"{call}: num_kv_heads {kv} must divide num_heads {num_heads}")
    return kv, head_dim


def make_rope(call: str, rope: bool | float | Rope, head_dim: int) -> Rope | None:
    """True -> base 10000, a number -> that base, a Rope -> itself, False -> None."""
    if isinstance(rope, Rope):
        if rope.head_dim != head_dim:
            raise OptionError(f"{call}: the Rope is made for head_dim {rope.head_dim}, the heads are {head_dim} wide")
        return rope
    if rope is False:
        return None
    base = 10000.0 if rope is True else float(rope)
    if base <= 1 or head_dim % 2:
        raise OptionError(f"{call}: rotary positions need an even head_dim and a base above 1; pass rope=False to do without")
    return Rope(head_dim, base)


class Attention(Mixer):
    """y = o(softmax(scale * q(x) k(x)^T + bias, over the keys that `mask` allows) v(x)), with H heads side by side.

    dim, num_heads   width of x and number of query heads; head h reads KV head h // (num_heads // num_kv_heads)
    head_dim         width of a head, None = dim / num_heads
    mask             a mask value over absolute positions, None = every key (bidirectional). The cache follows from it: a mask
                     that reaches back only n keys gets a rolling buffer of n, any other causal mask a cache that grows
    rope             rotary positions on q and k: True (base 10000), a base, a Rope, or False
    score_mod        changes scaled scores (Alibi, RelativeBias, Softcap); tensors in it that need gradients become parameters
    scale            None = head_dim ** -0.5
    bias             of the projections: True, False, or "qkv" (not on the output)
    qk_norm          RMS norm over head_dim on q and k, before the rotation
    sink             a learned logit per head in the softmax denominator (rows then sum to less than 1)
    attend           computes uncached attention, signature of ops.attention; e.g. a ring over processes

    A query that may attend to nothing gives 0 (before the output projection's bias). Cost: 8 T dim^2 flops for projections
    when all heads are as wide as dim, and 4 dim flops per allowed (query, key) pair; cache 2 num_kv_heads head_dim per token
    held. Source: Vaswani et al. 2017, arXiv 1706.03762.
    """

    rearranges = False  # whether `_rearranged` is worth asking

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        mask: Mask | None = None,
        rope: bool | float | Rope = True,
        score_mod: ScoreMod | None = None,
        scale: float | None = None,
        bias: bool | Literal["qkv"] = False,
        qk_norm: bool = False,
        sink: bool = False,
        attend: Attend = attention,
    ) -> None:
        super().__init__(dim)
        kind = type(self).__name__
        call = f"{kind}(dim={dim}, num_heads={num_heads}, num_kv_heads={num_kv_heads}, head_dim={head_dim}, rope={rope})"
        self.num_heads = num_heads
        self.num_kv_heads, self.head_dim = check_heads(call, dim, num_heads, num_kv_heads, head_dim)
        self.mask, self.scale, self.attend = mask, scale, attend
        self.rope = make_rope(call, rope, self.head_dim)
        self.causal = is_causal(mask)
        keep, shape = reach(mask), (self.num_kv_heads, self.head_dim)
        self._specs = (PartSpec("kv", (("k", shape), ("v", shape)), window=keep.window, sinks=keep.sinks),)
        self.uses_positions = not (self.rope is None and score_mod is None and mask is None)
        self._make_projections(bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.sink = nn.Parameter(torch.zeros(num_heads)) if sink else None
        self._score_mod = score_mod
        learned = [] if score_mod is None else [t for t in score_mod.tensors() if t.requires_grad]
        self.score_params = nn.ParameterList(t if isinstance(t, nn.Parameter) else nn.Parameter(t) for t in learned)

    # ---- the pieces ---------------------------------------------------------------------------------------------------------

    def _make_projections(self, bias: bool | str) -> None:
        if bias not in (True, False, "qkv"):
            raise OptionError(f"{type(self).__name__}: bias must be True, False or 'qkv', not {bias!r}")
        inner, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(self.dim, inner, bias=bool(bias))
        self.k_proj = nn.Linear(self.memory_dim, kv, bias=bool(bias))
        self.v_proj = nn.Linear(self.memory_dim, kv, bias=bool(bias))
        self.o_proj = nn.Linear(inner, self.dim, bias=bias is True)

    def named(self: Self, name: str) -> Self:
        """Call this mixer by its catalogue name in errors and prints."""
        self.name = name
        return self

    def score_mod(self, device: torch.device) -> ScoreMod | None:
        """The score modification with its learned tensors taken from this module's parameters, on `device`."""
        mod = self._score_mod
        if mod is None or not mod.tensors():
            return mod
        learned = iter(self.score_params)
        return mod.replace_tensors(tuple(next(learned) if t.requires_grad else t.to(device) for t in mod.tensors()))

    def _queries(self, x: Tensor) -> Tensor:
        """q [..., T, H, D], not yet rotated."""
        q = project(x, self.q_proj, self.impl).unflatten(-1, (self.num_heads, self.head_dim))
        return q if self.q_norm is None else self.q_norm(q)

    def _keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [..., S, Hkv, D]; k not yet rotated."""
        k, v = (
            project(source, p, self.impl).unflatten(-1, (self.num_kv_heads, self.head_dim)) for p in (self.k_proj, self.v_proj)
        )
        return k if self.k_norm is None else self.k_norm(k), v

    def _angles(self, positions: Tensor, like: Tensor) -> Angles:
        """cos and sin of the rotation at `positions`, shared by q and k; None without rotary positions."""
        if self.rope is None:
            return None
        return self.rope.cos_sin(positions, wide_dtype(like.dtype))

    def _rotate(self, x: Tensor, angles: Angles) -> Tensor:
        return x if angles is None or self.rope is None else self.rope.rotate(x, *angles)

    def _combine(self, q: Tensor, positions: Tensor, angles: Angles, read: Read) -> Tensor:
        """Queries -> outputs, given `read(rotated q, mask)`. Mechanisms made of several reads override this."""
        return read(self._rotate(q, angles), self.mask)

    def _rearranged(self, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> Tensor | None:
        """A cheaper way to the same outputs for dense sequences from position 0 on; None = go through the mask."""
        return None

    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        if cache is None and seq is not None:
            if any(seq.first) and not (self._score_mod is None and is_shift_invariant(self.mask)):
                return self.mix_irregular(x, memory=memory, positions=positions, seq=seq)
            seq = SeqInfo(seq.lengths)
        q, (k, v) = self._queries(x), self._keys_values(x)
        angles = self._angles(positions, q)
        k = self._rotate(k, angles)
        options: dict[str, Any] = {"scale": self.scale, "sink": self.sink, "seq": seq, "impl": self.impl}
        options["score_mod"] = self.score_mod(x.device)
        if self.rearranges and seq is None and self.impl != "reference":
            whole = {name: value for name, value in options.items() if name != "seq"}
            out = self._rearranged(self._rotate(q, angles), k, v, whole)
            if out is not None:
                return self.o_proj(out.flatten(-2))

        def read(q: Tensor, mask: Mask | None, return_aux: AuxRequest | None = None) -> Any:
            if cache is None:
                return self.attend(q, k, v, mask=mask, return_aux=return_aux, **options)
            return attention_cached(q, cache.parts[0], mask=mask, return_aux=return_aux, **options)

        if cache is not None:
            assert seq is not None, "a cache comes with the packed form"
            cache.parts[0].write((k, v), seq)
        return self.o_proj(self._combine(q, positions, angles, read).flatten(-2))

    def mix_irregular(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None) -> Tensor:
        """One call per sequence, with the mask written out as [T, T] bits for its positions; O(T^2) bits of extra memory."""
        assert seq is not None
        if self.mask is not None and self.mask.batch is not None:
            raise UnsupportedError(f"{self}: positions must be consecutive when the mask differs by batch row")
        parts = zip(x.split(seq.lengths), positions.split(seq.lengths), strict=True)
        return torch.cat([self._mix_at(row, where) for row, where in parts]) if seq.lengths else self.o_proj(self.q_proj(x))

    def _mix_at(self, x: Tensor, positions: Tensor) -> Tensor:
        q, (k, v) = self._queries(x[None]), self._keys_values(x[None])
        angles = self._angles(positions, q)
        k = self._rotate(k, angles)
        score_mod = self.score_mod(x.device)
        where = None if score_mod is None else AtPositions(score_mod, positions)

        def read(q: Tensor, mask: Mask | None, return_aux: AuxRequest | None = None) -> Any:
            at = None if mask is None else Dense(mask.dense(Grid.at(positions, positions), heads=self.num_heads, device=x.device))
            options = {"scale": self.scale, "sink": self.sink, "impl": self.impl, "return_aux": return_aux}
            return self.attend(q, k, v, mask=at, score_mod=where, **options)

        return self.o_proj(self._combine(q, positions, angles, read).flatten(-2))[0]

    # ---- what it costs ------------------------------------------------------------------------------------------------------

    def cache_specs(self) -> tuple[PartSpec, ...]:
        return self._specs if self.causal else super().cache_specs()

    def describe_mask(self) -> Mask | None:
        return self.mask

    def flops(self, seq_len: int) -> int:
        """2 per multiply-add: projections, and q k and p v for every pair that the mask allows in every head."""
        pairs = self.num_heads * seq_len**2
        if self.mask is not None:
            alike = (1 if self.mask.heads else self.num_heads) / (self.mask.batch or 1)  # count adds up what differs
            pairs = round(alike * self.mask.count(Grid.dense(seq_len, seq_len)))
        return self._projection_flops(seq_len, seq_len) + 4 * self.head_dim * pairs

    def _projection_flops(self, queries: int, keys: int) -> int:
        inner, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return 4 * queries * self.dim * inner + 4 * keys * self.memory_dim * kv

    def extra_repr(self) -> str:
        shown: dict[str, object] = {
            "dim": self.dim,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
        }
        shown |= {"mask": self.mask, "rope": self.rope, "impl": self.impl}
        return ", ".join(f"{name}={shorten(value, 200)}" for name, value in shown.items())
