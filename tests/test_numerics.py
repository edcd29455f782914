"""torch's modes: autocast lowers no score, and a second derivative is right or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attlas
from attlas.errors import UnsupportedError
from attlas.kernels.cpu import scan as cpu_scan
from attlas.masks import Causal, Window
from attlas.nn.lowrank import Nystromformer
from attlas.nn.reversible import Reversible
from attlas.numerics import first_order
from attlas.ops.attention import attention
from attlas.ops.cluster import nearest_mean, sign_bits
from attlas.ops.lookahead import lookahead_attention
from attlas.ops.lsh import lsh_hash, make_rotations
from attlas.ops.scan import scan
from attlas.testing.inputs import randn

B, T, H, D = 2, 29, 3, 7


def _inputs(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [randn(B, T, H, D, dtype=dtype, seed=i).requires_grad_() for i in range(count)]


# ---- second derivatives ------------------------------------------------------------------------------------------------------


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, mask=Causal() & Window.last(5), impl="blocked")


def _lookahead(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return lookahead_attention((q, k, v), (q, k, v))[0]


def _reversible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    stack = Reversible([(nn.Tanh(), nn.Tanh())])
    return stack(q, k)[1] + v


@pytest.mark.parametrize("run", [_attention, _lookahead, _reversible])
def test_a_second_derivative_is_refused_however_it_is_asked_for(run: Any) -> None:
    """The inputs reach the first gradient by another way too (the cubes), where torch itself would leave the op's part out."""
    x = _inputs(3)
    (first,) = torch.autograd.grad(run(*x).square().sum() + x[0].pow(3).sum(), x[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="differentiated twice"):
        torch.autograd.grad(first.sum(), x[0], retain_graph=True)
    with pytest.raises(UnsupportedError, match="differentiated twice"):
        torch.autograd.grad(first.sum(), x[1], retain_graph=True)
    with pytest.raises(UnsupportedError, match="differentiated twice"):
        first.sum().backward()


def test_a_second_derivative_through_the_compiled_scan_is_refused() -> None:
    q, k, v = _inputs(3, torch.float32)
    state = randn(B, H, D, D, dtype=torch.float32, seed=5).requires_grad_()
    if cpu_scan.unsupported(q, v, low_rank=False, bonus=False) is not None:
        return
    out = scan(q, k, v, initial_state=state, impl="cpu")
    first = torch.autograd.grad(out.square().sum() + q.pow(3).sum(), q, create_graph=True)[0]
    for x in (q, state):
        with pytest.raises(UnsupportedError, match="differentiated twice"):
            torch.autograd.grad(first.sum(), x, retain_graph=True)


@pytest.mark.parametrize("name", ["sliding-window", "reformer", "castle", "routing"])
def test_the_reference_can_be_differentiated_twice(name: str) -> None:
    options = {"reformer": {"chunk": 3, "buckets": 2, "rounds": 2}, "routing": {"clusters": 2}, "sliding-window": {"window": 3}}
    mixer = attlas.build(name, dim=6, num_heads=2, head_dim=4, **options.get(name, {})).double().eval()
    x = randn(1, 5, 6).requires_grad_()
    with pytest.raises(UnsupportedError, match="use\\('reference'\\)"):
        torch.autograd.gradgradcheck(mixer, (x,))
    assert torch.autograd.gradgradcheck(mixer.use("reference"), (x,))


def test_only_a_second_derivative_is_refused() -> None:
    """A graph of the first gradient is no request for another, nor is one that goes elsewhere."""
    x, y = _inputs(3), randn(B, T, H, D, seed=9).requires_grad_()
    first = torch.autograd.grad((_attention(*x) * y).sum(), (x[0], y), create_graph=True)
    plain = torch.autograd.grad((_attention(*x) * y).sum(), (x[0], y))
    assert all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
    elsewhere = torch.autograd.grad(first[1].square().sum(), x[2])[0]  # d/dy is the output itself: one derivative of the op
    assert elsewhere.abs().max() > 0


def test_a_backward_for_one_tensor() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @first_order
        def backward(ctx: Any, saved: Any, grad: Tensor) -> Tensor:
            return 2 * saved[0] * grad

    x = randn(5).requires_grad_()
    (first,) = torch.autograd.grad(Square.apply(x).sum(), x, create_graph=True)
    assert torch.equal(first, 2 * x)
    with pytest.raises(UnsupportedError):
        first.sum().backward()


# ---- autocast ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_scores_stay_in_fp32_under_autocast(impl: str) -> None:
    x = [t.detach().requires_grad_() for t in _inputs(3, torch.bfloat16)]
    mask = Causal() & Window.last(11)
    plain = attention(*x, mask=mask, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*x, mask=mask, impl=impl), plain)


def test_a_backward_pass_under_autocast_stays_in_fp32() -> None:
    x = [t.detach().requires_grad_() for t in _inputs(3, torch.bfloat16)]
    plain = torch.autograd.grad(_attention(*x).float().square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(_attention(*x).float().square().sum(), x)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))


@pytest.mark.parametrize("form", ["chunk", "parallel"])
def test_scans_stay_in_fp32_under_autocast(form: str) -> None:
    q, k, v = _inputs(3, torch.bfloat16)
    beta = torch.sigmoid(randn(B, T, H, dtype=torch.bfloat16))  # the delta rule is computed in torch
    plain = scan(q, k, v, delta=beta, form=form)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scan(q, k, v, delta=beta, form=form), plain)


def test_lookahead_keys_stay_in_fp32_under_autocast() -> None:
    x = _inputs(3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = _lookahead(*x)
    assert torch.equal(inside, _lookahead(*x))


def test_choices_do_not_change_under_autocast() -> None:
    x = randn(1, 211, H, D, dtype=torch.float32)
    turns, means = make_rotations(H, D, 3, (14,), seed=1), randn(H, 13, D, dtype=torch.float32, seed=1)
    planes = randn(61, D + 1, dtype=torch.float32, seed=2)
    choices = [lambda: lsh_hash(x, turns, (14,)), lambda: nearest_mean(x, means), lambda: sign_bits(x, planes)]
    for choose in choices:
        with torch.autocast("cpu", torch.bfloat16):
            found = choose()
        assert torch.equal(found, choose())


def test_the_inversion_of_nystromformer_stays_in_fp32_under_autocast() -> None:
    mixer = Nystromformer(12, 3, landmarks=5, conv_kernel=3)
    q, k, v = (t.detach()[..., :4] for t in _inputs(3, torch.bfloat16))
    plain = mixer.attend_rows(q, k, v, torch.arange(T))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixer.attend_rows(q, k, v, torch.arange(T)), plain)


@pytest.mark.parametrize("start", ["none", "first", "null"])
@pytest.mark.parametrize("causal", [True, False])
def test_memory_compressed_runs_under_autocast(start: str, causal: bool) -> None:
    mixer = attlas.build("memory-compressed", dim=12, num_heads=3, start=start, causal=causal)
    x = randn(B, T, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert (y - mixer(x)).abs().max() < 0.05


def test_reversible_layers_recompute_in_the_precision_of_the_forward_pass() -> None:
    seen: list[torch.dtype] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            seen.append(y.dtype)
            return y

    stack = Reversible([(Watched(5, 5), Watched(5, 5))])
    x = randn(3, 5, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, z = stack(x, x)
    (y + z).float().sum().backward()
    assert seen == [torch.bfloat16] * 4
