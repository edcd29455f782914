"""Explicit tables from a name to the place where the thing lives. Nothing is imported before it is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from attlas.errors import UnknownNameError


def load_attr(path: str) -> Any:
    """Import `"package.module:attribute"` and return the attribute."""
    module, _, attr = path.partition(":")
    if not attr:
        raise UnknownNameError(f"{path!r} is not of the form 'module:attribute'")
    return getattr(importlib.import_module(module), attr)


def suggest(name: str, known: Iterable[str]) -> str:
    """A sentence that helps someone who mistyped `name`: the nearest known names, or all of them when none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "known: " + ", ".join(known)


class Registry(Mapping[str, str]):
    """A frozen name -> "module:attr" table with aliases. `load` imports lazily; an unknown name raises with a suggestion."""

    def __init__(self, kind: str, table: Mapping[str, str], aliases: Mapping[str, str] | None = None):
        self.kind = kind
        self._table = dict(table)
        self._aliases = dict(aliases or {})
        clash = self._table.keys() & self._aliases.keys()
        assert not clash, f"{kind} names that are also aliases: {sorted(clash)}"

    def canonical(self, name: str) -> str:
        """The table's own spelling of `name` (resolves aliases, case and underscores)."""
        key = str(name).strip().lower().replace("_", "-")
        key = self._aliases.get(key, key)
        if key not in self._table:
            raise UnknownNameError(f"unknown {self.kind} {name!r}; {suggest(key, [*self._table, *self._aliases])}")
        return key

    def load(self, name: str) -> Any:
        return load_attr(self._table[self.canonical(name)])

    def __getitem__(self, name: str) -> str:
        return self._table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)
