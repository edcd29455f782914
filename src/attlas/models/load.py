"""A model from where it lies on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attlas.errors import AttlasError, DataError, OptionError
from attlas.registry import suggest

if TYPE_CHECKING:
    import torch

    from attlas.models.transformer import Transformer

DTYPES = ("float32", "bfloat16", "float16")


def dtype_of_weights(name: str) -> torch.dtype:
    """The dtype that `--dtype name` asks for."""
    import torch

    if name not in DTYPES:
        raise OptionError(f"--dtype {name}: {suggest(name, DTYPES)}")
    return getattr(torch, name)


def load_model(path: str | Path, *, dtype: torch.dtype | None = None) -> Transformer:
    """The model in a .gguf file or in a folder as transformers saves it; see `from_gguf` and `from_pretrained`. Raises DataError
    for whatever is wrong with the files."""
    path = located(path)
    try:
        return _read(path, dtype)
    except AttlasError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{path} does not describe a model that can be built: {type(error).__name__}: {error}") from error


def located(path: str | Path) -> Path:
    """The path, where a model can lie there. Raises DataError that says what to give instead."""
    path = Path(path)
    if not path.exists():
        is_name = not path.is_absolute() and len(path.parts) == 2 and not path.parent.exists()  # "owner/model", as on a hub
        hint = "; models are not downloaded: give a folder or a .gguf file that is on this machine" if is_name else ""
        raise DataError(f"{path} does not exist{hint}")
    if path.is_file() and path.suffix != ".gguf":
        raise DataError(f"{path} is neither a .gguf file nor a folder; give the folder that holds config.json beside the weights")
    return path


def _read(path: Path, dtype: torch.dtype | None) -> Transformer:
    if path.suffix == ".gguf":
        from attlas.models.gguf import from_gguf

        return from_gguf(path, dtype=dtype)
    from attlas.models.weights import from_pretrained

    return from_pretrained(path, dtype=dtype)
