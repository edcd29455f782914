"""What every part of a layer's cache can do, and the value that says which part a mixer needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.errors import AttlasError, OptionError
from attlas.masks.geometry import Axis
from attlas.shapes import SeqInfo


class CacheError(AttlasError):
    """A cache was used in a way that its contents do not allow; the message restates the call. Nothing was changed."""


@dataclass(frozen=True)
class PartSpec:
    """What a part holds.

    kind     "kv" (keys and values), "latent" (compressed keys and values) or "tokens" (anything else): tensors per token;
             "lookahead": tensors per token that later tokens change; "state": tensors per sequence
    tensors  (name, shape per token or sequence), e.g. (("k", (Hkv, D)), ("v", (Hkv, Dv)))
    window   how many of the last tokens, the newest included, later tokens may still ask for; None = all
    sinks    how many of the first tokens stay besides the window
    group    one entry of the tensors stands for this many tokens; window and sinks then count entries
    dtype    None = the dtype of the cache
    """

    kind: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    window: int | None = None
    sinks: int = 0
    dtype: torch.dtype | None = None
    group: int = 1

    def __post_init__(self) -> None:
        tensors = tuple((str(name), tuple(int(n) for n in shape)) for name, shape in self.tensors)
        object.__setattr__(self, "tensors", tensors)
        names = [name for name, _ in tensors]
        if not names or len(set(names)) != len(names):
            raise OptionError(f"{self}: the tensors need distinct names")
        if (self.window is not None and self.window < 1) or self.sinks < 0 or self.group < 1:
            raise OptionError(
                f"{self}: window must be at least 1 (it counts the newest token), sinks at least 0, group at least 1"
            )

    def elements(self) -> int:
        """Numbers held per token (or per group of tokens)."""
        return sum(torch.Size(shape).numel() for _, shape in self.tensors)


@dataclass(frozen=True, eq=False)
class Table:
    """The storage of rows that hold every token: token p of row i is tensors[j][block_table[i, p // page_size], p % page_size].

    tensors      [pages, page_size, ...] each, in the order of the spec; not a copy
    block_table  int32 [rows, blocks]
    scales       where the tensors hold 8-bit numbers: fp32 [pages, page_size, ...] for each, without the last dimension; what is
                 stored is number times scale. Else none
    """

    tensors: tuple[Tensor, ...]
    block_table: Tensor
    scales: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Held:
    """What a read returns: `tensors` [n, ...] (a dense read: [rows, n, ...]) in the order of the spec, and `axis`, the absolute
    positions of the n tokens in that order."""

    tensors: tuple[Tensor, ...]
    axis: Axis


class Part(ABC):
    """One bundle of tensors for many rows; a row serves one sequence.

    The life of a step: `write` the new tokens, `read` as often as needed, `end_step`. Between steps a part may be truncated,
    reordered, forked, reset, saved and loaded. All positions are absolute. A part stores values, not gradients: `write` detaches.
    """

    spec: PartSpec
    cascade: bool = False  # read pages that rows of a step share once for all of them; a row's bits then depend on its company

    @property
    @abstractmethod
    def rows(self) -> int:
        """Number of rows."""

    @property
    @abstractmethod
    def lengths(self) -> tuple[int, ...]:
        """Tokens seen by each row, dropped ones included: the absolute position of its next token."""

    @abstractmethod
    def write(self, new: tuple[Tensor, ...], seq: SeqInfo) -> None:
        """Append packed tokens [T, ...]: seq.lengths[i] of them to row seq.rows[i]. seq.first must equal the rows' lengths (a
        SeqInfo without starts and keys means: go on where the row stands). Raises ShapeError or CacheError, and then nothing is
        written."""

    @abstractmethod
    def read(self, row: int, span: tuple[int | None, int | None] | None = None) -> Held:
        """The tokens that `row` holds, those just written included. `span` = (first, last) position wanted, both included, None =
        unlimited: what is returned has at least the held tokens of the span."""

    @abstractmethod
    def read_dense(self, rows: Sequence[int], span: tuple[int | None, int | None] | None = None) -> Held | None:
        """`read` of several rows as one view with a leading row dimension; None when the part has no such view."""

    def read_table(self, rows: Sequence[int]) -> Table | None:
        """The storage of several rows of any lengths as pages; None when a row is not laid out in the order of its positions."""
        return None

    @abstractmethod
    def missing(self, row: int) -> tuple[int, int]:
        """(first, end): the positions of seen tokens that the row no longer holds; (0, 0) when it holds all."""

    @abstractmethod
    def end_step(self) -> None:
        """The queries of this step are done: drop what only they needed."""

    @abstractmethod
    def check_truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        """Raise what `truncate` would raise."""

    @abstractmethod
    def truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        """Forget the tokens at and after `lengths[row]` (a dict row -> length, or one length per row). Raises UnsupportedError
        when tokens that the next query needs have been dropped; then no row is changed."""

    @abstractmethod
    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Row i becomes what row index[i] was (beam search). `index` has one entry per row and may repeat rows."""

    @abstractmethod
    def fork(self, row: int, into: int) -> None:
        """Row `into` becomes a copy of `row`; both go on independently."""

    @abstractmethod
    def reset(self, rows: Iterable[int] | None = None) -> None:
        """Empty the given rows, None = all."""

    @abstractmethod
    def save(self) -> dict[str, Tensor]:
        """Everything that is held, as fresh contiguous tensors (safe for torch.save with weights_only loading and for
        safetensors)."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `save`; what was held before is gone. Raises DataError or CacheError, and then nothing is changed."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the token storage held now."""
