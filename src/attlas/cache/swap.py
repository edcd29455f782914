"""Rows that wait in host memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.cache.lookahead import LookaheadPart
from attlas.cache.part import CacheError, Part
from attlas.cache.records import SwapHandle
from attlas.cache.state import StatePart
from attlas.shapes import SeqInfo


@dataclass(frozen=True, eq=False)
class SavedPages:
    """One group's pages of a row: which blocks have one, and what is stored in them, contents[part][tensor] [pages, ...]."""

    held: list[bool]
    contents: list[list[Tensor]]

    @property
    def pages(self) -> int:
        return sum(self.held)


@dataclass(frozen=True, eq=False)
class SwappedRow:
    """A row in host memory."""

    salt: str
    length: int
    groups: list[SavedPages]
    own: list[list[Tensor]]  # of the parts without pages


class SwapSpace:
    """Copies of rows outside of the device, `budget` bytes in all. The memory of a row is pinned where the device is a GPU, and
    is its own: giving a row back frees exactly what it took."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._rows: dict[int, tuple[SwapHandle, SwappedRow]] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows)

    def fits(self, nbytes: int) -> bool:
        return self.used + nbytes <= self.budget

    def add(self, row: SwappedRow, nbytes: int) -> SwapHandle:
        held = [t for group in row.groups for part in group.contents for t in part] + [t for part in row.own for t in part]
        assert self.fits(nbytes) and sum(t.nbytes for t in held) == nbytes
        handle = SwapHandle(self._next, row.length, nbytes)
        self._next += 1
        self._rows[handle.number] = handle, row
        self.used += nbytes
        return handle

    def get(self, handle: SwapHandle) -> SwappedRow:
        held = self._rows.get(handle.number)
        if held is None or held[0] != handle:
            raise CacheError(f"{handle}: no such row in host memory; a handle can be used once")
        return held[1]

    def remove(self, handle: SwapHandle) -> None:
        self.get(handle)
        del self._rows[handle.number]
        self.used -= handle.nbytes


def row_tensors(part: Part, row: int) -> list[Tensor]:
    """What a part without pages holds of a row: its state, or its tokens."""
    return [t[0] for t in part.states([row])] if isinstance(part, StatePart) else list(part.read(row).tensors)


def put_row(part: Part, row: int, tensors: list[Tensor], length: int) -> None:
    """The same into an empty row, after `length` tokens."""
    assert isinstance(part, (StatePart, LookaheadPart)), part
    whole = tuple(t.to(part.device)[None] for t in tensors)
    if isinstance(part, StatePart):
        part.put(whole, SeqInfo((length,), ids=(row,)))
    else:
        part.put([row], 0, whole, length)


def to_host(t: Tensor) -> Tensor:
    """A copy in host memory, pinned when t is on a GPU."""
    out = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
    return out.copy_(t)
