"""Pages: a fixed number of equal blocks of token slots, handed out one by one and shared by counting references."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attlas.cache.part import CacheError, PartSpec
from attlas.cache.tokens import allocate
from attlas.errors import OptionError

SMALLEST_PAGE, LARGEST_PAGE = 8, 256


class OutOfPagesError(CacheError):
    """The pool has fewer free pages than a request needs. `needed` and `free` say how many; nothing was changed."""

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed, self.free = needed, free


class PagePool:
    """Tensors [pages, page_size, ...], one for each tensor of the spec, a free list and a reference count for each page.

    num_pages  None = grows by doubling when it runs out; a number = fixed, then `allocate` raises OutOfPagesError
    page_size  tokens of a page, 8 ... 256

    A page is either free (no references) or used (at least one); `check` asserts it. Several parts of equal spec may draw on one
    pool. Source: PagedAttention, Kwon et al. 2023, arXiv 2309.06180.
    """

    def __init__(
        self,
        spec: PartSpec,
        num_pages: int | None,
        page_size: int = 16,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not SMALLEST_PAGE <= page_size <= LARGEST_PAGE:
            raise OptionError(f"PagePool(page_size={page_size}): wanted {SMALLEST_PAGE} ... {LARGEST_PAGE} tokens")
        if num_pages is not None and num_pages < 0:
            raise OptionError(f"PagePool(num_pages={num_pages}): must not be negative")
        self.spec, self.page_size, self.grows = spec, page_size, num_pages is None
        self.dtype = spec.dtype or dtype or torch.get_default_dtype()
        self.device = torch.empty(0, device=device).device
        self._references: list[int] = []
        self._free: list[int] = []
        self.tensors = self._allocate(0)
        self._extend(num_pages or 0)

    def __repr__(self) -> str:
        sizes = f"pages={self.total}, page_size={self.page_size}, free={self.free}"
        return f"PagePool({self.spec.kind}, {sizes}, {self.dtype}, {self.device})"

    # ---- sizes --------------------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        return len(self._references)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages with at least one reference."""
        return sum(1 for n in self._references if n)

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.spec.elements() * self.dtype.itemsize

    def nbytes(self) -> int:
        """Bytes of all pages, free ones included."""
        return sum(t.nbytes for t in self.tensors)

    def check(self) -> None:
        """Assert that free + used == total, that free pages have no references and that none is listed twice."""
        assert self.free + self.used == self.total, f"{self!r}: {self.used} used"
        assert len(set(self._free)) == len(self._free), f"{self!r}: a page is free twice"
        assert not any(self._references[page] for page in self._free), f"{self!r}: a free page has references"
        assert min(self._references, default=0) >= 0, f"{self!r}: negative reference count"
        assert all(len(t) == self.total for t in self.tensors), f"{self!r}: the storage has another number of pages"

    # ---- handing out --------------------------------------------------------------------------------------------------------

    def require(self, count: int) -> None:
        """Raise OutOfPagesError unless `count` pages can be had (a growing pool makes them)."""
        if count <= self.free:
            return
        if not self.grows:
            message = f"{count} pages are needed, but {self!r} has {self.free} free: {count - self.free} too few"
            raise OutOfPagesError(message, count, self.free)
        self._extend(max(count - self.free, self.total, 16))

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
            if not 0 <= page < self.total or not self._references[page]:
                raise CacheError(f"retain page {page} of {self!r}: it is not in use")
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each; a page without references is free. Pages are handed out again in the order given, so that a
        new sequence takes over the pages of an old one in order."""
        for page in reversed(pages):
            if not 0 <= page < self.total or not self._references[page]:
                raise CacheError(f"release page {page} of {self!r}: it is not in use")
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    # ---- storage ------------------------------------------------------------------------------------------------------------

    def _allocate(self, pages: int) -> tuple[Tensor, ...]:
        return tuple(allocate((pages, self.page_size, *shape), self.dtype, self.device) for _, shape in self.spec.tensors)

    def _extend(self, count: int) -> None:
        old, total = self.tensors, self.total
        self.tensors = self._allocate(total + count)
        for target, source in zip(self.tensors, old, strict=True):
            target[:total] = source
        self._references.extend([0] * count)
        self._free[:0] = range(total + count - 1, total - 1, -1)  # popped from the end: old pages first, then ascending

    def copy(self, source: int, target: int) -> None:
        """The contents of page `source` into page `target`."""
        for t in self.tensors:
            t[target] = t[source]

    def put(self, slots: Tensor, new: tuple[Tensor, ...]) -> None:
        """Write packed tokens [T, ...] to slots [T] (page * page_size + offset)."""
        for storage, tokens in zip(self.tensors, new, strict=True):
            storage.flatten(0, 1).index_copy_(0, slots, tokens.to(self.dtype))

    def gather(self, pages: Tensor, consecutive: int | None = None) -> tuple[Tensor, ...]:
        """The tokens of the listed pages [n], in that order: [n * page_size, ...]. `consecutive` = the first page when the pages
        follow each other; then the result is a view."""
        if consecutive is not None:
            return tuple(t[consecutive : consecutive + len(pages)].flatten(0, 1) for t in self.tensors)
        return tuple(t.index_select(0, pages).flatten(0, 1) for t in self.tensors)
