"""What mixers with a state of fixed size share: one forward for training, prefill and decode, over rows that may be padded at
the end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attlas.cache.layer import Cache
from attlas.cache.part import PartSpec
from attlas.cache.state import StatePart
from attlas.nn.mixer import Mixer
from attlas.numerics import wide_dtype
from attlas.ops.long_conv import short_conv
from attlas.ops.scan import pad_packed, scan, unpad_packed
from attlas.shapes import AuxRequest, SeqInfo

States = tuple[Tensor, ...]
SEGMENT, LEAST = 1 << 16, 256  # numbers of x, and least tokens, of a segment: what is computed from it stays in cache


class Rows:
    """Rows [N, T, ...] of which row n has `lengths[n]` valid tokens; `lengths` None = all valid."""

    def __init__(self, lengths: Sequence[int] | None, width: int, device: torch.device) -> None:
        self.lengths = None if lengths is None or all(n == width for n in lengths) else list(lengths)
        self.valid: Tensor | None = None
        if self.lengths is not None:
            ends = torch.tensor(self.lengths, device=device)
            self.valid = torch.arange(width, device=device) < ends[:, None]

    def mask(self, x: Tensor) -> Tensor:
        """x [N, T, ...] with padding set to 0: a token that writes nothing and does not decay (log decay 0)."""
        if self.valid is None:
            return x
        return x.masked_fill(~self.valid.view(*self.valid.shape, *[1] * (x.dim() - 2)), 0)

    def part(self, first: int, width: int, device: torch.device) -> Rows:
        """Tokens first ... first + width - 1 of every row."""
        return Rows(None if self.lengths is None else [min(max(n - first, 0), width) for n in self.lengths], width, device)

    def last(self, x: Tensor, tail: Tensor) -> Tensor:
        """The last tail.shape[1] valid tokens of each row of [tail ; x], for the next call."""
        count = tail.shape[1]
        if self.lengths is None and x.shape[1] >= count:
            return x[:, x.shape[1] - count :]
        joined = torch.cat([tail.to(x.dtype), x], 1)
        if self.lengths is None:
            return joined[:, joined.shape[1] - count :]
        start = torch.tensor(self.lengths, device=x.device)
        index = start[:, None] + torch.arange(count, device=x.device)
        return joined.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


class RecurrentMixer(Mixer):
    """Base of mixers whose cache is a state. A mechanism writes `run` and `state_shapes`; padding and caches are dealt with here.

    The state is fp32 (fp64 for fp64 parameters): it accumulates over the whole sequence.
    """

    causal = True
    uses_positions = False

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor,
        *,
        log_decay: Tensor | None = None,
        delta: Tensor | tuple[Tensor, Tensor] | None = None,
        bonus: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`ops.scan` from `state`, as `use` has chosen ("reference" is the quadratic form, brute force) -> (out, state after)."""
        form = "parallel" if self.impl == "reference" else "auto"
        out, aux = scan(
            q, k, v, log_decay=log_decay, delta=delta, bonus=bonus, initial_state=state, scale=scale, form=form, impl=self.impl,
            return_aux=AuxRequest(state=True),
        )  # fmt: skip
        assert aux.state is not None
        return out, aux.state

    @abstractmethod
    def state_shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(name, shape) of each tensor of one row's state."""

    @abstractmethod
    def run(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        """x [N, T, dim], states [N, ...] each -> (y [N, T, dim], states after the last valid token of each row).

        positions: [T] or [N, T]. Padding must leave the states alone (`rows.mask`); its outputs are thrown away."""

    def _state_dtype(self) -> torch.dtype:
        return wide_dtype(next(self.parameters()).dtype)

    def cache_specs(self) -> tuple[PartSpec, ...]:
        if not self.causal:
            return super().cache_specs()
        return (PartSpec("state", self.state_shapes(), dtype=self._state_dtype()),)

    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        if x.numel() == 0:
            return x
        if seq is None:
            return self._segments(x, self._empty(x), Rows(None, x.shape[1], x.device), positions)[0]
        padded = pad_packed(x, seq.lengths)
        rows = Rows(seq.lengths, padded.shape[1], x.device)
        where = pad_packed(positions, seq.lengths)
        if cache is None:
            return unpad_packed(self._segments(padded, self._empty(padded), rows, where)[0], seq.lengths)
        part = cache.parts[0]
        assert isinstance(part, StatePart), part
        y, states = self._segments(padded, part.states(seq.rows), rows, where)
        part.put(states, seq)
        return unpad_packed(y, seq.lengths)

    def _segments(self, x: Tensor, states: States, rows: Rows, positions: Tensor) -> tuple[Tensor, States]:
        """`run`, for long sequences on the CPU segment after segment: intermediate results of a whole long sequence pass through
        main memory again and again, and the system hands out fresh pages for each of them."""
        tokens = max(LEAST, SEGMENT // (x.shape[0] * self.dim) // LEAST * LEAST)
        whole = x.shape[1] <= tokens or x.device.type != "cpu" or not self.causal or self.impl == "reference"
        if whole or torch.compiler.is_compiling():
            return self.run(x, states, rows, positions)
        outs = []
        for i, piece in enumerate(x.split(tokens, 1)):
            width, first = piece.shape[1], i * tokens
            here = positions[..., first : first + width]
            y, states = self.run(piece, states, rows.part(first, width, x.device), here)
            outs.append(y)
        return torch.cat(outs, 1), states

    def _empty(self, x: Tensor) -> States:
        dtype = self._state_dtype()
        return tuple(torch.zeros(x.shape[0], *shape, dtype=dtype, device=x.device) for _, shape in self.state_shapes())


class ShortConv(nn.Module):
    """Depthwise causal convolution over `width` tokens, as most linear mixers put before the recurrence. weight [C, width]."""

    def __init__(self, channels: int, width: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor, tail: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """x [N, T, C], tail [N, width - 1, C] -> (convolved x, next tail)."""
        return short_conv(x, self.weight, self.bias, tail=tail.to(x.dtype)), rows.last(x, tail)


class GatedNorm(nn.Module):
    """RMS norm over the last dimension, then (or before) a silu gate: norm(x) * silu(z), or norm(x * silu(z)) with
    `gate_first`."""

    def __init__(self, width: int, eps: float = 1e-6, *, affine: bool = True, gate_first: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.eps, self.gate_first = eps, gate_first

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        gate = None if z is None else nn.functional.silu(z)
        if gate is not None and self.gate_first:
            return nn.functional.rms_norm(x * gate, x.shape[-1:], self.weight, self.eps)
        x = nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return x if gate is None else x * gate


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps): eps is added, as in the delta-rule papers' code, not a floor."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def scan_flops(seq_len: int, heads: int, dim_k: int, dim_v: int) -> int:
    """Useful flops of the recurrence: write k v^T and read S^T q, one multiply-add each per state element and token."""
    return 4 * seq_len * heads * dim_k * dim_v
