"""A recurrent state: per row a bundle of tensors of fixed size (matrices, convolution tails, sums), whatever the length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from attlas.cache.part import CacheError, Held, Part, PartSpec
from attlas.errors import DataError, ShapeError, UnsupportedError
from attlas.shapes import SeqInfo, describe


class StatePart(Part):
    """The state after all tokens that a row has seen. `states` reads it, `put` replaces it and counts the tokens that made the
    new one.

    A state cannot be taken apart: `truncate` works only to the present length or to 0. For speculation, `fork` before and go on
    from the copy. An empty row is all zeros.
    """

    def __init__(self, spec: PartSpec, rows: int, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        self.spec = spec
        dtype = spec.dtype or dtype or torch.get_default_dtype()
        self.device = torch.empty(0, device=device).device
        with torch.inference_mode(False):
            self._tensors = tuple(torch.zeros((rows, *shape), dtype=dtype, device=device) for _, shape in spec.tensors)
        self._lengths = [0] * rows

    @property
    def rows(self) -> int:
        return len(self._lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self._lengths)

    def __repr__(self) -> str:
        return f"StatePart({[name for name, _ in self.spec.tensors]}, rows={self.rows}, lengths={self._lengths[:8]})"

    def states(self, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """The tensors [n, ...] of the given rows, in the order of the spec."""
        index = self._index(rows)
        return tuple(t[index] for t in self._tensors)

    def put(self, states: tuple[Tensor, ...], seq: SeqInfo) -> None:
        """Row seq.rows[i] becomes states[...][i], which is `seq.lengths[i]` tokens further. seq.first must equal the rows'
        lengths."""
        index = self._index(seq.rows)
        held = tuple(self._lengths[r] for r in seq.rows)
        if seq.first != held and (seq.starts is not None or seq.lengths_k is not None):
            raise CacheError(f"{self!r}.put: rows {seq.rows} stand at {held}, the new tokens start at {seq.first}")
        for t, new in zip(self._tensors, states, strict=True):
            if new.shape != (len(seq.rows), *t.shape[1:]):
                raise ShapeError(f"{self!r}.put: wanted a state {[len(seq.rows), *t.shape[1:]]}; got {describe(new=new)}")
        for t, new in zip(self._tensors, states, strict=True):
            t[index] = new.detach().to(t.dtype)
        for r, n in zip(seq.rows, seq.lengths, strict=True):
            self._lengths[r] += n

    def write(self, new: tuple[Tensor, ...], seq: SeqInfo) -> None:
        raise UnsupportedError(f"{self!r}.write: a state part holds no tokens; its mixer replaces the state with `put`")

    def read(self, row: int, span: tuple[int | None, int | None] | None = None) -> Held:
        raise UnsupportedError(f"{self!r}.read: a state part holds no tokens; `states` returns the state")

    def read_dense(self, rows: Sequence[int], span: tuple[int | None, int | None] | None = None) -> Held | None:
        raise UnsupportedError(f"{self!r}.read_dense: a state part holds no tokens; `states` returns the state")

    def missing(self, row: int) -> tuple[int, int]:
        return 0, self._lengths[row]

    def end_step(self) -> None:
        pass

    def check_truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        for row, length in self._wanted(lengths).items():
            if length not in (0, self._lengths[row]):
                raise UnsupportedError(
                    f"{self!r}.truncate(row {row} to {length}): a recurrent state of {self._lengths[row]} tokens cannot be taken "
                    "back; fork the row before the tokens that may be dropped"
                )

    def truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        self.check_truncate(lengths)
        self.reset(row for row, length in self._wanted(lengths).items() if length == 0)

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        rows = [int(i) for i in index]
        if len(rows) != self.rows:
            raise CacheError(f"{self!r}.reorder: {len(rows)} entries for {self.rows} rows")
        source = self._index(rows)
        for t in self._tensors:
            t.copy_(t[source])
        self._lengths = [self._lengths[i] for i in rows]

    def fork(self, row: int, into: int) -> None:
        self._index((row, into))
        for t in self._tensors:
            t[into] = t[row]
        self._lengths[into] = self._lengths[row]

    def reset(self, rows: Iterable[int] | None = None) -> None:
        rows = list(range(self.rows) if rows is None else rows)
        index = self._index(rows)
        for t in self._tensors:
            t[index] = 0
        for row in rows:
            self._lengths[row] = 0

    def save(self) -> dict[str, Tensor]:
        saved = {name: t.clone() for (name, _), t in zip(self.spec.tensors, self._tensors, strict=True)}
        return saved | {"lengths": torch.tensor(self._lengths, dtype=torch.int64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        names = [name for name, _ in self.spec.tensors]
        fits = set(state) == {*names, "lengths"} and all(
            state[n].shape == t.shape and state[n].dtype == t.dtype for n, t in zip(names, self._tensors, strict=True)
        )
        if not fits or state["lengths"].shape != (self.rows,) or bool((state["lengths"] < 0).any()):
            raise DataError(f"{self!r}.load: the saved tensors do not fit; got {describe(**state)}")
        for name, t in zip(names, self._tensors, strict=True):
            t.copy_(state[name])
        self._lengths = [int(n) for n in state["lengths"]]

    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self._tensors)

    def _wanted(self, lengths: Mapping[int, int] | Sequence[int]) -> dict[int, int]:
        wanted = dict(lengths) if isinstance(lengths, Mapping) else dict(enumerate(lengths))
        self._index(tuple(wanted))
        return wanted

    def _index(self, rows: Sequence[int]) -> Tensor:
        if any(not 0 <= r < self.rows for r in rows):
            raise CacheError(f"rows {list(rows)} of {self!r}: rows are 0 ... {self.rows - 1}")
        return torch.tensor(list(rows), dtype=torch.int64, device=self.device)
