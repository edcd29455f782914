"""The truth: the reference against a literal loop and torch; then every implementation against the reference in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention_cases import CASES, Case, evaluate, run
from attlas.errors import UnsupportedError
from attlas.masks import All, Causal, Window
from attlas.ops import attention
from attlas.ops.select import IMPLS
from attlas.reference import softmax as reference
from attlas.scores import Alibi
from attlas.shapes import AuxRequest
from attlas.testing.budget import assert_budget, assert_same

F64 = torch.float64


def test_reference_is_the_literal_sum():
    case = Case(tq=5, tk=7, heads=4, kv_heads=2, dim=3, dim_v=2)
    t = {n: x.detach() for n, x in case.tensors(F64).items()}
    allowed = torch.rand(2, 4, 5, 7) < 0.6
    allowed[1, 2, 3] = False
    sink, slopes = torch.randn(4, dtype=F64), torch.rand(4, dtype=F64)
    out, lse = reference.attention(**t, mask_bool=allowed, score_mod=Alibi(slopes), scale=0.4, sink=sink)
    bare, bare_lse = reference.attention(**t, mask_bool=allowed, scale=0.4)
    for b in range(2):
        for h in range(4):
            for i in range(5):
                keys = [j for j in range(7) if allowed[b, h, i, j]]
                dot = [float(t["q"][b, i, h] @ t["k"][b, j, h // 2]) * 0.4 for j in keys]
                bias = [d - float(slopes[h]) * abs(i + 2 - j) for d, j in zip(dot, keys, strict=True)]
                for scores, extra, o, l in ((bias, [float(sink[h])], out, lse), (dot, [], bare, bare_lse)):
                    total = sum(math.exp(s) for s in scores + extra)
                    want = sum(
                        (math.exp(s) / total * t["v"][b, j, h // 2] for s, j in zip(scores, keys, strict=True)), torch.zeros(2)
                    )
                    assert torch.allclose(o[b, i, h], want.to(F64), rtol=1e-12, atol=1e-12)
                    assert l[b, i, h] == -math.inf if total == 0 else math.isclose(l[b, i, h], math.log(total), rel_tol=1e-12)


@pytest.mark.parametrize("tk", [67, 83, 41])
def test_causal_start_is_the_alignment_of_torch(tk):
    case = Case(tk=tk, dim_v=7)
    t = {n: x.detach() for n, x in case.tensors(F64).items()}
    want = F.scaled_dot_product_attention(*(t[n].transpose(1, 2) for n in "qkv"), is_causal=True, enable_gqa=True).transpose(1, 2)
    assert_same(attention(**t, mask=Causal(align="start"), impl="reference"), want, "reference")
    assert_same(attention(**t, mask=Causal(align="start"), impl="blocked"), want, "blocked")


def test_causal_is_aligned_to_the_end():
    case = Case(tk=83)
    t = {n: x.detach() for n, x in case.tensors(F64).items()}
    lower_right = torch.ones(67, 83, dtype=torch.bool).tril(83 - 67)
    heads_first = [x.transpose(1, 2) for x in t.values()]
    want = F.scaled_dot_product_attention(*heads_first, attn_mask=lower_right, enable_gqa=True).transpose(1, 2)
    for impl in ("blocked", "reference", "auto"):
        assert_same(attention(**t, mask=Causal(), impl=impl), want, impl)


def test_lse_is_that_of_torch_flash_attention():
    q, k, v = (torch.randn(2, 59, 3, 8) for _ in range(3))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
    for impl in ("blocked", "reference"):
        got, aux = attention(q, k, v, mask=Causal(), impl=impl, return_aux=AuxRequest(lse=True))
        assert torch.allclose(got, out.transpose(1, 2), atol=1e-5)
        assert torch.allclose(aux.lse, lse.transpose(1, 2), atol=1e-5)


@pytest.mark.parametrize("name", list(CASES))
def test_blocked_is_the_reference_in_fp64(name):
    case = CASES[name]
    got, want = (evaluate(case, impl, F64) for impl in ("blocked", "reference"))
    empty = want.lse == -math.inf
    assert torch.equal(got.lse == -math.inf, empty)
    assert not got.out[empty].any()
    assert_same(got.out, want.out, "out")
    assert_same(got.lse.masked_fill(empty, 0.0), want.lse.masked_fill(empty, 0.0), "lse")
    for n in want.grads:
        assert_same(got.grads[n], want.grads[n], f"gradient of {n}")
    with torch.no_grad():  # a path of its own for a few queries
        tensors = case.tensors(F64)
        out, lse = run(case, tensors, "blocked")
        assert_same(out, want.out, "out without gradients")
        assert_same(lse.masked_fill(empty, 0.0), want.lse.masked_fill(empty, 0.0), "lse without gradients")
        assert_same(run(case, tensors, "blocked", lse=False)[0], want.out, "out alone")


SDPA_CASES = (
    "all",
    "more keys",
    "no keys",
    "no queries",
    "empty batch",
    "one head",
    "one key head",
    "causal",
    "causal start",
    "scale",
)


@pytest.mark.parametrize("name", [*SDPA_CASES, "causal start fewer keys", "negative scale", "packed alike, plain", "one query"])
def test_sdpa_is_the_reference_in_fp64(name):
    case = {
        **CASES,
        "packed alike, plain": replace(CASES["packed alike"], score_mod=None, mask=None),
        "one query": Case(tq=1, tk=83, mask=Causal() & Window.last(97)),
    }[name]
    got, want = (evaluate(case, impl, F64, lse=False) for impl in ("sdpa", "reference"))
    assert_same(got.out, want.out, "out")
    for n in want.grads:
        assert_same(got.grads[n], want.grads[n], f"gradient of {n}")


BUDGET_CASES = ("causal", "window and first", "sink", "t5 decoder", "chain", "packed causal", "few, window", "by head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BUDGET_CASES)
def test_error_budget_of_blocked(name, dtype):
    within_budget(CASES[name], "blocked", dtype, lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "all", "one key head"])
def test_error_budget_of_sdpa(name, dtype):
    within_budget(replace(CASES[name], dim_v=7), "sdpa", dtype, lse=False)


def within_budget(case: Case, impl: str, dtype: torch.dtype, *, lse: bool) -> None:
    """Against fp64 on the same rounded inputs: at most twice the error of the plain computation in the same dtype.

    Three seeds are judged together: a single plain result can be right by luck, above all where a parameter's gradient is a sum
    of thousands of terms that cancel.
    """
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(3):
        seeded = replace(case, seed=seed)
        rounded = {n: t.detach() for n, t in seeded.tensors(dtype).items()}
        truth = evaluate(seeded, "reference", F64, like=rounded, lse=lse)
        got, plain = (evaluate(seeded, i, dtype, like=rounded, lse=lse) for i in (impl, "naive"))
        assert got.out.dtype == dtype and got.lse.dtype == torch.float32
        assert all(got.grads[n].dtype == rounded[n].dtype for n in rounded)
        found.setdefault("out", []).append((got.out, plain.out, truth.out))
        for n in truth.grads:
            found.setdefault(f"gradient of {n}", []).append((got.grads[n], plain.grads[n], truth.grads[n]))
    for what, results in found.items():
        assert_budget(*(torch.stack(column) for column in zip(*results, strict=True)), what)


def test_reference_is_twice_differentiable():
    case = Case(batch=1, tq=3, tk=5, heads=2, kv_heads=1, dim=2, dim_v=3)
    t = case.tensors(F64)
    sink = torch.randn(2, dtype=F64, requires_grad=True)
    allowed = torch.rand(3, 5) < 0.7
    allowed[1] = False

    def call(q, k, v, sink):
        out, lse = reference.attention(q, k, v, mask_bool=allowed, sink=sink, score_mod=Alibi(torch.tensor([0.1, 0.3])))
        return out, lse

    assert torch.autograd.gradcheck(call, (*t.values(), sink))
    assert torch.autograd.gradgradcheck(call, (*t.values(), sink))


def test_blocked_gradient_is_numerically_right():
    case = Case(batch=1, tq=5, tk=7, heads=2, kv_heads=1, dim=2, dim_v=3)
    t = case.tensors(F64)
    sink = torch.randn(2, dtype=F64, requires_grad=True)
    slopes = torch.rand(2, dtype=F64, requires_grad=True)

    def call(q, k, v, sink, slopes):
        options = {"mask": Window(1, 1), "sink": sink, "score_mod": Alibi(slopes), "impl": "blocked"}
        out, aux = attention(q, k, v, return_aux=AuxRequest(lse=True), **options)
        return out, aux.lse

    assert torch.autograd.gradcheck(call, (*t.values(), sink, slopes))


def test_blocked_refuses_a_second_derivative():
    q, k, v = (torch.randn(1, 5, 2, 3, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(attention(q, k, v, impl="blocked").square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="differentiated twice"):
        grad.sum().backward()


def test_every_implementation_has_a_name_of_its_own():
    names = [i.name for i in IMPLS["attention"]]
    assert len(set(names)) == len(names) and {"sdpa", "blocked", "reference"} <= set(names)
    assert names[-1] == "reference"
    assert All() == All()
