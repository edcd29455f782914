"""Linear maps of many rows on the compiled core, with gradients.

The weights are packed anew in every call, which costs as much as some dozen rows, so that they may change in between. Results
lie on large pages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attlas.kernels.cpu.dense import PackedLinear
from attlas.kernels.cpu.launch import flat
from attlas.kernels.cpu.library import load, status
from attlas.kernels.cpu.pages import large_pages

LEAST_ROWS = 1024  # with fewer, packing the weights takes too much of what the product gains


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why x [..., in], weight [out, in] should go through torch's own linear map, None = they need not."""
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return f"it runs on the cpu, not on {x.device.type} and {weight.device.type}"
    if load() is None or not status().startswith("avx512"):
        return f"it is made for AVX-512 ({status()})"
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return f"it is made for torch.float32, not {x.dtype} and {weight.dtype}"
    rows = x.shape[:-1].numel()
    return None if rows >= LEAST_ROWS else f"{rows} rows are too few to pack the weights for"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias. x [..., in], weight [out, in], bias [out], fp32 -> [..., out] on large pages."""
    out = large_pages(x.new_empty(*x.shape[:-1], weight.shape[0]))
    PackedLinear(weight, bias).into(flat(x.reshape(-1, x.shape[-1])), out.view(-1, weight.shape[0]))
    return out


def linear_backward(x: Tensor, weight: Tensor, dout: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from dout [..., out]; empty where `wanted` says that they are not."""
    rows = flat(dout.reshape(-1, dout.shape[-1]))
    dx = linear(rows, weight.t(), None).view(x.shape) if wanted[0] else x.new_empty(0)
    dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if wanted[1] else x.new_empty(0)
    return dx, dweight, rows.sum(0) if wanted[2] else x.new_empty(0)


cpu_linear = torch.library.custom_op("attlas::cpu_linear", linear, mutates_args=(), device_types="cpu")
cpu_linear_backward = torch.library.custom_op("attlas::cpu_linear_backward", linear_backward, mutates_args=(), device_types="cpu")


@cpu_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@cpu_linear_backward.register_fake
def _(x: Tensor, weight: Tensor, dout: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    dx, dweight, dbias = (x.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))
    return dx, dweight, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad)
    found = cpu_linear_backward(*ctx.saved_tensors, dout, wanted)
    return tuple(g if want else None for g, want in zip(found, wanted, strict=True))


cpu_linear.register_autograd(_backward, setup_context=_save)
