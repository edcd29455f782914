"""Interleaved head attention: every head attends over several mixtures of all heads, laid out as one longer sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from attlas.cache.layer import Cache
from attlas.cache.part import Held, Part, PartSpec
from attlas.errors import OptionError
from attlas.masks.cell_patterns import BlockWindow
from attlas.masks.explicit import Dense
from attlas.masks.expr import Mask
from attlas.masks.geometry import Axis, Grid, Segment
from attlas.masks.leaves import Causal, Local, Window
from attlas.nn.attention import check_heads, make_rope
from attlas.nn.mixer import Mixer
from attlas.ops.attention import attention
from attlas.ops.cached import attention_cached
from attlas.positions.rope import Rope
from attlas.reference import interleaved as truth
from attlas.shapes import SeqInfo

Span = tuple[int | None, int | None]
NOISE = 0.02  # keeps the pseudo-heads from starting as exact copies of each other


class InterleavedHead(Mixer):
    """Interleaved head attention (IHA): P pseudo-heads for each of H heads.

        q'_{n,h,p} = sum_m alpha^Q[m, h, p] q_{n,m}, likewise k' and v'       a pseudo-token is a mixture of all heads
        A_h = softmax(scale * Q'_h K'_h^T) V'_h                               over N P virtual tokens; (n, p) is token n P + p
        o_{n,h} = sum_{h',p} R[h, h', p] A_{h',(n,p)},  y = o_proj(o)

    pseudo_heads  P, None = num_heads
    causal        True: flat causal over the virtual tokens, as in the paper; of its own token a pseudo-query sees only the
                  pseudo-keys up to its own. "token": of its own token it sees all. False: bidirectional
    window        None = every earlier token. True causal: the last window P virtual tokens, the pseudo-query's own included
                  (so a token further back is seen in part); "token": the last `window` tokens, whole, its own included
    collapse      "global": R mixes the pseudo-heads of all heads, [H, H, P]; "per-head": those of each head alone, [H, P]
    rope          rotates virtual queries and keys, at the virtual position n P + p

    All P pseudo-queries of a head share one softmax over all pseudo-keys, so equal pseudo-keys count several times. Starts at
    alpha = identity (plus noise) and R = the mean over a head's own pseudo-heads.

    Cost: 4 P^2 head_dim flops per head and allowed pair of tokens, P^2 times those of multi-head attention; mixing 8 H^2 P
    head_dim per token. The cache holds k and v before mixing and rotation, 2 H head_dim per token as in multi-head attention; a
    step mixes what it reads anew (4 H^2 P head_dim flops per cached token, as much as the attention itself when P = H).
    Source: Duvvuri et al. 2026, arXiv 2602.21371.
    """

    name = "interleaved-head"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        pseudo_heads: int | None = None,
        causal: bool | Literal["token"] = True,
        window: int | None = None,
        collapse: Literal["global", "per-head"] = "global",
        head_dim: int | None = None,
        rope: bool | float | Rope = True,
        scale: float | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(dim)
        call = (
            f"interleaved-head(dim={dim}, num_heads={num_heads}, pseudo_heads={pseudo_heads}, causal={causal!r}, "
            f"window={window}, collapse={collapse!r}, head_dim={head_dim}, rope={rope})"
        )
        self.num_heads = num_heads
        _, self.head_dim = check_heads(call, dim, num_heads, None, head_dim)
        self.pseudo = num_heads if pseudo_heads is None else pseudo_heads
        if self.pseudo < 1 or collapse not in ("global", "per-head"):
            raise OptionError(f"{call}: pseudo_heads must be at least 1, collapse 'global' or 'per-head'")
        if causal not in (True, False, "token") or (window is not None and (window < 1 or not causal)):
            raise OptionError(f"{call}: causal must be True, False or 'token', and a window at least 1 and causal")
        self.order, self.causal, self.window, self.collapse = causal, bool(causal), window, collapse
        self.mask = _virtual_mask(self.pseudo, causal, window)
        self.rope = make_rope(call, rope, self.head_dim)
        self.scale = self.head_dim**-0.5 if scale is None else float(scale)
        self.uses_positions = self.rope is not None or self.mask is not None
        inner = num_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(inner, dim, bias=bias)
        copies = torch.eye(num_heads)[:, :, None].expand(-1, -1, self.pseudo)
        self.alpha_q, self.alpha_k, self.alpha_v = (nn.Parameter(copies + NOISE * torch.randn(copies.shape)) for _ in range(3))
        self.R = nn.Parameter((copies if collapse == "global" else torch.ones(num_heads, self.pseudo)) / self.pseudo)

    # ---- virtual tokens -----------------------------------------------------------------------------------------------------

    def _heads(self, projection: nn.Module, x: Tensor) -> Tensor:
        return projection(x).unflatten(-1, (self.num_heads, self.head_dim))

    def _virtual(self, heads: Tensor, alpha: Tensor) -> Tensor:
        """Heads [..., T, H, D] -> virtual tokens [..., T P, H, D], token-major."""
        return torch.einsum("...tmd,mhp->...tphd", heads, alpha.to(heads.dtype)).flatten(-4, -3)

    def _places(self, positions: Tensor) -> Tensor:
        """Token positions [T] -> virtual positions [T P]."""
        return (positions[:, None] * self.pseudo + torch.arange(self.pseudo, device=positions.device)).flatten()

    def _rotate(self, x: Tensor, places: Tensor) -> Tensor:
        return x if self.rope is None else self.rope(x, places)

    def _virtual_keys(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [..., T, H, D] of tokens at `positions` [T] -> rotated virtual keys and values [..., T P, H, D]."""
        return self._rotate(self._virtual(k, self.alpha_k), self._places(positions)), self._virtual(v, self.alpha_v)

    def _collapse(self, out: Tensor) -> Tensor:
        """Virtual outputs [..., T P, H, D] -> y [..., T, dim]."""
        each = out.unflatten(-3, (-1, self.pseudo))
        rule = "...tpgd,hgp->...thd" if self.R.dim() == 3 else "...tphd,hp->...thd"
        return self.o_proj(torch.einsum(rule, each, self.R.to(out.dtype)).flatten(-2))

    # ---- the mechanism ------------------------------------------------------------------------------------------------------

    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        if x.numel() == 0:
            return x
        if self.impl == "reference" and cache is None:
            return self._literal(x, positions, seq)
        k, v = self._heads(self.k_proj, x), self._heads(self.v_proj, x)
        q = self._rotate(self._virtual(self._heads(self.q_proj, x), self.alpha_q), self._places(positions))
        if cache is None:
            virtual = None if seq is None else SeqInfo(tuple(n * self.pseudo for n in seq.lengths))  # only distances count
            keys, values = self._virtual_keys(k, v, positions)
            return self._collapse(attention(q, keys, values, mask=self.mask, scale=self.scale, seq=virtual, impl=self.impl))
        assert seq is not None, "a cache comes with the packed form"
        cache.parts[0].write((k, v), seq)
        lengths, starts = (tuple(n * self.pseudo for n in values) for values in (seq.lengths, seq.first))
        view = VirtualView(self, cache.parts[0])
        virtual = SeqInfo(lengths, starts=starts, ids=seq.rows)
        return self._collapse(attention_cached(q, view, seq=virtual, mask=self.mask, scale=self.scale, impl=self.impl))

    def mix_irregular(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None) -> Tensor:
        """One call per sequence, with the mask written out as [T P, T P] bits for its positions."""
        assert seq is not None
        rows = zip(x.split(seq.lengths), positions.split(seq.lengths), strict=True) if seq.lengths else ()
        return torch.cat([x[:0], *(self._mix_at(row[None], where)[0] for row, where in rows if len(row))])

    def _mix_at(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (self._heads(projection, x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        places = self._places(positions)
        mask = None if self.mask is None else Dense(self.mask.dense(Grid.at(places, places), device=x.device))
        q = self._rotate(self._virtual(q, self.alpha_q), places)
        keys, values = self._virtual_keys(k, v, positions)
        return self._collapse(attention(q, keys, values, mask=mask, scale=self.scale, impl=self.impl))

    def _literal(self, x: Tensor, positions: Tensor, seq: SeqInfo | None) -> Tensor:
        """Each sequence by attlas.reference.interleaved."""
        if seq is not None:
            rows = zip(x.split(seq.lengths), positions.split(seq.lengths), strict=True)
            return torch.cat([self._literal(row[None], where, None)[0] for row, where in rows if len(row)])
        q, k, v = (self._heads(projection, x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        places, total = self._places(positions), x.shape[1] * self.pseudo
        allowed = torch.ones(total, total, dtype=torch.bool) if self.mask is None else self.mask.dense(Grid.at(places, places))
        out = truth.interleaved_head(
            q, k, v, (self.alpha_q, self.alpha_k, self.alpha_v), self.R, allowed=allowed.to(x.device), scale=self.scale,
            rotate=lambda t: self._rotate(t, places),
        )  # fmt: skip
        return self.o_proj(out.flatten(-2))

    # ---- what it costs ------------------------------------------------------------------------------------------------------

    def cache_specs(self) -> tuple[PartSpec, ...]:
        if not self.causal:
            return super().cache_specs()
        keep = self.window
        if keep is not None and self.order is True and self.pseudo > 1:
            keep += 1  # the first pseudo-queries reach back into one more token
        shape = (self.num_heads, self.head_dim)
        return (PartSpec("tokens", (("k", shape), ("v", shape)), window=keep),)

    def describe_mask(self) -> Mask | None:
        """Over virtual tokens."""
        return self.mask

    def flops(self, seq_len: int) -> int:
        """2 per multiply-add: projections, mixing to and from the virtual tokens, and 4 head_dim per allowed virtual pair."""
        inner, virtual = self.num_heads * self.head_dim, seq_len * self.pseudo
        pairs = virtual**2 if self.mask is None else self.mask.count(Grid.dense(virtual, virtual))
        collapse = virtual * inner * (self.num_heads if self.collapse == "global" else 1)
        mixing = 2 * (3 * virtual * inner * self.num_heads + collapse)
        return 8 * seq_len * self.dim * inner + mixing + 4 * pairs * inner

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, pseudo_heads={self.pseudo}"
        shown += f", causal={self.order!r}, window={self.window}, collapse={self.collapse}"
        return f"{shown}, rope={self.rope}, scale={self.scale:.6g}, impl={self.impl}"


def _virtual_mask(pseudo: int, causal: bool | Literal["token"], window: int | None) -> Mask | None:
    """Which virtual keys a virtual query may attend to."""
    if causal == "token":
        return Causal() | Local(pseudo) if window is None else BlockWindow(pseudo, window - 1, 0)
    if not causal:
        return None
    return Causal() if window is None else Causal() & Window.last(window * pseudo)


@dataclass(frozen=True, eq=False, repr=False)
class VirtualView:
    """A part of unmixed keys and values, read as the virtual tokens that `mixer` makes of them. All positions are virtual."""

    mixer: InterleavedHead
    part: Part
    cascade: bool = False  # what is read is made anew at each read, and shares no pages

    def __repr__(self) -> str:
        return repr(self.part)

    @property
    def rows(self) -> int:
        return self.part.rows

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(n * self.mixer.pseudo for n in self.part.lengths)

    def read(self, row: int, span: Span | None = None) -> Held:
        return self._expand(self.part.read(row, self._tokens(span)))

    def read_dense(self, rows: Sequence[int], span: Span | None = None) -> Held | None:
        held = self.part.read_dense(rows, self._tokens(span))
        return None if held is None else self._expand(held)

    def read_table(self, rows: Sequence[int]) -> None:
        """Virtual tokens are nowhere stored."""

    def missing(self, row: int) -> tuple[int, int]:
        begin, end = self.part.missing(row)
        return begin * self.mixer.pseudo, end * self.mixer.pseudo

    def _tokens(self, span: Span | None) -> Span | None:
        """The tokens that virtual positions first ... last lie in."""
        if span is None:
            return None
        low, high = (None if end is None else end // self.mixer.pseudo for end in span)
        return low, high

    def _expand(self, held: Held) -> Held:
        p, axis = self.mixer.pseudo, held.axis
        dtype = self.mixer.alpha_k.dtype
        k, v = (t.to(dtype) for t in held.tensors)
        virtual = Axis(tuple(Segment(s.length * p, s.position * p, s.sequence, s.index * p) for s in axis.segments))
        return Held(self.mixer._virtual_keys(k, v, axis.positions(k.device)), virtual)
