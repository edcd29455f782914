"""What a comparison may cost and how its progress is shown: the plan, lengths, caches, bars and plain lines."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace

import pytest
import torch

from attlas.lab import build, plan, progress, speed
from attlas.lab.mechanisms import Mechanism, choose, mechanism, reference_of
from attlas.lab.options import CompareOptions
from attlas.lab.tasks.text import Document, build_corpus

# ---------------------------------------------------------------------------------------------------- budget


def test_costs_go_through_both_probes():
    quadratic = speed.Cost(speed._through(256, 256 * 2e-6 + 256**2 * 3e-9, 1024, 1024 * 2e-6 + 1024**2 * 3e-9), (0.0, 0.0))
    assert quadratic.time(4096) == pytest.approx(4096 * 2e-6 + 4096**2 * 3e-9)
    assert speed._through(256, 1.0, 1024, 4.0) == pytest.approx((4 / 1024, 0.0))
    assert speed._through(256, 1.0, 1024, 2.0) == pytest.approx((2 / 1024, 0.0))  # an overhead: a line through the longer one
    assert speed._through(256, 1.0, 1024, 64.0) == pytest.approx((0.0, 64 / 1024**2))


def test_lengths_double_until_the_time_is_gone_and_cheap_mechanisms_go_further():
    cheap = speed.Cost((1e-5, 0.0), (1.0, 0.0))
    costs = {"dear": speed.Cost((0.0, 1e-6), (1.0, 0.0)), "cheap": cheap, "also cheap": cheap}
    chosen = speed.choose_lengths(costs, 60.0, 1e9, longest=65536)
    assert list(chosen) == [256 * 2**i for i in range(len(chosen))]
    assert chosen[256] == ["dear", "cheap", "also cheap"] and chosen[max(chosen)] == ["cheap", "also cheap"]
    assert sum(speed.CALLS * costs[label].time(n) for n, labels in chosen.items() for label in labels) <= 60
    assert list(speed.choose_lengths(costs, 0.0, 1e9)) == [256, 512]  # two lengths always
    assert max(speed.choose_lengths(costs, 1e9, 1500.0)) == 1024  # memory
    pair = {k: costs[k] for k in ("dear", "cheap")}
    assert all(len(v) == 2 for v in speed.choose_lengths(pair, 60.0, 1e9).values())  # nobody is measured alone
    assert len(speed.choose_lengths({"cheap": cheap}, 60.0, 1e9)) > 4  # but one alone is


def tiny_corpus():
    return build_corpus([Document(f"d{i}", b"the cat sat on the mat. " * 40 + bytes([65 + i])) for i in range(9)], "cats")


def planner(options, names=("causal", "local")):
    found = choose(replace(options, names=names))
    return plan.Planner(options, found, found, tiny_corpus(), began=0.0)


def test_steps_fill_the_budget_and_are_the_same_for_all():
    options = CompareOptions(context=16)
    text = planner(options)._text({"a": 0.01, "b": 0.03}, 40.0)
    assert text.batch == 2 and text.steps == int(40 / 0.04 - plan.WINDOWS / 6)
    many = planner(options)._text({"a": 0.001, "b": 0.001}, 80.0)
    assert many.batch > 2 and many.steps <= plan.MOST_TEXT
    three = planner(replace(options, seeds=3))._text({"a": 0.01, "b": 0.03}, 40.0)
    assert three.steps == pytest.approx(text.steps / 3, abs=20)
    assert planner(replace(options, steps=7))._text({"a": 1.0}, 1.0).steps == 7
    assert planner(options)._text({"a": 9.0}, 1.0).steps == plan.FEWEST
    assert planner(options)._recall({"a": 0.05, "b": 0.05}, 50.0).steps < 500


def test_a_plan_survives_its_file():
    made = plan.Plan(
        "b", "w", {"cpu": "x"}, None, {"text": {"causal": build.Sized(3, 4)}}, plan.Training(5, 6, (0.1,), {"causal": 0.2}), None,
        {256: ["causal"]}, {256: 1.5}, (256, 512),
    )  # fmt: skip
    assert plan.Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_speed_is_not_measured_when_the_output_is_not_finite():
    class Broken(Mechanism):
        def build(self, dim, num_heads):
            mixer = super().build(dim, num_heads)
            with torch.no_grad():
                mixer.v_proj.weight.fill_(math.inf)
            return mixer

    pair = [Mechanism("causal", "causal"), Broken("broken", "causal")]
    found = speed.measure_length(pair, 37, speed.Place(16, 2))
    assert found["broken"] == {"problem": "the output at length 37 is not finite"}
    assert found["causal"]["prefill"]["median"] > 0 and found["causal"]["train_peak"] > found["causal"]["prefill_peak"] > 0


def test_caches_are_measured_from_real_ones():
    m = mechanism("sliding-window:window=11", CompareOptions())
    found = speed.cache_sizes(m, (5, 100), speed.Place(24, 3), chunk=7)
    assert found == [
        {"length": 5, "measured": 5 * 2 * 24 * 4, "formula": 5 * 2 * 24 * 4},
        {"length": 100, "measured": 11 * 2 * 24 * 4, "formula": 11 * 2 * 24 * 4},
    ]
    assert reference_of([m], CompareOptions()).label == "causal"


# ---------------------------------------------------------------------------------------------------- display


def test_plain_lines_when_it_is_no_terminal():
    out = io.StringIO()
    shown = progress.Plain(out)
    with shown:
        shown.note("hello")
        shown.stages({"text": 2.0}, {})
        shown.begin("text", "causal seed 0", 1.0)
        shown.tick("text", "causal seed 0", 0.5, "3.1 bits")
        shown.end("text", "causal seed 0", "causal seed 0: 2.7 bits per byte")
    assert out.getvalue() == "[0:00] hello\n[0:00] language: causal seed 0: 2.7 bits per byte\n"
    assert isinstance(progress.make_progress(), progress.Plain)
    assert type(progress.make_progress(quiet=True)) is progress.Progress


def test_bars_show_stage_share_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = progress.Live()
    shown.console.file = io.StringIO()
    with shown:
        shown.stages({"text": 90.0, "recall": 10.0, "cache": 0.5}, {"text": 30.0, "cache": 0.5})
        task = shown.bars.tasks[0]
        assert task.completed == 30.0 and [t.fields["left"] for t in shown.bars.tasks] == ["", "", "done"]
        shown.begin("text", "causal", 30.0)
        shown.begin("text", "alibi", 30.0)
        assert task.fields["left"] == "1:00"
        now[0] += 10
        shown.tick("text", "causal", 0.5, "[bold] 3.1 bits")
        shown.tick("text", "alibi", 0.5)  # 30 predicted seconds in 10: three times as fast, side by side
        assert task.completed == 60.0 and task.fields["left"] == "0:10"
        assert task.fields["what"] == "causal  [bold] 3.1 bits   alibi"
        shown.end("text", "causal", "causal seed 0: [2.7] bits per byte")
        shown.end("text", "alibi", "alibi: 2.8")
        assert task.completed == 90.0 and task.fields["left"] == "done"
    assert "Language  causal seed 0: [2.7] bits per byte\n" in shown.console.file.getvalue()
    assert progress.clock(95) == "1:35" and progress.clock(3725) == "1:02:05"
