"""`attlas compare` from end to end, on tiny models: what it writes, how it resumes, what it refuses, and the report."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import lab_results
from attlas.errors import DataError, UnknownNameError, UnsupportedError
from attlas.lab import compare, figures, gate, mechanisms, prose, report, trials
from attlas.lab.figure_parts import Style, value_axis
from attlas.lab.options import CompareOptions
from attlas.lab.progress import Progress
from attlas.lab.results import best_rate

NAMES = ("causal", "sliding-window:window=5")


@pytest.fixture
def text(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(11):
        (folder / f"{i}.txt").write_text(f"The {i}th of the files says that cats sit on mats, {i} times over.\n" * (9 + i))
    return folder


def options(source: Path, out: str, **more) -> CompareOptions:
    tiny = {
        "dim": 16,
        "layers": 1,
        "heads": 2,
        "layer_dim": 16,
        "context": 16,
        "steps": 6,
        "recall_steps": 4,
        "lengths": (32, 64),
    }
    where = {"text": (source,), "out": source.parent / out}
    return CompareOptions(**{"names": NAMES, "minutes": 0.05, "threads": 1, **where, **tiny, **more})


class Count(Progress):
    """Remembers what was run."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def begin(self, stage: str, what: str, seconds: float) -> None:
        self.begun.append(f"{stage} {what}")


def quality(results) -> list[tuple]:
    """What must not depend on when or how often the comparison was interrupted."""
    texts = [(r["label"], r["seed"], r["bits"], r["curve"]) for r in results.outcomes("text")]
    return texts + [(r["label"], r["seed"], r["accuracy"], r["curve"]) for r in results.outcomes("recall")]


def test_a_whole_comparison(text):
    shown = Count()
    results = compare.run(options(text, "a"), progress=shown)
    assert results.complete and not results.failures()
    assert [w.split()[0] for w in shown.begun] == ["text"] * 2 + ["recall"] * 2 + ["speed"] * 4 + ["cache"] * 2
    rows = results.rows()
    assert [r["mechanism"] for r in rows] == list(NAMES)
    for row in rows:
        assert row["status"] == "ok" and row["tokens"] == 6 * results.plan["text"]["batch"] * 16
        assert 4 < row["bits_per_byte"] < 9 and 0 <= row["recall"] <= 1 and row["length"] == 64
        assert all(row[f"{what}_seconds"] > 0 and row[f"{what}_exponent"] is not None for what in ("prefill", "train", "decode"))
        assert row["train_peak_bytes"] > 64 * 16 * 4 and row["train_tokens_per_second"] > 0
    assert rows[0]["prefill_to_causal"] == 1.0 and rows[0]["bits_to_causal"] == 0.0
    assert rows[0]["parameters"] == rows[1]["parameters"]
    assert [r["cache_bytes"] for r in rows] == [64 * 2 * 16 * 4, 5 * 2 * 16 * 4]
    folder = results.folder
    written = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [r["mechanism"] for r in written] == list(NAMES)
    assert json.loads((folder / "results.json").read_text())["rows"][1]["mechanism"] == NAMES[1]
    assert results.report == folder / "report.html" and results.report.stat().st_size > 1_000_000
    kept = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert len(kept) == 2 + len(shown.begun) and len({k["key"] for k in kept}) == len(kept)


def test_a_second_call_runs_nothing_and_fresh_runs_everything(text):
    first = compare.run(options(text, "a", stages=("text", "cache")), progress=Count())
    again = Count()
    second = compare.run(options(text, "a", stages=("text", "cache")), progress=again)
    assert again.begun == [] and quality(second) == quality(first)
    assert again.notes == ["4 of 4 trials are stored already"]
    fresh = Count()
    third = compare.run(options(text, "a", stages=("text", "cache"), fresh=True), progress=fresh)
    assert len(fresh.begun) == 4 and quality(third) == quality(first)  # the same seeds, so the same results to the last bit


def test_one_more_mechanism_trains_only_that_one_for_the_same_number_of_steps(text):
    asked = options(text, "a", stages=("text",), steps=None)
    first = compare.run(asked, progress=Count())
    shown = Count()
    second = compare.run(replace(asked, names=(*NAMES, "alibi")), progress=shown)
    assert shown.begun == ["text alibi seed 0"]
    assert second.plan["text"]["steps"] == first.plan["text"]["steps"]
    assert quality(second)[:2] == quality(first)
    assert len({r["tokens"] for r in second.outcomes("text")}) == 1


