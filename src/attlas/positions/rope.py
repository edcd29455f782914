"""Rotary position embedding: channel pairs of q and k are turned by an angle proportional to the absolute position."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attlas.errors import OptionError, ShapeError, UnsupportedError
from attlas.numerics import wide_dtype
from attlas.positions.rotation import rotate
from attlas.positions.scaling import DynamicNTK, RopeScaling, plain_frequencies
from attlas.shapes import describe


@dataclass(frozen=True)
class Rope:
    """Rotary positions: the pair (a, b) of frequency f at position p becomes

        (a cos(p f) - b sin(p f),  b cos(p f) + a sin(p f)) * attention_factor,    f_i = base ** (-2 i / rotary_dim)

    so that q(p) . k(p') depends on p - p' only. Applied to q and k after the projection (and after a q/k norm), before caching.

    head_dim     width of x
    rotary_dim   only the first `rotary_dim` channels turn, the rest pass unchanged; None = all of head_dim
    interleaved  False: pairs are (x_i, x_{i + rotary_dim/2}) as in GPT-NeoX and Llama; True: (x_{2i}, x_{2i+1}) as in GPT-J and
                 DeepSeek. The layouts are permutations of each other, so a checkpoint works with one of them only
    scaling      how the frequencies are stretched: Linear, NTK, DynamicNTK, Yarn, Llama3 (attlas.positions)

    Numerics     The frequencies are fp32 numbers. The angle p f of an integer position is formed exactly, in fp64, and only its
                 cosine and sine are rounded, to fp32 (fp64 for fp64 x): at position ten million they are as good as at position
                 ten. fp16 and bf16 inputs are turned in fp32 and rounded once.
    Cost         2 multiplications and 1 addition per turned channel, and one cos and sin per token and pair, recomputed at each
                 call. Callers that turn several tensors at the same positions can share them:
                 `cos, sin = rope.cos_sin(positions)`, then `rope.rotate(x, cos, sin)`.
    Inverse      `rope(rope(x, p), -p)` is x * attention_factor ** 2; positions may be negative.
    A Rope is a value (hashable, comparable, no parameters, no buffers): `module.to(torch.bfloat16)` cannot round its frequencies
    and no checkpoint can overwrite them.
    Source       Su et al. 2021, arXiv 2104.09864.
    """

    head_dim: int
    base: float = 10000.0
    rotary_dim: int | None = field(default=None, kw_only=True)
    interleaved: bool = field(default=False, kw_only=True)
    scaling: RopeScaling | None = field(default=None, kw_only=True)
    _by_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise OptionError(f"{self!r}: base must be above 1")
        if not 0 < self.turned <= self.head_dim or self.turned % 2:
            raise OptionError(f"{self!r}: rotary_dim must be even and between 2 and head_dim")
        if self.scaling is not None and not isinstance(self.scaling, RopeScaling):
            raise OptionError(f"{self!r}: scaling must be a RopeScaling value such as Linear(4.0) or Llama3()")
        self.inverse_frequencies()  # a scaling that does not fit rotary_dim is refused here, not at the first call

    @property
    def turned(self) -> int:
        """How many channels turn."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def attention_factor(self) -> float:
        """Multiplies cos and sin (YaRN); 1 for the others."""
        return 1.0 if self.scaling is None else self.scaling.magnitude

    def inverse_frequencies(self) -> Tensor:
        """Radians per position of each pair, fp32 [rotary_dim / 2], on the CPU."""
        if self.scaling is None:
            return plain_frequencies(self.base, self.turned)
        return self.scaling.frequencies(self.base, self.turned)

    def at_length(self, seq_len: int) -> Rope:
        """The Rope for sequences of `seq_len` tokens, when the frequencies depend on it (DynamicNTK). Keys cached from another
        length do not fit the new one."""
        if not isinstance(self.scaling, DynamicNTK):
            raise UnsupportedError(
                f"{self!r}: the frequencies do not depend on the sequence length, so at_length({seq_len}) has no effect"
            )
        return replace(self, scaling=replace(self.scaling, seq_len=seq_len))

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x [..., T, H, head_dim] (the queries or the keys) to `positions`: integers [T], or [B, T] beside x [B, T, H,
        head_dim].

        Returns a tensor of x's shape and dtype. Differentiable to any order. Raises ShapeError.
        """
        self._check(x, positions)
        return self.rotate(x, *self.cos_sin(positions, wide_dtype(x.dtype)))

    def cos_sin(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """attention_factor * cos and sin of the angles of `positions` [..., T]: each [..., T, 1, rotary_dim / 2] in `dtype`."""
        if positions.device.type == "mps":  # has no fp64
            cos, sin = self.cos_sin(positions.cpu(), dtype)
            return cos.to(positions.device), sin.to(positions.device)
        angles = positions[..., None, None].to(torch.float64) * self._frequencies(positions.device)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos.to(dtype), sin.to(dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn x [..., T, H, head_dim] by angles given as `cos_sin` returns them."""
        return rotate(x, cos, sin, self.interleaved)

    def _frequencies(self, device: torch.device) -> Tensor:
        """fp64 copies of the fp32 frequencies on `device`: the product of a 24-bit number and a position below 2**29 is then
        exact."""
        if torch.compiler.is_compiling():
            return self.inverse_frequencies().to(device, torch.float64)
        known = self._by_device.get(device)
        if known is None:
            known = self._by_device[device] = self.inverse_frequencies().to(device, torch.float64)
        return known

    def _check(self, x: Tensor, positions: Tensor) -> None:
        reason = self._misfit(x, positions)
        if reason:
            raise ShapeError(f"{self!r}({describe(x=x, positions=positions)}): {reason}")

    def _misfit(self, x: Tensor, positions: Tensor) -> str | None:
        if x.dim() < 3 or x.shape[-1] != self.head_dim or not x.is_floating_point():
            return f"x must be floating point [..., T, H, {self.head_dim}]"
        if positions.is_floating_point() or positions.dtype == torch.bool or positions.is_complex():
            return "positions must be integers (fractions of a position are a matter of scaling)"
        lead = x.shape[:-2]
        if positions.dim() == 0 or positions.shape != lead[len(lead) - positions.dim() :]:
            return "positions must be [T] or [B, T] with the T (and B) of x"
        if positions.device != x.device:
            return "x and positions must be on one device"
        return None
