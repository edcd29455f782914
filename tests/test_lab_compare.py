"""`attlas compare` from end to end, on tiny models: what it writes, how it resumes, and what it refuses."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lab_results
from attlas.errors import DataError, UnknownNameError, UnsupportedError
from attlas.lab import compare, gate, mechanisms, trials
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


def test_side_by_side_gives_the_same_numbers(text):
    asked = options(text, "one", stages=("text", "recall"))
    alone = compare.run(asked, progress=Count())
    shown = Count()
    beside = compare.run(replace(asked, out=text.parent / "two", threads=2), progress=shown)
    assert beside.plan["workers"] == 2 and not beside.failures() and len(shown.begun) == 4
    assert quality(beside) == quality(alone)


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
