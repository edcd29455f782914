"""Tensors that belong to a value, on the device where they are wanted."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(owner: object, name: str, device: torch.device) -> Tensor:
    """`owner.name` on `device`; a copy is made once and kept with the owner, so that decoding steps do not wait for it."""
    tensor: Tensor = getattr(owner, name)
    if tensor.device == device:
        return tensor
    copies: dict[tuple[str, torch.device], Tensor] = owner.__dict__.setdefault("_copies", {})
    if (name, device) not in copies:
        copies[name, device] = tensor.to(device)
    return copies[name, device]
