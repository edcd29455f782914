"""The report: one page that loads nothing, tables for readers and machines, figures that hold what was measured."""

from __future__ import annotations

import json
import math
import re
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import lab_results
from attlas.lab import figures, prose, report
from attlas.lab.figure_parts import Style, value_axis


class Page(HTMLParser):
    """Collects tags, attributes, headings and visible words; checks that every tag is closed."""

    VOID = frozenset({"meta", "link", "br", "input", "img", "hr", "path", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.words.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[str, Page]:
    html = report.render(lab_results.results(tmp_path_factory.mktemp("made-up")))
    parsed = Page()
    parsed.feed(html)
    parsed.close()
    assert parsed.open == []
    return html, parsed


def test_the_report_loads_nothing(page):
    _, parsed = page
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name) or ""
            assert not re.match(r"\s*(https?:)?//", value), f"<{tag} {name}={value}>"
    assert not [tag for tag, _ in parsed.tags if tag in ("iframe", "object", "embed", "img", "audio", "video")]
    policy = [a["content"] for tag, a in parsed.tags if tag == "meta" and "content" in a and "default-src" in a["content"]]
    assert policy and policy[0].startswith("default-src 'none'")
    ours = report.asset("report.css") + report.asset("report.js") + report.asset("report.html")
    assert not re.search(r"https?://|@import|url\(", ours)


def test_the_report_has_all_its_parts(page):
    _, parsed = page
    words = " ".join(parsed.words)
    for heading in (
        "Side by side", "What quality costs", "Learning to predict bytes", "Finding what was said", "Time against length",
        "What decoding has to keep", "The mechanisms", "How far to trust this", "How it was measured", "What it does not show",
    ):  # fmt: skip
        assert heading in words
    boxes = {a["data-figure"]: a for _, a in parsed.tags if "data-figure" in a}
    assert set(boxes) == {
        "quality-train", "curves", "positions", "recall", "recall-curves", "time-prefill", "time-train", "time-decode",
        "time-train_peak", "cache",
    }  # fmt: skip
    assert all(len(a["aria-label"]) > 40 and a["role"] == "img" for a in boxes.values())
    assert words.count("gate green") == 10
    assert "y_i = sum_{j <= i}" in words and "tokens that left the window are forgotten" in words  # formula, caveat
    assert sum(a.get("viewbox") == "0 0 32 32" for tag, a in parsed.tags if tag == "svg") == 8  # pictures
    assert words.count("a running state, no mask") == 2
    assert "60 GFLOP/s" in words and "Test CPU" in words and "attlas compare" in words


def test_tables_can_be_read_by_machines_and_people(page):
    _, parsed = page
    heads = [a for tag, a in parsed.tags if tag == "th" and a.get("scope") == "col"]
    assert len(heads) > 10 and all(a["aria-sort"] == "none" for a in heads)
    assert len([a for tag, a in parsed.tags if tag == "th" and a.get("scope") == "row"]) == 2 * 10
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert ("html", {"lang": "en"}) in parsed.tags


def test_embedded_figures_are_data_that_the_page_can_read(page):
    html, parsed = page
    block = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.S)[1]
    found = json.loads(block)
    shown = {a["data-show"] for _, a in parsed.tags if "data-show" in a} | {
        a["data-figure"] for _, a in parsed.tags if "data-figure" in a
    }
    assert shown == set(found)
    assert all(f["data"] and f["alt"] for f in found.values())


def test_names_of_the_user_cannot_break_the_page(tmp_path):
    results = lab_results.results(tmp_path, ("causal", "streaming:sink_positions=absolute"))
    nasty = '</script><b>"&'
    results.plan["corpus"]["source"] = nasty
    try:
        parsed = Page()
        parsed.feed(report.render(replace(results, command=f"attlas compare {nasty}")))
        parsed.close()
    finally:
        results.plan["corpus"]["source"] = "made-up text"
    assert parsed.open == [] and nasty in " ".join(parsed.words)


def test_colours_and_symbols_are_the_same_in_every_plot(tmp_path):
    results = lab_results.results(tmp_path)
    seen: dict[str, set] = {}
    for figure in figures.all_figures(results).values():
        for trace in figure["data"]:
            if "meta" in trace:
                colour = trace.get("marker", {}).get("color") or trace["line"]["color"]
                seen.setdefault(trace["meta"], set()).add(colour)
    assert {label: len(colours) for label, colours in seen.items()} == dict.fromkeys(results.mechanisms, 1)
    assert len({min(c) for c in seen.values()}) == 10
    names = set(re.findall(r"--([a-z0-9]+):", report.asset("report.css")))
    assert {c.removeprefix("@") for colours in seen.values() for c in colours} <= names
    many = Style(["a", "causal", *(f"m{i}" for i in range(25))])
    looks = [(many.colour(k), many.symbol(k), many.dash(k)) for k in many.index]
    assert many.index["causal"] == 0 and len(set(looks)) == len(looks)


