"""Hierarchical, axial, memory-compressed, Synthesizer and lambda mixers against loops over tokens that were written from the
papers' equations: outputs and every gradient, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from same_weights import EXACT, close, inputs, lively
from torch import Tensor, nn
from torch.nn import functional

from attlas.catalogue.index import build

DIM, HEADS, HEAD = 22, 2, 6


def must_agree(mine: nn.Module, loops: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Outputs, and gradients of the input and of every parameter."""
    found = []
    for run in (mine, loops):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        probe = inputs(*y.shape, seed=9)
        wanted = [leaf, *mine.parameters()]
        found.append([y, *torch.autograd.grad((y * probe).sum(), wanted)])
    for got, want in zip(*found, strict=True):
        close(got, want, EXACT)
    assert all(g.abs().max() > 1e-6 for g in found[0])


def projected(mine: Any, x: Tensor, *names: str) -> list[Tensor]:
    """[B, T, dim] -> [B, T, H, D] for each projection."""
    return [getattr(mine, f"{name}_proj")(x).unflatten(-1, (HEADS, HEAD)) for name in names]


def per_head(weigh: Callable[[int, int], Tensor], x: Tensor, mine: Any) -> Tensor:
    """weigh(row, head) -> [T, D]; put side by side and through the output projection."""
    rows = [torch.cat([weigh(b, h) for h in range(HEADS)], -1) for b in range(len(x))]
    return mine.o_proj(torch.stack(rows))


# ---- hierarchical -----------------------------------------------------------------------------------------------------------


def groups_of(i: int, length: int, block: int, causal: bool) -> list[tuple[int, int, int]]:
    """(level, first, end) of the groups that token i attends to: every level's neighbouring blocks, without what is covered."""
    covered, level, found = set(), 0, []
    while len(covered) < (i + 1 if causal else length):
        size, width = 2**level, block * 2**level
        own = i // width
        for first in range((own - 1) * width, (own + (1 if causal else 2)) * width, size):
            tokens = set(range(max(first, 0), min(first + size, length)))
            if not tokens or tokens <= covered or (causal and max(tokens) > i):
                continue
            assert not tokens & covered, "a group is covered as a whole or not at all"
            found.append((level, min(tokens), max(tokens) + 1))
            covered |= tokens
        level += 1
    assert not causal or max(covered) <= i
    return found


@pytest.mark.parametrize("length", [1, 5, 32, 61])
@pytest.mark.parametrize(("causal", "coarse"), [(True, False), (False, False), (False, True)])
def test_hierarchical(causal: bool, coarse: bool, length: int):
    options = {"block": 4, "head_dim": HEAD, "rope": False, "bias": True}
    mine = lively(build("hierarchical", DIM, HEADS, causal=causal, coarse_queries=coarse, **options))
    x = inputs(2, length, DIM) * 0.5

    def loops(x: Tensor) -> Tensor:
        q, k, v = projected(mine, x, "q", "k", "v")

        def one(b: int, h: int) -> Tensor:
            rows = []
            for i in range(length):
                top, bottom = 0.0, 0.0
                for level, first, end in groups_of(i, length, 4, causal):
                    start = i >> level << level
                    asking = q[b, start : start + 2**level, h].mean(0) if coarse else q[b, i, h]
                    weight = torch.exp(asking @ k[b, first:end, h].mean(0) / math.sqrt(HEAD))
                    top, bottom = top + weight * v[b, first:end, h].sum(0), bottom + weight * (end - first)
                rows.append(top / bottom)
            return torch.stack(rows)

        return per_head(one, x, mine)

    if length == 1:  # one key: nothing depends on the scores
        torch.testing.assert_close(mine(x), loops(x), atol=EXACT, rtol=0)
    else:
        without = mine.k_proj.bias  # moves all scores of a query alike
        without.requires_grad_(False)
        mine.parameters = lambda: (p for p in nn.Module.parameters(mine) if p is not without)  # type: ignore[method-assign]
        must_agree(mine, loops, x)


# ---- axial ------------------------------------------------------------------------------------------------------------------


def line_attention(stage: Any, x: Tensor, causal: bool) -> Tensor:
    """x [..., n, dim] along its last axis but one, by torch's own attention."""
    q, k, v = (p(x).unflatten(-1, (HEADS, HEAD)).transpose(-2, -3) for p in (stage.q_proj, stage.k_proj, stage.v_proj))
    return stage.o_proj(functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(-2, -3).flatten(-2))


