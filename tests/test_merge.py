"""Partial results joined by their log-sum-exp are the result over all keys, forwards and backwards."""

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attlas.errors import ShapeError
from attlas.masks import Causal, Grid, Window
from attlas.ops import merge
from attlas.ops.call import make_call
from attlas.ops.select import run_call
from attlas.scores import Alibi
from attlas.testing.budget import assert_same

F64 = torch.float64


def tensors(tq=17, tk=43, dtype=F64) -> tuple[Tensor, ...]:
    shapes = ((2, tq, 6, 5), (2, tk, 3, 5), (2, tk, 3, 7))
    return tuple(torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)


def over(q, k, v, a, b, *, impl="blocked", **options):
    """(out, lse) over keys a ... b-1 alone."""
    first = k.shape[1] - q.shape[1]
    grid = Grid.at(range(first, k.shape[1]), range(a, b))
    return run_call(make_call(q, k[:, a:b], v[:, a:b], grid=grid, need_lse=True, **options), impl)


def loss(out: Tensor, lse: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=g, dtype=F64).to(x.dtype) for x in (out, lse)]
    return (out * weights[0]).sum() + (torch.where(lse.isfinite(), lse, 0.0) * weights[1]).sum()


@pytest.mark.parametrize("impl", ["blocked", "reference"])
@pytest.mark.parametrize("cuts", [(0, 43), (0, 13, 43), (0, 1, 2, 30, 41, 43), (0, 13, 13, 43), (0, 0, 43, 43)])
@pytest.mark.parametrize("mask", [None, Causal(), Causal() & Window.last(5), Window(3, 0) & ~Window(1, 0)])
def test_split_and_merge_is_the_whole(cuts, mask, impl):
    q, k, v = tensors()
    options = {"mask": mask, "score_mod": Alibi(torch.rand(6, dtype=F64)), "impl": impl}
    whole = over(q, k, v, 0, 43, **options)
    parts = [over(q, k, v, a, b, **options) for a, b in itertools.pairwise(cuts)]
    joined = merge(parts)
    empty = whole[1] == -math.inf
    assert torch.equal(joined[1] == -math.inf, empty)
    assert_same(joined[0], whole[0], "out")
    assert_same(joined[1].masked_fill(empty, 0.0), whole[1].masked_fill(empty, 0.0), "lse")
    for got, want in zip(
        torch.autograd.grad(loss(*joined), (q, k, v)), torch.autograd.grad(loss(*whole), (q, k, v)), strict=True
    ):
        assert_same(got, want, "gradient")


def test_a_sink_belongs_to_one_part():
    q, k, v = tensors()
    sink = torch.randn(6, dtype=F64, requires_grad=True)
    whole = over(q, k, v, 0, 43, sink=sink)
    joined = merge([over(q, k, v, 0, 29, sink=sink), over(q, k, v, 29, 43)])
    assert_same(joined[0], whole[0], "out")
    assert_same(joined[1], whole[1], "lse")
    (got,), (want,) = (torch.autograd.grad(loss(*x), sink) for x in (joined, whole))
    assert_same(got, want, "gradient of the sink")


@given(st.lists(st.lists(st.floats(-600, 600) | st.just(-math.inf), min_size=3, max_size=3), min_size=1, max_size=7))
@settings(max_examples=60)
def test_merge_is_the_literal_sum_in_any_order(rows):
    lses = [torch.tensor(r, dtype=F64) for r in rows]
    outs = [torch.randn(3, 2, dtype=F64).masked_fill((l == -math.inf)[:, None], 0.0) for l in lses]
    out, lse = merge(list(zip(outs, lses, strict=True)))
    back, lse_back = merge(list(zip(outs[::-1], lses[::-1], strict=True)))
    assert torch.allclose(out, back, rtol=1e-12, atol=1e-12) and torch.allclose(lse, lse_back, rtol=1e-12)
    for i in range(3):
        top = max(float(l[i]) for l in lses)
        if top == -math.inf:
            assert lse[i] == -math.inf and not out[i].any()
            continue
        weights = [math.exp(float(l[i]) - top) for l in lses]
        assert math.isclose(lse[i], top + math.log(sum(weights)), rel_tol=1e-12, abs_tol=1e-12)
        want = sum(w * o[i] for w, o in zip(weights, outs, strict=True)) / sum(weights)
        assert torch.allclose(out[i], want, rtol=1e-12, atol=1e-12)


