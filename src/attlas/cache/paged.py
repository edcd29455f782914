"""Rows over pages: a row's block table lists the pages of its tokens; rows can share pages until one of them writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attlas.cache.part import CacheError, PartSpec
from attlas.cache.pool import PagePool
from attlas.cache.tables import NO_PAGE, BlockTables, TablePart, consecutive, real
from attlas.errors import OptionError


class PagedPart(TablePart):
    """Token p of a row lies in page block_table[row, p // page_size], slot p % page_size.

    Pages are taken from the pool as tokens are written and returned as they are forgotten; a write that needs more pages than are
    free raises OutOfPagesError and changes nothing. `fork` and `reorder` share pages; a row that writes into a page with other
    references copies that page first (only the last, partly filled page of a row is ever written). With spec.window, `end_step`
    returns the pages that lie wholly outside of the window and the sinks; `rollback` further tokens are kept, so that
    `truncate` can take back at least rollback + 1 tokens between steps (without a window it can take back all).

    Reads gather the row's pages; when its pages follow each other in the pool they are views. `span` narrows a read to the token.
    Bytes: distinct pages in use by this part's rows (a shared page counts once) * page bytes; `pool.nbytes()` is the whole pool.
    `save` does not keep the sharing of pages.
    Source: PagedAttention, Kwon et al. 2023, arXiv 2309.06180.
    """

    def __init__(self, spec: PartSpec, rows: int, pool: PagePool, *, rollback: int = 0) -> None:
        if spec.tensors != pool.spec.tensors:
            raise CacheError(f"PagedPart({spec}): the pool was made for {pool.spec}")
        if rollback < 0:
            raise OptionError(f"PagedPart({spec}, rollback={rollback}): must not be negative")
        super().__init__(spec, rows, pool.dtype, pool.device)
        self.dtype, self.rollback = pool.dtype, rollback
        self.pool, self.store = pool, pool.store
        self.tables = BlockTables(rows, pool.page_size, self.device)

    # ---- writing ------------------------------------------------------------------------------------------------------------

    def pages_needed(self, rows: Sequence[int], counts: Sequence[int]) -> int:
        """Free pages that writing counts[i] tokens to row rows[i] will take, copies of shared pages included."""
        fresh, writers = 0, Counter[int]()
        for row, n in zip(rows, counts, strict=True):
            length, table = self._lengths[self._row(row)], self.tables.pages[row]
            fresh += self.tables.blocks(length + n) - len(table)
            if n and length % self.page_size:
                writers[table[-1]] += 1
        # The last one to write into a page may keep it, unless somebody who does not write holds it too.
        return fresh + sum(min(n, self.pool.references(page) - 1) for page, n in writers.items())

    def _append(self, new: tuple[Tensor, ...], rows: Sequence[int], counts: Sequence[int]) -> None:
        self.pool.require(self.pages_needed(rows, counts))
        slots: list[int] = []
        for row, n in zip(rows, counts, strict=True):
            if not n:
                continue
            length, table = self._lengths[row], self.tables.pages[row]
            if length % self.page_size:
                self._own_last_page(row)
            fresh = self.tables.blocks(length + n) - len(table)
            if fresh:
                table += self.pool.allocate(fresh)
                self.tables.touch([row])
            slots += self.tables.slots(row, length, length + n)
            self._lengths[row] += n
        self.store.put(torch.tensor(slots, dtype=torch.int64, device=self.device), new)

    def _own_last_page(self, row: int) -> None:
        """Copy the row's last page when somebody else refers to it."""
        page = self.tables.pages[row][-1]
        if self.pool.references(page) == 1:
            return
        (copy,) = self.pool.allocate(1)
        self.store.copy(page, copy)
        self.pool.release([page])
        self.tables.pages[row][-1] = copy
        self.tables.touch([row])

    def end_step(self) -> None:
        if self.spec.window is None:
            return
        front = self.tables.blocks(self.spec.sinks)
        for row, length in enumerate(self._lengths):
            keep = self._trail(length, self.spec.window + self.rollback)
            a, b = self._gaps[row]
            first = max(front, self.tables.blocks(a), b // self.page_size)
            if keep <= first:
                continue
            table = self.tables.pages[row]
            self.pool.release(real(table[first:keep]))
            table[first:keep] = [NO_PAGE] * (keep - first)
            self._gaps[row] = (a if b else front * self.page_size, keep * self.page_size)
            self.tables.touch([row])

    # ---- between steps ------------------------------------------------------------------------------------------------------

    def _cut(self, row: int, length: int) -> None:
        keep, table = self.tables.blocks(length), self.tables.pages[row]
        self.pool.release(real(table[keep:]))
        del table[keep:]
        self.tables.touch([row])

    def _drop(self, row: int) -> None:
        self._cut(row, 0)
        self._lengths[row], self._gaps[row] = 0, (0, 0)

    def attach(self, row: int, pages: Sequence[int], length: int) -> None:
        """Give an empty row the first `length` tokens that lie in `pages` (a shared prefix); the pages get one more reference."""
        if self._lengths[self._row(row)]:
            raise CacheError(f"attach to row {row} of {self!r}: the row is not empty")
        if self.tables.blocks(length) != len(pages):
            raise CacheError(
                f"attach to row {row} of {self!r}: {length} tokens take {self.tables.blocks(length)} pages, got {len(pages)}"
            )
        self.pool.retain(pages)
        self.tables.pages[row] = list(pages)
        self._lengths[row] = length
        self.tables.touch([row])

    def fork(self, row: int, into: int) -> None:
        if self._row(row) == self._row(into):
            return
        self._drop(into)
        self.pool.retain(real(self.tables.pages[row]))
        self.tables.pages[into] = list(self.tables.pages[row])
        self._lengths[into], self._gaps[into] = self._lengths[row], self._gaps[row]

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        rows = self._permutation(index)
        old = self.tables.pages
        for row in rows:
            self.pool.retain(real(old[row]))
        self.tables.pages = [list(old[row]) for row in rows]
        for table in old:
            self.pool.release(real(table))
        self._lengths = [self._lengths[row] for row in rows]
        self._gaps = [self._gaps[row] for row in rows]
        self.tables.touch()

    def reset(self, rows: Iterable[int] | None = None) -> None:
        for row in self._which(rows):
            self._drop(row)

    def defragment(self) -> int:
        """Give every row pages that follow each other, so that its reads become views, as far as free pages and sharing allow;
        returns how many pages moved. Contents and positions do not change. Cost: one copy of each page that moves."""
        return sum(self._straighten(row) for row in range(self.rows))

    def _straighten(self, row: int) -> int:
        table = self.tables.pages[row]
        shared = any(page == NO_PAGE or self.pool.references(page) > 1 for page in table)
        if shared or consecutive(table):
            return 0
        fresh = self.pool.allocate_run(len(table))
        if fresh is None:
            return 0
        self.store.move(table, fresh)
        self.pool.release(table)
        self.tables.pages[row] = fresh
        self.tables.touch([row])
        return len(fresh)

    # ---- saving -------------------------------------------------------------------------------------------------------------

    def _check_restorable(self, lengths: Sequence[int], gaps: Sequence[tuple[int, int]]) -> None:
        needed = sum(len(self._held_blocks(length, gap)) for length, gap in zip(lengths, gaps, strict=True))
        own = Counter(page for table in self.tables.pages for page in real(table))
        returned = sum(1 for page, n in own.items() if self.pool.references(page) == n)
        self.pool.require(needed - returned)

    def _held_blocks(self, length: int, gap: tuple[int, int]) -> set[int]:
        """Which blocks of a row have a page."""
        blocks = self.tables.blocks
        return set(range(blocks(gap[0]))) | set(range(gap[1] // self.page_size, blocks(length)))

    def _restore(self, row: int, tensors: tuple[Tensor, ...]) -> None:
        held, length = self._held_blocks(self._lengths[row], self._gaps[row]), self._lengths[row]
        pages = iter(self.pool.allocate(len(held)))
        self.tables.pages[row] = [next(pages) if i in held else NO_PAGE for i in range(self.tables.blocks(length))]
        self.tables.touch([row])
        slots = [slot for begin, end in self._held(row, None) for slot in self.tables.slots(row, begin, end)]
        self.store.put(torch.tensor(slots, dtype=torch.int64, device=self.device), tensors)