KILLED = """
import os, signal, sys
from attlas.lab import compare, store
from test_lab_compare import options
from pathlib import Path

if __name__ == "__main__":
    add, left = store.Store.add, [5]

    def add_then_die(self, record):
        add(self, record)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    store.Store.add = add_then_die
    compare.run(options(Path(sys.argv[1]), "killed", stages=("text", "recall")))
"""


def test_a_comparison_that_was_killed_goes_on_and_ends_the_same(text):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    died = subprocess.run([sys.executable, "-c", KILLED, str(text)], env=env, capture_output=True, text=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr
    folder = text.parent / "killed"
    assert len((folder / "trials.jsonl").read_text().splitlines()) == 5  # two gates and three trainings
    assert not (folder / "report.html").exists()
    shown = Count()
    asked = options(text, "killed", stages=("text", "recall"))
    resumed = compare.run(asked, progress=shown)
    assert shown.begun[0] == "recall sliding-window:window=5 seed 0" and resumed.complete
    assert quality(resumed) == quality(compare.run(replace(asked, out=text.parent / "whole"), progress=Count()))


def test_ctrl_c_stores_what_is_done_and_reports_it(text, monkeypatch):
    class Impatient(Count):
        def begin(self, stage: str, what: str, seconds: float) -> None:
            super().begin(stage, what, seconds)
            if len(self.begun) == 2:
                raise KeyboardInterrupt

    shown = Impatient()
    with pytest.raises(KeyboardInterrupt):
        compare.run(options(text, "a", stages=("text",)), progress=shown)
    assert "stopped: 1 of 2 trials are stored; the same command goes on" in shown.notes[-1]
    page = (text.parent / "a" / "report.html").read_text()
    assert "Not finished." in page
    after = Count()
    assert compare.run(options(text, "a", stages=("text",)), progress=after).complete
    assert after.begun == ["text sliding-window:window=5 seed 0"]


def test_a_red_gate_means_no_training_and_no_time(text, monkeypatch):
    right = gate.check

    def broken(mixer, length, **rest):
        found = right(mixer, length, **rest)
        return replace(found, problems=("decoding differs from one prefill by 1",)) if mixer.name == "sliding-window" else found

    monkeypatch.setattr(trials.gate, "check", broken)
    shown = Count()
    results = compare.run(options(text, "a", stages=("text", "speed")), progress=shown)
    assert not any("sliding" in w for w in shown.begun)
    row = results.rows()[1]
    assert row["status"] == "red gate" and row["bits_per_byte"] is None and row["prefill_seconds"] is None
    assert results.red() == {NAMES[1]: "decoding differs from one prefill by 1"}
    assert results.complete and "Red gate: sliding-window:window=5." in results.report.read_text()


def test_a_trial_that_fails_is_told_and_tried_again(text, monkeypatch):
    right = trials.held_out_bits

    def unlucky(model, *rest):
        if "sliding" in str(model.decoder.layers[0].mixer):
            raise MemoryError("out of memory")
        return right(model, *rest)

    monkeypatch.setattr(trials, "held_out_bits", unlucky)
    results = compare.run(options(text, "a", stages=("text",)), progress=Count())
    assert results.failures() == [("text", "sliding-window:window=5 seed 0", "MemoryError: out of memory")]
    assert [r["bits_per_byte"] is None for r in results.rows()] == [False, True]
    monkeypatch.setattr(trials, "held_out_bits", right)
    shown = Count()
    assert not compare.run(options(text, "a", stages=("text",)), progress=shown).failures()
    assert shown.begun == ["text sliding-window:window=5 seed 0"]


def test_causal_is_timed_for_reference_even_when_it_is_not_compared(text):
    results = compare.run(options(text, "a", names=("local:block=8",), stages=("speed",), text=()), progress=Count())
    (row,) = results.rows()
    assert row["mechanism"] == "local:block=8" and row["prefill_to_causal"] > 0
    assert list(results.layers("causal")) == [32, 64]


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"names": ("casual",)}, UnknownNameError, "did you mean 'causal'"),
        ({"names": ("cross",)}, UnsupportedError, "cannot be a causal language model"),
        ({"text": (Path("nowhere.txt"),)}, DataError, "cannot read nowhere.txt"),
        ({"context": 4096}, DataError, "too short"),
        ({"stages": ("cache",)}, DataError, "no text is used by the stages cache"),
        ({"device": "cuda:63"}, UnsupportedError, "no CUDA device"),
    ],
)
def test_nothing_is_written_for_what_cannot_be_done(text, change, error, why):
    with pytest.raises(error, match=why):
        compare.run(options(text, "a", **change), progress=Count())
    assert not (text.parent / "a").exists()


