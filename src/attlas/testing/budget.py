"""How wrong a fast computation may be: as wrong as the plain one in the same dtype, times two, plus a rounding band."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """Largest absolute errors against the fp64 truth. ok: error <= allowed."""

    error: float
    naive: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


def error_budget(got: Tensor, naive_same_dtype: Tensor, truth_fp64: Tensor, *, factor: float = 2.0, band: float = 4.0) -> Budget:
    """Compare max |got - truth| with factor * max |naive - truth| + band * eps * max |truth|.

    got               the result under test
    naive_same_dtype  the plain computation in the dtype of `got`
    truth_fp64        the plain computation in fp64 on the same (already rounded) inputs
    eps is that of the dtype of `got`. A NaN or infinity in `got` that the truth does not have is over any budget.
    The rule (twice the error of the plain computation) follows the flash-attention test suite; the band allows for a naive
    result that is exact by luck.
    """
    assert got.shape == truth_fp64.shape == naive_same_dtype.shape, (got.shape, naive_same_dtype.shape, truth_fp64.shape)
    assert got.dtype == naive_same_dtype.dtype, "the naive computation must have the dtype of the result"
    if got.numel() == 0:
        return Budget(0.0, 0.0, 0.0)
    truth = truth_fp64.double()
    error = (got.double() - truth).abs().max().item()
    naive = (naive_same_dtype.double() - truth).abs().max().item()
    allowed = factor * naive + band * torch.finfo(got.dtype).eps * truth.abs().max().item()
    return Budget(float("inf") if error != error else error, naive, allowed)


def assert_budget(got: Tensor, naive_same_dtype: Tensor, truth_fp64: Tensor, what: str = "result") -> Budget:
    """`error_budget`, raising AssertionError with the figures when the budget is exceeded."""
    budget = error_budget(got, naive_same_dtype, truth_fp64)
    assert budget.ok, f"{what}: error {budget.error:.3g} is over the budget {budget.allowed:.3g} (naive error {budget.naive:.3g})"
    return budget


def assert_same(got: Tensor, want: Tensor, what: str, *, tol: float = 1e-10) -> None:
    """|got - want| <= tol * (1 + max |want|) everywhere, with equal shapes; NaN never passes. For fp64 comparisons."""
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)}, expected {list(want.shape)}"
    if got.numel() == 0:
        return
    worst = (got.double() - want.double()).abs().max().item()
    allowed = tol * (1 + want.double().abs().max().item())
    assert worst <= allowed, f"{what}: differs by {worst:.3g} (allowed {allowed:.3g})"
