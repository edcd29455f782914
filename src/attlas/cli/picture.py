"""Shares of allowed pairs as a PNG: grey-scale, a square of pixels for each cell, written with the standard library."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

ALLOWED, MASKED = 40, 240  # grey levels of a cell in which all pairs and in which no pair may attend


def png(cells: Sequence[Sequence[float]], pixels: int) -> bytes:
    """The picture, `pixels` wide and high for each cell; shares between 0 and 1 become greys between."""
    lines = b"".join((b"\0" + b"".join(bytes([grey(share)]) * pixels for share in row)) * pixels for row in cells)
    width, height = len(cells[0]) * pixels, len(cells) * pixels
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits a pixel, grey
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")


def grey(share: float) -> int:
    return round(MASKED + (ALLOWED - MASKED) * share)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
