"""Pages: equal blocks of token slots, handed out one by one and shared by counting references, with their storage."""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.cache.ledger import OutOfPagesError, PageLedger
from attlas.cache.part import PartSpec
from attlas.cache.store import KvDtype, make_store
from attlas.errors import OptionError

__all__ = ["OutOfPagesError", "PagePool"]


class PagePool(PageLedger):
    """Tensors [pages, page_size, ...], one for each tensor of the spec, a free list and a reference count for each page.

    num_pages  None = grows by doubling when it runs out; a number = fixed, then `allocate` raises OutOfPagesError
    page_size  tokens of a page, 8 ... 256
    kv_dtype   "int8" or "fp8": what pages are stored as (see QuantisedStore); None = in the dtype of the cache

    Several parts of equal spec may draw on one pool. Source: PagedAttention, Kwon et al. 2023, arXiv 2309.06180.
    """

    def __init__(
        self,
        spec: PartSpec,
        num_pages: int | None,
        page_size: int = 16,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        kv_dtype: KvDtype | None = None,
    ) -> None:
        if num_pages is not None and num_pages < 0:
            raise OptionError(f"PagePool(num_pages={num_pages}): must not be negative")
        self.spec, self.page_size, self.grows = spec, page_size, num_pages is None
        self.dtype = spec.dtype or dtype or torch.get_default_dtype()
        self.device = torch.empty(0, device=device).device
        self.store = make_store(spec, num_pages or 0, page_size, self.dtype, self.device, kv_dtype)
        super().__init__(num_pages or 0)

    def __repr__(self) -> str:
        sizes = f"pages={self.total}, page_size={self.page_size}, free={self.free}"
        return f"PagePool({self.spec.kind}, {sizes}, {self.dtype}, {self.device})"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return self.store.tensors

    @property
    def page_bytes(self) -> int:
        return self.store.page_bytes

    def nbytes(self) -> int:
        """Bytes of all pages, free ones included."""
        return self.store.nbytes()

    def require(self, count: int) -> None:
        """Raise OutOfPagesError unless `count` pages can be had (a growing pool makes them)."""
        if self.grows and count > self.free:
            more = max(count - self.free, self.total, 16)
            self.store.resize(self.total + more)
            self._add(more)
        super().require(count)

    def check(self) -> None:
        """Assert that free + used == total, that free pages have no references and that none is listed twice."""
        super().check()
        assert all(len(t) == self.total for t in self.tensors), f"{self!r}: the storage has another number of pages"
