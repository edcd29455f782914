"""How the tokens of a step attend: cut into pieces that one kernel call after the other reads the cache for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attlas.kernels.cpu.attention import FEW_QUERIES
from attlas.shapes import SeqInfo

SHORT = 64  # tokens of a text; up to here each new token reads it alone, which is less work than a call for each sequence
LONG = 512  # tokens of a text; beyond, larger pieces pay
SMALL, LARGE = 32, 64  # tokens of a piece of texts up to there, and of longer ones


@dataclass(frozen=True)
class Run:
    """`count` pieces of `each` tokens that lie one after the other, from token `at` and piece `piece` of the step on."""

    at: int
    piece: int
    count: int
    each: int

    @property
    def end(self) -> int:
        return self.at + self.count * self.each


@dataclass(frozen=True, eq=False)
class Pieces:
    """A piece: tokens of one sequence that follow each other. They read what stands before them, and each other.

    runs    the pieces of the step in order, those of equal size together
    owners  the sequence of each piece
    ends    int64 [pieces]: tokens of its sequence up to the end of the piece
    """

    runs: tuple[Run, ...]
    owners: tuple[int, ...]
    ends: Tensor
    sequences: int

    @property
    def each(self) -> int:
        """Tokens of every sequence where all have as many and none is cut, else 0."""
        return self.runs[0].each if len(self.runs) == 1 and len(self.owners) == self.sequences else 0

    @cached_property
    def index(self) -> Tensor | None:
        """`owners` as a tensor; None where each sequence is one piece."""
        return torch.tensor(self.owners) if len(self.owners) != self.sequences else None


def cut(seq: SeqInfo, *, alone: bool = False) -> Pieces:
    """The pieces of a step; with `alone` every token is one. How a sequence is cut depends on itself only."""
    runs: list[Run] = []
    owners: list[int] = []
    ends: list[int] = []
    for owner, (first, n) in enumerate(zip(seq.first, seq.lengths, strict=True)):
        end = first
        for count, each in _cuts(first, n, alone):
            if runs and runs[-1].each == each:
                runs[-1] = replace(runs[-1], count=runs[-1].count + count)
            else:
                runs.append(Run(runs[-1].end if runs else 0, len(owners), count, each))
            owners += [owner] * count
            ends += range(end + each, end + count * each + 1, each)
            end += count * each
    return Pieces(tuple(runs), tuple(owners), torch.tensor(ends, dtype=torch.int64), seq.num_sequences)


def _cuts(first: int, n: int, alone: bool) -> Iterator[tuple[int, int]]:
    """(how many pieces, of how many tokens) of n tokens behind `first` others"""
    each = _size(first, n, alone)
    if n // each:
        yield n // each, each
    if n % each:
        yield 1, n % each


def _size(first: int, n: int, alone: bool) -> int:
    if alone or first + n <= SHORT:
        return 1
    if 0 < n <= FEW_QUERIES:  # one call of the kernel's reads them together
        return n
    return SMALL if first + n <= LONG else LARGE
