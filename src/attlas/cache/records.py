"""What the cache manager hands out: an admission, a picture of the pool, a swapped row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Admission:
    """A row that has been taken for a sequence; its first `cached_tokens` tokens are there already."""

    row: int
    cached_tokens: int


@dataclass(frozen=True)
class SwapHandle:
    """A row that lies in host memory: pass it to `swap_in` once, or to `discard`."""

    number: int
    length: int
    nbytes: int


@dataclass(frozen=True)
class CacheStats:
    """The pool at one moment; pages: free + used + cached == total.

    used     pages that some row holds
    cached   pages that no row holds, kept because a later prompt may start with their tokens; given up when pages run short
    tokens   token slots of used pages that hold a token which a later query may ask for
    waste    share of the token slots of used pages that hold none: reserved ahead, behind a window, or the rest of a last page
    queries, hits   prompt tokens of all admissions so far, and how many of them were found
    evictions       pages that were cached and have been given up
    rows, free_rows, swapped   rows in all, rows not taken, rows in host memory; swap_bytes: bytes of host memory in use
    """

    total: int
    used: int
    cached: int
    free: int
    tokens: int
    waste: float
    queries: int
    hits: int
    evictions: int
    rows: int
    free_rows: int
    swapped: int
    swap_bytes: int
