"""The pages of a cache manager as a whole: who gives up what when they run short, and how they move."""

from __future__ import annotations

from collections.abc import Sequence

from attlas.cache.groups import Group
from attlas.cache.ledger import OutOfPagesError, RowLedger
from attlas.cache.part import CacheError
from attlas.cache.radix import PrefixTree
from attlas.cache.store import PageStore
from attlas.cache.tables import consecutive, real


class PageSpace:
    """One ledger, the groups and the prefix tree that draw on it, and the stores that hold what it counts."""

    def __init__(self, pages: int) -> None:
        self.ledger = RowLedger(pages)
        self.groups: list[Group] = []
        self.stores: list[PageStore] = []
        self.tree = PrefixTree(1, ())
        self.evictions = 0

    def fill(self, groups: Sequence[Group], stores: Sequence[PageStore], page_size: int) -> None:
        self.groups, self.stores = list(groups), list(stores)
        self.tree = PrefixTree(page_size, [group.retention for group in groups])

    @property
    def available(self) -> int:
        """Pages that no row holds."""
        return self.ledger.total - self.ledger.held

    def room(self, count: int) -> None:
        """Have `count` pages free, giving up cached ones where needed; raises OutOfPagesError, and then nothing is changed. First
        go pages behind a window that have not been committed, then the leaves of the prefix tree that nobody uses, then what
        its other nodes hold behind a window."""
        ledger, before = self.ledger, self.ledger.free
        if count > self.available:
            message = f"{count} pages are needed, but {ledger!r} can give {self.available}: {count - self.available} too few"
            raise OutOfPagesError(message, count, self.available)
        if count > before:
            self._drop_aside(count)
        while ledger.free < count:
            gone = self.tree.evict(count - ledger.free) or self.tree.trim(count - ledger.free, lambda p: not ledger.holders(p))
            assert gone, "cached pages that nobody gives up"
            ledger.release(gone)
        self.evictions += ledger.free - before

    def _drop_aside(self, count: int) -> None:
        for group in self.groups:
            for row in range(group.rows):
                if self.ledger.free < count:
                    group.forget_aside(row)

    def resize(self, pages: int) -> None:
        """See CacheManager.resize."""
        ledger = self.ledger
        if pages < ledger.held:
            raise CacheError(f"resize({pages}) of {ledger!r}: the rows hold {ledger.held} pages")
        if pages < ledger.used:
            self.room(ledger.total - pages)
        holes = (page for page in range(min(pages, ledger.total)) if not ledger.references(page))
        high = (page for page in range(pages, ledger.total) if ledger.references(page))
        self._move(dict(zip(high, holes, strict=False)), pages)

    def defragment(self) -> int:
        """See CacheManager.defragment."""
        tables = [real(table) for group in self.groups for table in group.tables.pages]
        if all(consecutive(table) for table in tables):
            return 0
        order = dict.fromkeys(page for table in tables for page in table)
        order |= dict.fromkeys(page for page in range(self.ledger.total) if self.ledger.references(page))
        moved = {old: new for new, old in enumerate(order) if old != new}
        self._move(moved, self.ledger.total)
        return len(moved)

    def _move(self, moved: dict[int, int], total: int) -> None:
        """Page p becomes moved.get(p, p), in the stores and wherever it is named; and there are `total` pages."""
        for store in self.stores:
            if moved:
                store.move(list(moved), list(moved.values()))
            if total != self.ledger.total:
                store.resize(total)
        self.ledger.rename(moved, total)
        self.tree.rename(moved)
        for group in self.groups:
            group.rename(moved)
