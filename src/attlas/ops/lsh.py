"""Attention among tokens of one hash bucket: sort by bucket, attend in chunks of the sorted list, join the hash rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError
from attlas.numerics import full_precision, widened
from attlas.ops.attention import attention
from attlas.ops.groups import attend_groups, take
from attlas.ops.merge import merge
from attlas.scores import RelativeBias
from attlas.shapes import AuxRequest, describe

Causal = Literal[False, True, "content-leaks"]
Rule = Literal["paper", "trax"]
Own = Literal["last", "always"]
_STEP = 64  # queries of one piece of a read from a cache
_PAIRS = 1 << 21  # pairs of tokens whose rows are looked at together: their masks stay in cache, and memory is used again
_PIECE = 1 << 20  # pairs of tokens of one call, where they need no mask of their own
_HASHED = 1 << 20  # numbers of which the largest ones are sought at once


def make_rotations(heads: int, head_dim: int, rounds: int, buckets: Sequence[int], seed: int) -> Tensor:
    """Random directions [H, D, R, sum(buckets) / 2] for `lsh_hash`: fp64 normal numbers, a function of the arguments alone."""
    shape = (heads, head_dim, rounds, sum(buckets) // 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lsh_hash(x: Tensor, rotations: Tensor, buckets: Sequence[int]) -> Tensor:
    """Angular hash of each token: h(x) = argmax([x R; -x R]) for every round.

    x [B, T, H, D], rotations [H, D, R, sum(buckets) / 2] -> int64 [B, T, H, R]. With several factors in `buckets`, each has
    directions of its own and the hash is the number with these digits, the first one least: prod(buckets) buckets for
    sum(buckets) / 2 directions. No gradient. Cost: T H D R sum(buckets) flops. Andoni et al. 2015, arXiv:1509.02897.
    """
    (wide,) = widened(x.detach())
    tokens = max(1, _HASHED // max(1, x.shape[0] * rotations[:, 0].numel()))
    with full_precision(x):
        pieces = [_hash(piece, rotations.to(wide.dtype), buckets) for piece in wide.split(tokens, 1)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _hash(x: Tensor, rotations: Tensor, buckets: Sequence[int]) -> Tensor:
    turned = torch.einsum("bthd,hdrn->bthrn", x, rotations)
    code, place = torch.zeros(turned.shape[:-1], dtype=torch.int64, device=x.device), 1
    for part, size in zip(turned.split([b // 2 for b in buckets], dim=-1), buckets, strict=True):
        (top, at), (low, at_low) = part.max(-1), part.min(-1)  # the largest of [part, -part], without writing it out
        code = code + place * torch.where(top >= -low, at, at_low + size // 2)
        place *= size
    return code


def unit_keys(q: Tensor) -> Tensor:
    """The keys of shared queries and keys: q / sqrt(|q|^2 + 1e-6 D), of length just under 1."""
    (wide,) = widened(q)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6 * q.shape[-1])).to(q.dtype)


def lsh_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hashes: Tensor,
    *,
    chunk: int,
    before: int = 1,
    after: int = 0,
    causal: Causal = False,
    rule: Rule = "paper",
    own: Own = "last",
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """out_i = sum_j softmax_j(scale q_i . k_j) v_j over the keys j that share a bucket with i and stand near it among the sorted.

    q, k, v [B, T, H, D], hashes int64 [B, T, H, R] -> [B, T, H, D]. Each round sorts the tokens by (hash, position) and cuts the
    list into chunks of `chunk`; a query looks at its own chunk, at `before` chunks before it and `after` behind it.

    rule    "paper": keys of the query's bucket; one that is found in several rounds counts once. "trax": keys of every bucket in
            the chunks, once for each time they are found, and the chunks of all rounds form a ring; a sequence of at most one
            chunk is one bucket (Google's trax, transformers)
    causal  True: the before * chunk nearest earlier tokens of the query's bucket, in each round. Later tokens change nothing.
            "content-leaks": only keys j <= i, in chunks whose edges depend on the later tokens: the published language model,
            which is not causal
    own     "last": a token attends to itself only where it sees no other key in any round; "always" (causal=True): it is one of
            the nearest
    scale   None = 1 / sqrt(D)

    The rounds are joined by their log-sum-exp. Hashes carry no gradient. A NaN reaches whatever shares its chunks.
    Cost: a sort, and 4 R T chunk (1 + before + after) D flops per head. Memory: as many numbers / (4 D), for the masks.
    Errors: ShapeError, OptionError. Kitaev et al. 2020, arXiv:2001.04451.
    """
    _check(q, k, v, hashes, chunk, before, after, causal, rule, own)
    b, t, h, _ = q.shape
    if not q.numel():
        return q * v
    codes = hashes.permute(0, 2, 3, 1).reshape(b * h, -1, t)
    if rule == "trax" and t <= chunk:
        codes = torch.zeros_like(codes[:, :1])
    size = min(chunk, t)
    # each head on its own: the gradient of a part that was picked from all heads would be as large as all of them
    heads = [[one for row in x.unbind(0) for one in row.unbind(1)] for x in (q, k, v)]
    step = max(1, _PAIRS // (codes.shape[1] * t * size * (1 + before + after)))
    outs: list[Tensor] = []
    for first in range(0, len(codes), step):
        layout = _Rounds(codes[first : first + step], size, before, after, rule)
        allowed = None if layout.regular(causal) else layout.allowed(causal, before * chunk, own)
        rows = [torch.stack(x[first : first + step]) for x in heads]
        outs += _attend(layout, rows, allowed, scale, impl).unbind(0)
    return torch.stack(outs, 1).view(t, b, h, -1).transpose(0, 1)


def _attend(layout: _Rounds, rows: list[Tensor], allowed: Tensor | None, scale: float | None, impl: str) -> Tensor:
    """q, k, v [G, T, D] of the rows of `layout` -> [G, T, D]. allowed [G, R, chunks, size, keys]; None: what `regular` says."""
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    spans = [_Span(0, layout.codes.shape[1], 0, layout.chunks)] if allowed is not None else layout.spans()
    for span in spans:
        seen = layout.seen(span) if allowed is None else allowed.flatten(0, 2)
        (queries, keys), n = layout.picked(span), span.hi - span.lo
        near = [take(x, layout.windows(keys, n)).flatten(0, 2) for x in rows[1:]]
        out, lse = attend_groups(take(rows[0], queries).flatten(0, 2), *near, allowed=seen, scale=scale, impl=impl)
        outs.append(out.flatten(0, 1))
        lses.append(lse.flatten())
    index = layout.slots(spans).transpose(0, 1)  # [R, G, T]
    rounds, lse = take(torch.cat(outs), index), take(torch.cat(lses)[:, None], index)[..., 0]
    return rounds[0] if len(rounds) == 1 else merge(list(zip(rounds, lse, strict=True)))[0]


@dataclass(frozen=True)
class _Span:
    """Chunks lo ... hi - 1 of the rounds first ... last - 1. plain: all keys but the query's own token are allowed."""

    first: int
    last: int
    lo: int
    hi: int
    plain: bool = False


class _Rounds:
    """The sorted lists of all rounds. codes int64 [G, R, T]: the buckets of G rows of tokens."""

    def __init__(self, codes: Tensor, size: int, before: int, after: int, rule: Rule) -> None:
        g, r, t = codes.shape
        self.size, self.chunks = size, -(-t // size)
        self.rule = rule
        alone = rule == "trax" and self.chunks == 1 and r == 1
        self.before, self.after, self.ring = (0, 0, False) if alone else (before, after, rule == "trax")
        self.codes = codes
        self.order = codes.sort(dim=-1, stable=True).indices
        at = torch.arange(t, device=codes.device).expand_as(codes)
        self.rank = torch.empty_like(codes).scatter_(-1, self.order, at)
        padded = torch.nn.functional.pad(self.order, (0, self.chunks * size - t), value=-1)
        self.tokens = padded.view(g, r, self.chunks, size)  # of each chunk; -1: nothing
        self.wide = self.extended(self.tokens)

    def extended(self, x: Tensor) -> Tensor:
        """[G, R, chunks, size, ...] -> [G, R, before + chunks + after, size, ...]: beyond the ends of a round there is -1; on the
        ring, the neighbouring round."""
        if not self.ring:
            ends = [x.new_full((*x.shape[:2], n, *x.shape[3:]), -1) for n in (self.before, self.after)]
            return torch.cat([ends[0], x, ends[1]], dim=2)
        r = x.shape[1]
        index = torch.arange(-self.before, self.chunks + self.after, device=x.device)
        index = (index + torch.arange(0, r * self.chunks, self.chunks, device=x.device)[:, None]) % (r * self.chunks)
        return x.flatten(1, 2)[:, index]

    def windows(self, wide: Tensor, count: int) -> Tensor:
        """[G, R, before + count + after, size, ...] -> [G, R, count, (1 + before + after) * size, ...]: each chunk with its
        neighbours."""
        return torch.cat([wide[:, :, o : o + count] for o in range(self.before + self.after + 1)], dim=3)

    def around(self, x: Tensor) -> Tensor:
        return self.windows(self.extended(x), self.chunks)

    def picked(self, span: _Span) -> tuple[Tensor, Tensor]:
        """The queries of a span and the keys around them, as rows of [G * T, ...]; where there is no token, one of the row's."""
        g, _, t = self.codes.shape
        here, hi = slice(span.first, span.last), span.hi + self.before + self.after
        row = torch.arange(g, device=self.codes.device).view(g, 1, 1, 1) * t
        return self.tokens[:, here, span.lo : span.hi].clamp(min=0) + row, self.wide[:, here, span.lo : hi].clamp(min=0) + row

    def slots(self, spans: Sequence[_Span]) -> Tensor:
        """Where in the results of all spans, one after the other, those of each token are: [G, R, T]."""
        g, r, _ = self.rank.shape
        base, per_row = self.rank.new_empty(2, r, self.chunks).unbind(0)
        start = 0
        for span in spans:
            rounds, n = span.last - span.first, span.hi - span.lo
            here = torch.arange(rounds * n, device=base.device).view(rounds, n)
            base[span.first : span.last, span.lo : span.hi] = start + here * self.size
            per_row[span.first : span.last, span.lo : span.hi] = rounds * n * self.size
            start += g * rounds * n * self.size
        chunk = torch.div(self.rank, self.size, rounding_mode="floor")
        base, per_row = (x.expand(g, -1, -1).gather(-1, chunk) for x in (base, per_row))
        return base + torch.arange(g, device=base.device).view(g, 1, 1) * per_row + self.rank % self.size

    def regular(self, causal: Causal) -> bool:
        """Whether the rule is "all other tokens of the chunks", no token is without any, and most chunks have no special key."""
        few = self.chunks <= 2 * (self.before + self.after + 1)
        filled = self.codes.shape[-1] % self.size == 0 or self.before
        return self.rule == "trax" and not causal and bool(filled) and self.size > 1 and not few

    def spans(self) -> list[_Span]:
        """What `regular` rounds fall into: the inner chunks, in pieces that stay in cache, and the ends, which see padding or, on
        the ring, perhaps a token twice."""
        g, r, t = self.codes.shape
        lo, hi = self.before, self.chunks - self.after - bool(t % self.size)
        count = max(1, _PIECE // (g * self.size**2 * (1 + self.before + self.after)))
        if count >= r * (hi - lo):
            inner = [_Span(0, r, lo, hi, plain=True)]
        else:
            starts = [(i, at) for i in range(r) for at in range(lo, hi, count)]
            inner = [_Span(i, i + 1, at, min(at + count, hi), plain=True) for i, at in starts]
        return [*inner, *(_Span(0, r, *ends) for ends in ((0, lo), (hi, self.chunks)) if ends[0] < ends[1])]

    def seen(self, span: _Span) -> Tensor:
        """bool [1 | G * R * chunks, size, keys] of a span of `regular` rounds."""
        if span.plain:
            keys = torch.arange(-self.before * self.size, (1 + self.after) * self.size, device=self.codes.device)
            return (keys != torch.arange(self.size, device=keys.device)[:, None])[None]
        here, hi = slice(span.first, span.last), span.hi + self.before + self.after
        keys = self.windows(self.wide[:, here, span.lo : hi], span.hi - span.lo)[..., None, :]
        return ((keys != self.tokens[:, here, span.lo : span.hi, :, None]) & (keys >= 0)).flatten(0, 2)

    def allowed(self, causal: Causal, window: int, own: Own) -> Tensor:
        """bool [G, R, chunks, size, keys]."""
        return self.trax(causal) if self.rule == "trax" else self.paper(causal, window, own)

    def trax(self, causal: Causal) -> Tensor:
        """bool [G, R, chunks, size, keys]: every other token of the chunks."""
        q, k = self.tokens.int()[..., None], self.around(self.tokens).int()[..., None, :]
        allowed = (k < q if causal else k != q) & (k >= 0)
        alone = ~allowed.any(-1).flatten(2).gather(-1, self.rank)
        self._admit(allowed, alone.all(1))
        return allowed

    def _admit(self, allowed: Tensor, alone: Tensor) -> None:
        """Tokens that see no other in any round, bool [G, T], see themselves in the first one of `allowed` [G, R, chunks, size,
        keys]."""
        own = allowed[:, 0, ..., self.before * self.size :].diagonal(dim1=-2, dim2=-1)
        here = self.tokens[:, 0]
        own |= alone.gather(-1, here.clamp(min=0).flatten(1)).view_as(here) & (here >= 0)

    def paper(self, causal: Causal, window: int, own: Own) -> Tensor:
        """bool [G, R, chunks, size, keys]: tokens of the query's bucket inside its window, unless an earlier round has them.

        What a query may see in a round is a range of the sorted list: its bucket, cut to the window.
        """
        codes = self.codes.gather(-1, self.order)
        at = torch.arange(codes.shape[-1], device=codes.device).expand_as(codes)
        lo, hi = (torch.searchsorted(codes, codes, right=side, out_int32=True) for side in (False, True))
        if causal is True:
            lo = torch.maximum(lo, at - window + (own == "always"))
            hi = at + (own == "always")
        else:
            own_chunk = torch.div(at, self.size, rounding_mode="floor")
            lo = torch.maximum(lo, (own_chunk - self.before) * self.size)
            hi = at if causal else torch.minimum(hi, (own_chunk + self.after + 1) * self.size)
        place = torch.stack([at, lo, hi]).int().gather(-1, self.rank.expand(3, *codes.shape))  # by token, no longer by rank
        keys = self.windows(self.wide, self.chunks)
        rounds = []
        for r in range(self.codes.shape[1]):
            here = slice(r, r + 1)
            fresh = self._found(place[:, :, r], here)
            for other in range(r):
                fresh &= ~self._found(place[:, :, other], here)
            if not causal:
                fresh &= self.tokens[:, here].int()[..., None] != keys[:, here].int()[..., None, :]
            if not r:
                self._admit(fresh, (place[2] - place[1] <= (not causal)).all(1))
            rounds.append(fresh)
        return torch.cat(rounds, dim=1)

    def _found(self, place: Tensor, rounds: slice) -> Tensor:
        """Which pairs of the chunks of `rounds` one round sees; place [3, G, T]: rank, first and end of the range there."""
        tokens = self.tokens[:, rounds]
        rank, lo, hi = (x.gather(-1, tokens.clamp(min=0).flatten(1)).view_as(tokens) for x in place)
        rank = self.around(rank.masked_fill(tokens < 0, -1))[..., None, :]
        return (rank >= lo[..., None]) & (rank < hi[..., None])


def lsh_attention_after(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hashes: Tensor,
    *,
    window: int,
    own: Own = "last",
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """`lsh_attention(causal=True)` for the last tokens alone: q [Tq, H, D] are the newest of k, v [T, H, D], hashes [T, H, R].

    window = before * chunk. -> [Tq, H, D]. Cost: Tq T (R + 4 D) per head; memory 64 T numbers per head.
    """
    first = k.shape[0] - q.shape[0]
    outs = []
    for at in range(0, q.shape[0], _STEP):
        queries = torch.arange(first + at, first + min(at + _STEP, q.shape[0]), device=q.device)
        earlier = torch.arange(k.shape[0], device=q.device) < queries[:, None] + (own == "always")
        same = (hashes[queries][:, None] == hashes) & earlier[..., None, None]  # [tq, T, H, R]
        near = same.flip(1).cumsum(1, dtype=torch.int32).flip(1) <= window
        allowed = (same & near).any(-1).permute(2, 0, 1)
        bias = RelativeBias.dense(torch.where(allowed, 0.0, -torch.inf)[None])
        out, aux = attention(
            q[None, queries - first], k[None], v[None], score_mod=bias, scale=scale, impl=impl, return_aux=AuxRequest(lse=True)
        )
        assert aux.lse is not None
        outs.append(torch.where((aux.lse == -torch.inf)[..., None], v[None, queries], out)[0])
    return torch.cat(outs)


def _check(
    q: Tensor, k: Tensor, v: Tensor, hashes: Tensor, chunk: int, before: int, after: int, causal: object, rule: str, own: str
) -> None:
    options = f"chunk={chunk}, before={before}, after={after}, causal={causal!r}, rule={rule!r}, own={own!r}"
    call = f"lsh_attention({describe(q=q, k=k, v=v, hashes=hashes)}, {options})"
    if q.ndim != 4 or not q.shape == k.shape == v.shape or hashes.ndim != 4 or hashes.shape[:3] != q.shape[:3]:
        raise ShapeError(f"{call}: q, k and v must be [B, T, H, D], hashes [B, T, H, rounds]")
    if not hashes.shape[3]:
        raise ShapeError(f"{call}: needs at least one round of hashes")
    wrong = wrong_window(chunk, before, after, causal, rule)
    if wrong is None and (own not in ("last", "always") or (own == "always" and causal is not True)):
        wrong = "own must be 'last', or 'always' with causal=True"
    if wrong:
        raise OptionError(f"{call}: {wrong}")


def wrong_window(chunk: int, before: int, after: int, causal: object, rule: str) -> str | None:
    """What is wrong with the options of a window; None = nothing."""
    if chunk < 1 or before < 0 or after < 0:
        return "chunk must be at least 1, before and after at least 0"
    if rule not in ("paper", "trax") or causal not in (False, True, "content-leaks"):
        return "rule must be 'paper' or 'trax', causal False, True or 'content-leaks'"
    if causal is not True:
        return None
    if rule == "trax":
        return (
            "rule 'trax' looks at neighbouring buckets, and which tokens stand at their edge depends on later tokens: it cannot "
            "be causal. causal='content-leaks' is the published language model, which leaks"
        )
    return "causal=True looks back only: before must be at least 1, after 0" if before < 1 or after else None
