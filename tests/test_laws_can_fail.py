"""The laws can fail: mixers that each break one promise, and the law of that promise notices. Every law is broken at least
once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attlas.errors import UnsupportedError
from attlas.masks import Causal, Window
from attlas.nn.attention import Attention
from attlas.nn.cross import CrossAttention
from attlas.ops.attention import attention
from attlas.reference.softmax import attention as truth
from attlas.testing.laws import LAWS
from attlas.testing.subject import Subject


class Leaky(Attention):
    """Claims to be causal, and lets every token see the mean of the sequence."""

    def mix(self, x: Tensor, **options: Any) -> Tensor:
        return super().mix(x + 1e-3 * x.mean(-2, keepdim=True), **options)


class RestartingPositions(Attention):
    """Rotates every chunk as if it stood at the start."""

    def _angles(self, positions: Tensor, like: Tensor) -> Any:
        return super()._angles(positions - positions[:1], like)


class ShortMemory(Attention):
    """Keeps one token too few."""

    def cache_specs(self) -> Any:
        (spec,) = super().cache_specs()
        assert spec.window is not None
        return (replace(spec, window=spec.window - 1),)


class Boastful(Attention):
    """Says that it does, and keeps, something else than it does."""

    def flops(self, seq_len: int) -> int:
        return super().flops(seq_len) * 9

    def cache_bytes(self, seq_len: int) -> int:
        return super().cache_bytes(seq_len) // 2


class Rude(Attention):
    """Fails on bad input somewhere deep inside."""

    def _check(self, *args: Any) -> None:
        pass


class Upcasting(Attention):
    """Returns another dtype than it was given."""

    def mix(self, x: Tensor, **options: Any) -> Tensor:
        return super().mix(x, **options).float()


class Sloppy(Attention):
    """Rounds keys and values to bf16."""

    def _keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        k, v = super()._keys_values(source)
        return k.half().to(k.dtype), v.to(torch.bfloat16).to(v.dtype)

    def use(self, impl: str) -> Any:
        self.__class__ = Attention  # its literal twin is the sound one
        return Attention.use(self, impl)


class PaddingIsTokens(Attention):
    """Mixes the padding too."""

    def forward(self, x: Tensor, *, seq: Any = None, **options: Any) -> Tensor:
        return super().forward(x, **options) if x.dim() == 3 else super().forward(x, seq=seq, **options)


class WrongGradient(Attention):
    """Right outputs, wrong gradients."""

    def mix(self, x: Tensor, **options: Any) -> Tensor:
        y = super().mix(x, **options)
        return y + 0.01 * (x - x.detach())


class AlmostFull(Attention):
    """Off by one part in ten million everywhere, in the literal twin too."""

    def mix(self, x: Tensor, **options: Any) -> Tensor:
        return super().mix(x, **options) * 1.0000001


class RawStorage(Attention):
    """Reads memory as if every tensor were contiguous."""

    def mix(self, x: Tensor, **options: Any) -> Tensor:
        strides = torch.empty(x.shape, device="meta").stride()
        return super().mix(torch.as_strided(x, x.shape, strides) if x.dim() == 3 and x.shape[0] != 1 else x, **options)


class BatchNormed(Attention):
    """Subtracts a mean over the batch."""

    def mix(self, x: Tensor, **options: Any) -> Tensor:
        return super().mix(x - 1e-3 * x.mean(0, keepdim=True) if x.dim() == 3 else x, **options)


class BlindToSequences(Attention):
    """Lets packed sequences see each other."""

    def mix(self, x: Tensor, **options: Any) -> Tensor:
        return super().mix(x + 1e-3 * x.sum(0) if x.dim() == 2 else x, **options)


class BlindToPositions(Attention):
    """Takes explicit positions and forgets them."""

    def forward(self, x: Tensor, *, positions: Any = None, **options: Any) -> Tensor:
        return super().forward(x, **options)


class NeedsTokens(Attention):
    """Divides by the number of tokens."""

    def mix(self, x: Tensor, **options: Any) -> Tensor:
        return super().mix(x, **options) + 0 / x.shape[-2]


class Curious(Attention):
    """Looks at cache slots that were never written."""

    def mix(self, x: Tensor, *, cache: Any, **options: Any) -> Tensor:
        y = super().mix(x, cache=cache, **options)
        part = cache.parts[0] if cache is not None else None
        return y if part is None or not hasattr(part, "_storage") else y + 0 * part._storage[0].sum()


class Counting(Attention):
    """Numbers tokens by a counter of its own instead of by the cache."""

    def mix(self, x: Tensor, *, cache: Any, positions: Tensor, **options: Any) -> Tensor:
        if cache is not None:
            begin = 0 if cache.lengths[0] == 0 else self.count
            self.count = begin + x.shape[0] // 2
            positions = positions + begin - positions[0]
        return super().mix(x, cache=cache, positions=positions, **options)


class Peeking(CrossAttention):
    """A query that also reads the other queries."""

    def mix(self, x: Tensor, **options: Any) -> Tensor:
        return super().mix(x + 1e-3 * x.mean(-2, keepdim=True), **options)


class DataDependent(Attention):
    """Branches on values, which breaks the graph."""

    def mix(self, x: Tensor, **options: Any) -> Tensor:
        return super().mix(x if x.sum().item() > 1e9 else x + 0, **options)


def deaf(dim: int, num_heads: int, *, head_dim: int, scale: float | None = None) -> Attention:
    """Takes a scale and forgets it."""
    return Attention(dim, num_heads, head_dim=head_dim, mask=Causal()).named("broken")


def bidirectional_claim(dim: int, num_heads: int, *, head_dim: int) -> Attention:
    return Attention(dim, num_heads, head_dim=head_dim, mask=Causal()).named("broken")


def inaccurate(*args: Any, **options: Any) -> Tensor:
    return attention(*args, **options) * 1.0000001


def traceable(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


EXAMPLE = {"dim": 23, "num_heads": 3, "head_dim": 6}
WINDOW = {"mask": Causal() & Window.last(5)}


def plain(dim: int, num_heads: int, *, head_dim: int) -> Attention:
    return Attention(dim, num_heads, head_dim=head_dim, mask=Causal())


def subject(kind: type[Attention], **options: Any) -> Subject:
    if not issubclass(kind, CrossAttention):
        options = {"mask": Causal(), **options}

    def factory(dim: int, num_heads: int, *, head_dim: int, **more: Any) -> Attention:
        return kind(dim, num_heads, head_dim=head_dim, **{**options, **more}).named("broken")

    claims = frozenset({"causal", "packed", "decode", "backward"})
    return Subject("broken", factory, EXAMPLE, claims, reference=truth, degenerate=({}, plain, {}))


class EightBitsUnderAutocast(Attention):
    """Rounds what it read to 8 bits where torch.autocast is on."""

    def mix(self, x: Tensor, **options: Any) -> Tensor:
        y = super().mix(x, **options)
        return y.to(torch.float8_e5m2).to(y.dtype) if torch.is_autocast_enabled("cpu") else y


BROKEN: list[tuple[str, type[Attention], dict[str, Any]]] = [
    ("reference", Attention, {"attend": inaccurate}),
    ("gradcheck", WrongGradient, {}),
    ("dtypes", Upcasting, {}),
    ("autocast", EightBitsUnderAutocast, {}),
    ("degenerate", AlmostFull, {}),
    ("noncontiguous", RawStorage, {}),
    ("compile", DataDependent, {"attend": traceable}),
    ("causal", Leaky, {}),
    ("cross", Peeking, {}),
    ("batch-rows", BatchNormed, {}),
    ("packed", BlindToSequences, {}),
    ("padding", PaddingIsTokens, {}),
    ("positions", BlindToPositions, {}),
    ("empty", NeedsTokens, {}),
    ("decode", Leaky, {}),
    ("decode", RestartingPositions, {}),
    ("decode", ShortMemory, WINDOW),
    ("decode-dtypes", Sloppy, {}),
    ("unwritten-slots", Curious, {}),
    ("ragged-paged", ShortMemory, WINDOW),
    ("rollback", Counting, {}),
    ("cache-bytes", Boastful, {}),
    ("flops", Boastful, {}),
    ("errors", Rude, {}),
]


@pytest.mark.parametrize(("law", "kind", "options"), BROKEN, ids=[f"{law}-{kind.__name__}" for law, kind, _ in BROKEN])
def test_a_broken_mixer_is_caught(law: str, kind: type[Attention], options: dict[str, Any]) -> None:
    sound = {k: v for k, v in options.items() if v is not inaccurate}
    LAWS[law].check(subject(CrossAttention if kind is Peeking else Attention, **sound))  # without the defect the law is kept
    # Beside the law's own verdict: an op or the compiler that refuses what the defect asks for.
    with pytest.raises((AssertionError, UnsupportedError, ZeroDivisionError)):
        LAWS[law].check(subject(kind, **options))


@pytest.mark.parametrize(("law", "factory"), [("liveness", deaf), ("bidirectional", bidirectional_claim)])
def test_a_false_signature_or_claim_is_caught(law: str, factory: Callable[..., Attention]) -> None:
    with pytest.raises(AssertionError):
        LAWS[law].check(Subject("broken", factory, EXAMPLE, frozenset({"causal"}), reference=truth))


def test_every_law_is_broken_once() -> None:
    assert {law for law, _, _ in BROKEN} | {"liveness", "bidirectional"} == set(LAWS)
