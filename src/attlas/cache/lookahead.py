"""What earlier tokens have gathered from later ones: one tensor per token that every new token changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from attlas.cache.part import Held, PartSpec
from attlas.cache.tokens import Span, TokenPart, allocate, axis_of, grown
from attlas.errors import ShapeError, UnsupportedError
from attlas.shapes import SeqInfo, describe


class LookaheadPart(TokenPart):
    """Tensors per token that are rewritten: `put` appends the new tokens and replaces what the held ones have gathered.

    As with a state, what a token has added cannot be taken out again: `truncate` works only to the present length or to 0; for
    speculation, `fork` before and go on from the copy. Never paged: two sequences with the same beginning do not hold the same.

    max_len  allocated at once for every row, exactly; None = each row grows by doubling, and a row that is emptied gives its
             memory back, so that rows of an engine take what their own sequences need
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
        self._storage = [self._allocate(max_len or 0) for _ in range(rows)]

    def _allocate(self, capacity: int) -> tuple[Tensor, ...]:
        return tuple(allocate((capacity, *shape), self.dtype, self.device) for _, shape in self.spec.tensors)

    def _reserve(self, row: int, needed: int) -> None:
        """Make room for `needed` tokens in the row."""
        held, old = self._lengths[row], self._storage[row]
        capacity = len(old[0])
        if needed > capacity:
            self._storage[row] = self._allocate(grown(capacity, needed))
            for target, source in zip(self._storage[row], old, strict=True):
                target[:held] = source[:held]

    # ---- a step -------------------------------------------------------------------------------------------------------------

    def put(self, rows: Sequence[int], first: int, gathered: tuple[Tensor, ...], count: int) -> None:
        """Bring `rows`, which hold equally many tokens, forward by `count` tokens: their positions first, first + 1, ... become
        gathered[...] [len(rows), n, ...], which end at the last new token."""
        held = {self._lengths[self._row(row)] for row in rows}
        end = next(iter(held), 0) + count
        for t, (name, shape) in zip(gathered, self.spec.tensors, strict=True):
            if len(held) != 1 or first > end - count or t.shape != (len(rows), end - first, *shape):
                raise ShapeError(
                    f"{self!r}.put(rows={list(rows)}, first={first}, count={count}): wanted {name} "
                    f"{[len(rows), end - first, *shape]} of rows that hold equally many tokens; got {describe(**{name: t})}"
                )
        self._check_max_len([end], self.max_len)
        for i, row in enumerate(rows):
            self._reserve(row, end)
            for storage, t in zip(self._storage[row], gathered, strict=True):
                storage[first:end] = t[i].detach()
            self._lengths[row] = end

    def write(self, new: tuple[Tensor, ...], seq: SeqInfo) -> None:
        raise UnsupportedError(f"{self!r}.write: new tokens change what earlier ones hold; its mixer replaces both with `put`")

    def _append(self, new: tuple[Tensor, ...], rows: Sequence[int], counts: Sequence[int]) -> None:
        raise AssertionError("only `put` writes")

    def read(self, row: int, span: Span | None = None) -> Held:
        begin, end = next(iter(self._held(row, span)), (0, 0))
        return Held(tuple(t[begin:end] for t in self._storage[row]), axis_of((begin, end - begin)))

    def read_dense(self, rows: Sequence[int], span: Span | None = None) -> Held | None:
        """A view of one row; several have no common one."""
        if len(rows) != 1:
            return None
        held = self.read(rows[0], span)
        return Held(tuple(t[None] for t in held.tensors), held.axis)

    # ---- between steps ------------------------------------------------------------------------------------------------------

    def check_truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        super().check_truncate(lengths)
        for row, length in self._wanted(lengths).items():
            if length not in (0, self._lengths[row]):
                raise UnsupportedError(
                    f"{self!r}.truncate(row {row} to {length}): what the dropped tokens have added to earlier ones cannot be "
                    "taken back; fork the row before the tokens that may be dropped"
                )

    def _cut(self, row: int, length: int) -> None:
        if not length:
            self._empty(row)

    def _empty(self, row: int) -> None:
        if self.max_len is None:
            self._storage[row] = self._allocate(0)

    def reset(self, rows: Iterable[int] | None = None) -> None:
        for row in self._which(rows):
            self._lengths[row] = 0
            self._empty(row)

    def fork(self, row: int, into: int) -> None:
        self.reset([into])
        self._fill(into, self.read(row).tensors)

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        held = [tuple(t.clone() for t in self.read(row).tensors) for row in self._permutation(index)]
        for row, tensors in enumerate(held):
            self.reset([row])
            self._fill(row, tensors)

    def _fill(self, row: int, tensors: tuple[Tensor, ...]) -> None:
        """The tokens of an empty row."""
        length = len(tensors[0])
        self._reserve(row, length)
        for target, source in zip(self._storage[row], tensors, strict=True):
            target[:length] = source
        self._lengths[row] = length

    def _restore(self, row: int, tensors: tuple[Tensor, ...]) -> None:
        self._lengths[row] = 0
        self._fill(row, tensors)

    def _check_restorable(self, lengths: Sequence[int], gaps: Sequence[tuple[int, int]]) -> None:
        self._check_whole(gaps)
        self._check_max_len(lengths, self.max_len)

    def nbytes(self) -> int:
        return sum(t.nbytes for row in self._storage for t in row)
