"""Checks of the arguments of leaves. Every error restates the call."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from attlas.errors import OptionError


def integer(call: str, name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int that is at least `least`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise OptionError(f"{call}: {name} must be an integer, not {value!r}") from None
    if least is not None and number < least:
        raise OptionError(f"{call}: {name} must be at least {least}, not {number}")
    return number


def optional_integer(call: str, name: str, value: Any, least: int | None = None) -> int | None:
    return None if value is None else integer(call, name, value, least)


def integers(call: str, name: str, values: Any, least: int | None = None) -> tuple[int, ...]:
    """A tuple of ints from a sequence, a range or an integer tensor [n]."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise OptionError(f"{call}: {name} must be a sequence of integers, not {values!r}")
    if isinstance(values, range):
        out = tuple(values)
        if least is not None and out and min(out[0], out[-1]) < least:
            raise OptionError(f"{call}: {name} must be at least {least}, not {min(out[0], out[-1])}")
        return out
    return tuple(integer(call, name, v, least) for v in values)


def shorten(value: Any, width: int = 60) -> str:
    """`repr(value)`, cut when long: for error messages."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