def test_merge_nests():
    parts = [(torch.randn(5, 3, 2, dtype=F64), torch.randn(5, 3, dtype=F64) * 9) for _ in range(5)]
    flat = merge(parts)
    nested = merge([merge(parts[:2]), merge([merge(parts[2:3]), *parts[3:]])])
    assert_same(nested[0], flat[0], "out")
    assert_same(nested[1], flat[1], "lse")


def test_empty_parts_are_not_read_and_get_no_gradient():
    out = [torch.randn(5, 3, 2, dtype=F64, requires_grad=True), torch.full((5, 3, 2), math.nan, dtype=F64, requires_grad=True)]
    lse = [torch.randn(5, 3, dtype=F64), torch.full((5, 3), -math.inf, dtype=F64, requires_grad=True)]
    lse[0][2] = -math.inf
    lse[0].requires_grad_()
    merged, total = merge(list(zip(out, lse, strict=True)))
    live = torch.arange(5) != 2
    assert_same(merged[live], out[0].detach()[live], "out")
    assert not merged[2].any() and (total[2] == -math.inf).all()
    loss(merged, total).backward()
    for x in (*out, *lse):
        assert x.grad.isfinite().all()
        assert not x.grad[2].any()
    assert not out[1].grad.any() and not lse[1].grad.any() and out[0].grad[live].all()


def test_gradients_numerically():
    parts = [
        (torch.randn(3, 2, 2, dtype=F64, requires_grad=True), torch.randn(3, 2, dtype=F64, requires_grad=True)) for _ in range(3)
    ]
    flat = [x for part in parts for x in part]

    def joined(*xs: Tensor) -> tuple[Tensor, Tensor]:
        return merge(list(zip(xs[::2], xs[1::2], strict=True)))

    assert torch.autograd.gradcheck(joined, flat) and torch.autograd.gradgradcheck(joined, flat)


def test_large_parts_give_the_bits_of_small_ones(monkeypatch):
    """Beyond a size no copies are kept for the gradient: the same out, the same first gradients to the bit, the same second ones,
    with rows that are empty in one part, whose out is NaN there, and rows that are empty in all."""
    found = []
    for small in (1 << 16, 0):
        monkeypatch.setattr(sys.modules["attlas.ops.merge"], "_SMALL", small)
        torch.manual_seed(3)
        outs, lses = ([torch.randn(*shape, dtype=F64) for _ in range(3)] for shape in ((11, 7, 5), (11, 7)))
        lses[0][:4], lses[1][2:6], lses[2][3:5] = -math.inf, -math.inf, -math.inf
        outs[0][:4] = math.nan
        leaves = [x.requires_grad_() for x in (*outs, *lses)]
        joined = merge(list(zip(outs, lses, strict=True)))
        first = torch.autograd.grad(loss(*joined), leaves, retain_graph=True)
        again = torch.autograd.grad(loss(joined[0].sin(), joined[1]), leaves, create_graph=True)
        assert all(x.isfinite().all() for x in again)
        second = torch.autograd.grad(sum(x.square().sum() for x in again), leaves)
        found.append((joined[0], *first, second))
    *plain, plain_second = found[0]
    *large, large_second = found[1]
    assert all(torch.equal(a, b) for a, b in zip(plain, large, strict=True))
    for got, want in zip(large_second, plain_second, strict=True):
        assert_same(got, want, "second gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_fp32_whatever_the_outputs_are(dtype):
    """1000 equal parts: rounding of weights or of running sums in 16 bits would show."""
    value = torch.randn(3, 2, 5).to(dtype)
    out, lse = merge([(value, torch.full((3, 2), 3.0))] * 1000)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.allclose(out.float(), value.float(), rtol=max(2 * torch.finfo(dtype).eps, 1e-5), atol=0)
    assert torch.allclose(lse, torch.tensor(3.0 + math.log(1000)))


A = (torch.zeros(2, 3, 5), torch.zeros(2, 3))


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [A, (torch.zeros(2, 3, 7), torch.zeros(2, 3))],
        [A, (torch.zeros(2, 3, 5, dtype=F64), torch.zeros(2, 3))],
        [A, (torch.zeros(2, 3, 5), torch.zeros(3, 2))],
        [A, (torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64))],
        [A, (torch.zeros(2, 3, 5, device="meta"), torch.zeros(2, 3, device="meta"))],
    ],
)
def test_parts_that_do_not_fit_are_refused(parts):
    with pytest.raises(ShapeError, match=r"merge\(\["):
        merge(parts)
