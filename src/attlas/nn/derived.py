"""Buffers that are a function of a module's options alone: not saved, and made anew when weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def register_derived(module: nn.Module, name: str, make: Callable[[], Tensor]) -> None:
    """A buffer `name` that holds make() in the default dtype, on the device of `torch.device(...)` as a parameter would be.

    It is not part of the state dict. A module that was made on the meta device has no values, and `to_empty` gives it arbitrary
    ones; `load_state_dict` brings back the parameters, and here this buffer, on the device of the parameters.
    `make` must be picklable, such as a partial of a function.
    """
    make = partial(_on_cpu, make, torch.get_default_dtype())
    module.register_buffer(name, make().to(torch.get_default_device()), persistent=False)
    module.register_load_state_dict_post_hook(partial(_refill, name, make))


def _on_cpu(make: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    """Drawn from a generator of the CPU, whatever the default device is."""
    with torch.device("cpu"):
        return make().to(dtype)


def _refill(name: str, make: Callable[[], Tensor], module: nn.Module, _: Any) -> None:
    old = getattr(module, name)
    device = next((p.device for p in module.parameters()), old.device) if old.is_meta else old.device
    setattr(module, name, make().to(device, old.dtype))
