"""Bit tiles: packing, unpacking, counting and de-duplicating. Bit j of byte i is key 8*i + j (little endian)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_GATHER = 0x0102040810204080  # multiplying eight 0/1 bytes by this moves byte j to bit 56 + j


@cache
def _byte_counts(device: torch.device) -> Tensor:
    """Number of set bits of every byte, uint8 [256]."""
    return torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8, device=device)


def pack(bits: Tensor) -> Tensor:
    """bool [..., n] -> uint8 [..., n // 8]; n is a multiple of 8."""
    words = bits.contiguous().view(torch.int64)
    return (words * _GATHER >> 56).to(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """uint8 [..., n // 8] -> bool [..., n]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 1).bool().flatten(-2)


def popcount(packed: Tensor) -> Tensor:
    """Number of set bits of each tile uint8 [n, rows, bytes], int64 [n]."""
    return _byte_counts(packed.device)[packed.int()].flatten(1).sum(1, dtype=torch.int64)


def deduplicate(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct tiles in order of first appearance, and for every tile the index of its equal, int64 [n]."""
    n = len(tiles)
    if n < 2:
        return tiles, torch.arange(n, device=tiles.device)
    _, inverse = torch.unique(_fingerprint(tiles), return_inverse=True)
    distinct, same = first_of_each(inverse, int(inverse.max()) + 1)
    if not torch.equal(tiles[distinct][same], tiles):  # two contents with one fingerprint: compare the contents themselves
        _, inverse = torch.unique(tiles.flatten(1), dim=0, return_inverse=True)
        distinct, same = first_of_each(inverse, int(inverse.max()) + 1)
    return (tiles if len(distinct) == n else tiles[distinct]), same


def first_of_each(code: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where each distinct code in [0, size) appears first, ascending, and for every entry which of those it equals."""
    n = len(code)
    at = torch.arange(n, device=code.device)
    first = torch.full((size,), n, dtype=torch.int64, device=code.device).scatter_reduce_(0, code, at, "amin")
    distinct = torch.sort(first[first < n]).values
    first[code[distinct]] = torch.arange(len(distinct), device=code.device)
    return distinct, first[code]


def _fingerprint(tiles: Tensor) -> Tensor:
    """A 64-bit hash of each tile's bytes."""
    flat = tiles.flatten(1)
    short = -flat.shape[1] % 8
    if short:
        flat = torch.nn.functional.pad(flat, (0, short))
    words = flat.contiguous().view(torch.int64)
    place = torch.arange(1, words.shape[1] + 1, device=tiles.device) * -7046029254386353131
    mixed = (words ^ place) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 29)) * place
    return mixed.sum(1)
