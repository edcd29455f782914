"""From partial blocks to bit tiles: each distinct tile is evaluated once, pair by pair, however many blocks share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.masks import bits
from attlas.masks.box import PARTIAL, Box, Pairs
from attlas.masks.descent import Grains
from attlas.masks.expr import Compound, Mask
from attlas.masks.partition import Partition

DROPPED, WHOLE = -2, -1  # what blocks turn out to be once evaluated, beside the index of a tile
MAX_PIECES = 4  # segments that a block may hold and still have a key
FEW = 64  # blocks of several segments up to which evaluating each costs less than finding out which are alike
CHUNK = 2**22  # pairs evaluated at once


class Code:
    """One integer per block, equal only where all the columns added are equal. Exact, not a hash."""

    def __init__(self, n: int):
        self.value = torch.zeros(n, dtype=torch.int64, device="cpu")
        self.size = 1  # values lie in [0, size)

    def add(self, column: Tensor) -> None:
        low, high = (int(x) for x in torch.aminmax(column))
        width = high - low + 1
        if width == 1:
            return
        if width > 2**40:
            distinct, column = torch.unique(column, return_inverse=True)
            low, width = 0, len(distinct)
        if self.size * width >= 2**62:
            self.compress()
        self.value = self.value * width + (column - low)
        self.size *= width

    def compress(self) -> None:
        """The same distinctions with values below their number."""
        distinct, self.value = torch.unique(self.value, return_inverse=True)
        self.size = len(distinct)


@dataclass(frozen=True, eq=False)
class TileMaker:
    """Makes the tiles [height, width] of blocks of a grid; width is a multiple of 8."""

    mask: Mask
    grains: Grains
    height: int
    width: int

    def solve(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """For blocks (i, j): DROPPED (nothing allowed), WHOLE (everything) or the index of a tile, int64 [n]; and the tiles,
        uint8 [m, height, width // 8], all different."""
        if not len(i):
            return i, torch.zeros(0, self.height, self.width // 8, dtype=torch.uint8, device="cpu")
        distinct, same = self._distinct(i, j)
        tiles, allowed = self._evaluate(i[distinct], j[distinct])
        area = self.grains.q.level(0).tokens[i[distinct]] * self.grains.k.level(0).tokens[j[distinct]]
        state = torch.where(allowed == 0, DROPPED, torch.where(allowed == area, WHOLE, 0))
        proper = (state == 0).nonzero().flatten()
        if len(proper) < len(tiles):
            tiles = tiles[proper]
        tiles, index = bits.deduplicate(tiles)
        state[proper] = index
        return state[same], tiles

    def _distinct(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """One block for each tile key, and for every block which of those it equals."""
        code, keyed = Code(len(i)), torch.ones(len(i), dtype=torch.bool, device="cpu")
        simple = torch.ones_like(keyed)
        for side, at in ((self.grains.q, i), (self.grains.k, j)):
            if side.pieces is not None:
                simple &= side.pieces[at] == 1
                keyed &= side.pieces[at] <= MAX_PIECES
            code.add(side.level(0).tokens[at])
        self._key_simple(code, keyed, simple, i, j)
        split = keyed & ~simple
        if int(split.sum()) > FEW:
            self._key_split(code, keyed, split, i, j)
        else:
            keyed &= simple
        if not bool(keyed.all()):
            code.value = torch.where(keyed, code.value, code.size + torch.arange(len(i), device="cpu"))
            code.size += len(i)
        if code.size > 4 * len(i) + 4096:
            code.compress()
        return bits.first_of_each(code.value, code.size)

    def _key_simple(self, code: Code, keyed: Tensor, live: Tensor, i: Tensor, j: Tensor) -> None:
        """Keys of blocks that lie inside one segment each way (of one sequence: else they would be empty)."""
        code.add(live.long())
        add_columns(self.mask, self.grains.box(0, i, j), live, code, keyed)

    def _key_split(self, code: Code, keyed: Tensor, live: Tensor, i: Tensor, j: Tensor) -> None:
        """Keys of blocks that hold several segments: the keys of all the rectangles they consist of."""
        at = live.nonzero().flatten()
        part, part_keyed = Code(len(at)), torch.ones(len(at), dtype=torch.bool, device="cpu")
        q_pieces = [_piece(self.grains.q, i[at], n) for n in range(_most_pieces(self.grains.q, i[at]))]
        k_pieces = [_piece(self.grains.k, j[at], n) for n in range(_most_pieces(self.grains.k, j[at]))]
        for q in q_pieces:
            part.add(q.length)
        for k in k_pieces:
            part.add(k.length)
        for q in q_pieces:
            for k in k_pieces:
                joined = (q.length > 0) & (k.length > 0) & (q.sequence == k.sequence)
                part.add(joined.long())
                box = Box(q.lo, q.hi, k.lo, k.hi, q.index, q.index + q.hi - q.lo, k.index, k.index + k.hi - k.lo)
                add_columns(self.mask, box, joined, part, part_keyed)
        part.compress()
        column = torch.zeros_like(i)
        column[at] = part.value + 1
        code.add(column)
        keyed[at] &= part_keyed

    def _evaluate(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles, and the number of pairs allowed in each."""
        step = max(1, CHUNK // (self.height * self.width))
        packed, allowed = [], []
        for a, b in zip(i.split(step), j.split(step), strict=True):
            tile = self._bits(a, b)
            packed.append(bits.pack(tile))
            allowed.append(bits.popcount(packed[-1]))
        return torch.cat(packed), torch.cat(allowed)

    def _bits(self, i: Tensor, j: Tensor) -> Tensor:
        """bool [n, height, width]"""
        q, k = self.grains.q, self.grains.k
        q_token = (q.starts[i][:, None] + torch.arange(self.height, device="cpu"))[:, :, None]
        k_token = (k.starts[j][:, None] + torch.arange(self.width, device="cpu"))[:, None, :]
        index = (q.axis.lookup(q_token, 3), k.axis.lookup(k_token, 3)) if self.mask.uses_index else (None, None)
        tile = self.mask.evaluate(Pairs(q.axis.lookup(q_token, 1), k.axis.lookup(k_token, 1), *index))
        if self.grains.packed:
            tile = tile & (q.axis.lookup(q_token, 2) == k.axis.lookup(k_token, 2))
        for side, at, tokens, length in ((q, i, q_token, self.height), (k, j, k_token, self.width)):
            if bool((side.level(0).tokens[at] < length).any()):
                tile = tile & (tokens < side.ends[at][:, None, None])
        return tile.expand(len(i), self.height, self.width)


def add_columns(mask: Mask, box: Box, live: Tensor, code: Code, keyed: Tensor) -> None:
    """Add what determines the tiles of exact boxes, where `live`: what every part of the expression says of the whole box, and,
    only where it says PARTIAL, the keys of the leaves below. Clears `keyed` where that is not enough."""
    status = mask.classify_box(box)
    code.add(torch.where(live, status, 0))
    live = live & (status == PARTIAL)
    if not bool(live.any()):
        return
    if isinstance(mask, Compound):
        for part in mask.operands:
            add_columns(part, box, live, code, keyed)
        return
    keys = mask.tile_keys(box)
    for column in keys.columns:
        code.add(torch.where(live, column, 0))
    if keys.keyed is not None:
        keyed &= keys.keyed | ~live


@dataclass(frozen=True, eq=False)
class _Piece:
    """The part of each block that lies in its n-th segment; length 0 where there is none."""

    lo: Tensor
    hi: Tensor
    length: Tensor
    sequence: Tensor
    index: Tensor


def _most_pieces(side: Partition, at: Tensor) -> int:
    return 1 if side.pieces is None else int(side.pieces[at].max())


def _piece(side: Partition, at: Tensor, n: int) -> _Piece:
    if side.first_segment is None or side.pieces is None:
        segment, exists = torch.zeros_like(at), torch.ones_like(at, dtype=torch.bool)
    else:
        exists = n < side.pieces[at]
        segment = torch.where(exists, side.first_segment[at] + n, 0)
    ends, offset, sequence, index = side.axis.table
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    first = torch.maximum(side.starts[at], starts[segment])
    length = torch.where(exists, torch.minimum(side.ends[at], ends[segment]) - first, 0)
    lo = first + offset[segment]
    return _Piece(lo, lo + (length - 1).clamp(min=0), length, sequence[segment], first + index[segment])