def along(stage: Any, x: Tensor, axis: int, causal: bool) -> Tensor:
    """x [B, n_1, ..., n_k, dim] along grid axis `axis`."""
    return line_attention(stage, x.movedim(axis + 1, -2), causal).movedim(-2, axis + 1)


@pytest.mark.parametrize("combine", ["sequence", "sum"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 2)])
def test_axial(shape: tuple[int, ...], causal: bool, combine: str):
    mine = lively(build("axial", DIM, HEADS, shape=shape, combine=combine, causal=causal, head_dim=HEAD, rope=False))

    def loops(x: Tensor) -> Tensor:
        grid = x.unflatten(1, shape)
        axes = list(zip(reversed(range(len(shape))), mine.axes, strict=True))
        if combine == "sum":
            return sum(along(stage, grid, axis, causal) for axis, stage in axes).flatten(1, -2)
        for axis, stage in axes:
            grid = along(stage, grid, axis, causal)
        return grid.flatten(1, -2)

    must_agree(mine, loops, inputs(2, math.prod(shape), DIM) * 0.5)


def test_axial_shifted():
    mine = lively(build("axial", DIM, HEADS, shape=(5, 7), combine="shifted", causal=True, head_dim=HEAD, rope=False))
    whole, columns, row = mine.axes

    def loops(x: Tensor) -> Tensor:
        grid = x.unflatten(1, (5, 7))
        above = along(columns, along(whole, grid, 1, False), 0, True)
        shifted = torch.cat([torch.zeros_like(above[:, :1]), above[:, :-1]], 1)
        return along(row, grid + shifted, 1, True).flatten(1, 2)

    must_agree(mine, loops, inputs(2, 35, DIM) * 0.5)


# ---- memory-compressed ------------------------------------------------------------------------------------------------------


def entry(conv: nn.Conv1d, tokens: Tensor) -> Tensor:
    """tokens [factor, channels] -> [channels], tap by tap and channel by channel of each group."""
    assert conv.bias is not None
    outputs, per_group = conv.weight.shape[0], conv.weight.shape[1]
    groups = outputs // per_group
    step = outputs // groups
    return torch.stack([
        conv.bias[o]
        + sum(conv.weight[o, :, i] @ tokens[i, o // step * per_group : (o // step + 1) * per_group] for i in range(len(tokens)))
        for o in range(outputs)
    ])  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"start": "first", "strict": True},
        {"start": "null", "per_head": True},
        {"start": "none"},
        {"start": "none", "causal": False},
        {"start": "first", "causal": False, "factor": 2},
    ],
)
def test_memory_compressed(options: dict[str, Any]):
    mine = lively(build("memory-compressed", DIM, HEADS, head_dim=HEAD, **options))
    factor, length, inner = mine.factor, 11, HEADS * HEAD

    def loops(x: Tensor) -> Tensor:
        q, k, v = (getattr(mine, f"{n}_proj")(x) for n in "qkv")
        seen: list[list[Any]] = []
        for b in range(len(x)):
            pairs: list[Any] = []
            if mine.start != "none":
                first = (mine.null_k.flatten(), mine.null_v.flatten()) if mine.start == "null" else (k[b, 0], v[b, 0])
                pairs.append((-1, *first))
            for end in range(factor, length + 1 if mine.causal else length + factor, factor):
                tokens = [torch.cat([t[b], t.new_zeros(factor, inner)])[end - factor : end] for t in (k, v)]
                visible = end - 1 + mine.lag if mine.causal else -1
                pairs.append((visible, entry(mine.k_conv, tokens[0]), entry(mine.v_conv, tokens[1])))
            seen.append(pairs)

        def one(b: int, h: int) -> Tensor:
            mine_of = slice(h * HEAD, (h + 1) * HEAD)
            rows = []
            for t in range(length):
                now = [(key[mine_of], value[mine_of]) for visible, key, value in seen[b] if visible <= t]
                weights = [torch.exp(q[b, t, mine_of] @ key / math.sqrt(HEAD)) for key, _ in now]
                out = sum((w * value for w, (_, value) in zip(weights, now, strict=True)), q.new_zeros(HEAD))
                rows.append(out / sum(weights) if weights else out)
            return torch.stack(rows)

        return per_head(one, x, mine)

    x = inputs(2, length, DIM) * 0.5
    if mine.start == "none":  # then a bias of all keys cancels
        mine.k_conv.bias.requires_grad_(False)
        mine.parameters = lambda: (p for p in nn.Module.parameters(mine) if p is not mine.k_conv.bias)
    must_agree(mine, loops, x)


# ---- synthesizer ------------------------------------------------------------------------------------------------------------


