"""A model from where it lies on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from attlas.models.transformer import Transformer


def load_model(path: str | Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """The model in a .gguf file or in a folder as transformers saves it; see `from_gguf` and `from_pretrained`."""
    path = Path(path)
    if path.suffix == ".gguf":
        from attlas.models.gguf import from_gguf

        return from_gguf(path, dtype=dtype)
    from attlas.models.weights import from_pretrained

    return from_pretrained(path, dtype=dtype)
