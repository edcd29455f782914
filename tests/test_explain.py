"""`explain` says what `attention` does: the verdicts are held against what really runs and raises."""

import json
from dataclasses import replace

import pytest
import torch

from attention_cases import CASES
from attlas.errors import ShapeError, UnknownNameError, UnsupportedError
from attlas.masks import Causal, Grid, Padding, PerHead, Window
from attlas.ops import attention, explain, select
from attlas.ops.select import IMPLS
from attlas.scores import Alibi
from attlas.shapes import AuxRequest, SeqInfo

NAMES = [i.name for i in IMPLS["attention"]]


@pytest.mark.parametrize("name", list(CASES))
def test_what_explain_says_is_what_runs(name, monkeypatch):
    case = CASES[name]
    tensors = {n: t.detach() for n, t in case.tensors(torch.float32).items()}
    ran = []
    recording = tuple(replace(i, run=lambda call, i=i: ran.append(i.name) or i.run(call)) for i in IMPLS["attention"])
    monkeypatch.setitem(select.IMPLS, "attention", recording)
    q, k, v = (tensors[n] for n in "qkv")
    mod = case.score_mod
    if mod is not None:
        mod = mod.replace_tensors([t for n, t in tensors.items() if n.startswith("mod")])
    for impl in ("auto", *NAMES):
        for lse in (False, True):
            ran.clear()
            options = {"mask": case.mask, "score_mod": mod, "scale": case.scale, "sink": tensors.get("sink"), "seq": case.seq}
            options |= {"impl": impl, "return_aux": AuxRequest(lse=True) if lse else None}
            said = explain("attention", q, k, v, **options)
            assert [v.impl for v in said.verdicts] == NAMES
            assert [v.impl for v in said.verdicts if v.runs] == ([] if said.impl is None else [said.impl])
            try:
                attention(q, k, v, **options)
            except UnsupportedError as refusal:
                assert said.impl is None and impl != "auto"
                (verdict,) = [v for v in said.verdicts if v.impl == impl]
                assert not verdict.supported and verdict.reason.removeprefix("cannot: ") in str(refusal)
            else:
                assert ran == [said.impl] and (impl == "auto" or said.impl == impl)
                assert all(v.reason for v in said.verdicts)


def test_auto_goes_down_the_list(monkeypatch):
    torch_only = tuple(i for i in IMPLS["attention"] if i.name in ("sdpa", "blocked", "reference"))
    monkeypatch.setitem(select.IMPLS, "attention", torch_only)
    said = explain("attention", (2, 31, 8, 16), (2, 31, 2, 16), mask=Causal())
    assert said.impl == "sdpa"
    blocked = explain("attention", (2, 31, 8, 16), (2, 31, 2, 16), mask=Causal() & Window.last(5))
    assert blocked.impl == "blocked"
    sdpa = next(v for v in blocked.verdicts if v.impl == "sdpa")
    assert not sdpa.supported and "Window(4, 0)" in sdpa.reason
    long = explain("attention", (1, 5003, 8, 16), mask=Causal())
    sdpa = next(v for v in long.verdicts if v.impl == "sdpa")
    assert long.impl == "blocked" and sdpa.supported and "steps aside" in sdpa.reason


@pytest.mark.parametrize(
    ("mask", "pairs"),
    [(None, 2 * 3 * 31 * 47), (Causal(), 2 * 3 * sum(17 + i for i in range(31))), (Padding((47, 5)), 3 * 31 * (47 + 5))],
)
def test_useful_flops_count_allowed_pairs(mask, pairs):
    said = explain("attention", (2, 31, 3, 5), (2, 47, 3, 5), (2, 47, 3, 7), mask=mask)
    assert said.useful_flops == pairs * 2 * (5 + 7)


def test_useful_flops_of_masks_by_head_and_of_packed_batches():
    by_head = PerHead((Causal(), Window(2, 0)))
    said = explain("attention", (3, 31, 2, 5), mask=by_head)
    assert said.useful_flops == 3 * int(by_head.to_bool(31, 31).sum()) * 2 * 10
    seq = SeqInfo((7, 11), (13, 11))
    said = explain("attention", (18, 2, 5), (24, 2, 5), seq=seq, mask=Causal())
    assert said.useful_flops == 2 * int(Causal().dense(Grid.packed(seq)).sum()) * 2 * 10
    assert explain("attention", (18, 2, 5), (24, 2, 5), seq=seq).useful_flops == 2 * (7 * 13 + 11 * 11) * 2 * 10


def test_kv_bytes_are_those_within_reach():
    whole = explain("attention", (2, 1, 8, 16), (2, 997, 2, 16), (2, 997, 2, 24), mask=Causal(), dtype=torch.bfloat16)
    assert whole.kv_bytes == 2 * 997 * 2 * (16 + 24) * 2
    window = explain("attention", (2, 3, 8, 16), (2, 997, 2, 16), mask=Causal() & Window.last(101))
    assert window.kv_bytes == 2 * (101 + 2) * 2 * 32 * 4


def test_explanation_prints_and_becomes_json():
    said = explain("attention", (2, 31, 4, 16), (2, 31, 2, 16), mask=Causal(), score_mod=Alibi.for_heads(4), impl="sdpa")
    assert said.impl is None
    text = str(said)
    assert "q [2, 31, 4, 16] float32" in text and "no score modification" in text and "useful flops" in text
    assert all(name in text for name in NAMES)
    assert json.loads(json.dumps(said.to_dict()))["verdicts"][0]["impl"] == NAMES[0]


def test_explain_raises_what_the_op_raises():
    with pytest.raises(ShapeError, match="head_dim"):
        explain("attention", (2, 31, 4, 16), (2, 31, 2, 8))
    with pytest.raises(ShapeError, match="q is missing"):
        explain("attention")
    with pytest.raises(UnknownNameError, match="did you mean 'attention'"):
        explain("atention", (2, 31, 4, 16))
    with pytest.raises(UnknownNameError, match="did you mean 'blocked'"):
        explain("attention", (2, 31, 4, 16), impl="bloked")
