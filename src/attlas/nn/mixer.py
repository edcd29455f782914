"""The Mixer contract: x -> y, the same call for every mechanism, for training and for serving.

One `forward` runs a dense batch, a padded batch, a packed batch, a prefill, a chunk of a prefill and a ragged decode step. The
base class brings each of them into one of two forms and calls `mix`, which is all that a mechanism writes:

    dense   x [B, T, D], seq None, cache None, positions [T] = 0 ... T-1
    packed  x [T, D], seq = SeqInfo with starts, positions [T] = seq.positions(), cache or None

Positions are absolute. Everything that a mixer does with them (rotary codes, masks, biases) holds wherever the tokens lie in
memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from attlas.cache.layer import Cache, make_cache
from attlas.cache.part import PartSpec
from attlas.errors import OptionError, ShapeError, UnsupportedError
from attlas.masks.expr import Mask
from attlas.nn.packing import Rows, consecutive_starts, pack_memory
from attlas.shapes import SeqInfo, describe


@dataclass(frozen=True)
class Restated:
    """A call in words, put together only when an error prints it."""

    mixer: Mixer
    x: Tensor
    memory: Tensor | None
    positions: Tensor | None
    seq: SeqInfo | None

    def __str__(self) -> str:
        said = describe(x=self.x, memory=self.memory, positions=self.positions)
        return f"{self.mixer}: got {said}" + ("" if self.seq is None else f", seq={self.seq}")


class Mixer(nn.Module, ABC):
    """Base class of every token mixer: `y = mixer(x)` with y of the shape and dtype of x.

    A subclass sets `dim`, writes `mix` and `flops`, and, where it decodes, `cache_specs`. Class attributes say what it takes:

    memory_use       "none" | "required" | "optional": whether it reads `memory` (cross-attention)
    uses_positions   False when nothing in the mixer looks at positions; explicit `positions` are then an error, not ignored
    causal           True when no output depends on a later token
    max_len          longest sequence that the mixer takes, None = any
    impl             which implementation its ops run; set it with `use`
    """

    memory_use: Literal["none", "required", "optional"] = "none"
    uses_positions: bool = True
    causal: bool = False
    max_len: int | None = None
    impl: str = "auto"
    name: str = ""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.memory_dim = dim

    # ---- what a mechanism writes ------------------------------------------------------------------------------------------

    @abstractmethod
    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        """The mechanism itself, on the dense or the packed form (see the module's head). Same shape as x."""

    @abstractmethod
    def flops(self, seq_len: int) -> int:
        """Useful floating-point operations (2 per multiply-add) of one forward over `seq_len` tokens of one sequence:
        projections and the pairs that the mechanism needs; softmax, norms and biases are not counted."""

    def cache_specs(self) -> tuple[PartSpec, ...]:
        """The parts of this layer's cache. Mixers that cannot decode raise UnsupportedError."""
        raise UnsupportedError(f"{self}: this mixer has no cache: its outputs depend on later tokens, so it cannot decode")

    def describe_mask(self) -> Mask | None:
        """The mask value this mixer works with, None = every key."""
        return None

    def mix_irregular(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None) -> Tensor:
        """`mix` for positions that are not consecutive (`positions` [T], or [B, T] beside a dense x). Never with a cache."""
        raise UnsupportedError(f"{self}: positions must be consecutive within each sequence")

    # ---- what everybody calls ---------------------------------------------------------------------------------------------

    def forward(
        self,
        x: Tensor,
        *,
        memory: Tensor | None = None,
        positions: Tensor | None = None,
        seq: SeqInfo | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Mix tokens.

        x          [B, T, dim] dense; or packed [T, dim] with `seq`; or [B, T, dim] with `seq`: row b holds seq.lengths[b] valid
                   tokens and then padding, which is neither read nor written (its output is 0)
        memory     for cross-attention: [B, S, memory_dim], with seq.lengths_k valid tokens in each row, or packed [S_total,
                   memory_dim]
        positions  [T] or [B, T] absolute positions; None = 0, 1, 2 ..., or from seq.starts, or where the cache stands. They
                   need not be consecutive unless a cache is given
        cache      what `new_cache` made; the new tokens are appended to its rows (row b, or seq.ids[b]). It holds values: no
                   gradient flows through it

        Returns y of x's shape and dtype. Zero tokens and zero sequences are allowed.
        Raises ShapeError or UnsupportedError, restating the call.
        """
        self._check(x, memory, positions)
        if x.dim() == 3 and seq is None and cache is None and positions is None:
            self._check_memory_rows(x, memory)
            return self.mix(x, memory=memory, positions=torch.arange(x.shape[1], device=x.device), seq=None, cache=None)
        return self._forward_packed(x, memory, positions, seq, cache)

    def new_cache(
        self,
        rows: int = 1,
        max_len: int | None = None,
        *,
        layout: Literal["contiguous", "paged"] = "contiguous",
        page_size: int = 16,
        rollback: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Cache:
        """An empty cache for `rows` sequences of at most `max_len` tokens (None = grows). dtype and device follow the parameters.
        rollback: tokens that a rolling buffer keeps beyond its window, so that rollback + 1 of them can be truncated
        (speculation)."""
        like = next(self.parameters(), torch.empty(0))
        return make_cache(
            self.cache_specs(),
            rows,
            max_len,
            layout=layout,
            page_size=page_size,
            rollback=rollback,
            dtype=dtype or like.dtype,
            device=device or like.device,
        )

    def cache_bytes(self, seq_len: int) -> int:
        """Bytes that a contiguous cache of one sequence of `seq_len` tokens holds, in the dtype of the parameters."""
        like = next(self.parameters(), torch.empty(0))
        total = 0
        for spec in self.cache_specs():
            slots = seq_len // spec.group
            slots = slots if spec.window is None else min(slots, spec.window + spec.sinks)
            slots = 1 if spec.kind == "state" else slots
            total += slots * spec.elements() * (spec.dtype or like.dtype).itemsize
        return total

    def use(self, impl: str) -> Mixer:
        """Pin the implementation of every op of this mixer (and of the mixers inside it); returns self. An explicit
        implementation never falls back: a call it cannot run raises UnsupportedError."""
        if not isinstance(impl, str):
            raise OptionError(f"{self}.use({impl!r}): impl must be the name of an implementation")
        for module in self.modules():
            if isinstance(module, Mixer):
                module.impl = impl
        return self

    def __str__(self) -> str:
        """How errors restate the mixer: its name and options on one line."""
        return f"{self.name or type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    # ---- the one normalisation --------------------------------------------------------------------------------------------

    def _check(self, x: Tensor, memory: Tensor | None, positions: Tensor | None) -> None:
        if x.dim() not in (2, 3) or x.shape[-1] != self.dim:
            raise ShapeError(f"{self}: x must be [B, T, {self.dim}] or packed [T, {self.dim}]; got {describe(x=x)}")
        like = next(self.parameters(), None)
        if like is not None and like.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ShapeError(f"{self}: the parameters are {like.dtype}, x is not; got {describe(x=x)}")
        if memory is not None and self.memory_use == "none":
            raise UnsupportedError(
                f"{self}: this mixer attends to its own input and takes no memory; got {describe(x=x, memory=memory)}"
            )
        if memory is not None and (memory.dim() not in (2, 3) or memory.shape[-1] != self.memory_dim):
            want = f"[B, S, {self.memory_dim}] or packed [S, {self.memory_dim}]"
            raise ShapeError(f"{self}: memory must be {want}; got {describe(x=x, memory=memory)}")
        if positions is not None and not self.uses_positions:
            raise UnsupportedError(f"{self}: nothing in this mixer looks at positions, so they would be ignored; got positions")

    def _check_memory_rows(self, x: Tensor, memory: Tensor | None) -> None:
        if memory is None:
            if self.memory_use == "required":
                raise ShapeError(f"{self}: memory is missing; got {describe(x=x)}")
        elif memory.dim() != 3 or memory.shape[0] != x.shape[0]:
            raise ShapeError(
                f"{self}: a dense x takes memory [B, S, {self.memory_dim}] of as many rows; got {describe(x=x, memory=memory)}"
            )

    def _forward_packed(
        self, x: Tensor, memory: Tensor | None, positions: Tensor | None, seq: SeqInfo | None, cache: Cache | None
    ) -> Tensor:
        call = Restated(self, x, memory, positions, seq)
        rows = Rows.of(x, seq, call)
        lengths_k = None
        if memory is not None:
            memory, lengths_k = pack_memory(memory, seq, len(rows.lengths), call)
        elif seq is not None and seq.lengths_k not in (None, seq.lengths):
            raise ShapeError(f"{call}: seq.lengths_k differs from seq.lengths, but there is no memory that it could describe")
        elif cache is None and self.memory_use == "required":
            raise ShapeError(f"{call}: memory is missing")
        ids = None if seq is None else seq.ids
        starts = self._starts(rows, None if seq is None else seq.starts, ids, cache, call)
        if positions is not None:
            positions = rows.pack_positions(positions, call)
            given = consecutive_starts(positions, rows.lengths)
            if given is None:
                if cache is not None:
                    raise UnsupportedError(f"{call}: with a cache, positions must be consecutive within each sequence")
                resolved = SeqInfo(rows.lengths, lengths_k, starts, ids)
                return rows.unpack(self.mix_irregular(rows.pack(x), memory=memory, positions=positions, seq=resolved))
            starts = self._starts(rows, given, ids, cache, call)
        resolved = SeqInfo(rows.lengths, lengths_k, starts, ids)
        y = self.mix(rows.pack(x), memory=memory, positions=resolved.positions(x.device), seq=resolved, cache=cache)
        if cache is not None:
            cache.end_step()
        return rows.unpack(y)

    def _starts(
        self, rows: Rows, given: tuple[int, ...] | None, ids: tuple[int, ...] | None, cache: Cache | None, call: object
    ) -> tuple[int, ...]:
        """Absolute position of the first new token of each sequence."""
        if cache is None:
            return given if given is not None else (0,) * len(rows.lengths)
        self._check_cache(cache, call)
        ids = ids if ids is not None else tuple(range(len(rows.lengths)))
        if len(set(ids)) != len(ids) or max(ids, default=-1) >= len(cache.lengths):
            raise ShapeError(f"{call}: the sequences need {len(ids)} different rows of a cache with {len(cache.lengths)} rows")
        return self._cache_starts(cache, ids, given, rows.lengths, call)

    def _cache_starts(
        self, cache: Cache, ids: tuple[int, ...], given: tuple[int, ...] | None, lengths: tuple[int, ...], call: object
    ) -> tuple[int, ...]:
        held = tuple(cache.lengths[i] for i in ids)
        if given is not None and any(n and g != h for n, g, h in zip(lengths, given, held, strict=True)):
            raise ShapeError(f"{call}: the cache holds {held} tokens, so its next positions are {held}, not {given}")
        return held

    def _check_cache(self, cache: Cache, call: object) -> None:
        specs = self.cache_specs()
        held = tuple(part.spec for part in cache.parts)
        if held != specs:
            raise ShapeError(f"{call}: this cache was made for another layer: it holds {held}, this mixer needs {specs}")
