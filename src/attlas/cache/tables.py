"""Block tables, and the reading half of a part whose tokens lie in pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from attlas.cache.part import Held, Table
from attlas.cache.store import PageStore
from attlas.cache.tokens import Span, TokenPart, axis_of
from attlas.shapes import SeqInfo

NO_PAGE = -1


def consecutive(pages: Sequence[int]) -> bool:
    return all(b == a + 1 for a, b in pairwise(pages))


def real(pages: Iterable[int]) -> list[int]:
    """Without those that a window has dropped."""
    return [page for page in pages if page != NO_PAGE]


class BlockTables:
    """The pages of each row in order, as lists and, kept in step, as one int32 tensor. Page i of a row holds its positions
    i * page_size ... ; -1 = dropped by a window. Knows nothing of references: whoever changes a list says so with `touch`."""

    def __init__(self, rows: int, page_size: int, device: torch.device) -> None:
        self.page_size = page_size
        self.pages: list[list[int]] = [[] for _ in range(rows)]
        self._tensor = torch.full((rows, 0), NO_PAGE, dtype=torch.int32, device=device)
        self._width = 0
        self._stale = set(range(rows))  # rows of `_tensor` that no longer agree with `pages`
        # The layers of a step ask for the same rows of the table and for the same slots: the last answers.
        self._selected: tuple[tuple[int, ...], Tensor] | None = None
        self._written: tuple[object, Tensor] | None = None

    def touch(self, rows: Iterable[int] | None = None) -> None:
        """The pages of these rows have changed; None = of all."""
        self._stale.update(range(len(self.pages)) if rows is None else rows)
        self._selected = self._written = None

    def blocks(self, tokens: int) -> int:
        """Pages that `tokens` tokens take."""
        return -(-tokens // self.page_size)

    def slot(self, row: int, position: int) -> int:
        return self.pages[row][position // self.page_size] * self.page_size + position % self.page_size

    def slots(self, row: int, begin: int, end: int) -> list[int]:
        """Slots of the positions begin ... end - 1, page by page."""
        out: list[int] = []
        while begin < end:
            stop = min(end, (begin // self.page_size + 1) * self.page_size)
            slot = self.slot(row, begin)
            out.extend(range(slot, slot + stop - begin))
            begin = stop
        return out

    def remember(self, key: object, slots: Sequence[int]) -> Tensor:
        """`slots` as a tensor, which `remembered` returns for `key` until a page changes."""
        with torch.inference_mode(False):
            self._written = key, torch.tensor(slots, dtype=torch.int64, device=self._tensor.device)
        return self._written[1]

    def remembered(self, key: object) -> Tensor | None:
        return self._written[1] if self._written is not None and self._written[0] == key else None

    @property
    def tensor(self) -> Tensor:
        """int32 [rows, max_blocks], -1 past the end of a row."""
        if self._stale:
            self._refresh()
        return self._tensor[:, : self._width]

    def select(self, rows: Sequence[int]) -> Tensor:
        """The block table of some rows."""
        key, table = tuple(rows), self.tensor
        if key == tuple(range(len(self.pages))):
            return table
        if self._selected is None or self._selected[0] != key:
            self._selected = key, table[list(rows)]
        return self._selected[1]

    def _refresh(self) -> None:
        self._width = width = max(map(len, self.pages), default=0)
        old = self._tensor
        if width > old.shape[1]:
            with torch.inference_mode(False):
                self._tensor = torch.full((len(self.pages), 2 * width), NO_PAGE, dtype=torch.int32, device=old.device)
            self._tensor[:, : old.shape[1]] = old
        for row in self._stale:
            table = self.pages[row]
            self._tensor[row, : len(table)] = torch.tensor(table, dtype=torch.int32, device=old.device)
            self._tensor[row, len(table) :] = NO_PAGE
        self._stale.clear()


class TablePart(TokenPart):
    """Reads tokens through `tables` from `store`. Who owns the pages, and when they come and go, is the subclass's affair."""

    tables: BlockTables
    store: PageStore

    @property
    def page_size(self) -> int:
        return self.tables.page_size

    @property
    def block_table(self) -> Tensor:
        """int32 [rows, max_blocks]: pages of each row in order, -1 = no page (past the end, or dropped by a window)."""
        return self.tables.tensor

    def pages(self, row: int) -> tuple[int, ...]:
        """The row's pages in order; -1 where the window has dropped one."""
        return tuple(self.tables.pages[self._row(row)])

    def slot_mapping(self, seq: SeqInfo) -> Tensor:
        """int32 [T]: page * page_size + offset of the tokens seq.first ... seq.first + seq.lengths - 1 of rows seq.rows; -1 where
        the row does not hold the position."""
        slots: list[int] = []
        for row, first, n in zip(seq.rows, seq.first, seq.lengths, strict=True):
            held = set().union(*(range(a, b) for a, b in self._held(row, (first, first + n - 1))))
            slots += [self.tables.slot(row, p) if p in held else NO_PAGE for p in range(first, first + n)]
        return torch.tensor(slots, dtype=torch.int32, device=self.device)

    def read(self, row: int, span: Span | None = None) -> Held:
        ranges = self._held(row, span) or [(0, 0)]
        pieces = [self._gather(row, begin, end) for begin, end in ranges]
        tensors = pieces[0] if len(pieces) == 1 else tuple(torch.cat(p) for p in zip(*pieces, strict=True))
        return Held(tensors, axis_of(*((begin, end - begin) for begin, end in ranges)))

    def _gather(self, row: int, begin: int, end: int) -> tuple[Tensor, ...]:
        first, last = begin // self.page_size, self.tables.blocks(end)
        pages = self.tables.pages[row][first:last]
        base = pages[0] if pages and pages[-1] - pages[0] == len(pages) - 1 and consecutive(pages) else None
        index = self.block_table[row, first:last]
        at = first * self.page_size
        return tuple(t[begin - at : end - at] for t in self.store.gather(index, base))

    def read_dense(self, rows: Sequence[int], span: Span | None = None) -> Held | None:
        """None: rows over pages have no common view."""
        return None

    def read_table(self, rows: Sequence[int]) -> Table | None:
        if any(self._gaps[self._row(row)][1] for row in rows):
            return None
        return self.store.table(self.tables.select(rows))

    def _trail(self, length: int, keep: int) -> int:
        """First block that holds one of the last `keep` of `length` tokens."""
        return max(length - keep, 0) // self.page_size

    def nbytes(self) -> int:
        return len({page for table in self.tables.pages for page in table if page != NO_PAGE}) * self.store.page_bytes
