"""Caches: parts that hold what later tokens of a sequence need, and the cache of a layer that is made of them."""

from attlas.cache.contiguous import ContiguousPart
from attlas.cache.layer import Cache, make_cache
from attlas.cache.paged import PagedPart
from attlas.cache.part import CacheError, Held, Part, PartSpec, Table
from attlas.cache.pool import OutOfPagesError, PagePool
from attlas.cache.ring import RingPart
from attlas.cache.state import StatePart

__all__ = [
    "Cache",
    "CacheError",
    "ContiguousPart",
    "Held",
    "OutOfPagesError",
    "PagePool",
    "PagedPart",
    "Part",
    "PartSpec",
    "RingPart",
    "StatePart",
    "Table",
    "make_cache",
]
