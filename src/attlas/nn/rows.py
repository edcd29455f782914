"""Mixers that work on whole sequences: a batch of equal ones at once, others one after the other."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from attlas.cache.layer import Cache
from attlas.errors import ShapeError, UnsupportedError
from attlas.nn.mixer import Mixer
from attlas.shapes import SeqInfo


class RowMixer(Mixer):
    """Base of mixers whose computation has the shape of one sequence. A mechanism writes `mix_rows`, and `mix_cached` where it
    decodes."""

    @abstractmethod
    def mix_rows(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [B, T, dim], T >= 1, whose tokens stand at `positions` [T] -> y of x's shape."""

    def mix_cached(self, x: Tensor, positions: Tensor, seq: SeqInfo, cache: Cache) -> Tensor:
        """Packed x [T, dim], T >= 1, that goes on where the cache stands; a mechanism that decodes writes it."""
        raise UnsupportedError(f"{self}: it does not decode")

    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        if seq is None:
            self._check_end(x.shape[1])
            return self.mix_rows(x, positions) if x.numel() else x
        self._check_end(max((a + n for a, n in zip(seq.first, seq.lengths, strict=True)), default=0))
        if cache is not None:
            return self.mix_cached(x, positions, seq, cache) if x.numel() else x
        if len({*zip(seq.first, seq.lengths, strict=True)}) == 1 and seq.lengths[0]:
            n = seq.lengths[0]
            return self.mix_rows(x.unflatten(0, (-1, n)), positions[:n]).flatten(0, 1)
        return self._one_by_one(x, positions, seq)

    def mix_anywhere(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None) -> Tensor:
        """`mix_irregular` of mechanisms whose `mix_rows` takes any positions from 0 on."""
        assert seq is not None
        if positions.numel():
            if int(positions.min()) < 0:
                raise ShapeError(f"{self}: positions must not be negative")
            self._check_end(int(positions.max()) + 1)
        return self._one_by_one(x, positions, seq)

    def _one_by_one(self, x: Tensor, positions: Tensor, seq: SeqInfo) -> Tensor:
        rows = zip(x.split(seq.lengths), positions.split(seq.lengths), strict=True) if seq.lengths else ()
        return torch.cat([x[:0], *(self.mix_rows(row[None], where)[0] for row, where in rows if len(row))])

    def _check_end(self, end: int) -> None:
        if self.max_len is not None and end > self.max_len:
            raise ShapeError(f"{self}: it is made for {self.max_len} positions, x ends at {end}")
