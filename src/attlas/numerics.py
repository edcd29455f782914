"""The precision to compute in, and what torch's modes must not do to a computation: lower it, or differentiate what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from attlas.errors import UnsupportedError


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores, sums, states and angles of tensors of `dtype` are computed in: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the wide dtype of the first."""
    dtype = wide_dtype(tensors[0].dtype)
    return tuple(t.to(dtype) for t in tensors)


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Where products keep the dtype of their factors on the device of `like`: torch.autocast would compute them in 16 bits, those
    of fp32 scores, too. Layers around it, such as nn.Linear, are what autocast is for."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the `backward` of an autograd Function out of backward(ctx, saved, *grads), saved = ctx.saved_tensors.

    Differentiating the gradients again raises UnsupportedError, whichever way it is asked for. torch's once_differentiable leaves
    out the part of a second derivative that runs through the function, without a word, where the tensors of torch.autograd.grad
    can be reached by another way too.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> Any:
        saved: Sequence[Any] = ctx.saved_tensors  # once: checkpoints hand them out a single time
        with torch.no_grad(), full_precision(saved[0]):
            found = backward(ctx, saved, *grads)
        sources = [t for t in (*saved, *grads) if t is not None and t.requires_grad]
        if not torch.is_grad_enabled() or not sources:
            return found
        several = found if isinstance(found, tuple) else (found,)
        given = [g for g in several if g is not None]
        marked = iter(_Once.apply(len(given), *given, *sources))
        several = tuple(None if g is None else next(marked) for g in several)
        return several if isinstance(found, tuple) else several[0]

    return once


class _Once(torch.autograd.Function):
    """The first `count` tensors, as functions of the others that have no derivative."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(
            "this cannot be differentiated twice: what ran has first-order gradients only; an op with impl='reference', a mixer "
            "after use('reference'), can be"
        )
