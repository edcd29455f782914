"""A layer's cache: the parts that its mixer asked for, kept in step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from attlas.cache.contiguous import ContiguousPart
from attlas.cache.grouped import GroupedPart
from attlas.cache.lookahead import LookaheadPart
from attlas.cache.paged import PagedPart
from attlas.cache.part import Part, PartSpec
from attlas.cache.pool import PagePool
from attlas.cache.ring import RingPart
from attlas.cache.state import StatePart
from attlas.errors import DataError, OptionError
from attlas.registry import suggest

KINDS = ("kv", "latent", "tokens", "state")
LAYOUTS = ("contiguous", "paged")


class Cache:
    """The tuple of parts of one layer, all with the same rows. What is done to the cache is done to every part, or, when one of
    them refuses, to none."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        if not self.parts or len({part.rows for part in self.parts}) != 1:
            raise OptionError(f"Cache({list(self.parts)}): wanted at least one part, all with the same number of rows")

    def __repr__(self) -> str:
        return f"Cache({', '.join(map(repr, self.parts))})"

    @property
    def rows(self) -> int:
        return self.parts[0].rows

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens seen by each row (those of the first part; between steps all parts have seen the same)."""
        return self.parts[0].lengths

    def end_step(self) -> None:
        for part in self.parts:
            part.end_step()

    def check_truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        """Raise what `truncate` would raise."""
        for part in self.parts:
            part.check_truncate(lengths)

    def truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        """Forget the tokens at and after lengths[row]: a dict row -> length, or one length per row."""
        self.check_truncate(lengths)
        for part in self.parts:
            part.truncate(lengths)

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Row i becomes what row index[i] was (beam search)."""
        for part in self.parts:
            part.reorder(index)

    def fork(self, row: int, into: int) -> None:
        """Row `into` becomes a copy of `row`."""
        for part in self.parts:
            part.fork(row, into)

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Empty the given rows, None = all."""
        chosen = None if rows is None else list(rows)
        for part in self.parts:
            part.reset(chosen)

    def nbytes(self) -> int:
        """Bytes of token storage that the parts hold."""
        return sum(part.nbytes() for part in self.parts)

    def save(self) -> dict[str, Tensor]:
        """All parts in one flat dict: `<part>.<name>`. For torch.save (loads with weights_only=True) and safetensors."""
        return {f"{i}.{name}": t for i, part in enumerate(self.parts) for name, t in part.save().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `save`, into a cache of equal specs and rows, in any layout."""
        states: list[dict[str, Tensor]] = [{} for _ in self.parts]
        for key, t in state.items():
            number, _, name = key.partition(".")
            if not number.isdecimal() or int(number) >= len(states):
                raise DataError(f"load into {self!r}: there is no part for {key!r}")
            states[int(number)][name] = t
        for part, own in zip(self.parts, states, strict=True):
            part.load(own)


def make_cache(
    specs: Sequence[PartSpec],
    rows: int,
    max_len: int | None = None,
    *,
    layout: Literal["contiguous", "paged"] = "contiguous",
    page_size: int = 16,
    rollback: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Cache:
    """A cache with one part for each spec.

    rows      number of sequences
    max_len   longest sequence: storage for it is allocated at once, and a longer one is an error; None = grows
    layout    "contiguous": one array, or a rolling buffer where the spec has a window; "paged": pages, from a pool of the part's
              own (rows * ceil(max_len / page_size) pages). Parts over a shared pool: `Cache([PagedPart(spec, rows, pool), ...])`
    rollback  tokens that a rolling buffer or the pages of a window keep beyond the window, so that rollback + 1 tokens can be
              truncated between steps (without a window all can be; a state takes none back, it is forked instead)
    dtype     None = torch's default; a spec's own dtype wins
    """
    call = f"make_cache(rows={rows}, max_len={max_len}, layout={layout!r}, page_size={page_size}, rollback={rollback})"
    if rows < 1 or (max_len is not None and max_len < 0) or rollback < 0:
        raise OptionError(f"{call}: rows must be at least 1, max_len and rollback not negative")
    if layout not in LAYOUTS:
        raise OptionError(f"{call}: {suggest(str(layout), LAYOUTS)}")

    def make(spec: PartSpec, max_len: int | None = max_len) -> Part:
        if spec.group > 1:
            return GroupedPart(spec, make(replace(spec, group=1), None if max_len is None else max_len // spec.group))
        if spec.kind == "lookahead":  # not one of KINDS: it cannot lie in a pool that sequences share
            return LookaheadPart(spec, rows, max_len, dtype=dtype, device=device)
        if spec.kind not in KINDS:
            raise OptionError(f"{call}: no part of kind {spec.kind!r}; {suggest(spec.kind, KINDS)}")
        if spec.kind == "state":
            return StatePart(spec, rows, dtype, device)
        if layout == "paged":
            pages = None if max_len is None else rows * -(-max_len // page_size)
            return PagedPart(spec, rows, PagePool(spec, pages, page_size, dtype=dtype, device=device), rollback=rollback)
        if spec.window is None:
            return ContiguousPart(spec, rows, max_len, dtype=dtype, device=device)
        return RingPart(spec, rows, max_len, rollback=rollback, dtype=dtype, device=device)

    return Cache([make(spec) for spec in specs])
