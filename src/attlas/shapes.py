"""The legend of dimensions, shape checks that restate the call, and the two values that travel beside tensors.

Legend
    B  batch            Tq Tk  query / key tokens        H  query heads      Hkv  key/value heads (H % Hkv == 0)
    D  head_dim of q,k  Dv     head_dim of v             P  pages            N    sequences in a packed batch
    T  tokens of a packed batch (all sequences one after the other)
Layouts are token-major: dense [B, T, H, D], packed [T, H, D], pages [P, page_size, H, D], state [B, H, K, V] in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from attlas.errors import ShapeError


def describe(**tensors: Tensor | None) -> str:
    """`q [2, 5, 4, 8] float32 cpu, k ...`: how error messages restate tensors.

    Inside torch.compile, where sizes may be symbols, their names alone."""
    if torch.compiler.is_compiling():
        return ", ".join(tensors)
    return ", ".join(
        f"{name} {list(t.shape)} {str(t.dtype).removeprefix('torch.')} {t.device}" for name, t in tensors.items() if t is not None
    )


@dataclass(frozen=True)
class SeqInfo:
    """Which tokens of a packed batch belong to which sequence, and where they stand in it.

    lengths    new tokens (queries) of each sequence; they lie one after the other on the token axis
    lengths_k  keys of each sequence, None = same as `lengths`
    starts     absolute position of each sequence's first query; None = `lengths_k - lengths` (aligned to the end), or, when a
               cache is given, the number of tokens that the cache already holds
    ids        row of each sequence in the caches; None = 0, 1, 2, ...
    All are tuples of Python ints, so a SeqInfo can be compared and hashed.
    """

    lengths: tuple[int, ...]
    lengths_k: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("lengths", "lengths_k", "starts", "ids"):
            value = getattr(self, name)
            if value is None:
                continue
            value = tuple(int(v) for v in (value.tolist() if isinstance(value, Tensor) else value))
            object.__setattr__(self, name, value)
            if len(value) != len(self.lengths):
                raise ShapeError(f"SeqInfo: {name} has {len(value)} entries for {len(self.lengths)} sequences")
            if any(v < 0 for v in value):
                raise ShapeError(f"SeqInfo: {name} must not be negative: {value}")

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens_q: Sequence[int] | Tensor, cu_seqlens_k: Sequence[int] | Tensor | None = None) -> SeqInfo:
        """From cumulative offsets `[N+1]` as flash-attn and torch's varlen_attn take them."""

        def lens(cu: Sequence[int] | Tensor) -> tuple[int, ...]:
            c = cu.tolist() if isinstance(cu, Tensor) else list(cu)
            return tuple(b - a for a, b in pairwise(c))

        return cls(lens(cu_seqlens_q), None if cu_seqlens_k is None else lens(cu_seqlens_k))

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def keys(self) -> tuple[int, ...]:
        """Keys of each sequence."""
        return self.lengths if self.lengths_k is None else self.lengths_k

    @property
    def first(self) -> tuple[int, ...]:
        """Absolute position of the first query of each sequence."""
        if self.starts is not None:
            return self.starts
        return tuple(k - q for q, k in zip(self.lengths, self.keys, strict=True))

    @property
    def rows(self) -> tuple[int, ...]:
        """Cache row of each sequence."""
        return tuple(range(len(self.lengths))) if self.ids is None else self.ids

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def total_k(self) -> int:
        return sum(self.keys)

    @property
    def max_seqlen_q(self) -> int:
        return max(self.lengths, default=0)

    @property
    def max_seqlen_k(self) -> int:
        return max(self.keys, default=0)

    def cu_seqlens_q(self, device: torch.device | str | None = None) -> Tensor:
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)

    def cu_seqlens_k(self, device: torch.device | str | None = None) -> Tensor:
        return torch.tensor([0, *accumulate(self.keys)], dtype=torch.int32, device=device)

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Absolute position of every query token, int64 [T]."""
        parts = [torch.arange(s, s + n, device=device) for s, n in zip(self.first, self.lengths, strict=True)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)

    def sequence_ids(self, device: torch.device | str | None = None) -> Tensor:
        """Index (0 ... N-1) of the sequence of every query token, int64 [T]."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths, dtype=torch.int64)).to(device)


@dataclass(frozen=True)
class AuxRequest:
    """What to return beside the output: `return_aux=AuxRequest(lse=True)` -> `(out, Aux)`."""

    lse: bool = False
    state: bool = False


@dataclass(frozen=True)
class Aux:
    """lse: natural log, fp32 (fp64 for fp64 inputs), [B, Tq, H] or packed [T, H]. state: final recurrent state."""

    lse: Tensor | None = None
    state: Tensor | None = None
