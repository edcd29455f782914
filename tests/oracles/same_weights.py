"""How an attention module of transformers is held against a mixer with the same weights: outputs and every gradient, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Their softmax, and where there is one their rotary table, is computed in fp32 even for fp64 inputs.
FP32_INSIDE = 2e-6
EXACT = 1e-12

Convert = Callable[[Tensor], Sequence[Tensor]]


def alone(tensor: Tensor) -> Sequence[Tensor]:
    return (tensor,)


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """fp64 parameters of which all matter: matrices N(0, 0.3), vectors N(0.2, 0.3)."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3 + (0.2 if p.ndim == 1 else 0.0))
    return module


class Pair:
    """Their tensors and ours: `copy(theirs, targets, convert)` fills our parameters and remembers whose gradients belong
    together."""

    def __init__(self, mine: nn.Module) -> None:
        self.mine = mine.double().eval()
        self.parameters = dict(self.mine.named_parameters())
        self.links: list[tuple[Tensor, tuple[str, ...], Convert]] = []
        self.flat: set[str] = set()

    def copy(self, theirs: Tensor, *targets: str, convert: Convert = alone) -> Pair:
        with torch.no_grad():
            for name, part in zip(targets, convert(theirs), strict=True):
                self.parameters[name].copy_(part)
        self.links.append((theirs, targets, convert))
        return self

    def linear(self, theirs: nn.Module, *targets: str, convert: Convert = alone, bias: Convert | None = None) -> Pair:
        """A linear map: its weight and, where it has one, its bias."""
        self.copy(theirs.weight, *(f"{t}.weight" for t in targets), convert=convert)
        if getattr(theirs, "bias", None) is not None:
            self.copy(theirs.bias, *(f"{t}.bias" for t in targets), convert=bias or alone)
        return self

    def without_effect(self, *names: str) -> Pair:
        """Parameters that the output does not depend on (a bias on all keys, where nothing rotates them, cancels in the
        softmax)."""
        self.flat |= set(names)
        return self

    def must_agree(
        self, run_theirs: Callable[..., Tensor], run_mine: Callable[..., Tensor], *inputs: Tensor, atol: float = FP32_INSIDE
    ) -> None:
        """Outputs, gradients of the inputs and of all parameters agree to `atol` relative to the largest value of each."""
        linked = {name for _, targets, _ in self.links for name in targets}
        assert linked == self.parameters.keys(), "every parameter must come from the oracle"
        results = []
        for run in (run_theirs, run_mine):
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            out = run(*leaves)
            probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
            (out * probe).sum().backward()
            results.append([out.detach(), *(x.grad for x in leaves)])
        for theirs, mine in zip(*results, strict=True):
            close(mine, theirs, atol)
        for theirs, targets, convert in self.links:
            assert theirs.grad is not None and (theirs.grad.abs().max() > 1e-4) == self.flat.isdisjoint(targets)
            for name, part in zip(targets, convert(theirs.grad), strict=True):
                grad = self.parameters[name].grad
                assert grad is not None, f"{name} has no gradient"
                close(grad, part, atol, theirs.grad.abs().max().item())


def close(got: Tensor, want: Tensor, atol: float, size: float | None = None) -> None:
    torch.testing.assert_close(got, want, atol=atol * max(1.0, want.abs().max().item() if size is None else size), rtol=0)


def causal_bias(length: int, window: int | None = None) -> Tensor:
    """[1, 1, T, T]: 0 where a query may attend, else a large negative number, as transformers adds it to scores. `window` counts
    the query's own key."""
    q, k = torch.arange(length)[:, None], torch.arange(length)
    seen = (k <= q) & (q - k < (window or length))
    return torch.zeros(length, length, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
