"""The public face: its names are frozen, lazy, and every one resolves."""

from __future__ import annotations

import subprocess
import sys

import pytest

import attlas

NAMES = [
    "AttlasError", "AuxRequest", "Card", "Causal", "Documents", "Global", "Mask", "Mixer", "Padding", "Prefix", "SeqInfo",
    "Sinks", "Window", "__version__", "attention", "attention_cached", "build", "card", "cards", "explain", "merge",
]  # fmt: skip


def test_the_list_is_frozen() -> None:
    assert attlas.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves(name: str) -> None:
    value = getattr(attlas, name)
    assert value is getattr(attlas, name)
    assert name == "__version__" or value.__name__ == name


def test_names_are_functions_not_modules() -> None:
    import types

    import attlas.masks
    import attlas.ops

    for name in NAMES:
        assert not isinstance(getattr(attlas, name), types.ModuleType), f"attlas.{name} is a module"


def test_subpackages_are_reachable() -> None:
    assert attlas.masks.Local(3) == attlas.masks.Local(3)
    assert set(NAMES) <= set(dir(attlas))


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'attenshun'"):
        _ = attlas.attenshun


def test_import_is_lazy() -> None:
    code = "import sys, attlas; assert 'torch' not in sys.modules; assert not [m for m in sys.modules if m.startswith('attlas.') "
    code += "and m != 'attlas._version']; print(attlas.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == attlas.__version__
