"""Drawings: densities are counted, text and SVG show them."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise, product

import pytest

from attlas.errors import OptionError, ShapeError
from attlas.masks import Causal, Dense, Documents, Global, Mask, Nothing, Padding, PerHead, Sinks, Strided, Window, draw
from attlas.masks.draw import pattern, to_svg, to_text

SVG = "{http://www.w3.org/2000/svg}"


def averages(mask: Mask, Tq: int, Tk: int, rows: list[int], cols: list[int]) -> list[list[float]]:
    whole = mask.to_bool(Tq, Tk).double().reshape(-1, Tq, Tk).mean(0)
    return [[float(whole[a:b, c:d].mean()) for c, d in pairwise(cols)] for a, b in pairwise(rows)]


@pytest.mark.parametrize(
    "mask", [Causal(), Window(31, 5) | Global([7]), Strided(3), PerHead((Causal(), Nothing())), Padding([90, 13])]
)
def test_pattern_is_the_average_of_each_cell(mask: Mask) -> None:
    rows, cols = [i * 101 // 7 for i in range(8)], [i * 103 // 11 for i in range(12)]
    assert pattern(mask, 101, 103, 7, 11) == [pytest.approx(row) for row in averages(mask, 101, 103, rows, cols)]


@pytest.mark.parametrize(
    "mask", [Causal(), Causal() & Window.last(97) | Sinks(5), Documents([500, 700]), PerHead((Causal(), Strided(5)))]
)
def test_large_patterns_are_counted_by_blocks(mask: Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way large masks go, at a size where it can be checked; borders lie on multiples of the block."""
    monkeypatch.setattr(draw, "SMALL", 0)
    monkeypatch.setattr(draw, "BLOCKS", 128)
    Tq, Tk = 1103, 701
    rows = [i * (Tq // 16) // 7 * 16 for i in range(7)] + [Tq]
    cols = [i * (Tk // 8) // 5 * 8 for i in range(5)] + [Tk]
    found = pattern(mask, Tq, Tk, 7, 5)
    assert found == [pytest.approx(row, abs=1e-12) for row in averages(mask, Tq, Tk, rows, cols)]


def test_patterns_of_a_million_tokens() -> None:
    T = 1 << 20
    found = pattern(Causal() & Window.last(T // 4), T, T, 16, 16)
    for r, c in product(range(16), range(16)):
        assert found[r][c] == pytest.approx(1.0 if 1 <= r - c <= 3 else 0.5 if r - c in (0, 4) else 0.0, abs=1e-4)


def test_more_cells_than_tokens() -> None:
    assert pattern(Causal(), 2, 3, 4, 6) == [[1, 1, 1, 1, 0, 0]] * 2 + [[1, 1, 1, 1, 1, 1]] * 2
    assert pattern(Causal(), 0, 3, 2, 2) == [[0, 0], [0, 0]]
    assert pattern(Causal(), 1, 5000000, 1, 2) == [[1, 1]]


def test_text_of_a_small_causal_mask() -> None:
    assert to_text(Causal(), 5, 6).splitlines() == [
        "Causal()  5 queries down, 6 keys across",
        "┌──────┐",
        "│██▄   │",
        "│████▄ │",
        "│▀▀▀▀▀▀│",
        "└──────┘",
    ]


@pytest.mark.parametrize(("Tq", "Tk"), [(300, 300), (1 << 20, 1 << 20)])
def test_text_of_a_large_mask_has_shades(Tq: int, Tk: int) -> None:
    head, _, *lines, _ = to_text(Causal(), Tq, Tk, 32).splitlines()
    assert head.startswith("Causal()") and len(lines) == 16 and all(len(line) == 34 for line in lines)
    for r, line in enumerate(lines):
        assert line[1 : 1 + 2 * r] == "█" * 2 * r and line[3 + 2 * r : -1] == " " * (30 - 2 * r) and line[1 + 2 * r] == "▓"


def test_text_shows_the_thinnest_mask_and_averages_heads() -> None:
    lines = to_text(Window(0, 0), 4000, 4000, 20).splitlines()[2:-1]
    assert [line[1 + 2 * r] for r, line in enumerate(lines)] == ["░"] * 10
    assert to_text(PerHead((Causal(), Nothing())), 2, 2).splitlines()[2] == "│▒▒│"
    assert to_text(Causal(), 0, 3) == "Causal()  0 queries down, 3 keys across"
    tall = to_text(Causal(), 100000, 10, 20).splitlines()
    assert len(tall) <= 90 and len(tall[2]) == 12


def test_svg_is_a_labelled_document() -> None:
    mask = Causal() & Window.last(3) | Global([0])
    root = ET.fromstring(to_svg(mask, 9, 12, 360))
    assert root.tag == f"{SVG}svg" and root.findtext(f"{SVG}title") == repr(mask)
    words = [t.text for t in root.iter(f"{SVG}text")]
    assert "keys" in words and "queries" in words and words.count("11") <= 1
    assert {"0", "10"} <= set(words) and "4" in words  # keys from 0, queries from 12 - 9 = 3
    ink = [r for r in root.iter(f"{SVG}rect") if r.get("fill") == draw.INK]
    assert sum(float(r.get("width", 0)) * float(r.get("height", 0)) for r in ink) == pytest.approx(
        30.0**2 * mask.count((9, 12)), rel=0.01
    )


def test_svg_of_any_size() -> None:
    for Tq, Tk in ((0, 0), (0, 5), (1, 1 << 20), (1 << 20, 1), (3, 700), (5000, 5000)):
        text = to_svg(Causal() & Window.last(1000), Tq, Tk)
        ET.fromstring(text)
        assert len(text) < 200_000
    assert "&lt;bool" in to_svg(Dense(Causal().to_bool(5, 5)), 5, 5)


def test_drawings_refuse() -> None:
    with pytest.raises(OptionError, match=r"rows=0"):
        pattern(Causal(), 5, 5, 0, 3)
    with pytest.raises(OptionError, match=r"width=0"):
        to_text(Causal(), 5, 5, 0)
    with pytest.raises(OptionError, match=r"size=-1"):
        to_svg(Causal(), 5, 5, -1)
    with pytest.raises(ShapeError, match=r"Grid.dense\(-1, 5\)"):
        to_text(Causal(), -1, 5)
    with pytest.raises(ShapeError, match=r"Grid.dense\(5, -3\)"):
        to_svg(Causal(), 5, -3)