def test_a_damaged_plan_is_told(text):
    folder = text.parent / "a"
    folder.mkdir()
    (folder / "plan.json").write_text('{"format": 1, "basis": 3}')
    with pytest.raises(DataError, match="--fresh starts over"):
        compare.run(options(text, "a"), progress=Count())


# ---------------------------------------------------------------------------------------------------- results


def test_numbers_of_made_up_results(tmp_path):
    results = lab_results.results(tmp_path)
    rows = {r["mechanism"]: r for r in results.rows()}
    causal, window = rows["causal"], rows["sliding-window"]
    assert causal["length"] == 4096 and causal["prefill_seconds"] == pytest.approx(lab_results.seconds("causal", "prefill", 4096))
    assert window["prefill_exponent"] == pytest.approx(1.0) and 1.7 < causal["prefill_exponent"] < 2.0
    expected = lab_results.seconds("sliding-window", "decode", 4096) / lab_results.seconds("causal", "decode", 4096)
    assert window["decode_to_causal"] == pytest.approx(expected)
    assert window["faster_than_causal_from"] == 2048 and causal["faster_than_causal_from"] is None
    assert window["bits_to_causal"] == pytest.approx(0.12) and window["bits_to_causal_error"] == pytest.approx(0, abs=1e-9)
    assert causal["prefill_of_gemm"] == pytest.approx(4 * 4096**2 * 128 / causal["prefill_seconds"] / 60e9)
    assert causal["train_tokens_per_second"] == pytest.approx(21000)


def test_differences_are_compared_window_by_window_and_seed_by_seed(tmp_path):
    results = lab_results.results(tmp_path, ("causal", "alibi"))
    record = results.records["text"][1]["result"]
    record["per_window"] = [b + (0.02 if i % 2 else -0.02) for i, b in enumerate(record["per_window"])]
    gap, error = results.bits_between("alibi", "causal")
    shifts = [0.03 + (0.02 if i % 2 else -0.02) for i in range(11)]
    by_windows = statistics.stdev(shifts) / 11**0.5
    assert gap == pytest.approx(statistics.fmean(shifts)) and error == pytest.approx(by_windows)
    more = [(i, label, seed) for i, label in enumerate(("causal", "alibi")) for seed in (1, 2)]
    for i, label, seed in more:
        result = lab_results.text_result(label, i, seed) | {"bits": 2.7 + 0.05 * i * seed}
        results.records["text"].append(lab_results.record("text", label, result))
    by_seeds = statistics.stdev([0.03, 0.05, 0.10]) / 3**0.5
    _, error = results.bits_between("alibi", "causal")
    assert error == pytest.approx(math.hypot(by_windows / 3, by_seeds))  # one seed in three has windows that differ


def test_the_best_learning_rate_counts_only_when_no_seed_was_lost():
    runs = [{"rate": 1e-3, "bits": 3.0}, {"rate": 1e-3, "bits": 3.2}, {"rate": 1e-2, "bits": 2.0}, {"rate": 3e-3, "bits": 2.9},
            {"rate": 3e-3, "bits": 3.1}]  # fmt: skip
    best, rate = best_rate(runs, "bits", min)
    assert rate == 3e-3 and [r["bits"] for r in best] == [2.9, 3.1]
    assert best_rate([], "bits", min) == ([], None)


# ---------------------------------------------------------------------------------------------------- the report


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


@pytest.mark.heavy
def test_the_default_comparison_takes_less_than_five_minutes(tmp_path):
    """Ten mechanisms on whatever cores there are; softmax attention solves recall within its budget."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": os.pathsep.join(sys.path)}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "attlas", "compare"], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert time.perf_counter() - began < 300
    rows = json.loads((tmp_path / "attlas-results" / "compare" / "results.json").read_text())["rows"]
    assert len(rows) >= 8 and all(r["status"] == "ok" for r in rows)
    causal = rows[0]
    assert causal["recall"] >= 0.99 and causal["bits_per_byte"] < 3.3 and causal["longest_length"] >= 2048
    assert max(r["parameters"] for r in rows) / min(r["parameters"] for r in rows) < 1.02
    assert len({r["tokens"] for r in rows}) == 1


def test_torch_is_left_with_the_threads_that_it_had(text):
    before = torch.get_num_threads()
    compare.run(options(text, "a", stages=("cache",), text=()), progress=Count())
    assert torch.get_num_threads() == before and mechanisms.SELECTION[0] == "causal"
