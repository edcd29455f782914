"""CASTLE against the package `lookahead-keys-attention` with the same weights; its window and interleaved heads, for which there
is no package, against loops over scalars and vectors written from the papers' equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from same_weights import EXACT, Pair, inputs, lively
from torch import Tensor

from attlas.catalogue.index import build
from attlas.positions.rope import Rope

DIM, HEADS, WIDTH = 22, 3, 6
NAMES = ("ahead_q_proj", "ahead_k_proj", "ahead_v_proj", "q_proj", "k_proj", "v_proj")


def castle(rotary: bool) -> Any:
    from lookahead_keys_attention import Castle

    theirs = lively(Castle(dim=DIM, heads=HEADS, dim_head=WIDTH, use_triton=False, rotary_emb=rotary))
    if rotary:  # their frequencies are a parameter: back to the usual ones
        theirs.rotary_emb.freqs.data.copy_(Rope(WIDTH).inverse_frequencies())
    return theirs


def pair_with(theirs: Any, rotary: bool) -> Pair:
    mine = build("castle", DIM, HEADS, head_dim=WIDTH, rope=Rope(WIDTH, interleaved=True) if rotary else False)
    pair = Pair(mine).linear(theirs.to_all_qkv, *NAMES, convert=lambda w: w.chunk(6))
    pair.linear(theirs.combine_heads, "o_proj")
    return pair


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("length", [3, 71])
def test_castle(rotary: bool, length: int):
    theirs = castle(rotary)
    pair = pair_with(theirs, rotary)
    run = lambda x: theirs(x, return_next_cache=False)  # noqa: E731
    pair.must_agree(run, pair.mine, inputs(2, length, DIM), atol=EXACT)


def test_castle_decoding():
    theirs = castle(False)
    mine = pair_with(theirs, False).mine
    x, cache, held = inputs(2, 31, DIM), mine.new_cache(rows=2), None
    for token in x.split(1, dim=1):
        want, held = theirs(token, cache=held)
        torch.testing.assert_close(mine(token, cache=cache), want, atol=EXACT, rtol=0)
    gathered = torch.stack([cache.parts[1].read(row).tensors[0] for row in (0, 1)])
    torch.testing.assert_close(gathered.transpose(1, 2), held.U, atol=EXACT, rtol=0)


# ---- from the equations ----------------------------------------------------------------------------------------------------


def heads_of(x: Tensor, projection: Any, heads: int) -> list[list[Tensor]]:
    """[head][token] -> vector."""
    return [[row.chunk(heads)[h] for row in projection(x)] for h in range(heads)]


def softmax_sum(scores: list[Tensor], values: list[Tensor]) -> Tensor:
    weights = [s.exp() for s in scores]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("window", [1, 2, 4, 50])
def test_castle_with_a_window(window: int):
    """The keys of every step are summed up from their definition."""
    mine = lively(build("castle-swl", DIM, HEADS, head_dim=WIDTH, window=window, rope=False))
    x, rows = inputs(1, 9, DIM), []
    with torch.no_grad():
        qu, ku, vu, q, k, v = (heads_of(x[0], getattr(mine, name), HEADS) for name in NAMES)
        for t in range(9):
            outs = []
            for h in range(HEADS):
                scores = []
                for s in range(t + 1):
                    u = torch.zeros(WIDTH, dtype=torch.float64)
                    for j in range(s + 1, min(t, s + window) + 1):
                        u = u + vu[h][j] / (1 + math.exp(-float(qu[h][s] @ ku[h][j]) / WIDTH**0.5))
                    ahead = float(q[h][t] @ u) / WIDTH**0.5
                    scores.append(q[h][t] @ k[h][s] / WIDTH**0.5 - ahead / (1 + math.exp(-ahead)))
                outs.append(softmax_sum(scores, v[h][: t + 1]))
            rows.append(mine.o_proj(torch.cat(outs)))
        torch.testing.assert_close(mine(x)[0], torch.stack(rows), atol=EXACT, rtol=0)


def turned(x: Tensor, place: int) -> Tensor:
    """The pairs (i, i + width / 2) as complex numbers, times exp(i place f)."""
    half = len(x) // 2
    f = 10000.0 ** (-2 * torch.arange(half, dtype=torch.float64).float() / len(x)).double()
    z = torch.complex(x[:half], x[half:]) * torch.exp(1j * place * f)
    return torch.cat([z.real, z.imag])


def sees(order: Any, window: int | None, pseudo: int, n: int, p: int, m: int, r: int) -> bool:
    """Whether pseudo-query p of token n sees pseudo-key r of token m."""
    if order == "token":
        return m <= n and (window is None or n - m < window)
    if order is True:
        apart = (n * pseudo + p) - (m * pseudo + r)
        return apart >= 0 and (window is None or apart < window * pseudo)
    return True


CASES = [
    (True, None, "global"),
    (True, 2, "global"),
    ("token", None, "per-head"),
    ("token", 2, "global"),
    (False, None, "global"),
]


@pytest.mark.parametrize(("order", "window", "collapse"), CASES)
@pytest.mark.parametrize("rotary", [False, True])
def test_interleaved_heads(order: Any, window: int | None, collapse: Any, rotary: bool):
    P, N = 2, 5
    options = {"pseudo_heads": P, "causal": order, "window": window, "collapse": collapse, "rope": rotary}
    mine = lively(build("interleaved-head", DIM, HEADS, head_dim=WIDTH, **options))
    x, rows = inputs(1, N, DIM), []
    place = turned if rotary else (lambda vector, at: vector)
    with torch.no_grad():
        q, k, v = (heads_of(x[0], projection, HEADS) for projection in (mine.q_proj, mine.k_proj, mine.v_proj))

        def mixed(heads: list[list[Tensor]], alpha: Tensor, n: int, h: int, p: int) -> Tensor:
            return sum(alpha[m, h, p] * heads[m][n] for m in range(HEADS))

        for n in range(N):
            pseudo: dict[tuple[int, int], Tensor] = {}
            for h in range(HEADS):
                for p in range(P):
                    query = place(mixed(q, mine.alpha_q, n, h, p), n * P + p)
                    seen = [(m, r) for m in range(N) for r in range(P) if sees(order, window, P, n, p, m, r)]
                    keys = [place(mixed(k, mine.alpha_k, m, h, r), m * P + r) for m, r in seen]
                    values = [mixed(v, mine.alpha_v, m, h, r) for m, r in seen]
                    pseudo[h, p] = softmax_sum([query @ key / WIDTH**0.5 for key in keys], values)
            if collapse == "global":
                outs = [sum(mine.R[h, g, p] * pseudo[g, p] for g in range(HEADS) for p in range(P)) for h in range(HEADS)]
            else:
                outs = [sum(mine.R[h, p] * pseudo[h, p] for p in range(P)) for h in range(HEADS)]
            rows.append(mine.o_proj(torch.cat(outs)))
        torch.testing.assert_close(mine(x)[0], torch.stack(rows), atol=1e-9 if rotary else EXACT, rtol=0)
