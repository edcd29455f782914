"""One entry for every group of tokens: compressed keys and values, the levels of a hierarchy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from attlas.cache.part import CacheError, Held, Part, PartSpec
from attlas.errors import DataError
from attlas.shapes import SeqInfo


class GroupedPart(Part):
    """Entry i of a row stands for its tokens i * group ... (i + 1) * group - 1, and is there once all of them have been seen.

    `entries` is an ordinary part (contiguous, ring or paged) in which an entry counts as a token; its positions are the numbers
    of the entries, and it is what `ops.attention_cached` reads. This part keeps the number of tokens beside it, so that it goes
    with the other parts of the layer.
    """

    def __init__(self, spec: PartSpec, entries: Part) -> None:
        self.spec, self.entries = spec, entries
        self._lengths = [0] * entries.rows

    @property
    def rows(self) -> int:
        return self.entries.rows

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    def __repr__(self) -> str:
        return f"GroupedPart(group={self.spec.group}, lengths={self._lengths[:8]}, {self.entries!r})"

    def completed(self, seq: SeqInfo) -> tuple[int, ...]:
        """How many entries the seq.lengths[i] new tokens of row seq.rows[i] complete."""
        size = self.spec.group
        held = (self._lengths[row] for row in seq.rows)
        return tuple((h + n) // size - h // size for h, n in zip(held, seq.lengths, strict=True))

    def write(self, new: tuple[Tensor, ...], seq: SeqInfo) -> None:
        """Count seq.lengths[i] tokens of row seq.rows[i], and append the entries that they complete, packed [entries, ...]."""
        held = tuple(self._lengths[row] for row in seq.rows)
        moved = any(n and a != h for n, a, h in zip(seq.lengths, seq.first, held, strict=True))
        if moved and (seq.starts is not None or seq.lengths_k is not None):
            raise CacheError(f"write({seq}) to {self!r}: the next positions of these rows are {held}, not {seq.first}")
        counts = self.completed(seq)
        if any(counts) or any(len(t) for t in new):
            self.entries.write(new, SeqInfo(counts, ids=seq.rows))
        for row, n in zip(seq.rows, seq.lengths, strict=True):
            self._lengths[row] += n

    def read(self, row: int, span: tuple[int | None, int | None] | None = None) -> Held:
        """The entries of a row; `span` and the positions of what is returned count entries."""
        return self.entries.read(row, span)

    def read_dense(self, rows: Sequence[int], span: tuple[int | None, int | None] | None = None) -> Held | None:
        return self.entries.read_dense(rows, span)

    def missing(self, row: int) -> tuple[int, int]:
        first, end = self.entries.missing(row)
        return first * self.spec.group, end * self.spec.group

    def end_step(self) -> None:
        self.entries.end_step()

    def check_truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        wanted = self._wanted(lengths)
        for row, length in wanted.items():
            if not 0 <= length <= self._lengths[row]:
                raise CacheError(f"truncate row {row} of {self!r} to {length}: it must be between 0 and the present length")
        self.entries.check_truncate({row: length // self.spec.group for row, length in wanted.items()})

    def truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        self.check_truncate(lengths)
        wanted = self._wanted(lengths)
        self.entries.truncate({row: length // self.spec.group for row, length in wanted.items()})
        for row, length in wanted.items():
            self._lengths[row] = length

    def _wanted(self, lengths: Mapping[int, int] | Sequence[int]) -> dict[int, int]:
        wanted = dict(lengths) if isinstance(lengths, Mapping) else dict(enumerate(lengths))
        if any(not 0 <= row < self.rows for row in wanted):
            raise CacheError(f"truncate {self!r} to {lengths}: rows are 0 ... {self.rows - 1}")
        return wanted

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        self.entries.reorder(index)
        self._lengths = [self._lengths[int(row)] for row in index]

    def fork(self, row: int, into: int) -> None:
        self.entries.fork(row, into)
        self._lengths[into] = self._lengths[row]

    def reset(self, rows: Iterable[int] | None = None) -> None:
        rows = list(range(self.rows) if rows is None else rows)
        self.entries.reset(rows)
        for row in rows:
            self._lengths[row] = 0

    def save(self) -> dict[str, Tensor]:
        return self.entries.save() | {"tokens": torch.tensor(self._lengths, dtype=torch.int64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        tokens = [int(n) for n in state["tokens"]] if "tokens" in state else []
        entries = {name: t for name, t in state.items() if name != "tokens"}
        held = [n // self.spec.group for n in tokens]
        if len(tokens) != self.rows or "lengths" not in entries or held != entries["lengths"].tolist():
            raise DataError(f"load into {self!r}: the numbers of tokens {tokens} do not fit its rows and entries")
        self.entries.load(entries)
        self._lengths = tokens

    def nbytes(self) -> int:
        return self.entries.nbytes()
