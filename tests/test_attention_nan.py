"""NaN or infinity in a key or value that is masked: no row that does not see it, and none of its gradients, may notice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attention_cases import CASES, Case, run
from attlas.errors import UnsupportedError
from attlas.masks import All, Causal, Grid
from attlas.ops import attention, explain

F64 = torch.float64


def seen_pairs(case: Case) -> Tensor:
    """bool [B, H, Tq, Tk] (packed: B = 1)."""
    grid = Grid.dense(case.tq, case.tk) if case.seq is None else Grid.packed(case.seq)
    seen = (All() if case.mask is None else case.mask).dense(grid)
    return seen.expand(1 if case.seq is not None else case.batch, case.heads, *seen.shape[-2:])


def gradients(case: Case, tensors: dict[str, Tensor], impl: str, weight: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    out, lse = run(case, tensors, impl)
    loss = (out * weight).sum() + (torch.where(lse.isfinite(), lse, 0.0) * weight[..., 0]).sum()
    grads = torch.autograd.grad(loss, list(tensors.values()))
    return out.detach(), lse.detach(), dict(zip(tensors, grads, strict=True))


def check_poison(case: Case, impl: str, where: list[int], what: str, bad: float) -> None:
    """Put `bad` at key rows `where` of "k", "v", "both" of them, or both in "one" head only.

    Compare everything that cannot depend on them with a run on finite numbers.
    """
    clean = case.tensors(F64)
    poisoned = {n: t.detach().clone() for n, t in clean.items()}
    for name in "kv" if what in ("both", "one") else what:
        if what == "one":  # of one key head, and of the first batch row
            (poisoned[name] if case.seq is not None else poisoned[name][0])[where, -1] = bad
        else:
            poisoned[name][..., where, :, :] = bad
    poisoned = {n: t.requires_grad_() for n, t in poisoned.items()}
    seen = seen_pairs(case)
    tainted = seen[..., where].any(-1)  # [B, H, Tq]: rows that see one
    if what == "one":
        tainted[1:] = False
        tainted[:, : -case.heads // case.kv_heads] = False
    keys_tainted = (seen & tainted[..., None]).any(-2)  # [B, H, Tk]: keys seen by such a row
    kv_tainted = keys_tainted.unflatten(1, (case.kv_heads, -1)).any(2)
    rows, keys = (~t.transpose(1, 2) for t in (tainted, kv_tainted))  # token-major
    if case.seq is not None:
        rows, keys = rows[0], keys[0]
    shape = (*clean["q"].shape[:-1], case.dim_v)
    weight = torch.randn(shape, dtype=F64) * rows[..., None]
    out, lse, grads = gradients(case, clean, impl, weight)
    out_bad, lse_bad, grads_bad = gradients(case, poisoned, impl, weight)
    same(out_bad[rows], out[rows], "out")
    same(lse_bad[rows], lse[rows], "lse")
    with torch.no_grad():
        out_only, lse_only = run(case, poisoned, impl)
        same(out_only[rows], out[rows], "out without gradients")
        same(lse_only[rows], lse[rows], "lse without gradients")
    same(grads_bad["q"][rows], grads["q"][rows], "gradient of q")
    same(grads_bad["k"][keys], grads["k"][keys], "gradient of k")
    same(grads_bad["v"][keys], grads["v"][keys], "gradient of v")
    if not tainted.any():
        for n in grads:
            same(grads_bad[n], grads[n], f"gradient of {n}")


def same(got: Tensor, want: Tensor, what: str) -> None:
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-10), f"{what}: {(got - want).abs().max()}"


NAN_CASES = (
    "all",
    "causal",
    "causal more keys",
    "window",
    "window and first",
    "prefix",
    "documents",
    "padding",
    "by head",
    "dense mask by row",
    "alibi",
    "chain",
    "prefix only, chain",
    "dense bias by row",
    "random with bias",
    "sink on empty rows",
    "packed causal",
    "packed few",
    "few, window",
    "few, padding",
    "few, by head",
)


@pytest.mark.parametrize("impl", ["blocked", "reference"])
@pytest.mark.parametrize(("what", "bad"), [("k", math.nan), ("v", math.inf), ("both", math.nan), ("one", math.nan)])
@pytest.mark.parametrize("name", NAN_CASES)
def test_poison_stays_where_it_is_seen(name, what, bad, impl):
    case = CASES[name]
    tk = case.tk if case.seq is None else case.seq.total_k
    check_poison(case, impl, [tk - 1, tk // 2 + 3], what, bad)


@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_rows_that_see_poison_show_it(impl):
    q, k, v = (torch.randn(1, 41, 2, 3) for _ in range(3))
    v[0, 23, 0, 1] = math.nan
    k[0, 37] = math.nan
    out = attention(q, k, v, mask=Causal(), impl=impl)
    assert out[:, :23].isfinite().all()
    assert out[:, 23:, 0, 1].isnan().all() and out[:, 23:37, 0, [0, 2]].isfinite().all()
    assert out[:, 23:37, 1].isfinite().all() and out[:, 37:].isnan().all()


@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_infinite_values_are_averaged_as_numbers(impl):
    q, k, v = (torch.randn(1, 41, 1, 3) for _ in range(3))
    v[0, 23, 0] = torch.tensor([math.inf, -math.inf, 1.0])
    out = attention(q, k, v, mask=Causal(), impl=impl)
    assert (out[0, 23:, 0, 0] == math.inf).all() and (out[0, 23:, 0, 1] == -math.inf).all()
    assert out[0, 23:, 0, 2].isfinite().all() and out[0, :23].isfinite().all()


def test_sdpa_refuses_what_it_would_leak():
    q, k, v = (torch.randn(1, 41, 2, 3) for _ in range(3))
    v[0, 40] = math.nan
    with pytest.raises(UnsupportedError, match="NaN"):
        attention(q, k, v, mask=Causal(), impl="sdpa")
    assert attention(q, k, v, mask=Causal())[:, :40].isfinite().all()
    assert explain("attention", q, k, v, mask=Causal()).impl != "sdpa"
    assert attention(q, k, v, impl="sdpa").isnan().all()  # without a mask every row sees it


def test_sdpa_refuses_keys_that_would_leak_into_gradients():
    q, k, v = (torch.randn(1, 41, 2, 3) for _ in range(3))
    k[0, 40] = math.nan
    assert attention(q, k, v, mask=Causal(), impl="sdpa")[:, :40].isfinite().all()
    with pytest.raises(UnsupportedError, match="NaN"):
        attention(q.requires_grad_(), k, v, mask=Causal(), impl="sdpa")


def test_everything_not_finite_is_still_an_answer():
    q, k, v = (torch.full((1, 301, 2, 3), math.nan, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, mask=Causal(), impl="blocked")
    out.sum().backward()
    assert out.isnan().all() and q.grad.isnan().all() and k.grad.isnan().all() and v.grad.isnan().all()
