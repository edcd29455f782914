"""`attlas bench serve` on a model of two layers: every row runs, what it counts is right, and a wrong engine is not timed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from attlas.cli.app import app
from attlas.errors import OptionError
from attlas.lab import bench_serve, serve_goodput, serve_rows
from attlas.lab.serve_costs import middle
from attlas.lab.serve_goodput import goodput, promise
from attlas.lab.serve_load import MEAN_ANSWER, MEAN_PROMPT, Asked, Record, Run, conversations, drive, poisson, quantile
from attlas.lab.serve_rows import Sizes, bar
from attlas.lab.serve_subject import Subject, agreement, tiny
from attlas.lab.serve_text import sentence


def test_every_row_runs(tmp_path: Path):
    sizes = "--requests 5 --prefix 1024 --sharers 7 --seconds 0.13 --rates 40 --scale 0.05 --cancels 60 --repeats 1"
    picture = tmp_path / "goodput.html"
    options = ["--model", "tiny", "--dtype", "bfloat16,float32", "--json", *sizes.split(), "--picture", str(picture)]
    done = CliRunner().invoke(app, ["bench", "serve", *options])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    names = [name for name in bench_serve.ROWS if name != "cancelled"]
    assert [(row["name"], row["dtype"]) for row in result["rows"]] == [
        *((name, "bfloat16") for name in bench_serve.ROWS), *((name, "float32") for name in names)
    ]  # fmt: skip
    rows = {row["name"]: row for row in result["rows"] if row["dtype"] == "bfloat16"} | {
        row["name"]: row for row in result["rows"]
    }
    assert rows["decode one"]["over transformers"] > 0
    shared = rows["shared prefix"]
    assert shared["least_to_compute"] == shared["computed"] < shared["prompt_tokens"] and not shared["answers_differ"]
    assert shared["measured"] == {"transformers": 7, "not sharing": 7} and shared["over transformers"] > 0
    assert rows["goodput"]["rates"][0]["kept"] == 1.0 and 0 < rows["goodput"]["waste"] < 1
    assert rows["goodput"]["highest_kept"] == 40 and rows["goodput"]["rates"][0]["requests"] == 5
    assert all(0 < share < 1 for share in rows["no hits"]["calls"].values()) and rows["no hits"]["rounds"] == 40
    assert rows["cancelled"]["cancelled"] >= 60 and rows["cancelled"]["leaked"] == rows["cancelled"]["leaked_rows"] == 0
    assert 0 < result["agreement"]["bfloat16"]["agree"] <= result["agreement"]["bfloat16"]["places"] == 13 + 37 + 61 + 3 * 23
    text = bench_serve.table(result)
    assert "tiny" in text and "0 pages and 0 rows leaked" in text and "goodput" in text and "bfloat16: the most likely" in text
    assert "answered in time" in picture.read_text()


def test_nothing_is_timed_when_the_tokens_differ(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_serve, "subject", lambda _: broken())
    with pytest.raises(AssertionError, match="nothing is timed"):
        bench_serve.run(only=("decode",))


def broken() -> Subject:
    made = tiny()
    made.model.embed.tokens.weight.data.mul_(-1)
    return made


def test_nothing_is_timed_when_rounding_moves_the_engine_further_than_transformers():
    served = tiny()
    texts = served.check([(5, 6, 7, 11)], 7)
    half = served.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and served.dtype == torch.float32
    assert agreement(half, texts)["places"] == 10
    for weight in half.model.parameters():
        weight.data += 0.05
    with pytest.raises(AssertionError, match="bfloat16: a log probability is off by"):
        agreement(half, texts)


def test_an_interrupted_run_keeps_the_rows_that_are_there(monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(bench_serve.ROWS, "decode one", stop)
    order = {name: bench_serve.ROWS[name] for name in ("cancelled", "decode one")}
    monkeypatch.setattr(bench_serve, "ROWS", order)
    done = CliRunner().invoke(app, ["bench", "serve", "--model", "tiny", "--cancels", "7"])
    assert done.exit_code == 130
    assert "after 7 cancelled" in done.stdout and "interrupted" in done.stdout


def test_bars_say_whether_they_are_met():
    assert bar("speed", 2.0, least=2.0)["met"] and not bar("speed", 1.9, least=2.0)["met"]
    assert bar("cost", 0.009, most=0.01)["met"] and not bar("cost", 0.01, most=0.01)["met"]
    bars = [bar("transformers", 1.5, least=2.0)]
    row = {
        "name": "decode one",
        "seconds_per_token": {"attlas": 0.013},
        "over transformers": 1.5,
        "over other": 3.0,
        "bars": bars,
    }
    assert sentence(row) == "one request: 13.0 ms a token, 77 tokens/s, 1.50x transformers (>= 2)!, 3.00x other"


def test_the_middle_of_pairs_and_its_interval():
    assert middle([3.0]) == (3.0, 3.0, 3.0)
    assert middle(range(101)) == (50.0, 40, 60)  # 41st and 61st of 101: the interval that tables of ranks give


def test_rates_rise_until_too_few_are_served(monkeypatch: pytest.MonkeyPatch):
    sizes = Sizes(5, 160, 7, (), 0.1, 0.05, 7, 1)
    row = goodput(tiny(), sizes, lambda _: None)
    found = [r["rate"] / row["at_once"] for r in row["rates"]]
    assert found == pytest.approx([0.6, 1.2, 1.8, 2.7, 4.05, 6.075, 9.1125]) and not row["past_saturation"]
    monkeypatch.setattr(serve_goodput, "TTFT_SLO", 0.0)
    row = goodput(tiny(), sizes, lambda _: None)
    assert len(row["rates"]) == 2 and row["past_saturation"] and row["highest_kept"] is None


def test_what_arrives_in_time_counts():
    def record(first: float, last: float) -> Record:
        return Record(Asked((5,), 3), [7, 8, 9], first, last)

    late, slow, good = record(2.1, 2.2), record(0.1, 0.7), record(1.9, 2.3)
    told = promise(Run([late, slow, good, good], 11.0, 0.03), 5.0)
    assert told["kept"] == 0.5 and told["goodput"] == 2.5 and told["first_token_p99"] == 2.1 and told["waste"] == 0.03


def test_a_slow_peer_stands_for_itself_with_a_part(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    served = tiny()
    monkeypatch.setattr(Subject, "generate", lambda _, prompts, __: asked.append(len(prompts)))
    assert serve_rows.static_batches(served, [(5, 6)] * 67, 3)[1] == 67 and asked == [1, 8, 32, 32, 3]
    monkeypatch.setattr(serve_rows, "PATIENCE", 0.0)
    asked.clear()
    assert serve_rows.static_batches(served, [(5, 6)] * 67, 3)[1] == 8 and asked == [1, 8]


def test_sizes_are_checked():
    with pytest.raises(OptionError, match="mixed batch"):
        bench_serve.run(only=("mixt",))
    with pytest.raises(OptionError, match="at least 1"):
        bench_serve.run(requests=0)
    with pytest.raises(OptionError, match=r"\.gguf"):
        bench_serve.run(model=bench_serve.Path("folder"))


def test_requests_are_driven_at_their_times():
    served = tiny()
    ticks: list[float] = []
    asked = [Asked((5, 6, 7), 3), Asked((8, 9), 5, 0.05), Asked((11,), 1, 0.02)]
    run = drive(served.engine(rows=2, tokens=32), asked, ticks.append)
    assert [len(r.tokens) for r in run.records] == [3, 5, 1] and run.tokens == 9
    assert run.seconds >= 0.05 and all(0 < r.first <= r.last < 0.5 for r in run.records)
    assert ticks[-1] == 1.0 and 0 < run.waste < 1


def test_conversations_have_the_lengths_and_arrivals_that_were_asked_for():
    made = conversations(3000, 97, seed=3, longest=10**6)
    assert sum(len(a.prompt) for a in made) / 3000 == pytest.approx(MEAN_PROMPT, rel=0.06)
    assert sum(a.tokens for a in made) / 3000 == pytest.approx(MEAN_ANSWER, rel=0.06)
    assert poisson(made, 5.0, 7)[-1].arrival == pytest.approx(3000 / 5.0, rel=0.06)
    assert all(len(a.prompt) <= 20 and a.tokens <= 20 for a in conversations(50, 97, seed=3, longest=40))


def test_quantiles():
    values = random.Random(0).sample(range(1, 101), 100)
    assert quantile(values, 0.99) == 99 and quantile(values, 0.5) == 50 and quantile([7], 0.99) == 7
