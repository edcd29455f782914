"""Whether the value of an option is of a kind that its factory takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

NUMBERS = {int: Integral, float: Real}


@lru_cache(maxsize=256)
def kinds(factory: Callable[..., Any]) -> dict[str, Any]:
    """option -> its annotation."""
    return get_type_hints(factory.__init__ if isinstance(factory, type) else factory)  # type: ignore[misc]


def fits(value: Any, kind: Any) -> bool:
    """True also for kinds that cannot be told from a value, such as callables. A bool is no number, and 1 is not True."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, choice) for choice in choices)
    if choices == (False,):
        return isinstance(value, bool)  # what is never True says itself why not
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in choices)
    if origin in (Sequence, tuple):
        return _fits_sequence(value, choices)
    if kind is None or kind is NoneType:
        return value is None
    if kind in NUMBERS:
        return isinstance(value, NUMBERS[kind]) and not isinstance(value, bool)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _fits_sequence(value: Any, choices: Sequence[Any]) -> bool:
    if isinstance(value, Tensor | range):
        return True
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    return all(fits(one, choices[0]) for one in value) if choices else True
