"""Multi-head latent attention: keys and values are made from one small latent per token, and the cache holds only that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attlas.cache.layer import Cache
from attlas.cache.part import Held, Part, PartSpec, Table
from attlas.errors import OptionError
from attlas.masks.explicit import Dense
from attlas.masks.expr import Mask
from attlas.masks.geometry import Grid
from attlas.masks.leaves import Causal
from attlas.nn.mixer import Mixer
from attlas.numerics import wide_dtype
from attlas.ops.attention import attention
from attlas.ops.cached import attention_cached
from attlas.positions.rope import Rope
from attlas.positions.scaling import Yarn
from attlas.shapes import SeqInfo

Attend = Callable[..., Any]
Span = tuple[int | None, int | None]


@dataclass(frozen=True, eq=False, repr=False)
class LatentView:
    """A part of latents [rank + rope] per token, read as the keys and values that `to_kv` makes of them.

    stored  True when keys and values are views of the storage, so that a kernel may read them in place
    """

    part: Part
    to_kv: Callable[[Tensor], tuple[Tensor, Tensor]]
    stored: bool

    def __repr__(self) -> str:
        return repr(self.part)

    @property
    def rows(self) -> int:
        return self.part.rows

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.part.lengths

    @property
    def cascade(self) -> bool:
        return self.part.cascade

    def read(self, row: int, span: Span | None = None) -> Held:
        held = self.part.read(row, span)
        return Held(self.to_kv(held.tensors[0]), held.axis)

    def read_dense(self, rows: Sequence[int], span: Span | None = None) -> Held | None:
        held = self.part.read_dense(rows, span)
        return None if held is None else Held(self.to_kv(held.tensors[0]), held.axis)

    def read_table(self, rows: Sequence[int]) -> Table | None:
        table = self.part.read_table(rows) if self.stored else None
        if table is None:
            return None
        return Table(self.to_kv(table.tensors[0]), table.block_table, 2 * table.scales)  # keys and values share their scales

    def missing(self, row: int) -> tuple[int, int]:
        return self.part.missing(row)


def latent_scale(width: int, rope: Rope) -> float:
    """width ** -0.5, times m ** 2 under YaRN with mscale_all_dim: m = 0.1 mscale_all_dim ln(factor) + 1 for factors above 1."""
    scaling, scale = rope.scaling, width**-0.5
    if isinstance(scaling, Yarn) and scaling.mscale_all_dim and scaling.factor > 1:
        scale *= (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0) ** 2
    return scale


class MultiHeadLatent(Mixer):
    """Multi-head latent attention (MLA) of DeepSeek-V2 and V3.

        c_t = norm(x_t W_kv_a),  r_t = rope_t(x_t W_r)         one latent and one rotated key, shared by all heads
        k_t,h = [c_t W_k,h ; r_t],  v_t,h = c_t W_v,h
        q_t,h = [norm(x_t W_q_a) W_q,h ; rope_t(norm(x_t W_q_a) W_qr,h)]
        y_t = o(softmax_j(scale * q_t,h . k_j,h) v_j,h)

    kv_lora_rank      width of the latent c; it and r are all that the cache holds
    q_lora_rank       width that queries are squeezed through; None = straight from x
    qk_nope_head_dim  width of a head's query and key without positions; qk_rope_head_dim: with rotary positions
    v_head_dim        width of a head's value
    rope              base of the rotation, or a Rope of qk_rope_head_dim channels (DeepSeek's is interleaved)
    scale             None = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5, times mscale ** 2 where the Rope's scaling is a Yarn
                      with mscale_all_dim
    bias              of the projections down to the latents and of the output projection

    Without a cache, for prompts and for long chunks, keys and values are expanded. For few new tokens W_k moves to the query and
    W_v to the output: attention of H heads over one key/value head whose key is [c ; r] and whose value is c, read where the
    cache stores it. Both compute the same; the scale stays that of the expanded width.

    Cost: per pair H (nope + rope + v) multiply-adds expanded, H (2 kv_lora_rank + rope) absorbed. Cache kv_lora_rank + rope per
    token. Source: DeepSeek-AI 2024, arXiv 2405.04434.
    """

    name = "multi-head-latent"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_lora_rank: int = 512,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        rope: float | Rope = 10000.0,
        causal: bool = True,
        scale: float | None = None,
        bias: bool = False,
        attend: Attend = attention,
    ) -> None:
        super().__init__(dim)
        self.num_heads, self.attend, self.causal = num_heads, attend, causal
        self.kv_rank, self.q_rank = kv_lora_rank, q_lora_rank
        self.nope, self.rotary, self.v_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.mask: Mask | None = Causal() if causal else None
        self._check_options(rope)
        self.rope = rope if isinstance(rope, Rope) else Rope(self.rotary, float(rope), interleaved=True)
        self.scale = latent_scale(self.nope + self.rotary, self.rope) if scale is None else float(scale)
        queries = num_heads * (self.nope + self.rotary)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(dim, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(dim, q_lora_rank, bias=bias)
            self.q_a_norm = nn.RMSNorm(q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(q_lora_rank, queries, bias=False)
        self.kv_a_proj = nn.Linear(dim, kv_lora_rank + self.rotary, bias=bias)
        self.kv_a_norm = nn.RMSNorm(kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (self.nope + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, dim, bias=bias)

    def _check_options(self, rope: float | Rope) -> None:
        call = f"{self.name}({self._sizes()}, rope={rope})"
        sizes = (self.dim, self.num_heads, self.kv_rank, self.nope, self.rotary, self.v_dim, self.q_rank or 1)
        if min(sizes) < 1 or self.q_rank == 0:
            raise OptionError(f"{call}: every size must be at least 1")
        if isinstance(rope, Rope):
            if rope.head_dim != self.rotary:
                raise OptionError(f"{call}: the Rope is made for {rope.head_dim} channels, qk_rope_head_dim is {self.rotary}")
        elif isinstance(rope, bool) or rope <= 1 or self.rotary % 2:
            raise OptionError(f"{call}: rotary positions need an even qk_rope_head_dim and a base above 1")

    def _sizes(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, kv_lora_rank={self.kv_rank}, q_lora_rank={self.q_rank}, "
            f"qk_nope_head_dim={self.nope}, qk_rope_head_dim={self.rotary}, v_head_dim={self.v_dim}"
        )

    def extra_repr(self) -> str:
        return f"{self._sizes()}, rope={self.rope}, causal={self.causal}, scale={self.scale:.6g}, impl={self.impl}"

    # ---- the pieces ---------------------------------------------------------------------------------------------------------

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q without positions [..., T, H, nope], rotated q [..., T, H, rope], and [c ; rotated r] [..., T, kv_rank + rope]."""
        q = self.q_proj(x) if self.q_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(-1, (self.num_heads, -1)).split([self.nope, self.rotary], -1)
        latent, k_rope = self.kv_a_proj(x).split([self.kv_rank, self.rotary], -1)
        angles = self.rope.cos_sin(positions, wide_dtype(x.dtype))
        k_rope = self.rope.rotate(k_rope.unsqueeze(-2), *angles).squeeze(-2)
        return q_nope, self.rope.rotate(q_rope, *angles), torch.cat([self.kv_a_norm(latent), k_rope], -1)

    def _expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """[..., kv_rank + rope] -> k [..., H, nope + rope], v [..., H, v_dim]."""
        latent, k_rope = latent.to(self.kv_b_proj.weight.dtype).split([self.kv_rank, self.rotary], -1)
        k, v = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1)).split([self.nope, self.v_dim], -1)
        return torch.cat(
            [k, k_rope.to(k.dtype).unsqueeze(-2).expand(*k.shape[:-1], -1)], -1
        ), v  # autocast: k alone is in 16 bits

    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        q_nope, q_rope, latent = self._project(x, positions)
        if cache is not None:
            assert seq is not None, "a cache comes with the packed form"
            cache.parts[0].write((latent.unsqueeze(-2),), seq)
            return self.o_proj(self._read(q_nope, q_rope, cache.parts[0], seq).flatten(-2))
        k, v = self._expand(latent)
        packed = None if seq is None else SeqInfo(seq.lengths)  # only distances count
        options = {"mask": self.mask, "scale": self.scale, "seq": packed, "impl": self.impl}
        return self.o_proj(self.attend(torch.cat([q_nope, q_rope], -1), k, v, **options).flatten(-2))

    def mix_irregular(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None) -> Tensor:
        """One call per sequence, with the mask written out as [T, T] bits for its positions."""
        assert seq is not None
        rows = zip(x.split(seq.lengths), positions.split(seq.lengths), strict=True)
        return torch.cat([self._mix_at(row, where) for row, where in rows])

    def _mix_at(self, x: Tensor, positions: Tensor) -> Tensor:
        q_nope, q_rope, latent = self._project(x[None], positions)
        k, v = self._expand(latent)
        mask = None if self.mask is None else Dense(self.mask.dense(Grid.at(positions, positions), device=x.device))
        out = self.attend(torch.cat([q_nope, q_rope], -1), k, v, mask=mask, scale=self.scale, impl=self.impl)
        return self.o_proj(out.flatten(-2))[0]

    # ---- reading the cache --------------------------------------------------------------------------------------------------

    def absorbs(self, new: int, held: int) -> bool:
        """Whether `new` queries over `held` tokens cost less absorbed (each query goes through W_k and W_v, and pairs are wider)
        than with all held tokens expanded. Where pairs are wider, a prompt is expanded."""
        wider = (2 * self.kv_rank + self.rotary) - (self.nope + self.rotary + self.v_dim)
        through = self.kv_rank * (self.nope + self.v_dim)
        return new * (through + held * wider) < held * through

    def _read(self, q_nope: Tensor, q_rope: Tensor, part: Part, seq: SeqInfo) -> Tensor:
        """Each sequence in the form that is cheaper for it -> [T, H, v_dim]."""
        long = [not self.absorbs(n, part.lengths[row]) for n, row in zip(seq.lengths, seq.rows, strict=True)]
        if not any(long):
            return self._absorbed(q_nope, q_rope, part, seq)
        if all(long):
            return self._expanded(q_nope, q_rope, part, seq)
        rows = list(zip(q_nope.split(seq.lengths), q_rope.split(seq.lengths), strict=True))
        done: dict[int, Tensor] = {}
        for form, group in ((self._absorbed, _where(long, False)), (self._expanded, _where(long, True))):
            some = _subset(seq, group)
            out = form(torch.cat([rows[i][0] for i in group]), torch.cat([rows[i][1] for i in group]), part, some)
            done |= dict(zip(group, out.split(some.lengths), strict=True))
        return torch.cat([done[i] for i in range(len(long))])

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, part: Part, seq: SeqInfo) -> Tensor:
        view = LatentView(part, lambda held: self._expand(held.squeeze(-2)), stored=False)
        q = torch.cat([q_nope, q_rope], -1)
        return attention_cached(q, view, seq=seq, mask=self.mask, scale=self.scale, impl=self.impl)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, part: Part, seq: SeqInfo) -> Tensor:
        up = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))  # [H, nope + v, kv_rank]
        up_k, up_v = up.split([self.nope, self.v_dim], 1)
        q = torch.cat([torch.einsum("thd,hdr->thr", q_nope, up_k), q_rope], -1)
        view = LatentView(part, lambda held: (held, held[..., : self.kv_rank]), stored=True)
        out = attention_cached(q, view, seq=seq, mask=self.mask, scale=self.scale, impl=self.impl)
        return torch.einsum("thr,hdr->thd", out, up_v)

    # ---- what it costs ------------------------------------------------------------------------------------------------------

    def cache_specs(self) -> tuple[PartSpec, ...]:
        if not self.causal:
            return super().cache_specs()
        return (PartSpec("latent", (("latent_and_rope_key", (1, self.kv_rank + self.rotary)),)),)

    def describe_mask(self) -> Mask | None:
        return self.mask

    def flops(self, seq_len: int) -> int:
        """2 per multiply-add, in the expanded form."""
        pairs = seq_len**2 if self.mask is None else self.mask.count(Grid.dense(seq_len, seq_len))
        width = self.nope + self.rotary
        queries = self.dim * self.num_heads * width
        if self.q_rank is not None:
            queries = self.q_rank * (self.dim + self.num_heads * width)
        keys = self.dim * (self.kv_rank + self.rotary) + self.kv_rank * self.num_heads * (self.nope + self.v_dim)
        token = queries + keys + self.num_heads * self.v_dim * self.dim
        return 2 * seq_len * token + 2 * pairs * self.num_heads * (width + self.v_dim)


def _where(flags: Sequence[bool], wanted: bool) -> list[int]:
    return [i for i, flag in enumerate(flags) if flag is wanted]


def _subset(seq: SeqInfo, group: Sequence[int]) -> SeqInfo:
    """Some of the sequences, with their starts and rows."""
    lengths, starts, rows = (tuple(values[i] for i in group) for values in (seq.lengths, seq.first, seq.rows))
    return SeqInfo(lengths, starts=starts, ids=rows)
