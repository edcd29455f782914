"""Look a mechanism up, filter the catalogue, build a mixer by name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from attlas.catalogue.card import FAMILIES, FEATURES, Card
from attlas.errors import OptionError, UnknownNameError
from attlas.nn.mixer import Mixer
from attlas.registry import load_attr, suggest

# Where the cards are. A new family adds its line here.
MODULES = (
    "attlas.catalogue.cards.core:CARDS",
    "attlas.catalogue.cards.patterns:CARDS",
    "attlas.catalogue.cards.sparse_transformer:CARDS",
    "attlas.catalogue.cards.linear:CARDS",
    "attlas.catalogue.cards.convolution:CARDS",
    "attlas.catalogue.cards.latent:CARDS",
    "attlas.catalogue.cards.heads:CARDS",
    "attlas.catalogue.cards.sparse:CARDS",
    "attlas.catalogue.cards.lowrank:CARDS",
    "attlas.catalogue.cards.multiscale:CARDS",
    "attlas.catalogue.cards.content:CARDS",
)


@lru_cache(maxsize=1)
def _table() -> tuple[dict[str, Card], dict[str, str]]:
    """name -> card, in catalogue order, and alias -> name."""
    found = [card for path in MODULES for card in load_attr(path)]
    order = {family: i for i, family in enumerate(FAMILIES)}
    table: dict[str, Card] = {}
    for card in sorted(found, key=lambda c: order[c.family]):
        assert card.name not in table, f"two cards named {card.name}"
        table[card.name] = card
    aliases: dict[str, str] = {}
    for card in table.values():
        for alias in card.aliases:
            assert alias not in table and alias not in aliases, f"alias {alias!r} is taken"
            aliases[alias] = card.name
    return table, aliases


def card(name: str) -> Card:
    """The card of a mechanism, by name or alias (case and underscores do not matter)."""
    table, aliases = _table()
    key = str(name).strip().lower().replace("_", "-").replace(" ", "-")
    key = aliases.get(key, key)
    if key not in table:
        raise UnknownNameError(f"unknown mechanism {name!r}; {suggest(key, [*table, *aliases])}")
    return table[key]


def cards(*, family: str | None = None, supports: str | Iterable[str] = (), min_level: int = 0) -> tuple[Card, ...]:
    """All cards in catalogue order, or those of a family, with all the given claims, at or above a level."""
    wanted = {supports} if isinstance(supports, str) else set(supports)
    if unknown := wanted - FEATURES.keys():
        raise OptionError(f"cards(supports={sorted(wanted)}): unknown claim {sorted(unknown)}; {suggest(min(unknown), FEATURES)}")
    if family is not None and family not in FAMILIES:
        raise OptionError(f"cards(family={family!r}): no such family; {suggest(family, FAMILIES)}")
    return tuple(
        c for c in _table()[0].values() if family in (None, c.family) and wanted <= c.supports and c.level >= min_level
    )  # fmt: skip


def build(name: str, dim: int, num_heads: int | None = None, **options: Any) -> Mixer:
    """Build a mixer by the name of its card: `build("sliding-window", dim=512, num_heads=8, window=256)`.

    num_heads may be left out, and must be, for a mechanism without heads. The options are those of the mechanism's factory
    (`card(name).signature()`). Raises UnknownNameError for a name that is in no catalogue, OptionError for an option that is
    unknown, missing or out of range.
    """
    return card(name).build(dim, num_heads, **options)
