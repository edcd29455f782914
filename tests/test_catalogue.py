"""Cards are complete and consistent; names, aliases and options lead somewhere or raise with help."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch

from attlas.catalogue.card import FAMILIES, LEVELS, Card
from attlas.catalogue.index import build, card, cards
from attlas.catalogue.kinds import fits, kinds
from attlas.errors import OptionError, UnknownNameError, UnsupportedError
from attlas.masks import Mask
from attlas.nn.mixer import Mixer
from attlas.registry import load_attr

ALL = cards()
MINE = {
    "full", "causal", "cross", "multi-head", "multi-query", "grouped-query", "alibi", "flash", "local", "sliding-window",
    "dilated-window", "global", "streaming", "learned-sink", "strided", "fixed", "block-sparse",
}  # fmt: skip


def test_the_softmax_core_is_there() -> None:
    assert {c.name for c in ALL} >= MINE


@pytest.mark.parametrize("c", ALL, ids=lambda c: c.name)
def test_card_is_complete(c: Card) -> None:
    for name in ("name", "summary", "formula", "paper", "time", "memory", "cache"):
        text = getattr(c, name)
        assert isinstance(text, str) and text.strip() == text and text, f"{c.name}: {name} is empty or padded"
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", c.name)
    assert all(re.fullmatch(r"[a-z0-9+]+(-[a-z0-9+]+)*", a) for a in c.aliases)
    assert c.summary.endswith(".") and len(c.summary) < 160
    assert c.time.startswith("O(") and c.memory.startswith("O(")
    assert c.family in FAMILIES and isinstance(c.used_by, tuple)
    assert c.pattern is None or isinstance(c.pattern, Mask)


@pytest.mark.parametrize("c", ALL, ids=lambda c: c.name)
def test_source_and_year_agree(c: Card) -> None:
    found = re.search(r"arXiv:(\d\d)\d\d\.\d{4,5}", c.paper)
    assert found, f"{c.name}: the paper has no arXiv id"
    assert 2000 + int(found[1]) == c.year


@pytest.mark.parametrize("c", [c for c in ALL if c.level >= 1], ids=lambda c: c.name)
def test_paths_resolve(c: Card) -> None:
    assert callable(load_attr(c.reference)) and callable(load_attr(c.op))


@pytest.mark.parametrize("c", [c for c in ALL if c.level >= 2], ids=lambda c: c.name)
def test_example_builds_and_options_are_typed(c: Card) -> None:
    mixer = c.build(**c.example)
    assert isinstance(mixer, Mixer) and mixer.name == c.name
    assert str(mixer).startswith(f"{c.name}(dim=")
    parameters = list(c.options.values())
    free = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert free in (["dim"], ["dim", "num_heads"]) and len(parameters) <= 12
    for p in parameters:
        assert p.annotation is not inspect.Parameter.empty, f"{c.name}: option {p.name} has no type"
        assert p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL), f"{c.name}: *{p.name}"
    assert inspect.getdoc(c.factory)
    for options in c.options_for.values():
        assert options.keys() <= c.options.keys()


@pytest.mark.parametrize("c", ALL, ids=lambda c: c.name)
def test_cards_are_plain_data(c: Card) -> None:
    data = json.loads(json.dumps(c.to_dict()))
    assert data["name"] == c.name and data["level_name"] == LEVELS[c.level]


def test_lookup() -> None:
    assert card("sliding_window") is card("SWA") is card("Sliding Window") is card("sliding-window")
    names = [n for c in ALL for n in (c.name, *c.aliases)]
    assert len(names) == len(set(names))
    with pytest.raises(UnknownNameError, match="unknown mechanism 'slidng-window'; did you mean 'sliding-window'"):
        card("slidng-window")


def test_filters() -> None:
    assert {c.name for c in cards(family="core")} >= {"full", "causal", "cross"}
    assert [c.family for c in ALL] == sorted((c.family for c in ALL), key=FAMILIES.index)
    bounded = cards(supports=("causal", "bounded-cache"))
    assert "sliding-window" in {c.name for c in bounded} and "causal" not in {c.name for c in bounded}
    assert cards(supports="cross") == tuple(c for c in ALL if "cross" in c.supports)
    assert all(c.level >= 3 for c in cards(min_level=3)) and len(cards(min_level=5)) == 0
    with pytest.raises(OptionError, match="no such family; did you mean 'core'"):
        cards(family="cor")
    with pytest.raises(OptionError, match=r"unknown claim .* did you mean 'causal'"):
        cards(supports="casual")


def test_build() -> None:
    mixer = build("sliding-window", dim=26, num_heads=13, window=7)
    assert str(mixer).startswith("sliding-window(dim=26, num_heads=13")
    with pytest.raises(
        OptionError, match=r"(?s)sliding-window\(dim=26, num_heads=13, widow=7\): no option 'widow'; did you mean 'window'"
    ):
        build("sliding-window", 26, 13, widow=7)
    with pytest.raises(OptionError, match=r"(?s)option 'window' is missing\n  sliding-window\(dim: int, num_heads: int"):
        build("swa", 26, 13)
    with pytest.raises(OptionError, match="window must be at least 1"):
        build("sliding-window", 26, 13, window=0)


def test_cards_hash_and_compare() -> None:
    assert len({*ALL, *cards()}) == len(ALL)


@pytest.mark.parametrize("c", cards(), ids=lambda c: c.name)
def test_options_of_the_wrong_kind_are_refused(c: Card) -> None:
    """Every option, with values of every kind that its annotation does not name."""
    asked = {"dim": 26, **c.example}
    for name, kind in kinds(c.factory).items():
        for wrong in (1.5, "a word", object(), True):
            if name in c.options and not fits(wrong, kind):
                with pytest.raises(OptionError, match=rf"(?s){c.name}\(.*option '{name}' is .*, not "):
                    c.build(**{**asked, name: wrong})


def test_kinds() -> None:
    assert fits(3, int | None) and fits(None, int | None) and not fits(3.0, int) and not fits(True, int)
    assert fits(3, float) and not fits("3", float) and not fits(True, float)
    assert fits(True, bool) and not fits(1, bool) and not fits(0, Literal[False, "all"])
    assert fits("all", Literal[False, "all"]) and not fits("al", Literal[False, "all"])
    assert fits((1, 2), Sequence[int]) and fits(range(3), Sequence[int]) and not fits((1, 2.5), Sequence[int])
    assert not fits("12", Sequence[str]) and not fits(12, Sequence[int]) and fits(torch.ones(2), Sequence[int])
    assert fits(object(), Callable[..., int])


def test_what_cannot_be_causal_says_why() -> None:
    sizes = {"linformer": {"max_len": 13}}
    for name in ("linformer", "nystromformer"):
        with pytest.raises(UnsupportedError, match=r"it has no causal form.*so it cannot decode"):
            build(name, 26, 13, causal=True, **sizes.get(name, {}))
    for name in ("clustered", "improved-clustered", "multi-resolution"):
        with pytest.raises(UnsupportedError, match="no causal form"):
            build(name, 26, 13, causal=True)
