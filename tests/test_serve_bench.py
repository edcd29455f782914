"""`attlas bench serve` on a model of two layers: every row runs, what it counts is right, and a wrong engine is not timed."""

from __future__ import annotations

import json
import random

import pytest
from typer.testing import CliRunner

from attlas.cli.app import app
from attlas.errors import OptionError
from attlas.lab import bench_serve
from attlas.lab.serve_load import MEAN_ANSWER, MEAN_PROMPT, Asked, conversations, drive, poisson, quantile
from attlas.lab.serve_subject import Subject, tiny


def test_every_row_runs():
    sizes = "--requests 5 --prefix 160 --sharers 7 --unshared 3 --rates 40 --arrivals 5 --scale 0.05 --cancels 60 --repeats 1"
    done = CliRunner().invoke(app, ["bench", "serve", "--model", "tiny", "--json", *sizes.split()])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == list(bench_serve.ROWS)
    assert rows["decode one"]["over transformers"] > 0
    shared = rows["shared prefix"]
    assert shared["least_to_compute"] <= shared["computed"] <= shared["prompt_tokens"]
    assert rows["goodput"]["rates"][0]["kept"] == 1.0 and 0 < rows["goodput"]["waste"] < 1
    assert rows["cancelled"]["cancelled"] >= 60 and rows["cancelled"]["leaked"] == rows["cancelled"]["leaked_rows"] == 0
    text = bench_serve.table(result)
    assert "tiny" in text and "0 pages and 0 rows leaked" in text and "goodput" in text


def test_nothing_is_timed_when_the_tokens_differ(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench_serve, "subject", lambda _: broken())
    with pytest.raises(AssertionError, match="nothing is timed"):
        bench_serve.run(only=("decode",))


def broken() -> Subject:
    made = tiny()
    made.model.embed.tokens.weight.data.mul_(-1)
    return made


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
