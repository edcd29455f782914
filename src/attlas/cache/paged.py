"""Rows over pages: a row's block table lists the pages of its tokens; rows can share pages until one of them writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from attlas.cache.part import CacheError, Held, PartSpec, Table
from attlas.cache.pool import PagePool
from attlas.cache.tokens import Span, TokenPart, axis_of
from attlas.shapes import SeqInfo

NO_PAGE = -1


class PagedPart(TokenPart):
    """Token p of a row lies in page block_table[row, p // page_size], slot p % page_size.

    Pages are taken from the pool as tokens are written and returned as they are forgotten; a write that needs more pages than are
    free raises OutOfPagesError and changes nothing. `fork` and `reorder` share pages; a row that writes into a page with other
    references copies that page first (only the last, partly filled page of a row is ever written). With spec.window, `end_step`
    returns the pages that lie wholly outside of the window and the sinks.

    Reads gather the row's pages; when its pages follow each other in the pool they are views. `span` narrows a read to the token.
    Bytes: distinct pages in use by this part's rows (a shared page counts once) * page bytes; `pool.nbytes()` is the whole pool.
    `save` does not keep the sharing of pages.
    Source: PagedAttention, Kwon et al. 2023, arXiv 2309.06180.
    """

    def __init__(self, spec: PartSpec, rows: int, pool: PagePool) -> None:
        if spec.tensors != pool.spec.tensors:
            raise CacheError(f"PagedPart({spec}): the pool was made for {pool.spec}")
        super().__init__(spec, rows, pool.dtype, pool.device)
        self.dtype = pool.dtype
        self.pool = pool
        self._tables: list[list[int]] = [[] for _ in range(rows)]
        self._table = torch.full((rows, 0), NO_PAGE, dtype=torch.int32, device=self.device)
        self._width = 0
        self._stale = set(range(rows))  # rows of `_table` that no longer agree with `_tables`

    # ---- where tokens lie ---------------------------------------------------------------------------------------------------

    @property
    def page_size(self) -> int:
        return self.pool.page_size

    @property
    def block_table(self) -> Tensor:
        """int32 [rows, max_blocks]: pages of each row in order, -1 = no page (past the end, or dropped by a window)."""
        if self._stale:
            self._refresh()
        return self._table[:, : self._width]

    def _refresh(self) -> None:
        self._width = width = max((len(t) for t in self._tables), default=0)
        if width > self._table.shape[1]:
            grown = torch.full((self.rows, 2 * width), NO_PAGE, dtype=torch.int32, device=self.device)
            grown[:, : self._table.shape[1]] = self._table
            self._table = grown
        for row in self._stale:
            table = self._tables[row]
            self._table[row, : len(table)] = torch.tensor(table, dtype=torch.int32, device=self.device)
            self._table[row, len(table) :] = NO_PAGE
        self._stale.clear()

    def pages(self, row: int) -> tuple[int, ...]:
        """The row's pages in order; -1 where the window has dropped one."""
        return tuple(self._tables[self._row(row)])

    def slot_mapping(self, seq: SeqInfo) -> Tensor:
        """int32 [T]: page * page_size + offset of the tokens seq.first ... seq.first + seq.lengths - 1 of rows seq.rows; -1 where
        the row does not hold the position."""
        slots: list[int] = []
        for row, first, n in zip(seq.rows, seq.first, seq.lengths, strict=True):
            held = set().union(*(range(a, b) for a, b in self._held(row, (first, first + n - 1))))
            slots += [self._slot(row, p) if p in held else NO_PAGE for p in range(first, first + n)]
        return torch.tensor(slots, dtype=torch.int32, device=self.device)

    def _slot(self, row: int, position: int) -> int:
        return self._tables[row][position // self.page_size] * self.page_size + position % self.page_size

    def _blocks(self, tokens: int) -> int:
        """Pages that `tokens` tokens take."""
        return -(-tokens // self.page_size)

    # ---- writing ------------------------------------------------------------------------------------------------------------

    def pages_needed(self, rows: Sequence[int], counts: Sequence[int]) -> int:
        """Free pages that writing counts[i] tokens to row rows[i] will take, copies of shared pages included."""
        fresh, writers = 0, Counter[int]()
        for row, n in zip(rows, counts, strict=True):
            length, table = self._lengths[self._row(row)], self._tables[row]
            fresh += self._blocks(length + n) - len(table)
            if n and length % self.page_size:
                writers[table[-1]] += 1
        # The last one to write into a page may keep it, unless somebody who does not write holds it too.
        return fresh + sum(min(n, self.pool.references(page) - 1) for page, n in writers.items())

    def _append(self, new: tuple[Tensor, ...], rows: Sequence[int], counts: Sequence[int]) -> None:
        self.pool.require(self.pages_needed(rows, counts))
        size = self.page_size
        slots: list[int] = []
        for row, n in zip(rows, counts, strict=True):
            if not n:
                continue
            length, table = self._lengths[row], self._tables[row]
            if length % size:
                self._own_last_page(row)
            fresh = self._blocks(length + n) - len(table)
            if fresh:
                table += self.pool.allocate(fresh)
                self._stale.add(row)
            at, end = length, length + n
            while at < end:
                stop = min(end, (at // size + 1) * size)
                slot = table[at // size] * size + at % size
                slots.extend(range(slot, slot + stop - at))
                at = stop
            self._lengths[row] = end
        self.pool.put(torch.tensor(slots, dtype=torch.int64, device=self.device), new)

    def _own_last_page(self, row: int) -> None:
        """Copy the row's last page when somebody else refers to it."""
        page = self._tables[row][-1]
        if self.pool.references(page) == 1:
            return
        (copy,) = self.pool.allocate(1)
        self.pool.copy(page, copy)
        self.pool.release([page])
        self._tables[row][-1] = copy
        self._stale.add(row)

    def end_step(self) -> None:
        if self.spec.window is None:
            return
        size, front = self.page_size, self._blocks(self.spec.sinks)
        for row, length in enumerate(self._lengths):
            keep = max(length - self.spec.window, 0) // size  # first page with a token of the window
            a, b = self._gaps[row]
            first = max(front, self._blocks(a), b // size)
            if keep <= first:
                continue
            self.pool.release([page for page in self._tables[row][first:keep] if page != NO_PAGE])
            self._tables[row][first:keep] = [NO_PAGE] * (keep - first)
            self._gaps[row] = (a if b else front * size, keep * size)
            self._stale.add(row)

    # ---- reading ------------------------------------------------------------------------------------------------------------

    def read(self, row: int, span: Span | None = None) -> Held:
        ranges = self._held(row, span) or [(0, 0)]
        pieces = [self._gather(row, begin, end) for begin, end in ranges]
        tensors = pieces[0] if len(pieces) == 1 else tuple(torch.cat(p) for p in zip(*pieces, strict=True))
        return Held(tensors, axis_of(*((begin, end - begin) for begin, end in ranges)))

    def _gather(self, row: int, begin: int, end: int) -> tuple[Tensor, ...]:
        first, last = begin // self.page_size, self._blocks(end)
        pages = self._tables[row][first:last]
        base = pages[0] if pages and pages[-1] - pages[0] == len(pages) - 1 and _consecutive(pages) else None
        index = self.block_table[row, first:last]
        at = first * self.page_size
        return tuple(t[begin - at : end - at] for t in self.pool.gather(index, base))

    def read_dense(self, rows: Sequence[int], span: Span | None = None) -> Held | None:
        """None: rows over pages have no common view."""
        return None

    def read_table(self, rows: Sequence[int]) -> Table | None:
        if any(self._gaps[self._row(row)][1] for row in rows):
            return None
        table, rows = self.block_table, list(rows)
        return Table(self.pool.tensors, table if rows == list(range(self.rows)) else table[rows])

    # ---- between steps ------------------------------------------------------------------------------------------------------

    def _cut(self, row: int, length: int) -> None:
        keep = self._blocks(length)
        self.pool.release([page for page in self._tables[row][keep:] if page != NO_PAGE])
        del self._tables[row][keep:]
        self._stale.add(row)

    def _drop(self, row: int) -> None:
        self._cut(row, 0)
        self._lengths[row], self._gaps[row] = 0, (0, 0)

    def attach(self, row: int, pages: Sequence[int], length: int) -> None:
        """Give an empty row the first `length` tokens that lie in `pages` (a shared prefix); the pages get one more reference."""
        if self._lengths[self._row(row)]:
            raise CacheError(f"attach to row {row} of {self!r}: the row is not empty")
        if self._blocks(length) != len(pages):
            raise CacheError(
                f"attach to row {row} of {self!r}: {length} tokens take {self._blocks(length)} pages, got {len(pages)}"
            )
        self.pool.retain(pages)
        self._tables[row] = list(pages)
        self._lengths[row] = length
        self._stale.add(row)

    def fork(self, row: int, into: int) -> None:
        if self._row(row) == self._row(into):
            return
        self._drop(into)
        self.pool.retain(page for page in self._tables[row] if page != NO_PAGE)
        self._tables[into] = list(self._tables[row])
        self._lengths[into], self._gaps[into] = self._lengths[row], self._gaps[row]

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        rows = self._permutation(index)
        old = self._tables
        for row in rows:
            self.pool.retain(page for page in old[row] if page != NO_PAGE)
        self._tables = [list(old[row]) for row in rows]
        for table in old:
            self.pool.release([page for page in table if page != NO_PAGE])
        self._lengths = [self._lengths[row] for row in rows]
        self._gaps = [self._gaps[row] for row in rows]
        self._stale = set(range(self.rows))

    def reset(self, rows: Iterable[int] | None = None) -> None:
        for row in self._which(rows):
            self._drop(row)

    def defragment(self) -> int:
        """Give every row pages that follow each other, so that its reads become views, as far as free pages and sharing allow;
        returns how many pages moved. Contents and positions do not change. Cost: one copy of each page that moves."""
        return sum(self._straighten(row) for row in range(self.rows))

    def _straighten(self, row: int) -> int:
        table = self._tables[row]
        shared = any(page == NO_PAGE or self.pool.references(page) > 1 for page in table)
        if shared or _consecutive(table):
            return 0
        fresh = self.pool.allocate_run(len(table))
        if fresh is None:
            return 0
        for source, target in zip(table, fresh, strict=True):
            self.pool.copy(source, target)
        self.pool.release(table)
        self._tables[row] = fresh
        self._stale.add(row)
        return len(fresh)

    def _check_restorable(self, lengths: Sequence[int], gaps: Sequence[tuple[int, int]]) -> None:
        needed = sum(len(self._held_blocks(length, gap)) for length, gap in zip(lengths, gaps, strict=True))
        own = Counter(page for table in self._tables for page in table if page != NO_PAGE)
        returned = sum(1 for page, n in own.items() if self.pool.references(page) == n)
        self.pool.require(needed - returned)

    def _held_blocks(self, length: int, gap: tuple[int, int]) -> set[int]:
        """Which blocks of a row have a page."""
        return set(range(self._blocks(gap[0]))) | set(range(gap[1] // self.page_size, self._blocks(length)))

    def _restore(self, row: int, tensors: tuple[Tensor, ...]) -> None:
        held = self._held_blocks(self._lengths[row], self._gaps[row])
        pages = iter(self.pool.allocate(len(held)))
        self._tables[row] = [next(pages) if i in held else NO_PAGE for i in range(self._blocks(self._lengths[row]))]
        self._stale.add(row)
        slots = [self._slot(row, p) for begin, end in self._held(row, None) for p in range(begin, end)]
        self.pool.put(torch.tensor(slots, dtype=torch.int64, device=self.device), tensors)

    def nbytes(self) -> int:
        used = {page for table in self._tables for page in table if page != NO_PAGE}
        return len(used) * self.pool.page_bytes


def _consecutive(pages: Sequence[int]) -> bool:
    return all(b == a + 1 for a, b in pairwise(pages))
