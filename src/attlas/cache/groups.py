"""Groups: layers that keep the same tokens share one block table; a layer's part is a view of it with storage of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from attlas.cache.grouped import GroupedPart
from attlas.cache.ledger import RowLedger
from attlas.cache.part import PartSpec
from attlas.cache.radix import Retention
from attlas.cache.store import PageStore
from attlas.cache.swap import SavedPages, to_host
from attlas.cache.tables import NO_PAGE, BlockTables, TablePart, real
from attlas.errors import UnsupportedError


class KeepRule(Protocol):
    """Which entries a group keeps: all, or the last `window` and the first `sinks`; an entry stands for so many tokens."""

    @property
    def window(self) -> int | None: ...
    @property
    def sinks(self) -> int: ...
    @property
    def tokens_per_entry(self) -> int: ...


class Space(Protocol):
    """Where pages come from: `room` makes so many free, or raises OutOfPagesError."""

    ledger: RowLedger

    def room(self, count: int) -> None: ...


class LayerPart(TablePart):
    """What one layer sees of a CacheManager: an ordinary part to write, read and end steps with. Rows are taken, forked,
    truncated and released by the manager, for all layers at once."""

    def __init__(self, spec: PartSpec, group: Group, store: PageStore, rows: int) -> None:
        super().__init__(spec, rows, store.dtype, store.device)
        self.group, self.store, self.tables = group, store, group.tables
        self._gaps = group.gaps  # one list for all parts of the group

    def _append(self, new: tuple[Tensor, ...], rows: Sequence[int], counts: Sequence[int]) -> None:
        slots = self.group.slots_to_write(rows, [self._lengths[row] for row in rows], counts)
        self.store.put(slots, new)
        for row, n in zip(rows, counts, strict=True):
            self._lengths[row] += n

    def end_step(self) -> None:
        """Pages behind the window go back when the last layer that shares the table has ended its step."""
        if self is self.group.last:
            self.group.roll(self._lengths)

    def stand(self, row: int, length: int) -> None:
        """Called by the manager when the group's pages of a row have changed."""
        self._lengths[row] = length

    def _refuse(self, verb: str) -> NoReturn:
        raise UnsupportedError(f"{verb} of {self!r}: its rows belong to a CacheManager, which does this for all layers at once")

    def truncate(self, lengths: Mapping[int, int] | Sequence[int]) -> None:
        self._refuse("truncate")

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        self._refuse("reorder")

    def fork(self, row: int, into: int) -> None:
        self._refuse("fork")

    def reset(self, rows: Iterable[int] | None = None) -> None:
        self._refuse("reset")

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._refuse("load")

    def _cut(self, row: int, length: int) -> None:
        self._refuse("truncate")

    def _restore(self, row: int, tensors: tuple[Tensor, ...]) -> None:
        self._refuse("load")

    def _check_restorable(self, lengths: Sequence[int], gaps: Sequence[tuple[int, int]]) -> None:
        self._refuse("load")


class GroupedLayerPart(GroupedPart):
    """Entries that stand for several tokens each, in a layer part."""

    def stand(self, row: int, length: int) -> None:
        """Called by the manager when the group's pages of a row have changed."""
        self._lengths[row] = length


