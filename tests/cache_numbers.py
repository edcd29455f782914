"""What the tests of cache parts share: tokens that hold their own position, and reads that check it."""

from __future__ import annotations

import torch

from attlas.cache import ContiguousPart, PagedPart, PagePool, PartSpec, RingPart
from attlas.shapes import SeqInfo

SHAPES = (("k", (3, 5)), ("v", (7,)))
ELEMENTS = 22


def spec(window: int | None = None, sinks: int = 0) -> PartSpec:
    return PartSpec("kv", SHAPES, window, sinks)


def tokens(n: int, start: int = 0) -> tuple[torch.Tensor, ...]:
    """Token p holds the number start + p."""
    base = torch.arange(start, start + n, dtype=torch.float32)
    return tuple(base.view(-1, *[1] * len(shape)).expand(-1, *shape) for _, shape in SHAPES)


def write(part, n: int, row: int = 0) -> None:
    at = part.lengths[row]
    part.write(tokens(n, at), SeqInfo((n,), starts=(at,), ids=(row,)))


def positions(part, row: int = 0) -> list[int]:
    """Positions held, in array order; the contents must be the positions themselves."""
    held = part.read(row)
    where = held.axis.positions().tolist()
    for t in held.tensors:
        assert t.flatten(1)[:, 0].tolist() == where if where else not len(t)
    return where


def all_parts(rows: int, dtype: torch.dtype = torch.float32) -> list:
    return [
        ContiguousPart(spec(), rows, dtype=dtype),
        RingPart(spec(11, 2), rows, dtype=dtype),
        PagedPart(spec(), rows, PagePool(spec(), None, 8, dtype=dtype)),
        PagedPart(spec(11, 2), rows, PagePool(spec(11, 2), None, 8, dtype=dtype)),
    ]
