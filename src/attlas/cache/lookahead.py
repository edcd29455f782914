"""What earlier tokens have gathered from later ones: one tensor per token that every new token changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from attlas.cache.contiguous import ContiguousPart
from attlas.cache.part import CacheError
from attlas.errors import ShapeError, UnsupportedError
from attlas.shapes import SeqInfo, describe


class LookaheadPart(ContiguousPart):
    """A contiguous part whose tensors are rewritten: `put` appends the new tokens and replaces what the held ones have gathered.

    As with a state, what a token has added cannot be taken out again: `truncate` works only to the present length or to 0; for
    speculation, `fork` before and go on from the copy. Never paged: two sequences with the same beginning do not hold the same.
    """

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
        self._reserve(end)
        for storage, t in zip(self._storage, gathered, strict=True):
            for row, new in zip(rows, t, strict=True):
                storage[row, first:end] = new.detach()
        for row in rows:
            self._lengths[row] = end

    def write(self, new: tuple[Tensor, ...], seq: SeqInfo) -> None:
        raise UnsupportedError(f"{self!r}.write: new tokens change what earlier ones hold; its mixer replaces both with `put`")

    def check_truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        super().check_truncate(lengths)
        for row, length in self._wanted(lengths).items():
            if length not in (0, self._lengths[row]):
                raise UnsupportedError(
                    f"{self!r}.truncate(row {row} to {length}): what the dropped tokens have added to earlier ones cannot be "
                    "taken back; fork the row before the tokens that may be dropped"
                )

    def _reserve(self, needed: int) -> None:
        if self.max_len is not None and needed > self.max_len:
            raise CacheError(f"{self!r}: a row would hold {needed} tokens, but the cache was made with max_len={self.max_len}")
        super()._reserve(needed)