# Linear RGB as people with deuteranopia, protanopia and tritanopia see it (Machado et al. 2009, severity 1).
SEEN_BY = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
)


def linear(colour: str) -> list[float]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def luminance(colour: str) -> float:
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


def cielab(rgb: list[float]) -> tuple[float, float, float]:
    matrix = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [sum(m * c for m, c in zip(row, rgb, strict=True)) for row in matrix]
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (xyz[0] / 0.9505, xyz[1], xyz[2] / 1.089))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_colours_can_be_told_apart_with_any_colour_vision():
    css = report.asset("report.css")
    palettes = [re.findall(r"--c\d: (#[0-9a-f]{6});", line) for line in css.splitlines() if "--c0:" in line]
    assert [len(p) for p in palettes] == [10, 10, 10] and palettes[1] == palettes[2]  # light; dark by system and by choice
    for palette, card in ((palettes[0], "#ffffff"), (palettes[1], "#161e26")):
        assert f"--card: {card}" in css
        for colour in palette:
            pair = sorted((luminance(colour), luminance(card)))
            assert (pair[1] + 0.05) / (pair[0] + 0.05) > 2.8, f"{colour} hardly stands out on {card}"
        for matrix in SEEN_BY:
            seen = [[min(1, max(0, sum(m * c for m, c in zip(row, linear(p), strict=True)))) for row in matrix] for p in palette]
            labs = [cielab(rgb) for rgb in seen]
            assert min(math.dist(a, b) for i, a in enumerate(labs) for b in labs[:i]) > 15


def test_figures_hold_what_was_measured(tmp_path):
    found = figures.all_figures(lab_results.results(tmp_path))
    prefill = next(t for t in found["time-prefill"]["data"] if t.get("meta") == "causal")
    assert prefill["x"] == list(lab_results.LENGTHS)
    assert prefill["y"] == [lab_results.seconds("causal", "prefill", n) for n in lab_results.LENGTHS]
    assert found["time-prefill"]["layout"]["xaxis"]["type"] == found["time-prefill"]["layout"]["yaxis"]["type"] == "log"
    assert "n<sup>1.00</sup>" in next(t for t in found["time-prefill"]["data"] if t.get("meta") == "local")["hovertemplate"]
    bars = {t["meta"]: t["x"][0] for t in found["recall"]["data"]}
    assert bars["causal"] == 0.995 and list(bars.values()) == sorted(bars.values())
    sizes = {t["meta"]: t["marker"]["size"] for t in found["quality-prefill"]["data"]}
    assert sizes["causal"] > sizes["multi-query"] > sizes["local"]


@pytest.mark.parametrize(("low", "high"), [(2e-4, 3e-4), (1e-3, 9e-3), (1e-3, 0.5), (1e-6, 10.0)])
def test_axes_of_times_always_have_a_few_ticks(low, high):
    axis = value_axis("time", [low, high], str)
    assert 3 <= len(axis["tickvals"]) <= 9
    assert 10 ** axis["range"][0] < low and high < 10 ** axis["range"][1]


def test_headlines_name_the_best_and_their_ties(tmp_path):
    results = lab_results.results(tmp_path)
    found = {h.question: h for h in prose.headlines(results)}
    assert found["Best language model"].label == "causal" and found["Best language model"].big == "2.700"
    assert found["Fastest prefill"].label == "sliding-window" and "ahead of it from 2,048 on" in found["Fastest prefill"].note
    assert found["Smallest cache"].big == "64" and "128 times less than causal" in found["Smallest cache"].note
    assert "six of ten reached 99 %" in found["Best recall"].note


def test_a_report_of_what_is_there(tmp_path):
    """Stages that were not asked for, a red gate and a comparison of one mechanism leave sections out; nothing breaks."""
    results = lab_results.results(tmp_path, ("causal",))
    only = replace(results, records={"gate": results.records["gate"]}, plan={"machine": lab_results.MACHINE})
    html = report.render(only)
    assert "Time against length" not in html and "The mechanisms" in html
    red = report.render(lab_results.results(tmp_path, red="local", complete=False))
    assert "Red gate: local." in red and "Not finished." in red
    alone = report.render(results)
    assert "One attention mechanism, one machine" in alone and "Learning to predict bytes" in alone


def test_the_assets_are_in_the_package(tmp_path):
    """A wheel takes every file below src/attlas; the report reads its assets through the package, not from a path."""
    root = Path(report.__file__).parents[1]
    archive = tmp_path / "attlas.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in (root / "lab" / "assets").iterdir():
            out.write(path, f"attlas/lab/assets/{path.name}")
    assert sorted(zipfile.ZipFile(archive).namelist()) == [
        f"attlas/lab/assets/{n}" for n in ("report.css", "report.html", "report.js")
    ]
    assert all(report.asset(n) for n in ("report.css", "report.html", "report.js"))
