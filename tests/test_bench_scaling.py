"""`attlas bench scaling`: every card that claims less than a square takes part, and a wrong result stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attlas.catalogue.index import card
from attlas.cli.app import app
from attlas.errors import OptionError
from attlas.lab import scaling_decode, scaling_growth, scaling_peers
from attlas.lab.bench_scaling import run, table

SMALL: dict[str, Any] = {"lengths": (512, 1024), "repeats": 1, "quiet": True}


@pytest.mark.parametrize("name", [c.name for c in scaling_growth.grown()])
def test_every_card_that_claims_less_than_a_square_can_be_built_long(name: str):
    mixer = scaling_growth.build(card(name), 1024)
    assert mixer(torch.randn(1, 3, scaling_growth.DIM)).shape == (1, 3, scaling_growth.DIM)


def test_what_claims_a_square_is_left_out():
    names = {c.name for c in scaling_growth.grown()}
    assert {"sliding-window", "longformer", "bigbird", "learned-sink", "linear-transformer", "hyena"} <= names
    assert not names & {"causal", "multi-head", "flash", "multi-head-latent", "conv-hybrid", "cross"}
    bars = {name: scaling_growth.bar(card(name)) for name in ("full", "local", "strided")}
    assert bars == {"full": None, "local": 1.25, "strided": 1.75}


def test_growth_is_measured_and_drawn(tmp_path: Path):
    found = run(only=("longformer", "streaming"), parts=("growth",), picture=tmp_path / "growth.html", **SMALL)
    assert [row["name"] for row in found["growth"]] == ["streaming", "longformer"]
    for row in found["growth"]:
        assert row["lengths"] == [512, 1024] and row["bar"] == 1.25
        assert all(len(row[what]["seconds"]) == 2 and row[what]["exponent"] is not None for what in ("forward", "training"))
    assert "longformer" in table(found) and "decode" in found and not found["decode"]
    assert "claim n^2" not in table(found)
    assert "claim n^2: synthesizer" in table(found | {"quadratic": scaling_growth.quadratic(("synthesizer",))})
    assert not set(scaling_growth.quadratic()) & {c.name for c in scaling_growth.grown()}
    page = (tmp_path / "growth.html").read_text()
    assert page.count("Plotly.newPlot(") == 2 and '"@' not in page.split("<main>")[1]


def test_decoding_from_the_latent():
    found = run(parts=("decode",), decode_tokens=257, **SMALL)
    (row,) = found["decode"]
    assert row["bytes_per_token"] == 4 * (512 + 64) and row["cache_bytes"] == 257 * row["bytes_per_token"]
    assert row["ratio"] > 1
    assert "2304 bytes per token" in table(found)
    absorbed, expanding = scaling_decode.pair()
    assert absorbed.absorbs(1, 257) and not expanding.absorbs(1, 257)


@pytest.mark.parametrize("name", ["longformer", "bigbird", "reformer"])
def test_the_peers_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    for size, value in {"DIM": 24, "HEADS": 2, "WINDOW": 32, "BLOCK": 8, "CHECKED": 512, "BUCKETS": 8, "CHUNK": 16}.items():
        monkeypatch.setattr(scaling_peers, size, value)
    if name not in scaling_peers.known():  # a mechanism that the catalogue does not have is no peer
        return
    assert scaling_peers.check(name) is None
    row = scaling_peers.measure(name, 512, 1, 1.0)
    assert {"forward auto", "training auto"} <= row["ratios"].keys()
    pair = scaling_peers.PEERS[name].make(512)
    with torch.no_grad():
        next(pair.mine.parameters()).mul_(1.01)
    monkeypatch.setitem(scaling_peers.PEERS, name, scaling_peers.Peer(lambda tokens: pair, {"auto": (1.0, 1.0)}))
    assert "differs" in str(scaling_peers.check(name))


def test_a_wrong_result_stops_everything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaling_decode, "check", lambda: "the cache is wrong")
    monkeypatch.setattr(scaling_decode, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="the cache is wrong"):
        run(parts=("decode",), **SMALL)
    done = CliRunner().invoke(app, ["bench", "scaling", "--parts", "decode", "--quiet"])
    assert (done.exit_code, done.stdout) == (1, "") and "nothing is timed: the cache is wrong" in done.stderr


@pytest.mark.parametrize(
    ("asked", "says"),
    [({"only": ("longfomer",)}, "longformer"), ({"parts": ("grwth",)}, "growth"), ({"peer_lengths": (1000,)}, "steps of 512")],
)
def test_what_cannot_be_measured_is_refused(asked: dict[str, Any], says: str):
    with pytest.raises(OptionError, match=says):
        run(**{**SMALL, **asked})