def two_layers(layers: Any, x: Tensor, h: int) -> Tensor:
    """The outputs of one head for one token."""
    width = layers.weight.shape[2]
    hidden = (layers.first.weight[h * width : (h + 1) * width] @ x + layers.first.bias[h * width : (h + 1) * width]).clamp(min=0)
    return layers.weight[:, h] @ hidden + layers.bias[:, h]


def synthesized(mine: Any, kind: str, x: Tensor, i: int, j: int, h: int) -> Tensor:
    """One score of one sequence x [T, dim]."""
    if kind == "dense":
        return two_layers(mine.dense, x[i], h)[j]
    if kind == "factorised-dense":
        b = mine.sides[1]
        return two_layers(mine.dense_a, x[i], h)[j // b] * two_layers(mine.dense_b, x[i], h)[j % b]
    if kind == "random":
        return mine.R[h, i, j]
    if kind == "fixed-random":
        return mine.R_fixed[h, i, j]
    if kind == "factorised-random":
        return mine.R1[i, h] @ mine.R2[j, h]
    q, k = (p(x).unflatten(-1, (HEADS, HEAD))[:, h] for p in (mine.q_proj, mine.k_proj))
    return q[i] @ k[j] * (1 / math.sqrt(HEAD) if mine.combine == "shares" else 1.0)


KINDS = ["dense", "factorised-dense", "random", "fixed-random", "factorised-random", ("random", "dot-product", "dense")]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("kinds", "options"), [*((kinds, {}) for kinds in KINDS), (("random", "dot-product"), {"combine": "sum", "scale": 1.0})]
)
def test_synthesizer(kinds: Any, options: dict[str, Any], causal: bool):
    mine = lively(build("synthesizer", DIM, HEADS, max_len=11, kinds=kinds, causal=causal, head_dim=HEAD, **options))
    length = 7

    def loops(x: Tensor) -> Tensor:
        (v,) = projected(mine, x, "v")
        logits = [] if mine.mix_logits is None else list(mine.mix_logits.exp())
        shares = [a / sum(logits) for a in logits] or [1.0] * len(mine.kinds)

        def one(b: int, h: int) -> Tensor:
            rows = []
            for i in range(length):
                keys = range(i + 1 if causal else length)
                scores = [
                    sum(a * synthesized(mine, kind, x[b], i, j, h) for a, kind in zip(shares, mine.kinds, strict=True))
                    for j in keys
                ]
                weights = [torch.exp(torch.as_tensor(s)) for s in scores]
                rows.append(sum(w * v[b, j, h] for w, j in zip(weights, keys, strict=True)) / sum(weights))
            return torch.stack(rows)

        return per_head(one, x, mine)

    must_agree(mine, loops, inputs(2, length, DIM) * 0.5)


# ---- lambda -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("causal", "norm", "scope"), [(False, True, 5), (False, False, 27), (True, False, 4)])
def test_lambda(causal: bool, norm: bool, scope: int):
    mine = lively(build("lambda", DIM, HEADS, dim_k=3, dim_u=2, scope=scope, causal=causal, norm=norm))
    length, wide = 13, DIM // HEADS
    if norm:
        for n, m in enumerate((mine.q_norm, mine.v_norm)):
            m.running_mean.copy_(inputs(len(m.running_mean), seed=n))
            m.running_var.copy_(inputs(len(m.running_var), seed=n + 5).square() + 0.5)

    def loops(x: Tensor) -> Tensor:
        q, k, v = mine.q_proj(x), mine.k_proj(x), mine.v_proj(x)
        if norm:
            q, v = (
                (t - m.running_mean) / (m.running_var + m.eps).sqrt() * m.weight + m.bias
                for t, m in ((q, mine.q_norm), (v, mine.v_norm))
            )
        back = scope - 1 if causal else scope // 2
        rows = []
        for b in range(len(x)):
            for n in range(length):
                context = range(n + 1 if causal else length)
                total = x.new_zeros(3, wide)
                for u in range(2):
                    keys = [k[b, m, u * 3 : u * 3 + 3].exp() for m in context]
                    for m in context:
                        value = v[b, m, u * wide : (u + 1) * wide]
                        total = total + torch.outer(keys[m] / sum(keys), value)
                        if m - n + back in range(scope):
                            total = total + torch.outer(mine.E[m - n + back, :, u], value)
                rows.append(torch.cat([total.T @ q[b, n, h * 3 : h * 3 + 3] for h in range(HEADS)]))
        return torch.stack(rows).view(len(x), length, DIM)

    must_agree(mine, loops, inputs(2, length, DIM) * 0.5)
