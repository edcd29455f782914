"""Linear maps of long sequences on the compiled core: right to rounding, with every gradient, and only where nothing is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attlas.catalogue.index import build
from attlas.kernels.cpu import projections
from attlas.kernels.cpu.library import status
from attlas.masks import Window
from attlas.nn.projection import project

ROWS, INPUTS, OUTPUTS = projections.LEAST_ROWS + 7, 307, 131


def made(bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(INPUTS, OUTPUTS, bias=bias), torch.randn(ROWS, INPUTS), torch.randn(ROWS, OUTPUTS)


def results(f: nn.Module, x: Tensor, dout: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = f(leaf)
    return [out.detach(), *torch.autograd.grad(out, (leaf, *f.parameters()), dout)]


class Core(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return projections.cpu_linear(x, self.linear.weight, self.linear.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_round_no_worse_than_those_of_torch(bias: bool):
    linear, x, dout = made(bias)
    wide = nn.Linear(INPUTS, OUTPUTS, bias).double()
    wide.load_state_dict(linear.state_dict())
    truth = results(wide, x.double(), dout.double())
    for got, theirs, want in zip(results(Core(linear), x, dout), results(linear, x, dout), truth, strict=True):
        budget = 2 * float((theirs - want).abs().max()) + 1e-7 * float(want.abs().max())
        assert float((got - want).abs().max()) <= budget


def test_views_and_gradients_of_any_strides():
    linear, x, dout = made()
    wanted = results(Core(linear), x, dout)
    for turned in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, INPUTS:], x.reshape(-1, 1, INPUTS)):
        shaped = dout.t().contiguous().t().reshape(*turned.shape[:-1], OUTPUTS)
        for got, want in zip(results(Core(linear), turned, shaped), wanted, strict=True):
            torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-5, atol=1e-5)
    total = results(Core(linear), x, torch.ones(1, 1).expand_as(dout))
    for got, want in zip(total, results(linear, x, torch.ones_like(dout)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_only_the_gradients_that_are_asked_for():
    linear, x, dout = made()
    linear.weight.requires_grad_(False)
    projections.cpu_linear(x, linear.weight, linear.bias).backward(dout)
    assert linear.weight.grad is None and linear.bias.grad is not None
    torch.testing.assert_close(linear.bias.grad, dout.sum(0), rtol=1e-5, atol=1e-4)


def test_when_the_core_is_asked(monkeypatch: pytest.MonkeyPatch):
    linear, x, _ = made()
    asked: list[int] = []
    monkeypatch.setattr(projections, "linear", lambda x, weight, bias: asked.append(len(x)) or x @ weight.t() + bias)
    with torch.no_grad():
        project(x, linear, "auto")
        assert asked == ([ROWS] if status().startswith("avx512") else [])
        asked.clear()
        for impl in ("blocked", "reference", "sdpa"):
            project(x, linear, impl)
        project(x[:7], linear, "auto")
        project(x.double(), nn.Linear(INPUTS, OUTPUTS).double(), "auto")
        project(x, type("Wrapped", (nn.Linear,), {})(INPUTS, OUTPUTS), "auto")
        with torch.autocast("cpu", torch.bfloat16):
            assert project(x, linear, "auto").dtype == torch.bfloat16
        seen: list[nn.Module] = []
        linear.register_forward_hook(lambda module, given, out: seen.append(module))
        project(x, linear, "auto")
        assert seen == [linear] and asked == []


def test_a_mixer_trains_as_without_the_core():
    torch.manual_seed(0)
    mixer = build("longformer", 48, 3, window=Window(13, 11), tokens=(0, 1), rope=False, bias=True)
    x, found = torch.randn(1, ROWS, 48), []
    for impl in ("auto", "blocked"):
        leaf = x.clone().requires_grad_()
        out = mixer.use(impl)(leaf)
        grads = torch.autograd.grad(out.sin().sum(), (leaf, *mixer.parameters()))
        with torch.no_grad():
            found.append([mixer(x), out.detach(), *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max().clamp_min(1.0)))


def test_the_operators_pass_opcheck():
    linear, x, _ = made()
    torch.library.opcheck(projections.cpu_linear, (x[:17], linear.weight, linear.bias))