class Group:
    """One block table for the parts that keep the same tokens: all of them, or the last `window` and the first `sinks`.

    Page p of the table is page p in the store of every part; no two groups use a page at the same time, so parts of different
    groups may lie in one store. With `sharing`, pages that leave the window before they have been committed to the prefix tree
    are set aside: they belong to no row, and are given up when pages run short.

    A table counts entries: tokens, or groups of `tokens_per_entry` tokens (`entries` converts; sharing is off for those).
    """

    def __init__(self, rule: KeepRule, rows: int, page_size: int, space: Space, device: torch.device) -> None:
        self.window, self.sinks, self.tokens_per_entry = rule.window, rule.sinks, rule.tokens_per_entry
        self.rows, self.ledger, self.room = rows, space.ledger, space.room
        self.tables = BlockTables(rows, page_size, device)
        self.gaps = [(0, 0)] * rows
        self.aside: list[dict[int, int]] = [{} for _ in range(rows)]  # block -> page behind the window, not committed
        self.parts: list[LayerPart] = []
        self.last: LayerPart | None = None  # the one whose step ends last
        self.rollback, self.sharing = 0, False
        self.committed = [0] * rows  # blocks of each row that lie in the prefix tree

    @property
    def page_size(self) -> int:
        return self.tables.page_size

    @property
    def front(self) -> int:
        return self.tables.blocks(self.sinks)

    @property
    def retention(self) -> Retention:
        if self.window is None:
            return Retention()
        return Retention(self.tables.blocks(self.window - 1 + self.rollback), self.front)

    def entries(self, tokens: int) -> int:
        return tokens // self.tokens_per_entry

    def stores(self) -> Iterator[PageStore]:
        return (part.store for part in self.parts)

    # ---- pages come ---------------------------------------------------------------------------------------------------------

    def pages_needed(self, row: int, length: int, new: int) -> int:
        """Free pages that `new` tokens behind the first `length` take, the copy of a shared last page included."""
        table = self.tables.pages[row]
        fresh = max(self.tables.blocks(length + new) - len(table), 0)
        return fresh + bool(new and self._shared_page(row, length) is not None)

    def _shared_page(self, row: int, length: int) -> int | None:
        """The partly filled page that the next token goes to, when somebody else refers to it."""
        if not length % self.page_size:
            return None
        page = self.tables.pages[row][length // self.page_size]
        return page if self.ledger.references(page) > 1 else None

    def prepare(self, row: int, length: int, new: int) -> None:
        """Give the row the pages of its next tokens, and its last page to itself. The pages must be free."""
        if not self.pages_needed(row, length, new):
            return
        table = self.tables.pages[row]
        shared = self._shared_page(row, length)
        if shared is not None:
            (copy,) = self.ledger.take(1)
            for store in self.stores():
                store.copy(shared, copy)
            self.ledger.drop([shared])
            table[length // self.page_size] = copy
        table += self.ledger.take(max(self.tables.blocks(length + new) - len(table), 0))
        self.tables.touch([row])

    def slots_to_write(self, rows: Sequence[int], lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Slots int64 [T] of the next tokens. The first layer of a step makes room where nothing has been reserved; the others
        get what it got."""
        key = (tuple(rows), tuple(lengths), tuple(counts))
        slots = self.tables.remembered(key)
        if slots is None:
            steps = list(zip(rows, lengths, counts, strict=True))
            self.room(sum(self.pages_needed(*step) for step in steps))
            for step in steps:
                self.prepare(*step)
            flat = [slot for row, length, n in steps for slot in self.tables.slots(row, length, length + n)]
            slots = self.tables.remember(key, flat)
        return slots

    def attach(self, row: int, pages: Sequence[int]) -> None:
        """Give an empty row the beginning that lies in `pages`: those of them that it needs."""
        blocks, rule = len(pages), self.retention
        table = [page if rule.needs(i, blocks) else NO_PAGE for i, page in enumerate(pages)]
        self.ledger.hold(real(table))
        self._set(row, table)

    def _set(self, row: int, table: list[int]) -> None:
        """The pages of an empty row; -1 where the window has passed."""
        self.tables.pages[row] = table
        gone = [i for i, page in enumerate(table) if page == NO_PAGE]
        self.gaps[row] = (gone[0] * self.page_size, (gone[-1] + 1) * self.page_size) if gone else (0, 0)
        self.tables.touch([row])

    def nbytes(self, row: int, length: int) -> int:
        """Bytes of the pages of the row's first `length` entries, in all layers."""
        pages = real(self.tables.pages[row][: self.tables.blocks(length)])
        return len(pages) * sum(store.page_bytes for store in self.stores())

    def save(self, row: int, length: int) -> SavedPages:
        """A copy of those pages in host memory."""
        table = self.tables.pages[row][: self.tables.blocks(length)]
        contents = [[to_host(t[real(table)]) for t in store.tensors] for store in self.stores()]
        return SavedPages([page != NO_PAGE for page in table], contents)

    def restore(self, row: int, saved: SavedPages) -> None:
        """Give an empty row fresh pages with the saved contents. They must be free."""
        pages = iter(fresh := self.ledger.take(saved.pages))
        self._set(row, [next(pages) if has else NO_PAGE for has in saved.held])
        for store, tensors in zip(self.stores(), saved.contents, strict=True):
            store.write_pages(fresh, tensors)

    def fork(self, row: int, into: int, length: int) -> None:
        """The row's tokens for an empty row; pages reserved ahead stay with the first."""
        table = self.tables.pages[row][: self.tables.blocks(length)]
        self.ledger.hold(real(table))
        self.tables.pages[into], self.gaps[into] = list(table), self.gaps[row]
        self.tables.touch([into])

    # ---- pages go -----------------------------------------------------------------------------------------------------------

    def roll(self, lengths: Sequence[int]) -> None:
        """Give back the pages that lie wholly behind the window and the rollback. Where prefixes are shared, the window is that
        of the last whole page, so that a sequence which goes on from there finds all of it."""
        if self.window is None:
            return
        size = self.page_size
        for row, length in enumerate(lengths):
            seen = (min(length, length // size * size + 1) if self.sharing else length) - self.rollback
            keep, (a, b) = max(seen - self.window, 0) // size, self.gaps[row]
            first = max(self.front, b // size)
            if keep <= first:
                continue
            table = self.tables.pages[row]
            self._leave(row, first, table[first:keep])
            table[first:keep] = [NO_PAGE] * (keep - first)
            self.gaps[row] = (a if b else self.front * size, keep * size)
            self.tables.touch([row])

    def _leave(self, row: int, first: int, pages: list[int]) -> None:
        """Let go of pages behind the window; set aside those that the prefix tree may still want."""
        if self.sharing:
            wanted = {block: page for block, page in enumerate(pages, first) if block >= self.committed[row]}
            self.ledger.retain(wanted.values())
            self.aside[row] |= wanted
        self.ledger.drop(pages)

    def forget_aside(self, row: int, begin: int = 0, end: int | None = None) -> int:
        """Give up the pages set aside for the blocks begin ... end - 1 of a row; returns how many."""
        gone = [block for block in self.aside[row] if begin <= block and (end is None or block < end)]
        self.ledger.release([self.aside[row].pop(block) for block in gone])
        return len(gone)

    def cut(self, row: int, length: int) -> None:
        """Forget the tokens at and after `length`, and what was reserved ahead."""
        keep, table = self.tables.blocks(length), self.tables.pages[row]
        self.ledger.drop(real(table[keep:]))
        del table[keep:]
        if length <= self.gaps[row][0]:
            self.gaps[row] = (0, 0)
        self.forget_aside(row, length // self.page_size)
        self.committed[row] = min(self.committed[row], length // self.page_size)
        self.tables.touch([row])

    # ---- what the prefix tree sees ------------------------------------------------------------------------------------------

    def offered(self, row: int, begin: int, end: int) -> list[int]:
        """The pages of the blocks begin ... end - 1, those set aside included; -1 = given back."""
        aside, table = self.aside[row], self.tables.pages[row][begin:end]
        return [aside.get(i, NO_PAGE) if page == NO_PAGE else page for i, page in enumerate(table, begin)]

    def shared(self, row: int, begin: int, held: Sequence[int]) -> None:
        """The blocks behind `begin` lie in the tree, in the pages `held`: use those in place of equal ones of the row's own."""
        table = self.tables.pages[row]
        for block, theirs in enumerate(held, begin):
            own = table[block]
            if own not in (NO_PAGE, theirs):
                self.ledger.hold([theirs])
                self.ledger.drop([own])
                table[block] = theirs
        self.forget_aside(row, 0, begin + len(held))
        self.committed[row] = begin + len(held)
        self.tables.touch([row])

    def rename(self, moved: dict[int, int]) -> None:
        """Page p is called moved.get(p, p) from now on."""
        self.tables.pages = [[moved.get(page, page) for page in table] for table in self.tables.pages]
        self.aside = [{block: moved.get(page, page) for block, page in aside.items()} for aside in self.aside]
        self.tables.touch()

    # ---- accounting ---------------------------------------------------------------------------------------------------------

    def unused(self, lengths: Sequence[int]) -> dict[int, int]:
        """page -> token slots of it that hold nothing which a later query of some row may ask for; pages without are left out."""
        out: dict[int, int] = {}
        size = self.page_size
        for row, length in enumerate(lengths):
            table, needed = self.tables.pages[row], 0 if self.window is None else max(length - self.window + 1, 0)
            behind = range(self.gaps[row][1] // size, min(needed // size + 1, len(table)))
            blocks = {*range(length // size, len(table)), *(behind if needed else ()), *range(self.front if needed else 0)}
            for block in blocks:
                begin, end = block * size, min((block + 1) * size, length)
                asked = max(end - max(begin, needed), 0) + max(min(self.sinks, needed, end) - begin, 0)
                if table[block] != NO_PAGE:
                    out[table[block]] = min(out.get(table[block], size), size - asked)
        return out

    def check(self, lengths: Sequence[int]) -> None:
        """Assert that the tables say what the lengths and the window promise."""
        for row, length in enumerate(lengths):
            table, (a, b) = self.tables.pages[row], self.gaps[row]
            held = [self.tables.blocks(a) <= i < b // self.page_size for i in range(len(table))]
            assert len(table) >= self.tables.blocks(length), f"row {row} lacks pages"
            assert [page == NO_PAGE for page in table] == held, f"row {row}: the table disagrees with the gap {(a, b)}"
            assert not b or (self.window and a >= min(self.sinks, b) and b <= max(length - self.window + 1, 0)), (a, b)
            assert not self.aside[row] or self.sharing
            assert all(table[block] == NO_PAGE and block >= self.committed[row] for block in self.aside[row])
            assert self.tables.tensor[row, : len(table)].tolist() == table
            assert bool((self.tables.tensor[row, len(table) :] == NO_PAGE).all())
            assert self._shared_page(row, length) is None or length % self.page_size
