"""What the parts that store something for each token share: checks, bookkeeping of positions, truncation rule, saving."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from attlas.cache.part import CacheError, Part, PartSpec
from attlas.errors import DataError, ShapeError, UnsupportedError
from attlas.kernels.cpu.pages import large_pages
from attlas.masks.geometry import Axis, Segment
from attlas.shapes import SeqInfo, describe

Span = tuple[int | None, int | None]
FIRST_CAPACITY = 16  # slots of a storage that grows


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised storage that can be written inside and outside of inference mode."""
    with torch.inference_mode(False):
        return large_pages(torch.empty(tuple(shape), dtype=dtype, device=device))


def grown(capacity: int, needed: int) -> int:
    """Slots of a storage that has to hold `needed` tokens: at least twice as many as before, so that a token is rarely copied."""
    return max(needed, 2 * capacity, FIRST_CAPACITY)


def axis_of(*runs: tuple[int, int]) -> Axis:
    """The axis of runs (first position, count) in array order."""
    return Axis(tuple(Segment(count, first, 0, first) for first, count in runs))


def slices(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, end) of each sequence on the packed token axis."""
    out, at = [], 0
    for n in counts:
        out.append((at, at + n))
        at += n
    return out


class TokenPart(Part):
    """A row holds the positions [0, a) and [b, length), where [a, b) = `missing(row)` is the gap that a window has left."""

    def __init__(self, spec: PartSpec, rows: int, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        self.spec = spec
        self.dtype = spec.dtype or dtype or torch.get_default_dtype()
        # "cuda" becomes "cuda:0", so that it can be compared with the device of a tensor
        self.device = torch.empty(0, device=device).device
        self._lengths = [0] * rows
        self._gaps = [(0, 0)] * rows

    # ---- what a storage writes --------------------------------------------------------------------------------------------

    @abstractmethod
    def _append(self, new: tuple[Tensor, ...], rows: Sequence[int], counts: Sequence[int]) -> None:
        """Store checked tokens and advance the lengths; raise CacheError before anything changes."""

    @abstractmethod
    def _cut(self, row: int, length: int) -> None:
        """Shorten a row; the truncation rule has been checked."""

    @abstractmethod
    def _restore(self, row: int, tensors: tuple[Tensor, ...]) -> None:
        """Fill an empty row with the held tokens in ascending position; its length and gap are already set."""

    @abstractmethod
    def _check_restorable(self, lengths: Sequence[int], gaps: Sequence[tuple[int, int]]) -> None:
        """Raise DataError or CacheError when this storage cannot hold such rows."""

    # ---- bookkeeping --------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    def missing(self, row: int) -> tuple[int, int]:
        return self._gaps[self._row(row)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.spec.kind}, rows={self.rows}, lengths={self._shown()}, {self.dtype}, {self.device})"

    def _shown(self) -> str:
        return str(self._lengths) if self.rows <= 8 else f"[{', '.join(map(str, self._lengths[:8]))}, ...]"

    def _row(self, row: int) -> int:
        if not 0 <= row < len(self._lengths):
            raise CacheError(f"row {row} of {self!r}: rows are 0 ... {self.rows - 1}")
        return row

    def _held(self, row: int, span: Span | None) -> list[tuple[int, int]]:
        """Held ranges [begin, end) of positions inside the span, ascending."""
        length, (a, b) = self._lengths[self._row(row)], self._gaps[row]
        low, high = span if span is not None else (None, None)
        low = 0 if low is None else max(low, 0)
        high = length if high is None else min(high + 1, length)
        ranges = [(0, a), (b, length)] if b else [(0, length)]
        cut = [(max(begin, low), min(end, high)) for begin, end in ranges]
        return [(begin, end) for begin, end in cut if begin < end]

    def _even(self, rows: Sequence[int]) -> bool:
        """Rows that follow each other and hold the same positions."""
        first = rows[0]
        same = (self._lengths[self._row(first)], self._gaps[first])
        return all(r == first + i and (self._lengths[self._row(r)], self._gaps[r]) == same for i, r in enumerate(rows))

    # ---- writing ------------------------------------------------------------------------------------------------------------

    def write(self, new: tuple[Tensor, ...], seq: SeqInfo) -> None:
        reason = self._misfit(new, seq)
        if reason:
            names = {name: t for (name, _), t in zip(self.spec.tensors, new, strict=False)}
            raise (ShapeError if reason[0] == "shape" else CacheError)(
                f"write({describe(**names)}, {seq}) to {self!r}: {reason[1]}"
            )
        self._append(tuple(t.detach() for t in new), seq.rows, seq.lengths)

    def _misfit(self, new: tuple[Tensor, ...], seq: SeqInfo) -> tuple[str, str] | None:
        if len(new) != len(self.spec.tensors):
            return "shape", f"the part stores {len(self.spec.tensors)} tensors, got {len(new)}"
        for (name, shape), t in zip(self.spec.tensors, new, strict=True):
            if t.shape != (seq.total, *shape):
                return "shape", f"{name} must be {[seq.total, *shape]}: the {seq.total} tokens of seq"
            if t.device != self.device:
                return "shape", f"{name} must be on {self.device}"
        rows = seq.rows
        if len(set(rows)) != len(rows):
            return "cache", "two sequences would write to one row"
        for row in rows:
            self._row(row)
        if seq.starts is None and seq.lengths_k is None:
            return None
        held = tuple(self._lengths[row] for row in rows)
        if any(n and first != h for n, first, h in zip(seq.lengths, seq.first, held, strict=True)):
            return "cache", f"the next positions of these rows are {held}, not {seq.first}"
        return None

    # ---- between steps ------------------------------------------------------------------------------------------------------

    def end_step(self) -> None:
        """Nothing to drop."""

    def check_truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        for row, length in self._wanted(lengths).items():
            if not 0 <= length <= self._lengths[row]:
                raise CacheError(f"truncate row {row} of {self!r} to {length}: it must be between 0 and the present length")
            a, b = self._gaps[row]
            if not b or length <= a or self.spec.window is None:
                continue
            shortest = b + self.spec.window - 1  # the next query looks back window - 1 tokens
            if length < shortest:
                raise UnsupportedError(
                    f"truncate row {row} of {self!r} to {length}: the window of {self.spec.window} needs tokens that have been "
                    f"dropped; the shortest possible length is {shortest}"
                )

    def truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        self.check_truncate(lengths)
        for row, length in self._wanted(lengths).items():
            if length == self._lengths[row]:
                continue
            if length <= self._gaps[row][0]:
                self._gaps[row] = (0, 0)
            self._cut(row, length)
            self._lengths[row] = length

    def _wanted(self, lengths: Mapping[int, int] | Sequence[int]) -> dict[int, int]:
        if isinstance(lengths, Mapping):
            return {self._row(int(row)): int(length) for row, length in lengths.items()}
        if len(lengths) != self.rows:
            raise CacheError(f"truncate {self!r} to {lengths}: wanted a length for each row, or a dict row -> length")
        return dict(enumerate(int(length) for length in lengths))

    def _permutation(self, index: Sequence[int] | Tensor) -> list[int]:
        rows = [int(i) for i in (index.tolist() if isinstance(index, Tensor) else index)]
        if len(rows) != self.rows:
            raise CacheError(f"reorder {self!r} by {rows}: wanted one source row for each row")
        return [self._row(row) for row in rows]

    def _which(self, rows: Iterable[int] | None) -> list[int]:
        return list(range(self.rows)) if rows is None else [self._row(int(row)) for row in rows]

    def _check_max_len(self, lengths: Iterable[int], max_len: int | None) -> None:
        longest = max(lengths, default=0)
        if max_len is not None and longest > max_len:
            raise CacheError(f"{self!r}: a row would hold {longest} tokens, but the cache was made with max_len={max_len}")

    # ---- saving -------------------------------------------------------------------------------------------------------------

    def save(self) -> dict[str, Tensor]:
        """Layout-free, so that what one kind of part saved another can load:
        lengths int64 [rows]; gaps int64 [rows, 2]; tensors.<name> [n, ...]: the held tokens row after row, ascending in
        position."""
        pieces: list[list[Tensor]] = [[] for _ in self.spec.tensors]
        for row in range(self.rows):
            held = self.read(row)
            order = held.axis.positions(self.device).argsort()
            for piece, t in zip(pieces, held.tensors, strict=True):
                piece.append(t.index_select(0, order))
        state = {f"tensors.{name}": torch.cat(p) for (name, _), p in zip(self.spec.tensors, pieces, strict=True)}
        gaps = torch.tensor(self._gaps, dtype=torch.int64).view(self.rows, 2)
        return {"lengths": torch.tensor(self._lengths, dtype=torch.int64), "gaps": gaps, **state}

    def load(self, state: Mapping[str, Tensor]) -> None:
        lengths, gaps, tensors = self._checked_state(state)
        counts = [length - (b - a) for length, (a, b) in zip(lengths, gaps, strict=True)]
        self.reset()
        for row, (begin, end) in enumerate(slices(counts)):
            self._lengths[row], self._gaps[row] = lengths[row], gaps[row]
            if end > begin:
                self._restore(row, tuple(t[begin:end] for t in tensors))

    def _checked_state(self, state: Mapping[str, Tensor]) -> tuple[list[int], list[tuple[int, int]], list[Tensor]]:
        call = f"load into {self!r}"
        names = ["lengths", "gaps", *(f"tensors.{name}" for name, _ in self.spec.tensors)]
        if set(names) != set(state):
            raise DataError(f"{call}: wanted the tensors {names}, got {sorted(state)}")
        if state["lengths"].shape != (self.rows,) or state["gaps"].shape != (self.rows, 2):
            raise DataError(f"{call}: the file is for {len(state['lengths'])} rows")
        lengths = [int(n) for n in state["lengths"].tolist()]
        gaps = [(int(a), int(b)) for a, b in state["gaps"].tolist()]
        total = 0
        for row, (length, (a, b)) in enumerate(zip(lengths, gaps, strict=True)):
            if not (a == b == 0 and length >= 0) and not 0 <= a < b <= length:
                raise DataError(f"{call}: row {row} of {length} tokens cannot lack the positions {a} ... {b - 1}")
            total += length - (b - a)
            self._check_window(row, length, (a, b))
        self._check_restorable(lengths, gaps)
        tensors = [state[name].to(self.device) for name in names[2:]]
        for (name, shape), t in zip(self.spec.tensors, tensors, strict=True):
            if t.shape != (total, *shape) or t.dtype != self.dtype:
                raise DataError(f"{call}: {name} must be {[total, *shape]} {self.dtype}; got {describe(**{name: t})}")
        return lengths, gaps, tensors

    def _check_whole(self, gaps: Sequence[tuple[int, int]]) -> None:
        """For parts that drop nothing."""
        for row, (a, b) in enumerate(gaps):
            if b:
                raise DataError(f"load into {self!r}: it holds every token, row {row} lacks the positions {a} ... {b - 1}")

    def _check_window(self, row: int, length: int, gap: tuple[int, int]) -> None:
        a, b = gap
        if not b:
            return
        window = self.spec.window
        if window is None or a < self.spec.sinks or b > length - window + 1:
            needs = "all tokens" if window is None else f"the first {self.spec.sinks} and the last {window - 1} tokens"
            raise DataError(
                f"load into {self!r}: row {row} of {length} tokens lacks the positions {a} ... {b - 1}; this part needs {needs}"
            )
