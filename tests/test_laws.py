"""Every card times every law that applies to it: a new card is tested without a line here. That the laws can fail is shown in
test_laws_can_fail.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attlas.catalogue.index import cards
from attlas.testing.laws import LAWS, laws_for

MIXERS = [card for card in cards() if card.level >= 2]
PAIRS = [pytest.param(card, law, id=f"{card.name}-{law}") for card in MIXERS for law in laws_for(card.subject().claims)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("card", "law"), PAIRS)
def test_law(card: Any, law: str) -> None:
    LAWS[law].check(card.subject())


def test_every_claim_has_a_law() -> None:
    """A card cannot claim something that nothing checks."""
    from attlas.catalogue.card import FEATURES

    checked = {law.needs for law in LAWS.values()}
    checked |= {"bounded-cache", "gqa"}  # the first in cache-bytes, the second as a face in reference and packed
    assert set(FEATURES) <= checked
    for card in MIXERS:
        if "gqa" in card.supports:
            assert "num_kv_heads" in {**card.example, **card.options_for.get("gqa", {})}, (
                f"{card.name}: no example with shared heads"
            )
