"""Caches: parts that hold what later tokens of a sequence need, and the cache of a layer that is made of them."""

from attlas.cache.contiguous import ContiguousPart
from attlas.cache.layer import Cache, make_cache
from attlas.cache.ledger import OutOfPagesError
from attlas.cache.lookahead import LookaheadPart
from attlas.cache.manager import CacheManager
from attlas.cache.paged import PagedPart
from attlas.cache.part import CacheError, Held, Part, PartSpec, Table
from attlas.cache.pool import PagePool
from attlas.cache.radix import NodeView, PrefixTree, Retention
from attlas.cache.records import Admission, CacheStats, SwapHandle
from attlas.cache.ring import RingPart
from attlas.cache.state import StatePart

__all__ = [
    "Admission",
    "Cache",
    "CacheError",
    "CacheManager",
    "CacheStats",
    "ContiguousPart",
    "Held",
    "LookaheadPart",
    "NodeView",
    "OutOfPagesError",
    "PagePool",
    "PagedPart",
    "Part",
    "PartSpec",
    "PrefixTree",
    "Retention",
    "RingPart",
    "StatePart",
    "SwapHandle",
    "Table",
    "make_cache",
]
