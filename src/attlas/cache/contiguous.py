"""One array [rows, capacity, ...]: the growing cache of full attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attlas.cache.part import Held, PartSpec, Table
from attlas.cache.tokens import Span, TokenPart, allocate, axis_of, grown, slices


class ContiguousPart(TokenPart):
    """Keeps every token; token p of a row is slot p.

    max_len  allocated at once, exactly; a longer row is an error. None = the storage grows by doubling (the largest row decides)

    Reads are views, also of several rows at once when they follow each other and have equal lengths. `fork` and `reorder` copy.
    Bytes: rows * capacity * elements per token.
    """

    def __init__(
        self,
        spec: PartSpec,
        rows: int,
        max_len: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(spec, rows, dtype, device)
        self.max_len = max_len
        self._storage = self._allocate(max_len or 0)

    @property
    def capacity(self) -> int:
        """Slots of each row."""
        return self._storage[0].shape[1]

    def _allocate(self, capacity: int) -> tuple[Tensor, ...]:
        return tuple(allocate((self.rows, capacity, *shape), self.dtype, self.device) for _, shape in self.spec.tensors)

    def _reserve(self, needed: int) -> None:
        """Make room for `needed` tokens in every row."""
        if needed <= self.capacity:
            return
        self._check_max_len([needed], self.max_len)
        used, old = max(self._lengths), self._storage
        self._storage = self._allocate(grown(self.capacity, needed))
        for target, source in zip(self._storage, old, strict=True):
            target[:, :used] = source[:, :used]

    def _append(self, new: tuple[Tensor, ...], rows: Sequence[int], counts: Sequence[int]) -> None:
        if not rows:
            return
        starts = [self._lengths[row] for row in rows]
        self._reserve(max(s + n for s, n in zip(starts, counts, strict=True)))
        even = self._even(rows) and len(set(counts)) == 1
        for storage, tokens in zip(self._storage, new, strict=True):
            if even:
                block = storage[rows[0] : rows[0] + len(rows), starts[0] : starts[0] + counts[0]]
                block.copy_(tokens.view(len(rows), counts[0], *tokens.shape[1:]))
            elif len(tokens) == len(rows) and set(counts) == {1}:
                storage[torch.tensor(rows, device=self.device), torch.tensor(starts, device=self.device)] = tokens.to(self.dtype)
            else:
                for row, start, (begin, end) in zip(rows, starts, slices(counts), strict=True):
                    storage[row, start : start + end - begin] = tokens[begin:end]
        for row, n in zip(rows, counts, strict=True):
            self._lengths[row] += n

    def read(self, row: int, span: Span | None = None) -> Held:
        begin, end = next(iter(self._held(row, span)), (0, 0))
        return Held(tuple(t[row, begin:end] for t in self._storage), axis_of((begin, end - begin)))

    def read_dense(self, rows: Sequence[int], span: Span | None = None) -> Held | None:
        if not rows or not self._even(rows):
            return None
        begin, end = next(iter(self._held(rows[0], span)), (0, 0))
        tensors = tuple(t[rows[0] : rows[0] + len(rows), begin:end] for t in self._storage)
        return Held(tensors, axis_of((begin, end - begin)))

    def read_table(self, rows: Sequence[int]) -> Table | None:
        """Every row is one page."""
        for row in rows:
            self._row(row)
        return Table(self._storage, torch.tensor(rows, dtype=torch.int32, device=self.device)[:, None])

    def _cut(self, row: int, length: int) -> None:
        """The slots past the new length are simply not read any more."""

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        rows = self._permutation(index)
        if rows == list(range(self.rows)):
            return
        self._lengths = [self._lengths[row] for row in rows]
        used, source = max(self._lengths), torch.tensor(rows, device=self.device)
        for t in self._storage:
            t[:, :used] = t[:, :used].index_select(0, source)

    def fork(self, row: int, into: int) -> None:
        length = self._lengths[self._row(row)]
        for t in self._storage:
            t[self._row(into), :length] = t[row, :length]
        self._lengths[into] = length

    def reset(self, rows: Iterable[int] | None = None) -> None:
        for row in self._which(rows):
            self._lengths[row] = 0

    def _check_restorable(self, lengths: Sequence[int], gaps: Sequence[tuple[int, int]]) -> None:
        self._check_whole(gaps)
        self._check_max_len(lengths, self.max_len)

    def _restore(self, row: int, tensors: tuple[Tensor, ...]) -> None:
        length, self._lengths[row] = self._lengths[row], 0
        self._reserve(length)
        for storage, tokens in zip(self._storage, tensors, strict=True):
            storage[row, :length] = tokens
        self._lengths[row] = length

    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._storage)
