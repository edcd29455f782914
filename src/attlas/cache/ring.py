"""A rolling buffer: the first `sinks` tokens and the last `window` tokens of each row, in a fixed number of slots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attlas.cache.part import Held, PartSpec, Table
from attlas.cache.tokens import Span, TokenPart, allocate, axis_of, slices
from attlas.errors import OptionError


class RingPart(TokenPart):
    """Token p is slot p while p < sinks, and slot sinks + (p - sinks) mod window afterwards: token p overwrites token p - window.

    max_len   an upper bound on the tokens of a row; when it is below window + sinks only `max_len` slots are allocated
    rollback  further tokens kept beyond the window, so that `truncate` can take back rollback + 1 tokens between steps
              (speculation)

    One token overwrites one that no later query may ask for, so it is written at once. A chunk of several tokens would overwrite
    what its first queries need: it is kept aside (by reference: do not change the tensors given to `write` before `end_step`),
    read as [old ; new], and enters the buffer at `end_step`. Afterwards a row never holds more than window + rollback + sinks
    tokens.

    Reads return slot order: a wrapped buffer is one view whose axis has up to three segments. Reads of a chunk that was kept
    aside copy. A `span` leaves out the sinks or the window as a whole, which keeps the other one a view.
    Bytes: rows * min(window + rollback + sinks, max_len) * elements per token, plus the chunks of an open step.
    Source: Mistral 7B (arXiv 2310.06825) for the buffer, StreamingLLM (arXiv 2309.17453) for the sinks.
    """

    def __init__(
        self,
        spec: PartSpec,
        rows: int,
        max_len: int | None = None,
        *,
        rollback: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if spec.window is None or rollback < 0:
            raise OptionError(f"RingPart({spec}, rollback={rollback}): a rolling buffer needs spec.window and rollback >= 0")
        super().__init__(spec, rows, dtype, device)
        self.max_len, self.rollback = max_len, rollback
        slots = spec.sinks + spec.window + rollback
        slots = slots if max_len is None else min(slots, max_len)
        self._sinks = min(spec.sinks, slots)
        self._ring = slots - self._sinks
        self._storage = tuple(allocate((rows, slots, *shape), self.dtype, self.device) for _, shape in spec.tensors)
        self._aside: dict[int, tuple[Tensor, ...]] = {}  # row -> tokens of this step that are not in the buffer yet
        self._begin: dict[int, int] = {}  # row -> its length when the step's first tokens came

    # ---- geometry of the slots ----------------------------------------------------------------------------------------------

    def _stored(self, row: int) -> int:
        """Tokens seen when the chunk aside is not counted."""
        aside = self._aside.get(row)
        return self._lengths[row] - (0 if aside is None else len(aside[0]))

    def _first_rolling(self, row: int) -> int:
        """Lowest position behind the sinks that is held."""
        return self._gaps[row][1] or self._sinks

    def _slots(self, first: int, end: int) -> list[tuple[int, int, int]]:
        """(slot, position, count) of the positions first ... end-1, in order of position. At most one lap."""
        runs = []
        if first < self._sinks:
            runs.append((first, first, min(end, self._sinks) - first))
        first = max(first, self._sinks)
        if first < end:
            offset = (first - self._sinks) % self._ring
            count = min(end - first, self._ring - offset)
            runs.append((self._sinks + offset, first, count))
            if first + count < end:
                runs.append((self._sinks, first + count, end - first - count))
        return runs

    def _held_slots(self, row: int) -> list[tuple[int, int, int]]:
        """(slot, position, count) of everything in the buffer, ascending by slot."""
        stored = self._stored(row)
        runs = self._slots(0, min(stored, self._sinks)) + self._slots(max(self._first_rolling(row), self._sinks), stored)
        return sorted(runs)

    def _wanted_slots(self, row: int, span: Span | None) -> list[tuple[int, int, int]]:
        """The runs of `_held_slots` that meet the span: sinks alone, or the window alone, are one view each."""
        low, high = span if span is not None else (None, None)
        runs = self._held_slots(row)
        return [r for r in runs if (high is None or r[1] <= high) and (low is None or r[1] + r[2] > low)]

    # ---- writing ------------------------------------------------------------------------------------------------------------

    def _append(self, new: tuple[Tensor, ...], rows: Sequence[int], counts: Sequence[int]) -> None:
        self._check_max_len((self._lengths[row] + n for row, n in zip(rows, counts, strict=True)), self.max_len)
        new = tuple(t.to(self.dtype) for t in new)
        if self._append_single(new, rows, counts):
            return
        for row, (begin, end) in zip(rows, slices(counts), strict=True):
            if begin == end:
                continue
            tokens = tuple(t[begin:end] for t in new)
            self._begin.setdefault(row, self._lengths[row])
            if self._fits(row, end - begin):
                self._store(row, tokens)
            elif row in self._aside:
                self._aside[row] = tuple(torch.cat(pair) for pair in zip(self._aside[row], tokens, strict=True))
            else:
                self._aside[row] = tokens
            self._lengths[row] += end - begin

    def _append_single(self, new: tuple[Tensor, ...], rows: Sequence[int], counts: Sequence[int]) -> bool:
        """A decode step of several rows, one token each: one copy per tensor."""
        if len(rows) < 2 or set(counts) != {1} or not all(self._fits(row, 1) for row in rows):
            return False
        slots = [self._slots(self._lengths[row], self._lengths[row] + 1)[0][0] for row in rows]
        follow = all(row == rows[0] + i for i, row in enumerate(rows)) and len(set(slots)) == 1
        for storage, tokens in zip(self._storage, new, strict=True):
            if follow:
                storage[rows[0] : rows[0] + len(rows), slots[0]] = tokens
            else:
                storage[torch.tensor(rows, device=self.device), torch.tensor(slots, device=self.device)] = tokens
        for row in rows:
            self._begin.setdefault(row, self._lengths[row])
            self._advance(row, self._lengths[row] + 1)
            self._lengths[row] += 1
        return True

    def _fits(self, row: int, count: int) -> bool:
        """Can `count` tokens be stored without losing one that the first query of the step asks for?"""
        if row in self._aside:
            return False
        length = self._lengths[row]
        room = self._ring - max(0, length - self._first_rolling(row))
        new = length + count - self._begin.get(row, length)
        return count <= room + max(0, self._sinks - length) or new <= self.rollback + 1

    def _store(self, row: int, tokens: tuple[Tensor, ...]) -> None:
        """Put tokens that follow the stored ones into their slots; those that would be overwritten again at once are left out."""
        start = self._stored(row)
        end = start + len(tokens[0])
        runs = self._slots(start, max(start, min(end, self._sinks)))
        runs += self._slots(max(start, self._sinks, end - self._ring), end)
        for storage, t in zip(self._storage, tokens, strict=True):
            for slot, position, count in runs:
                storage[row, slot : slot + count] = t[position - start : position - start + count]
        self._advance(row, end)

    def _advance(self, row: int, stored: int) -> None:
        """Note what has been overwritten once the tokens before `stored` are in the buffer."""
        oldest = max(self._first_rolling(row), stored - self._ring)
        if oldest > self._sinks:
            self._gaps[row] = (self._sinks, oldest)

    def end_step(self) -> None:
        for row in list(self._aside):
            tokens = self._aside[row]
            self._store(row, tokens)
            del self._aside[row]
        self._begin.clear()

    # ---- reading ------------------------------------------------------------------------------------------------------------

    def read(self, row: int, span: Span | None = None) -> Held:
        runs, aside = self._wanted_slots(self._row(row), span), self._aside.get(row)
        axis = [(position, count) for _, position, count in runs]
        if aside is not None:
            axis.append((self._stored(row), len(aside[0])))
        views = _joined(runs) if runs or aside is None else []
        pieces = [[t[row, begin:end] for begin, end in views] for t in self._storage]
        for i, t in enumerate(aside or ()):
            pieces[i].append(t)
        return Held(tuple(p[0] if len(p) == 1 else torch.cat(p) for p in pieces), axis_of(*axis))

    def read_dense(self, rows: Sequence[int], span: Span | None = None) -> Held | None:
        if not rows or not self._even(rows) or self._aside.keys() & set(rows):
            return None
        runs = self._wanted_slots(rows[0], span)
        views = _joined(runs)
        if len(views) != 1:
            return None
        tensors = tuple(t[rows[0] : rows[0] + len(rows), views[0][0] : views[0][1]] for t in self._storage)
        return Held(tensors, axis_of(*((position, count) for _, position, count in runs)))

    def read_table(self, rows: Sequence[int]) -> Table | None:
        """As long as nothing has been dropped, a row is one page, and token p is its slot p."""
        if any(self._gaps[self._row(row)][1] or row in self._aside for row in rows):
            return None
        return Table(self._storage, torch.tensor(rows, dtype=torch.int32, device=self.device)[:, None])

    # ---- between steps ------------------------------------------------------------------------------------------------------

    def _cut(self, row: int, length: int) -> None:
        aside = self._aside.pop(row, None)
        if aside is not None:
            keep = length - (self._lengths[row] - len(aside[0]))
            if keep > 0:
                self._aside[row] = tuple(t[:keep] for t in aside)
        if row in self._begin:
            self._begin[row] = min(self._begin[row], length)

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        rows = self._permutation(index)
        if rows == list(range(self.rows)):
            return
        source = torch.tensor(rows, device=self.device)
        for t in self._storage:
            t.copy_(t.index_select(0, source))
        self._lengths = [self._lengths[row] for row in rows]
        self._gaps = [self._gaps[row] for row in rows]
        self._aside = {i: self._aside[row] for i, row in enumerate(rows) if row in self._aside}
        self._begin = {i: self._begin[row] for i, row in enumerate(rows) if row in self._begin}

    def fork(self, row: int, into: int) -> None:
        if self._row(row) == self._row(into):
            return
        for t in self._storage:
            t[into] = t[row]
        self._lengths[into], self._gaps[into] = self._lengths[row], self._gaps[row]
        for by_row in (self._aside, self._begin):
            by_row.pop(into, None)
            if row in by_row:
                by_row[into] = by_row[row]  # type: ignore[assignment]

    def reset(self, rows: Iterable[int] | None = None) -> None:
        for row in self._which(rows):
            self._lengths[row], self._gaps[row] = 0, (0, 0)
            self._aside.pop(row, None)
            self._begin.pop(row, None)

    def _check_restorable(self, lengths: Sequence[int], gaps: Sequence[tuple[int, int]]) -> None:
        self._check_max_len(lengths, self.max_len)

    def _restore(self, row: int, tokens: tuple[Tensor, ...]) -> None:
        length, (a, b) = self._lengths[row], self._gaps[row]
        end_of_front = a if b else length
        oldest = max(b if b else self._sinks, length - self._ring, self._sinks)
        for storage, t in zip(self._storage, tokens, strict=True):
            for slot, position, count in self._slots(0, min(self._sinks, end_of_front)) + self._slots(oldest, length):
                at = position - (b - a if b and position >= b else 0)
                storage[row, slot : slot + count] = t[at : at + count]
        self._gaps[row] = (self._sinks, oldest) if oldest > self._sinks else (0, 0)

    def nbytes(self) -> int:
        aside = {id(t): t.nbytes for tokens in self._aside.values() for t in tokens}
        return sum(t.nbytes for t in self._storage) + sum(aside.values())


def _joined(runs: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """Slot intervals [begin, end) that cover runs given in ascending order of slots, in the same order; at least one."""
    out: list[tuple[int, int]] = []
    for slot, _, count in runs:
        if out and out[-1][1] == slot:
            out[-1] = (out[-1][0], slot + count)
        else:
            out.append((slot, slot + count))
    return out or [(0, 0)]
