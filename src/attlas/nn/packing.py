"""How the tokens of a call lie in memory: dense, padded or packed, brought to one packed form and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.errors import ShapeError
from attlas.shapes import SeqInfo


def valid_index(lengths: Sequence[int], width: int, device: torch.device) -> Tensor | None:
    """Flat indices into [len(lengths) * width] of the first lengths[b] places of each row; None when every place is valid."""
    if all(n == width for n in lengths):
        return None
    return torch.cat([torch.arange(b * width, b * width + n, device=device) for b, n in enumerate(lengths)])


def consecutive_starts(positions: Tensor, lengths: Sequence[int]) -> tuple[int, ...] | None:
    """First position of each sequence when the packed `positions` [T] count up by one in each; None when they do not.

    Reads the positions on the host (one synchronisation on an accelerator). An empty sequence starts at 0."""
    values, starts, at = positions.tolist(), [], 0
    for n in lengths:
        first = values[at] if n else 0
        if values[at : at + n] != list(range(first, first + n)):
            return None
        starts.append(first)
        at += n
    return tuple(starts)


@dataclass(frozen=True)
class Rows:
    """The new tokens of one call. `width` is T of a dense x [B, T, D], None for packed x; `index` picks the valid places of a
    padded x."""

    lengths: tuple[int, ...]
    width: int | None
    index: Tensor | None

    @classmethod
    def of(cls, x: Tensor, seq: SeqInfo | None, call: object) -> Rows:
        if x.dim() == 2:
            if seq is None:
                raise ShapeError(f"{call}: a packed x [T, D] needs seq=SeqInfo(lengths); a batch is [B, T, D]")
            if seq.total != x.shape[0]:
                raise ShapeError(f"{call}: seq holds {seq.total} tokens, x {x.shape[0]}")
            return cls(seq.lengths, None, None)
        batch, width = x.shape[:2]
        if seq is None:
            return cls((width,) * batch, width, None)
        if seq.num_sequences != batch or seq.max_seqlen_q > width:
            raise ShapeError(
                f"{call}: seq must give the number of valid tokens (at most {width}) of each of the {batch} rows of x"
            )
        return cls(seq.lengths, width, valid_index(seq.lengths, width, x.device))

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [tokens, ...]; padding is left out, packed input is returned as it is."""
        if self.width is None:
            return x
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def unpack(self, y: Tensor) -> Tensor:
        """The inverse of `pack`; padding becomes 0."""
        if self.width is None:
            return y
        shape = (len(self.lengths), self.width, *y.shape[1:])
        if self.index is None:
            return y.reshape(shape)
        return y.new_zeros(shape[0] * shape[1], *y.shape[1:]).index_copy(0, self.index, y).view(shape)

    def pack_positions(self, positions: Tensor, call: object) -> Tensor:
        """Positions [T] (shared by the rows, or packed) or [B, T] -> int64 [tokens]."""
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise ShapeError(f"{call}: positions must be integers")
        if self.width is None:
            wanted: tuple[tuple[int, ...], ...] = ((sum(self.lengths),),)
        else:
            wanted = ((self.width,), (len(self.lengths), self.width))
        if tuple(positions.shape) not in wanted:
            raise ShapeError(f"{call}: positions must have shape {' or '.join(str(list(w)) for w in wanted)}")
        if self.width is not None and positions.dim() == 1:
            positions = positions.expand(len(self.lengths), -1)
        return self.pack(positions).to(torch.int64)


def pack_memory(memory: Tensor, seq: SeqInfo | None, rows: int, call: object) -> tuple[Tensor, tuple[int, ...]]:
    """Memory [B, S, Dm] (the first lengths_k[b] of each row valid) or packed [S_total, Dm] -> (packed, tokens of each
    sequence)."""
    given = None if seq is None else seq.lengths_k
    if memory.dim() == 2:
        if given is None or sum(given) != memory.shape[0]:
            raise ShapeError(
                f"{call}: packed memory needs seq=SeqInfo(..., lengths_k=...) adding up to its {memory.shape[0]} tokens"
            )
        return memory, given
    width = memory.shape[1]
    if memory.shape[0] != rows:
        raise ShapeError(f"{call}: memory has {memory.shape[0]} rows for {rows} sequences")
    lengths = (width,) * rows if given is None else given
    if max(lengths, default=0) > width:
        raise ShapeError(f"{call}: seq.lengths_k asks for more than the {width} memory tokens of a row")
    return Rows(lengths, width, valid_index(lengths, width, memory.device)).pack(memory), lengths
