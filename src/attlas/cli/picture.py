"""A grid of booleans as a PNG: grey-scale, a square of pixels for each cell, written with the standard library."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

ALLOWED, MASKED = 40, 235  # grey levels of a pair that may and may not attend


def png(rows: Sequence[Sequence[bool]], cell: int) -> bytes:
    """The picture, `cell` pixels for each entry."""
    lines = b"".join((b"\0" + b"".join(bytes([ALLOWED if on else MASKED]) * cell for on in row)) * cell for row in rows)
    width, height = len(rows[0]) * cell, len(rows) * cell
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits a pixel, grey
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
