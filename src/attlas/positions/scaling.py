"""How rotary frequencies are stretched so that a model reads further than it was trained: one value per method."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.errors import OptionError


def plain_frequencies(base: float, dim: int) -> Tensor:
    """`base ** (-2 i / dim)` for i = 0 ... dim/2 - 1, fp32 [dim / 2], on the CPU (also under `torch.device("meta")`)."""
    return 1.0 / _powers(base, dim)


def _powers(base: float, dim: int) -> Tensor:
    # fp32 throughout, like the code that trained the checkpoints: the rounded values are part of the model.
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    powers = base**exponents
    assert isinstance(powers, Tensor)
    return powers


def _positive(where: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise OptionError(f"{where}: {name} must be positive, got {value}")


class RopeScaling(ABC):
    """A change of the rotary frequencies. `f` below is the unscaled inverse frequency `base ** (-2 i / dim)`, dim =
    rotary_dim."""

    @abstractmethod
    def frequencies(self, base: float, dim: int) -> Tensor:
        """Inverse frequencies, fp32 [dim / 2], on the CPU."""

    @property
    def magnitude(self) -> float:
        """Multiplies cos and sin, hence every score by its square."""
        return 1.0


@dataclass(frozen=True)
class Linear(RopeScaling):
    """Position interpolation: f / factor, the same as dividing every position by `factor`.

    Source: Chen et al. 2023, arXiv 2306.15595.
    """

    factor: float

    def __post_init__(self) -> None:
        _positive(repr(self), factor=self.factor)

    def frequencies(self, base: float, dim: int) -> Tensor:
        return plain_frequencies(base, dim) / self.factor


@dataclass(frozen=True)
class NTK(RopeScaling):
    """NTK-aware scaling, static: base' = base * factor ** (dim / (dim - 2)). The lowest frequency is divided by `factor`, the
    highest is kept.

    Source: "NTK-aware scaled RoPE" (bloc97, 2023), described in Peng et al. 2023, arXiv 2309.00071, section 3.1.
    """

    factor: float

    def __post_init__(self) -> None:
        _positive(repr(self), factor=self.factor)

    def frequencies(self, base: float, dim: int) -> Tensor:
        return plain_frequencies(base * self.factor ** _ntk_exponent(self, dim), dim)


@dataclass(frozen=True)
class DynamicNTK(RopeScaling):
    """NTK-aware scaling that grows with the sequence: base' = base * (factor * n / L - (factor - 1)) ** (dim / (dim - 2)) with
    L = `original_max_position` and n = max(seq_len, L).

    The base depends on `seq_len`, so **keys that were rotated and cached for a shorter sequence stand on an older base than the
    query that reads them**: their scores are no longer a function of the distance alone. For decoding, give the longest length
    that will be reached (prompt + new tokens) once, and all keys share one base. `rope.at_length(n)` gives the Rope for another
    length; to follow a growing sequence exactly, cache the keys unrotated and rotate all of them at each new length.

    Source: emozilla 2023, described in Peng et al. 2023, arXiv 2309.00071, section 3.3.
    """

    factor: float
    original_max_position: int
    seq_len: int

    def __post_init__(self) -> None:
        _positive(repr(self), factor=self.factor, original_max_position=self.original_max_position, seq_len=self.seq_len)

    def frequencies(self, base: float, dim: int) -> Tensor:
        length = max(self.seq_len, self.original_max_position)
        grown = (self.factor * length / self.original_max_position) - (self.factor - 1)
        return plain_frequencies(base * grown ** _ntk_exponent(self, dim), dim)


@dataclass(frozen=True)
class Yarn(RopeScaling):
    """YaRN: dimensions that turn more than `beta_fast` times within L = `original_max_position` keep f, those that turn fewer
    than `beta_slow` times get f / factor, a linear ramp over the dimension index lies between.

    turns(i) = beta at i = dim * ln(L / (2 pi beta)) / (2 ln base); `truncate` rounds the two ends outwards to whole dimensions.
    attention_factor  None = m(factor, mscale) / m(factor, mscale_all_dim) when both are given and not 0, else m(factor, 1), with
                      m(s, c) = 0.1 c ln(s) + 1 for s > 1, else 1.
    Source: Peng et al. 2023, arXiv 2309.00071; mscale as in DeepSeek-V2 (arXiv 2405.04434).
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _positive(
            repr(self),
            factor=self.factor,
            original_max_position=self.original_max_position,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
        )
        if self.beta_fast < self.beta_slow:
            raise OptionError(f"{self!r}: beta_fast counts turns of the fast dimensions and must not be below beta_slow")

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    def _growth(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

    def frequencies(self, base: float, dim: int) -> Tensor:
        powers = _powers(base, dim)
        stretched, kept = 1.0 / (self.factor * powers), 1.0 / powers
        low, high = self._ramp_ends(base, dim)
        index = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
        keep = 1 - ((index - low) / (high - low)).clamp(0, 1)
        return stretched * (1 - keep) + kept * keep

    def _ramp_ends(self, base: float, dim: int) -> tuple[float, float]:
        def index_of(turns: float) -> float:
            return (dim * math.log(self.original_max_position / (turns * 2 * math.pi))) / (2 * math.log(base))

        low, high = index_of(self.beta_fast), index_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        return low, high + 0.001 if low == high else high  # a ramp of width zero would divide by zero


@dataclass(frozen=True)
class Llama3(RopeScaling):
    """Llama-3.1: with wavelength w = 2 pi / f and L = `original_max_position`: f where w < L / high_freq_factor, f / factor where
    w > L / low_freq_factor, and between them (1 - s) f / factor + s f with s = (L / w - low) / (high - low).

    Source: Llama Team 2024, arXiv 2407.21783, and the reference code of that release.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        _positive(
            repr(self),
            factor=self.factor,
            low_freq_factor=self.low_freq_factor,
            original_max_position=self.original_max_position,
        )
        if self.high_freq_factor <= self.low_freq_factor:
            raise OptionError(f"{self!r}: high_freq_factor must be above low_freq_factor")

    def frequencies(self, base: float, dim: int) -> Tensor:
        plain = plain_frequencies(base, dim)
        wavelength = 2 * math.pi / plain
        span = self.high_freq_factor - self.low_freq_factor
        smooth = (self.original_max_position / wavelength - self.low_freq_factor) / span
        between = (1 - smooth) * plain / self.factor + smooth * plain
        long = wavelength > self.original_max_position / self.low_freq_factor
        short = wavelength < self.original_max_position / self.high_freq_factor
        return torch.where(long, plain / self.factor, torch.where(short, plain, between))


@dataclass(frozen=True)
class Each(RopeScaling):
    """f_i / factors_i: a number for each frequency, as GGUF files write down the rule of Llama 3.1."""

    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        for factor in self.factors:
            _positive(repr(self), factor=factor)

    def frequencies(self, base: float, dim: int) -> Tensor:
        if len(self.factors) != dim // 2:
            raise OptionError(f"{self!r}: {len(self.factors)} factors for {dim // 2} frequencies")
        return plain_frequencies(base, dim) / torch.tensor(self.factors, dtype=torch.float32, device="cpu")


def _ntk_exponent(scaling: RopeScaling, dim: int) -> float:
    if dim <= 2:
        raise OptionError(f"{scaling!r} needs at least 4 rotated channels, got {dim}")
    return dim / (dim - 2)
