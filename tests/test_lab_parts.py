"""The pieces of a comparison one by one: options, mechanisms, sizes, the gate, training, the store, the workers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from attlas.catalogue.index import build as build_mixer
from attlas.errors import DataError, OptionError, UnknownNameError, UnsupportedError
from attlas.lab import build, gate, pool
from attlas.lab.mechanisms import Mechanism, choose, mechanism, parse_name
from attlas.lab.options import CompareOptions
from attlas.lab.store import Store, key_of, write_atomic
from attlas.lab.tasks.mqar import RecallTask
from attlas.lab.tasks.text import Document, build_corpus
from attlas.lab.train import Diverged, Recipe, Trained, held_out_bits, recall_loss, text_loss, train

# ---------------------------------------------------------------------------------------------------- options, names


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"minutes": 0}, "--minutes"), ({"seeds": 0}, "--seeds"), ({"stages": ("txet",)}, "did you mean 'text'"),
        ({"stages": ()}, "at least one of"), ({"dim": 60}, "multiple of"), ({"context": 4}, "--context"),
        ({"lengths": (64, 64)}, "must differ"), ({"name": "a/b"}, "folder name"), ({"learning_rates": (2.0,)}, "--learning-r"),
        ({"device": "cdua"}, "did you mean 'cuda'"), ({"layer_dim": 20}, "--layer-dim 20 --heads 4"),
    ],
)  # fmt: skip
def test_options_out_of_range(bad, why):
    with pytest.raises(OptionError, match=why):
        CompareOptions(**bad)


def test_the_command_line_of_options_is_what_differs_from_the_defaults():
    assert CompareOptions().command() == "attlas compare"
    options = CompareOptions(names=("causal", "local:block=8"), text=(Path("a"), Path("b")), minutes=2, fresh=True)
    assert options.command() == "attlas compare causal local:block=8 --text a --text b --minutes 2 --fresh"


def test_names_carry_options():
    assert parse_name("sliding-window:window=64") == ("sliding-window", {"window": 64})
    assert parse_name("global:window=8:tokens=(0,3)") == ("global", {"window": 8, "tokens": (0, 3)})
    assert parse_name("streaming:sink-positions=absolute") == ("streaming", {"sink_positions": "absolute"})
    with pytest.raises(OptionError, match="NAME:OPTION=VALUE"):
        parse_name("local:8")


def test_mechanisms_with_the_options_they_need():
    options = CompareOptions(names=("causal", "swa", "swa:window=7", "gqa"), context=88)
    found = choose(options)
    assert [m.label for m in found] == ["causal", "sliding-window", "sliding-window:window=7", "grouped-query"]
    assert [dict(m.options).get("window") for m in found] == [None, 11, 7, None]
    assert found[2].call(24, 3) == 'attlas.build("sliding-window", dim=24, num_heads=3, window=7)'
    assert found[1].build(48, 4).cache_bytes(100) == 11 * 2 * 48 * 4


def test_the_default_selection_is_eight_or_more():
    labels = [m.label for m in choose(CompareOptions())]
    assert labels[0] == "causal" and len(labels) >= 8


@pytest.mark.parametrize(
    ("names", "error", "why"),
    [
        (("casual",), UnknownNameError, "did you mean 'causal'"),
        (("cross",), UnsupportedError, "'cross' cannot be a causal language model: it sees later tokens"),
        (("full",), UnsupportedError, "cannot be a causal language model"),
        (("multi-head:causal=False",), UnsupportedError, "with these options it sees later tokens$"),
        (("reformer",), UnsupportedError, "it sees later tokens; try reformer:causal=True$"),
        (("local:blcok=3",), OptionError, "did you mean 'block'"),
        (("causal", "causal"), OptionError, "named twice: causal"),
    ],
)
def test_names_that_cannot_be_compared(names, error, why):
    with pytest.raises(error, match=why):
        choose(CompareOptions(names=names))


# ---------------------------------------------------------------------------------------------------- equal sizes


def test_models_have_equal_numbers_of_weights():
    options = CompareOptions(names=("causal", "mqa", "gqa", "alibi", "local"), dim=48, layers=3, heads=3)
    found = choose(options)
    sizes = build.text_sizes(found, found[0], options)
    counts = {m.label: build.count(build.text_model(m, options, sizes[m.label].hidden)) for m in found}
    assert counts == {label: s.parameters for label, s in sizes.items()}
    assert max(counts.values()) / min(counts.values()) < 1.02
    assert sizes["causal"].hidden == 128 and sizes["multi-query"].hidden > sizes["causal"].hidden
    recall = build.recall_sizes(found, found[0], RecallTask(), 4)
    assert max(s.parameters for s in recall.values()) / min(s.parameters for s in recall.values()) < 1.02


def test_a_mechanism_that_cannot_be_made_equal_is_refused():
    with pytest.raises(UnsupportedError, match=r"big: its language model has 5,000 weights .* the others 3,000"):
        build.match("big", lambda hidden: 4990 + 10 * hidden, 3000, "language")
    assert build.match("fine", lambda hidden: 1000 + 30 * hidden, 3000, "language") == build.Sized(67, 3010)


def test_the_short_convolution_against_its_definition():
    conv, x = build.ShortConv(5), torch.randn(2, 7, 5)
    y = conv(x)
    for t in range(7):
        expected = x[:, t] + sum(conv.weight[j] * x[:, t - j] for j in range(3) if t >= j)
        assert torch.allclose(y[:, t], expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- the gate


@pytest.mark.parametrize("name", ["causal", "sliding-window", "streaming"])
def test_right_mechanisms_are_green(name):
    options = CompareOptions(names=(name,), context=64)
    found = gate.check(mechanism(name, options).build(24, 3), 29)
    assert found.problems == () and found.decode_error < 1e-5


def test_a_mechanism_that_looks_ahead_is_red():
    mixer = build_mixer("full", 24, 3)
    mixer.cache_specs = build_mixer("causal", 24, 3).cache_specs
    found = gate.check(mixer, 23)
    assert any("when later tokens change" in p for p in found.problems)


def test_decoding_that_differs_is_red():
    mixer = build_mixer("causal", 24, 3)
    right = mixer.mix

    def wrong(x, *, memory, positions, seq, cache):
        y = right(x, memory=memory, positions=positions, seq=seq, cache=cache)
        return 1.01 * y if cache is not None and x.shape[0] == 1 else y

    mixer.mix = wrong
    found = gate.check(mixer, 23)
    assert found.problems == (f"decoding differs from one prefill by {found.decode_error:.1e} of the largest output",)
    assert 0.001 < found.decode_error < 0.011


def test_outputs_that_are_not_numbers_and_errors_are_red():
    mixer = build_mixer("causal", 24, 3)
    with torch.no_grad():
        mixer.o_proj.weight[0, 0] = math.nan
    assert any("not finite" in p for p in gate.check(mixer, 23).problems)
    assert gate.check(build_mixer("full", 24, 3), 23).problems[0].startswith("raised UnsupportedError")


# ---------------------------------------------------------------------------------------------------- training


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
    recipe = Recipe(1000, 1, 0.5)
    rates = [recipe.rate_at(s) for s in range(1000)]
    assert rates[0] == pytest.approx(0.005) and max(rates) == rates[99] == rates[100] == 0.5
    assert rates[-1] == pytest.approx(0.05, rel=1e-3)
    assert all(a >= b for a, b in pairwise(rates[100:]))


def tiny_corpus():
    return build_corpus([Document(f"d{i}", b"the cat sat on the mat. " * 40 + bytes([65 + i])) for i in range(9)], "cats")


def test_training_learns_and_repeats_exactly():
    options, corpus = CompareOptions(names=("causal",), dim=16, layers=1, heads=2, context=16), tiny_corpus()
    m = choose(options)[0]

    def run(seed: int) -> tuple[Trained, float]:
        model = build.text_model(m, options, 16, seed)
        done = train(model, Recipe(40, 4, 1e-2, seed), text_loss(model, corpus, 4, 16, seed, "cpu"))
        return done, held_out_bits(model, corpus, 8, 16, "cpu").bits

    (one, bits), (again, same), (other, _) = run(0), run(0), run(1)
    assert one.losses == again.losses and bits == same
    assert one.losses != other.losses
    assert one.losses[0] == pytest.approx(math.log(256), abs=0.2) and one.losses[-1] < 3.5
    assert len(one.losses) == 40 and one.seconds > 0


def test_held_out_bits_against_the_definition():
    options, corpus = CompareOptions(names=("causal",), dim=16, layers=1, heads=2, context=16), tiny_corpus()
    model = build.text_model(choose(options)[0], options, 16)
    held = held_out_bits(model, corpus, 5, 16, "cpu", batch=2)
    total = []
    model.requires_grad_(False)
    for window in build_windows(corpus, 5):
        logits = model(window[None, :-1])[0].log_softmax(-1)
        total.append([-float(logits[t, window[t + 1]]) / math.log(2) for t in range(16)])
    assert held.bits == pytest.approx(sum(map(sum, total)) / 80, rel=1e-5)
    assert held.per_window == pytest.approx([sum(w) / 16 for w in total], rel=1e-5)
    assert [p[:2] for p in held.by_position] == [(2 * i, 2 * i + 1) for i in range(8)]
    assert held.by_position[3][2] == pytest.approx(sum(w[6] + w[7] for w in total) / 10, rel=1e-5)


def build_windows(corpus, number):
    from attlas.lab.tasks.text import validation_windows

    return validation_windows(corpus, number, 16)


def test_training_stops_when_it_is_good_enough_and_when_it_diverges():
    model = nn.Linear(1, 1)
    values = iter([0.2, 0.995, 1.0])
    done = train(
        model, Recipe(30, 1, 0.1), lambda: model(torch.ones(1)).sum(), check=lambda: next(values), check_every=5, enough=0.99
    )
    assert done.checks == [(5, 0.2), (10, 0.995)] and len(done.losses) == 10
    with pytest.raises(Diverged, match="nan at step 1 of 30"):
        train(model, Recipe(30, 1, 0.1), lambda: model(torch.ones(1)).sum() * math.nan)


def test_a_curve_is_means_of_blocks():
    record = Trained(losses=[float(i) for i in range(10)])
    assert record.curve(4) == [(3, 1.0), (6, 4.0), (9, 7.0), (10, 9.0)]


def test_the_recall_loss_looks_at_queries_only():
    task = RecallTask(length=16, pairs=2, vocab=16)
    model = build.RecallModel(Mechanism("causal", "causal"), task, 4, 8)
    loss = recall_loss(model, task, 7, 0, "cpu")()
    inputs, labels = task.batch(7, torch.Generator().manual_seed(2_000_003))
    whole = nn.functional.cross_entropy(model.logits(model(inputs)).flatten(0, 1), labels.flatten())  # ignores -100
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)


# ---------------------------------------------------------------------------------------------------- the store


def test_keys_depend_on_content_not_order():
    assert key_of({"a": 1, "b": [2, 3]}) == key_of({"b": [2, 3], "a": 1}) != key_of({"a": 1, "b": [3, 2]})


def test_trials_are_read_back_and_failed_ones_are_tried_again(tmp_path):
    with Store(tmp_path / "deep" / "er") as store:
        store.add({"key": "k1", "stage": "text", "status": "ok", "result": {"x": 1.5}})
        store.add({"key": "k2", "stage": "text", "status": "failed", "error": "no luck"})
        store.save_plan({"format": 1})
    with Store(tmp_path / "deep" / "er") as store:
        assert store.done("k1") and not store.done("k2") and not store.done("k3")
        assert store.records["k1"]["result"] == {"x": 1.5} and store.plan() == {"format": 1}
    with Store(tmp_path / "deep" / "er", fresh=True) as store:
        assert not store.records and store.plan() is None


def test_a_damaged_line_costs_only_its_trial(tmp_path):
    with Store(tmp_path) as store:
        store.add({"key": "k1", "stage": "text", "status": "ok"})
        store.add({"key": "k2", "stage": "text", "status": "ok"})
    path = tmp_path / "trials.jsonl"
    path.write_text(path.read_text()[:-20])
    with Store(tmp_path) as store:
        assert store.done("k1") and not store.done("k2") and store.unreadable == 1
    (tmp_path / "plan.json").write_text("{")
    with Store(tmp_path) as store, pytest.raises(DataError, match="--fresh starts over"):
        store.plan()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, "old")

    def no_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new and longer")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_two_comparisons_do_not_share_a_folder(tmp_path):
    code = f"from attlas.lab.store import Store\nfrom pathlib import Path\nStore(Path({str(tmp_path)!r})).__enter__()"
    with Store(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert "another comparison is writing" in other.stderr
    with Store(tmp_path) as store:  # free again
        assert store.records == {}


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write to the folder"), Store(tmp_path / "file" / "sub"):
        pass


# ---------------------------------------------------------------------------------------------------- processes


def make_jobs(folder: str):
    def die(tick):
        os._exit(7)

    def shout(tick):
        print("words that must not end up among the messages")
        tick(0.5, "half way")
        return {"threads": torch.get_num_threads(), "pid": os.getpid()}

    def slow(tick):
        for _ in range(600):
            time.sleep(0.05)
            tick(0.0, "still here")
        return {}

    return {"die": die, "shout": shout, "slow": slow}


def test_workers_run_jobs_and_one_that_dies_costs_its_job_only(tmp_path):
    events = list(pool.run(["shout", "die", "shout"], 1, "test_lab_parts:make_jobs", (str(tmp_path),)))
    assert [(e.kind, e.key) for e in events if e.kind != "tick"] == [
        ("begin", "shout"), ("done", "shout"), ("begin", "die"), ("lost", "die"), ("begin", "shout"), ("done", "shout"),
    ]  # fmt: skip
    assert any(e.kind == "tick" and (e.fraction, e.words) == (0.5, "half way") for e in events)
    done = [e.record for e in events if e.kind == "done"]
    assert done[0]["threads"] == 1 and done[0]["pid"] != done[1]["pid"]
    assert next(e.words for e in events if e.kind == "lost").startswith("the worker process ended with code 7: ")


def test_workers_end_with_the_loop_that_uses_them():
    events = pool.run(["slow", "slow"], 2, "test_lab_parts:make_jobs", ("",))
    begun = [next(events), next(events)]
    assert [e.kind for e in begun] == ["begin", "begin"]
    workers = [w.process for w in events.gi_frame.f_locals["pool"].values()]
    events.close()
    assert [w.returncode for w in workers] == [-9, -9]


def test_a_worker_that_cannot_start_says_why():
    events = list(pool.run(["x"], 1, "test_lab_parts:no_such_function", ()))
    assert events[-1].kind == "lost" and "no_such_function" in events[-1].words
