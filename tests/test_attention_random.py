"""Random shapes, masks, score mods and packings: block-wise attention is the reference, with every size of slab and chunk."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_cases import Case, evaluate, run
from attlas.kernels.blocked import chunks, layout
from attlas.masks import Causal, Dense, Documents, Global, Mask, Prefix, Sinks, Strided, Window
from attlas.masks.lru import BoundedCache
from attlas.scores import Alibi, RelativeBias, ScoreMod, Softcap
from attlas.shapes import SeqInfo
from attlas.testing.budget import assert_same

F64 = torch.float64
HERE = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def leaves(tq: int, tk: int, *, dense: bool) -> st.SearchStrategy[Mask]:
    small = st.integers(0, 40)
    found = [
        st.builds(Causal),
        st.builds(Causal, st.just("start")),
        st.builds(Window, st.none() | small, st.none() | small),
        st.builds(Prefix, small),
        st.builds(Sinks, small),
        st.builds(Strided, st.integers(1, 20)),
        st.builds(lambda t: Global(tuple(sorted(t))), st.sets(st.integers(0, 150), max_size=3)),
        st.builds(Documents, st.lists(st.integers(1, 60), min_size=1, max_size=4).map(tuple)),
    ]
    if dense:
        tensors = st.tuples(st.integers(0, 1000), st.floats(0.0, 1.0))
        found.append(tensors.map(lambda s: Dense(torch.rand(tq, tk, generator=torch.Generator().manual_seed(s[0])) < s[1])))
    return st.one_of(found)


def masks(tq: int, tk: int, *, dense: bool) -> st.SearchStrategy[Mask | None]:
    compound = st.recursive(
        leaves(tq, tk, dense=dense),
        lambda m: st.builds(lambda a, b: a & b, m, m) | st.builds(lambda a, b: a | b, m, m) | m.map(lambda a: ~a),
        max_leaves=3,
    )
    return st.none() | compound


def score_mods(heads: int) -> st.SearchStrategy[ScoreMod | None]:
    g = torch.Generator().manual_seed(1)
    one = st.sampled_from(
        [
            Softcap(1.9),
            Alibi(torch.rand(heads, generator=g, dtype=F64)),
            RelativeBias(torch.randn(14, heads, generator=g, dtype=F64), True, 33),
            RelativeBias(torch.randn(14, heads, generator=g, dtype=F64), False, 33),
        ]
    )
    return st.none() | one | st.builds(lambda a, b: a >> b, one, one)


@st.composite
def calls(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    options = {"heads": heads, "kv_heads": kv_heads, "dim": draw(st.integers(1, 5)), "dim_v": draw(st.integers(1, 5))}
    options |= {"sink": draw(st.booleans()), "score_mod": draw(score_mods(heads)), "scale": draw(st.none() | st.just(0.37))}
    if draw(st.booleans()):
        lengths = draw(st.lists(st.tuples(st.integers(0, 71), st.integers(0, 71)), max_size=4))
        seq = SeqInfo(tuple(a for a, _ in lengths), tuple(max(a, b) for a, b in lengths))
        return Case(seq=seq, mask=draw(masks(0, 0, dense=False)), **options)
    tq, tk = draw(st.integers(0, 150)), draw(st.integers(0, 150))
    return Case(batch=draw(st.integers(1, 3)), tq=tq, tk=tk, mask=draw(masks(tq, tk, dense=True)), **options)


@pytest.fixture(params=["usual sizes", "small sizes"])
def sizes(request, monkeypatch):
    """Small sizes make short tensors go through many slabs and chunks, and through slabs gathered from short runs."""
    if request.param == "small sizes":
        monkeypatch.setattr(layout, "SLAB_KEYS", 24)
        monkeypatch.setattr(chunks, "SLAB_KEYS", 24)
        monkeypatch.setattr(layout, "SHORT_RUN", 17)
        monkeypatch.setattr(layout, "FEW_QUERIES", 0)
        monkeypatch.setattr(layout, "SIZES", ((16, 16, 1.0), (8, 8, 0.9)))
        monkeypatch.setattr(layout, "LEAST_QUERIES", 8)
        monkeypatch.setattr(layout, "_LAYOUTS", BoundedCache(64, 1 << 26))
        monkeypatch.setattr(chunks, "SCORES", 500)


@given(case=calls())
@HERE
def test_blocked_is_the_reference(sizes, case):
    got, want = (evaluate(case, impl, F64) for impl in ("blocked", "reference"))
    empty = want.lse == -math.inf
    assert torch.equal(got.lse == -math.inf, empty)
    assert_same(got.out, want.out, "out")
    assert_same(got.lse.masked_fill(empty, 0.0), want.lse.masked_fill(empty, 0.0), "lse")
    for n in want.grads:
        assert_same(got.grads[n], want.grads[n], f"gradient of {n}")
    with torch.no_grad():
        assert_same(run(case, case.tensors(F64), "blocked")[0], want.out, "out without gradients")
        assert_same(run(case, case.tensors(F64), "auto", lse=False)[0], want.out, "auto")


@given(case=calls(), data=st.data())
@settings(HERE, max_examples=20)
def test_nan_in_a_masked_key_or_value_stays_there(sizes, case, data):
    """Some keys and values are not finite: what does not see them is what it would be without them."""
    from test_attention_nan import check_poison

    tk = case.tk if case.seq is None else case.seq.total_k
    count = min(tk, data.draw(st.integers(1, 4)))
    where = data.draw(st.lists(st.integers(0, max(0, tk - 1)), min_size=count, max_size=count, unique=True)) if tk else []
    bad = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    for impl in ("blocked", "reference"):
        check_poison(case, impl, where, data.draw(st.sampled_from(["k", "v", "both", "one"])), bad)
