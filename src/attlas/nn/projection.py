"""Linear maps of long sequences."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attlas.kernels.cpu import projections as cpu


def project(x: Tensor, linear: nn.Linear, impl: str) -> Tensor:
    """linear(x); with the compiled core (impl "auto" or "cpu") where that is faster and the module is nothing but its weights."""
    if impl not in ("auto", "cpu") or not _plain(linear) or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return linear(x)
    if cpu.unsupported(x, linear.weight) is not None:
        return linear(x)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, linear.weight, linear.bias))
    return (cpu.cpu_linear if learns else cpu.linear)(x, linear.weight, linear.bias)


def _plain(linear: nn.Module) -> bool:
    """Neither replaced, nor wrapped, nor watched."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter and not any(hooks)
