"""Which pages are free, and how many references each of the others has. Numbers only; the tokens lie in a page store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attlas.cache.part import CacheError


class OutOfPagesError(CacheError):
    """The pool has fewer free pages than a request needs. `needed` and `free` say how many; nothing was changed."""

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed, self.free = needed, free


class PageLedger:
    """A free list and a reference count for each of `total` pages. A page is either free (no references) or used (at least one);
    `check` asserts it."""

    def __init__(self, pages: int) -> None:
        self._references: list[int] = []
        self._free: list[int] = []
        self._add(pages)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pages={self.total}, free={self.free})"

    @property
    def total(self) -> int:
        return len(self._references)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages with at least one reference."""
        return self.total - self.free

    def check(self) -> None:
        """Assert that exactly the pages without references are free, and that none is listed twice."""
        assert sum(1 for n in self._references if n) == self.used, f"{self!r}: free + used is not the total"
        assert len(set(self._free)) == len(self._free), f"{self!r}: a page is free twice"
        assert not any(self._references[page] for page in self._free), f"{self!r}: a free page has references"
        assert min(self._references, default=0) >= 0, f"{self!r}: negative reference count"

    def require(self, count: int) -> None:
        """Raise OutOfPagesError unless `count` pages can be had."""
        if count > self.free:
            message = f"{count} pages are needed, but {self!r} has {self.free} free: {count - self.free} too few"
            raise OutOfPagesError(message, count, self.free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each. All or none."""
        self.require(count)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def allocate_run(self, count: int) -> list[int] | None:
        """`count` free pages that follow each other, with one reference each; None when there is no such run."""
        ascending = sorted(self._free)
        for i in range(len(ascending) - count + 1):
            if ascending[i + count - 1] - ascending[i] == count - 1:
                run = ascending[i : i + count]
                self._free = [page for page in self._free if not run[0] <= page <= run[-1]]
                for page in run:
                    self._references[page] = 1
                return run
        return None

    def references(self, page: int) -> int:
        return self._references[page]

    def retain(self, pages: Iterable[int]) -> None:
        """One more reference to each of these used pages."""
        pages = list(pages)
        for page in pages:
            self._check_used(page, "retain")
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each; a page without references is free. Pages are handed out again in the order given, so that a
        new sequence takes over the pages of an old one in order."""
        for page in reversed(pages):
            self._check_used(page, "release")
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def _check_used(self, page: int, verb: str) -> None:
        if not 0 <= page < self.total or not self._references[page]:
            raise CacheError(f"{verb} page {page} of {self!r}: it is not in use")

    def _add(self, count: int) -> None:
        total = self.total
        self._references.extend([0] * count)
        self._free[:0] = range(total + count - 1, total - 1, -1)  # popped from the end: old pages first, then ascending


class RowLedger(PageLedger):
    """A ledger that knows which references are those of rows (`take`, `hold`, `drop`); the others are those of a prefix tree,
    which can be given up: `held` pages have a row, `cached` ones have references but no row."""

    def __init__(self, pages: int) -> None:
        self._holders: list[int] = []
        self.held = 0
        super().__init__(pages)

    @property
    def cached(self) -> int:
        return self.used - self.held

    def holders(self, page: int) -> int:
        """Rows that hold the page."""
        return self._holders[page]

    def take(self, count: int) -> list[int]:
        """`count` free pages, each held by one row."""
        pages = self.allocate(count)
        for page in pages:
            self._holders[page] = 1
        self.held += count
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """One more row holds each of these used pages."""
        pages = list(pages)
        self.retain(pages)
        for page in pages:
            self.held += not self._holders[page]
            self._holders[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """One row less holds each."""
        for page in pages:
            assert self._holders[page], f"{self!r}: no row holds page {page}"
            self._holders[page] -= 1
            self.held -= not self._holders[page]
        self.release(pages)

    def rename(self, moved: dict[int, int], total: int) -> None:
        """Page p is called moved.get(p, p) from now on, and there are `total` pages. The new names of used pages differ and are
        below `total`."""
        used = [(moved.get(p, p), self._references[p], self._holders[p]) for p in range(self.total) if self._references[p]]
        self._references, self._holders, self._free = [], [], []
        self._add(total)
        for page, references, holders in used:
            self._references[page], self._holders[page] = references, holders
        self._free = [page for page in self._free if not self._references[page]]

    def check(self) -> None:
        super().check()
        assert self.held == sum(1 for n in self._holders if n), f"{self!r}: wrong count of held pages"
        pairs = zip(self._holders, self._references, strict=True)
        assert all(0 <= rows <= references for rows, references in pairs), f"{self!r}: more rows than references"

    def _add(self, count: int) -> None:
        super()._add(count)
        self._holders.extend([0] * count)
