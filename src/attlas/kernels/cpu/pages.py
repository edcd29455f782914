"""Large memory pages for large arrays.

A fresh result of tens of megabytes is handed out page by page as it is written, which can take longer than writing it.
A cache of a hundred megabytes lies on tens of thousands of 4 KiB pages, and a decode step, which reads all of it once, spends a
good part of its time on looking their addresses up. Linux hands out 2 MiB pages where it is asked to.
"""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from typing import Any

from torch import Tensor

LARGE = 1 << 22  # bytes; smaller arrays stay as they are
_PAGE, _MADV_HUGEPAGE = 4096, 14


@lru_cache(maxsize=1)
def _madvise() -> Any:
    try:
        return ctypes.CDLL(None).madvise if sys.platform == "linux" else None
    except (OSError, AttributeError):
        return None


def large_pages(t: Tensor) -> Tensor:
    """Ask for large pages under t, a fresh array that nothing has been written to; returns t.

    A request, not a demand: on other systems, where the kernel is set to "never", and for arrays below 4 MiB nothing changes.
    """
    size = t.numel() * t.element_size()
    if size < LARGE or t.device.type != "cpu" or _madvise() is None:
        return t
    start = -(-t.data_ptr() // _PAGE) * _PAGE
    end = (t.data_ptr() + size) // _PAGE * _PAGE
    _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)
    return t
