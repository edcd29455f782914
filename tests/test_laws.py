"""Every card times every law that applies to it. A new card is tested without a line here. And: the laws can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attlas.catalogue.index import cards
from attlas.errors import UnsupportedError
from attlas.masks import Causal, Window
from attlas.nn.attention import Attention
from attlas.reference.softmax import attention as truth
from attlas.testing.laws import LAWS, laws_for
from attlas.testing.subject import Subject

MIXERS = [card for card in cards() if card.level >= 2]
PAIRS = [pytest.param(card, law, id=f"{card.name}-{law}") for card in MIXERS for law in laws_for(card.supports)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("card", "law"), PAIRS)
def test_law(card: Any, law: str) -> None:
    LAWS[law].check(card.subject())


# ---- deliberately broken mixers: each breaks one promise, and the law of that promise must notice ------------------------------


class Leaky(Attention):
    """Claims to be causal, and lets every token see the mean of the sequence."""

    def mix(self, x: Any, **options: Any) -> Any:
        return super().mix(x + 1e-3 * x.mean(-2, keepdim=True), **options)


class RestartingPositions(Attention):
    """Rotates every chunk as if it stood at the start."""

    def _angles(self, positions: Any, like: Any) -> Any:
        return super()._angles(positions - positions[:1], like)


class ShortMemory(Attention):
    """Keeps one token too few."""

    def cache_specs(self) -> Any:
        (spec,) = super().cache_specs()
        assert spec.window is not None
        return (replace(spec, window=spec.window - 1),)


class DeafOption(Attention):
    """Takes a scale and forgets it."""

    def __init__(self, dim: int, num_heads: int, *, head_dim: int, scale: float | None = None) -> None:
        super().__init__(dim, num_heads, head_dim=head_dim, mask=Causal())


class Boastful(Attention):
    """Says it does less work, and keeps less, than it does."""

    def flops(self, seq_len: int) -> int:
        return super().flops(seq_len) * 9

    def cache_bytes(self, seq_len: int) -> int:
        return super().cache_bytes(seq_len) // 2


class WrongScale(Attention):
    def mix(self, x: Any, **options: Any) -> Any:
        return super().mix(x, **options) * 1.0000001


class Rude(Attention):
    """Fails on bad input somewhere deep inside."""

    def _check(self, *args: Any) -> None:
        pass


class Upcasting(Attention):
    def mix(self, x: Any, **options: Any) -> Any:
        return super().mix(x, **options).float()


class CopyingPadding(Attention):
    """Treats padding as tokens."""

    def forward(self, x: Any, *, seq: Any = None, **options: Any) -> Any:
        return super().forward(x, **options) if x.dim() == 3 else super().forward(x, seq=seq, **options)


def _subject(kind: type[Attention], **options: Any) -> Subject:
    def factory(dim: int, num_heads: int, *, head_dim: int, **more: Any) -> Attention:
        return kind(dim, num_heads, head_dim=head_dim, **{"mask": Causal(), **options, **more})

    example = {"dim": 23, "num_heads": 3, "head_dim": 6}
    if kind is DeafOption:
        return Subject("broken", DeafOption, example, frozenset({"causal"}), reference=truth)
    claims = frozenset({"causal", "packed", "decode", "backward"})
    return Subject("broken", factory, example, claims, reference=truth)


WINDOW = {"mask": Causal() & Window.last(5)}


@pytest.mark.parametrize(
    ("kind", "options", "law"),
    [
        (Leaky, {}, "causal"),
        (Leaky, {}, "decode"),
        (RestartingPositions, {}, "decode"),
        (ShortMemory, WINDOW, "decode"),
        (ShortMemory, WINDOW, "ragged-paged"),
        (DeafOption, {}, "liveness"),
        (Boastful, {}, "flops"),
        (Boastful, {}, "cache-bytes"),
        (Rude, {}, "errors"),
        (Upcasting, {}, "dtypes"),
        (CopyingPadding, {}, "padding"),
    ],
)
def test_the_laws_can_fail(kind: type[Attention], options: dict[str, Any], law: str) -> None:
    sound = _subject(Attention, **options)
    if kind is not DeafOption and law not in ("errors", "liveness"):
        LAWS[law].check(sound)  # the same mixer without the defect keeps the law
    with pytest.raises((AssertionError, UnsupportedError)):  # the second: an op that sees the defect itself
        LAWS[law].check(_subject(kind, **options))


def test_the_reference_law_sees_a_relative_error_of_1e_7() -> None:
    """The twin of a mixer runs the same `mix`, so an error outside of attention is caught by gradcheck's and degenerate's kind of
    independence, an error inside attention by the reference law: here the op itself is off by 1e-7."""

    def off(*args: Any, **options: Any) -> Any:
        from attlas.ops.attention import attention

        return attention(*args, **options) * 1.0000001

    with pytest.raises(AssertionError, match="differs by"):
        LAWS["reference"].check(_subject(Attention, attend=off))


def test_every_claim_has_a_law() -> None:
    """A card cannot claim something that nothing checks."""
    from attlas.catalogue.card import FEATURES

    checked = {law.needs for law in LAWS.values()} | {
        "bounded-cache",
        "gqa",
    }  # in cache-bytes, and as faces of reference and packed
    assert set(FEATURES) <= checked
    for card in MIXERS:
        if "gqa" in card.supports:
            assert "num_kv_heads" in {**card.example, **card.options_for.get("gqa", {})}, (
                f"{card.name}: no example with shared heads"
            )
