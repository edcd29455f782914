"""Where the tokens of pages lie: one tensor [pages, page_size, ...] for each tensor of a spec, plain or quantised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from attlas.cache.part import PartSpec, Table
from attlas.cache.tokens import allocate
from attlas.errors import OptionError
from attlas.registry import suggest

SMALLEST_PAGE, LARGEST_PAGE = 8, 256
KvDtype = Literal["int8", "fp8"]


class PageStore:
    """Pages in the dtype of the cache. `tensors` are the stored ones; reads of pages that follow each other are views of them."""

    def __init__(self, spec: PartSpec, pages: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        if not SMALLEST_PAGE <= page_size <= LARGEST_PAGE:
            raise OptionError(f"pages of page_size={page_size}: wanted {SMALLEST_PAGE} ... {LARGEST_PAGE} tokens")
        self.spec, self.page_size, self.dtype, self.device = spec, page_size, dtype, device
        self.tensors = self._allocate(pages)

    def _stored(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """(shape per token, dtype) of each stored tensor."""
        return [(shape, self.dtype) for _, shape in self.spec.tensors]

    def _allocate(self, pages: int) -> tuple[Tensor, ...]:
        return tuple(allocate((pages, self.page_size, *shape), dtype, self.device) for shape, dtype in self._stored())

    @property
    def page_bytes(self) -> int:
        return self.page_size * sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._stored())

    def nbytes(self) -> int:
        """Bytes of all pages, free ones included."""
        return sum(t.nbytes for t in self.tensors)

    def resize(self, pages: int) -> None:
        """Keep the first `pages` pages; new ones come behind them."""
        old = self.tensors
        keep = min(pages, len(old[0]))
        self.tensors = self._allocate(pages)
        for target, source in zip(self.tensors, old, strict=True):
            target[:keep] = source[:keep]

    def copy(self, source: int, target: int) -> None:
        """The contents of page `source` into page `target`."""
        for t in self.tensors:
            t[target] = t[source]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Page sources[i] into targets[i], all at once: a page may be both. Takes as much memory again as what moves."""
        wanted = torch.tensor(list(sources), dtype=torch.int64, device=self.device)
        self.write_pages(targets, (t.index_select(0, wanted) for t in self.tensors))

    def write_pages(self, pages: Sequence[int], contents: Iterable[Tensor]) -> None:
        """Stored contents [n, ...], one for each tensor of the store, to the n pages."""
        to = torch.tensor(list(pages), dtype=torch.int64, device=self.device)
        for t, new in zip(self.tensors, contents, strict=True):
            t.index_copy_(0, to, new.to(self.device))

    def put(self, slots: Tensor, new: tuple[Tensor, ...]) -> None:
        """Write packed tokens [T, ...] to slots [T] (page * page_size + offset)."""
        for storage, tokens in zip(self.tensors, new, strict=True):
            storage.flatten(0, 1).index_copy_(0, slots, tokens.to(self.dtype))

    def gather(self, pages: Tensor, consecutive: int | None = None) -> tuple[Tensor, ...]:
        """The tokens of the listed pages [n], in that order: [n * page_size, ...]. `consecutive` = the first page when the pages
        follow each other; then the result is a view."""
        return tuple(t.flatten(0, 1) for t in self._pick(pages, consecutive))

    def _pick(self, pages: Tensor, consecutive: int | None) -> tuple[Tensor, ...]:
        if consecutive is not None:
            return tuple(t[consecutive : consecutive + len(pages)] for t in self.tensors)
        return tuple(t.index_select(0, pages) for t in self.tensors)

    @property
    def held(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What a kernel reads: the tensors of the spec as they are stored, and their scales where they have any."""
        return self.tensors, ()

    def table(self, block_table: Tensor) -> Table:
        """The stored pages that a block table int32 [rows, blocks] refers to (-1 = none); not a copy."""
        tensors, scales = self.held
        return Table(tensors, block_table, scales)


class QuantisedStore(PageStore):
    """Pages of 8-bit numbers with one fp32 scale for each token and head (the last axis of a tensor shares it).

        scale = max |x| / top,   stored = round(x / scale)      top = 127 for int8, 448 for fp8 (e4m3)

    "int8": |x - read| <= scale / 2 = max |x| / 254. "fp8": |x - read| <= max(|x| / 16, scale / 1024). A group of zeros is read as
    zeros; a number that is not finite makes its group NaN, and only that. Scales are those of the token alone: what is stored for
    it depends on no other token. Bytes per number: 1, and 4 / width for the scale. Mixers read what they have just written back
    from here, so that how a prompt is cut into steps changes nothing; but for hyena and axial (combine="shifted"), which use
    the exact numbers within a step.

    Cost: `put` quantises T tokens. The compiled core reads the 8-bit numbers themselves, so that a decode step moves the bytes
    that are held; a `gather` dequantises the pages that it wants into a fresh tensor of the cache's dtype.
    """

    def __init__(
        self, spec: PartSpec, pages: int, page_size: int, dtype: torch.dtype, device: torch.device, kv_dtype: KvDtype
    ) -> None:
        self.code, self.top = CODES[kv_dtype]
        super().__init__(spec, pages, page_size, dtype, device)

    def _stored(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        held = torch.int8 if self.code == torch.int8 else torch.uint8  # torch cannot index_copy fp8 on every device
        scales = [(shape[:-1], torch.float32) for _, shape in self.spec.tensors]
        return [(shape, held) for _, shape in self.spec.tensors] + scales

    def put(self, slots: Tensor, new: tuple[Tensor, ...]) -> None:
        codes, scales = self.tensors[: len(new)], self.tensors[len(new) :]
        for code, scale, tokens in zip(codes, scales, new, strict=True):
            wide = tokens.float()
            factor = wide.abs().amax(-1) / self.top
            scaled = wide / factor.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
            if self.code == torch.int8:
                scaled = scaled.round().nan_to_num()
            stored = scaled.clamp(-self.top, self.top).to(self.code).view(code.dtype)
            code.flatten(0, 1).index_copy_(0, slots, stored)
            scale.flatten(0, 1).index_copy_(0, slots, factor.where(factor.isfinite(), torch.nan))

    def _pick(self, pages: Tensor, consecutive: int | None) -> tuple[Tensor, ...]:
        stored, half = super()._pick(pages, consecutive), len(self.spec.tensors)
        pairs = zip(stored[:half], stored[half:], strict=True)
        return tuple(code.view(self.code).float().mul_(scale.unsqueeze(-1)).to(self.dtype) for code, scale in pairs)

    @property
    def held(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        half = len(self.spec.tensors)
        return tuple(t.view(self.code) for t in self.tensors[:half]), self.tensors[half:]


CODES: dict[str, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def make_store(
    spec: PartSpec, pages: int, page_size: int, dtype: torch.dtype, device: torch.device, kv_dtype: KvDtype | None
) -> PageStore:
    """A plain store, or one of 8-bit numbers. A spec with a dtype of its own, or one of values without an axis, stays plain."""
    if kv_dtype is not None and kv_dtype not in CODES:
        raise OptionError(f"kv_dtype={kv_dtype!r}: {suggest(str(kv_dtype), tuple(CODES))}")
    if kv_dtype is None or spec.dtype is not None or not all(shape for _, shape in spec.tensors):
        return PageStore(spec, pages, page_size, dtype, device)
    return QuantisedStore(spec, pages, page_size, dtype, device, kv_dtype)
