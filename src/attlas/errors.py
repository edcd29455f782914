"""Every error that a user of attlas can meet. All derive from ValueError, so `except ValueError` catches them."""

from __future__ import annotations


class AttlasError(ValueError):
    """Base of all attlas errors."""


class ShapeError(AttlasError):
    """Tensors whose shapes, dtypes or devices do not fit together; the message restates the call."""


class OptionError(AttlasError):
    """An option with a value outside its range, or an option that does not exist."""


class UnknownNameError(AttlasError):
    """A name that is in no table; the message suggests the nearest ones."""


class UnsupportedError(AttlasError):
    """A request that is understood but cannot be honoured, with the reason. attlas never does something else instead."""


class DataError(AttlasError):
    """A file or a text that cannot be used."""
