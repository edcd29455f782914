"""A cache that forgets what was used longest ago, bounded by number and by bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import Protocol


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


class BoundedCache:
    """Keeps at most max_items values of at most max_bytes together; the newest one is kept whatever its size."""

    def __init__(self, max_items: int, max_bytes: int):
        self.max_items, self.max_bytes = max_items, max_bytes
        self._items: OrderedDict[Hashable, tuple[Sized, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> Sized | None:
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: Hashable, value: Sized, held: int = 0) -> None:
        """held: bytes that the key keeps alive."""
        with self._lock:
            self._items[key] = value, held
            self._items.move_to_end(key)
            while len(self._items) > 1 and (len(self._items) > self.max_items or self._bytes() > self.max_bytes):
                self._items.popitem(last=False)

    def _bytes(self) -> int:
        return sum(value.nbytes + held for value, held in self._items.values())

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._bytes()

    def __len__(self) -> int:
        return len(self._items)

    def clear(self) -> None:
        with self._lock:
            self._items.clear()
