"""What `attention` promises beside its numbers: strides, views, invariances, live arguments, and errors that restate the call."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from attention_cases import CASES, Case, evaluate, run
from attlas.errors import AttlasError, OptionError, ShapeError, UnknownNameError, UnsupportedError
from attlas.masks import Axis, Causal, Grid, Padding, PerHead, Segment, Window
from attlas.ops import attention
from attlas.ops.call import make_call
from attlas.ops.select import run_call
from attlas.scores import Alibi, RelativeBias, Softcap
from attlas.shapes import AuxRequest, SeqInfo
from attlas.testing.budget import assert_same

F64 = torch.float64
IMPLS = ("blocked", "reference", "auto")


def qkv(*, batch=2, tq=67, tk=67, heads=6, kv_heads=3, dim=7, dim_v=5, dtype=torch.float32):
    case = Case(batch=batch, tq=tq, tk=tk, heads=heads, kv_heads=kv_heads, dim=dim, dim_v=dim_v)
    return tuple(case.tensors(dtype)[n].detach() for n in "qkv")


LAYOUTS = {
    "head-major": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dim-major": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "every other token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "part of a row": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("tq", [1, 5])
def test_no_sequences_at_all(impl: str, dtype: torch.dtype, tq: int):
    q, k, v = (t[:0] for t in qkv(tq=tq, tk=7, dtype=dtype))
    for mask in (None, Causal(), Window(3, 0)):
        out, aux = attention(q, k, v, mask=mask, impl=impl, return_aux=AuxRequest(lse=True))
        assert out.shape == attention(q, k, v, mask=mask, impl=impl).shape == (0, tq, 6, 5)
        assert out.dtype == dtype and aux.lse.shape == (0, tq, 6)


@pytest.mark.parametrize("impl", [*IMPLS, "sdpa"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("tq", [67, 3])
def test_any_strides(layout, impl, tq):
    q, k, v = qkv(tq=tq, dim_v=7, dtype=F64)
    mask = None if impl == "sdpa" else Causal()
    want = attention(q, k, v, mask=mask, impl="reference")
    moved = [LAYOUTS[layout](x).requires_grad_() for x in (q, k, v)]
    assert not all(x.is_contiguous() for x in moved)
    assert_same(attention(*moved, mask=mask, impl=impl), want, layout)
    with torch.no_grad():
        assert_same(attention(*moved, mask=mask, impl=impl), want, layout)


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_tensors_and_gradients(impl):
    q = torch.randn(1, 1, 1, 7, dtype=F64, requires_grad=True)
    k, v = torch.randn(2, 67, 3, 7, dtype=F64), torch.randn(2, 67, 3, 5, dtype=F64)
    out = attention(q.expand(2, 67, 6, 7), k, v, mask=Causal(), impl=impl)
    (got,) = torch.autograd.grad(out.sum(), q)  # the gradient of a sum is expanded too
    (want,) = torch.autograd.grad(attention(q.expand(2, 67, 6, 7), k, v, mask=Causal(), impl="reference").sum(), q)
    assert_same(got, want, "gradient")


@pytest.mark.parametrize("impl", ["blocked", "reference"])
def test_gradient_of_lse_alone_and_of_some_inputs(impl):
    case = CASES["alibi"]
    for wanted in ("q", "k", "v", "mod0"):
        t = {n: x.detach().requires_grad_(n == wanted) for n, x in case.tensors(F64).items()}
        (got,) = torch.autograd.grad(run(case, t, impl)[0].square().sum(), t[wanted])
        (want,) = torch.autograd.grad(run(case, t, "reference")[0].square().sum(), t[wanted])
        assert_same(got, want, wanted)
        if wanted == "v":  # lse does not depend on v
            continue
        (got,) = torch.autograd.grad(run(case, t, impl)[1].square().sum(), t[wanted])
        (want,) = torch.autograd.grad(run(case, t, "reference")[1].square().sum(), t[wanted])
        assert_same(got, want, wanted)


@pytest.mark.parametrize("name", ["causal", "window", "chain", "few, window", "padding causal"])
def test_a_batch_row_is_computed_alike_in_every_batch(name):
    case = replace(CASES[name], batch=5, mask=Causal() if name == "padding causal" else CASES[name].mask)
    t = {n: x.detach() for n, x in case.tensors(F64).items()}
    whole = run(case, t, "blocked")[0]
    for i in range(5):
        alone = {n: x[i : i + 1] if n in "qkv" else x for n, x in t.items()}
        assert_same(run(replace(case, batch=1), alone, "blocked")[0], whole[i : i + 1], f"row {i}", tol=1e-14)


def test_same_call_same_bits():
    first, second = (evaluate(CASES["chain"], "blocked", torch.float32) for _ in range(2))
    assert torch.equal(first.out, second.out) and torch.equal(first.lse, second.lse)
    assert all(torch.equal(first.grads[n], second.grads[n]) for n in first.grads)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "name", ["packed", "packed causal", "packed few", "packed started", "packed alike", "packed alike but for positions"]
)
def test_packed_is_one_by_one(name, impl):
    case = CASES[name]
    t = {n: x.detach() for n, x in case.tensors(F64).items()}
    out, lse = run(case, t, impl)
    seq = case.seq
    rows = zip(
        t["q"].split(seq.lengths), t["k"].split(seq.keys), t["v"].split(seq.keys), seq.first, out.split(seq.lengths), strict=True
    )
    for q, k, v, first, got in rows:
        grid = Grid.at(range(first, first + len(q)), range(len(k)))
        sink = t.get("sink")
        call = make_call(q[None], k[None], v[None], mask=case.mask, score_mod=case.score_mod, sink=sink, grid=grid)
        assert_same(got, run_call(call, "reference")[0][0], name)
    assert lse.shape == out.shape[:-1]


@pytest.mark.parametrize("impl", ["blocked", "reference"])
@pytest.mark.parametrize("tq", [3, 67])
def test_explicit_grid_of_a_rolling_cache(impl, tq):
    """Slots hold positions out of order; the answer is that of the keys in order."""
    q, k, v = qkv(tq=tq, dtype=F64)
    mask, mod = Causal() & Window.last(50), Alibi(torch.rand(6, dtype=F64))
    first = 70_000 - tq
    ordered = make_call(
        q, k, v, mask=mask, score_mod=mod, grid=Grid.at(range(first, 70_000), range(70_000 - 67, 70_000)), need_lse=True
    )
    turn = 23
    slots = Grid(ordered.grid.q, Axis((Segment(67 - turn, 70_000 - 67 + turn), Segment(turn, 70_000 - 67))))
    k2, v2 = (torch.cat([x[:, turn:], x[:, :turn]], 1) for x in (k, v))
    turned = make_call(q, k2, v2, mask=mask, score_mod=mod, grid=slots, need_lse=True)
    want = run_call(ordered, "reference")
    for call in (ordered, turned):
        got = run_call(call, impl)
        assert_same(got[0], want[0], "out")
        assert_same(got[1], want[1], "lse")


@pytest.mark.parametrize("impl", IMPLS)
def test_every_argument_is_live(impl):
    q, k, v = qkv()
    base = attention(q, k, v, impl=impl)
    for options in (
        {"mask": Causal()},
        {"mask": Padding((67, 5))},
        {"mask": PerHead((Causal(),) * 6)},
        {"score_mod": Softcap(0.3)},
        {"score_mod": Alibi.for_heads(6)},
        {"score_mod": RelativeBias(torch.randn(32, 6))},
        {"score_mod": RelativeBias.dense(torch.randn(2, 6, 67, 67))},
        {"scale": 0.9},
        {"scale": 0.0},
        {"sink": torch.zeros(6)},
    ):
        changed = attention(q, k, v, impl=impl, **options)
        assert changed.shape == base.shape and not torch.allclose(changed, base), options
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    one = attention(*flat, seq=SeqInfo((134,)), impl=impl)
    two = attention(*flat, seq=SeqInfo((67, 67)), impl=impl)
    later = attention(*flat, seq=SeqInfo((67, 67), starts=(3, 0)), mask=Causal(), impl=impl)
    now = attention(*flat, seq=SeqInfo((67, 67)), mask=Causal(), impl=impl)
    assert torch.allclose(two.view_as(base), base, atol=1e-6) and not torch.allclose(one, two)
    assert not torch.allclose(later, now)
    out, aux = attention(q, k, v, impl=impl, return_aux=AuxRequest(lse=True))
    assert torch.allclose(out, base, atol=1e-6) and aux.lse.shape == (2, 67, 6) and aux.state is None
    assert attention(q, k, v, impl=impl, return_aux=AuxRequest())[1].lse is None


@pytest.mark.parametrize("impl", IMPLS)
def test_default_scale_is_the_root_of_the_head_dim(impl):
    q, k, v = qkv(dim=13, dtype=F64)
    assert_same(attention(q, k, v, impl=impl), attention(q, k, v, scale=13**-0.5, impl="reference"), "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tq", [2, 67])
def test_dtypes_of_results(impl, dtype, tq):
    q, k, v = qkv(tq=tq, dtype=dtype)
    out, aux = attention(q, k, v, mask=Causal(), impl=impl, return_aux=AuxRequest(lse=True))
    assert out.dtype == dtype and aux.lse.dtype == (F64 if dtype == F64 else torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_query_without_keys_is_zero_and_moves_nothing(impl):
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = Window(0, 0) & ~Window(None, None) | Padding((67, 0))  # row 0 sees everything, row 1 nothing
    out, aux = attention(q, k, v, mask=mask, impl=impl, return_aux=AuxRequest(lse=True))
    assert (out[1] == 0).all() and (aux.lse[1] == -math.inf).all()
    out.sum().backward()
    for x in (q, k, v):
        assert (x.grad[1] == 0).all() and x.grad[0].isfinite().all()
    assert v.grad[0].any()
    sink = torch.randn(6, requires_grad=True)
    out, aux = attention(q, k, v, mask=mask, sink=sink, impl=impl, return_aux=AuxRequest(lse=True))
    assert torch.equal(out[1], torch.zeros_like(out[1])) and torch.allclose(aux.lse[1], sink.expand(67, 6))


def test_sink_of_minus_infinity_is_no_sink():
    q, k, v = qkv(dtype=F64)
    sink = torch.full((6,), -math.inf, dtype=F64)
    for impl in IMPLS:
        for tq in (67, 2):
            got = attention(q[:, :tq], k, v, mask=Causal(), sink=sink, impl=impl, return_aux=AuxRequest(lse=True))
            want = attention(q[:, :tq], k, v, mask=Causal(), impl="reference", return_aux=AuxRequest(lse=True))
            assert_same(got[0], want[0], impl)
            assert_same(got[1].lse, want[1].lse, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tq", [67, 2])
def test_a_large_sink_takes_everything(impl, tq):
    q, k, v = qkv(tq=tq)
    sink = torch.tensor([1e4, -1e4] * 3)
    out, aux = attention(q, k, v, mask=Causal(), sink=sink, impl=impl, return_aux=AuxRequest(lse=True))
    bare, bare_aux = attention(q, k, v, mask=Causal(), impl="reference", return_aux=AuxRequest(lse=True))
    assert not out[..., ::2, :].any() and torch.equal(aux.lse[..., ::2], torch.full_like(aux.lse[..., ::2], 1e4))
    assert torch.allclose(out[..., 1::2, :], bare[..., 1::2, :], atol=1e-5)
    assert torch.allclose(aux.lse[..., 1::2], bare_aux.lse[..., 1::2], atol=1e-5)


@pytest.mark.parametrize("impl", ["blocked", "auto"])
def test_large_scores_neither_overflow_nor_vanish(impl):
    q, k, v = qkv()
    for shift in (1e4, -1e4):
        big = attention(q, k, v, mask=Causal(), score_mod=RelativeBias.dense(torch.full((1, 67, 67), shift)), impl=impl)
        assert torch.allclose(big, attention(q, k, v, mask=Causal(), impl="reference"), atol=2e-2)
    ramp = (torch.arange(67.0) * -50).expand(1, 67, 67)  # every later slab is far below the first
    got = attention(q, k, v, score_mod=RelativeBias.dense(ramp), impl=impl)
    assert torch.allclose(got, v[:, :1].repeat_interleave(2, 2).expand_as(got), atol=1e-5)


Q, K, V = qkv()
PACKED = [x.flatten(0, 1) for x in (Q, K, V)]

BAD_CALLS = {
    "not a tensor": (ShapeError, "q must be a tensor", lambda: attention([1.0], K, V)),
    "rank": (ShapeError, "must all be", lambda: attention(Q[0, 0], K, V)),
    "rank of k": (ShapeError, "must all be", lambda: attention(Q, K[0], V)),
    "dtype": (ShapeError, "one dtype", lambda: attention(Q.double(), K, V)),
    "integers": (ShapeError, "torch.int64 is not one of", lambda: attention(Q.long(), K.long(), V.long())),
    "device": (ShapeError, "one device", lambda: attention(Q, K.to("meta"), V)),
    "batch": (ShapeError, "batch sizes differ", lambda: attention(Q[:1], K, V)),
    "k and v": (ShapeError, "agree in all but the last", lambda: attention(Q, K, V[:, :5])),
    "head dim": (ShapeError, r"head_dim of q \(7\) and k \(5\)", lambda: attention(Q, V, V)),
    "no head dim": (ShapeError, "positive", lambda: attention(Q[..., :0], K[..., :0], V)),
    "no value dim": (ShapeError, "positive", lambda: attention(Q, K, V[..., :0])),
    "heads": (ShapeError, "6 query heads cannot be shared", lambda: attention(Q, K[:, :, [0, 1, 2, 2]], V[:, :, [0, 1, 2, 2]])),
    "no heads": (ShapeError, "cannot be shared", lambda: attention(Q, K[:, :, :0], V[:, :, :0])),
    "packed without seq": (ShapeError, "pass seq", lambda: attention(*PACKED)),
    "seq with a batch": (ShapeError, "batch dimension", lambda: attention(Q, K, V, seq=SeqInfo((67,)))),
    "seq too short": (ShapeError, "counts 60 queries", lambda: attention(*PACKED, seq=SeqInfo((60,)))),
    "seq keys": (ShapeError, "100 keys", lambda: attention(*PACKED, seq=SeqInfo((134,), (100,)))),
    "bool mask": (OptionError, "attlas.masks.Dense", lambda: attention(Q, K, V, mask=torch.ones(67, 67, dtype=torch.bool))),
    "mask heads": (ShapeError, "heads 2", lambda: attention(Q, K, V, mask=PerHead((Causal(), Causal())))),
    "mask batch": (ShapeError, "batch 3", lambda: attention(Q, K, V, mask=Padding((1, 2, 3)))),
    "batch mask on packed": (ShapeError, "packed", lambda: attention(*PACKED, mask=Padding((134,)), seq=SeqInfo((67, 67)))),
    "mod": (OptionError, "score_mod must be", lambda: attention(Q, K, V, score_mod=lambda s: s)),
    "mod heads": (ShapeError, "heads 5", lambda: attention(Q, K, V, score_mod=Alibi.for_heads(5))),
    "mod batch": (ShapeError, "batch 3", lambda: attention(Q, K, V, score_mod=RelativeBias.dense(torch.zeros(3, 1, 67, 67)))),
    "mod device": (ShapeError, "device", lambda: attention(Q, K, V, score_mod=Alibi(torch.zeros(6, device="meta")))),
    "mod size": (
        ShapeError,
        "RelativeBias.dense",
        lambda: attention(Q, K, V, score_mod=RelativeBias.dense(torch.zeros(1, 67, 61))),
    ),
    "scale": (OptionError, "finite number", lambda: attention(Q, K, V, scale=math.nan)),
    "scale tensor": (OptionError, "finite number", lambda: attention(Q, K, V, scale=torch.tensor(1.0))),
    "sink shape": (ShapeError, r"sink must be a float tensor \[H\] = \[6\]", lambda: attention(Q, K, V, sink=torch.zeros(3))),
    "sink dtype": (ShapeError, "sink", lambda: attention(Q, K, V, sink=torch.zeros(6, dtype=torch.int64))),
    "aux": (OptionError, "AuxRequest", lambda: attention(Q, K, V, return_aux=True)),
    "state": (UnsupportedError, "recurrent state", lambda: attention(Q, K, V, return_aux=AuxRequest(state=True))),
    "impl": (UnknownNameError, "did you mean 'blocked'", lambda: attention(Q, K, V, impl="block")),
    "grid": (ShapeError, "the grid is 5 x 67", lambda: make_call(Q, K, V, grid=Grid.dense(5, 67))),
    "grid and seq": (OptionError, "pass one", lambda: make_call(*PACKED, grid=Grid.dense(134, 134), seq=SeqInfo((134,)))),
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_wrong_calls_are_refused_and_restated(name):
    error, words, call = BAD_CALLS[name]
    with pytest.raises(error, match=words) as caught:
        call()
    assert issubclass(error, AttlasError)
    if name not in ("mod size", "aux", "state", "impl"):  # those are not about the tensors
        assert str(caught.value).startswith("attention(q") and ", v [" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mask": Causal() & Window.last(5)}, "can only do"),
        ({"mask": Causal(), "tq": 60}, "can only do"),
        ({"score_mod": Softcap(3.0)}, "no score modification"),
        ({"sink": torch.zeros(6)}, "no sink"),
        ({"return_aux": AuxRequest(lse=True)}, "log-sum-exp"),
    ],
)
def test_explicit_impl_never_falls_back(options, reason):
    options = dict(options)
    q = Q[:, : options.pop("tq", 67)]
    with pytest.raises(UnsupportedError, match=reason) as caught:
        attention(q, K, V, impl="sdpa", **options)
    assert f"q [2, {q.shape[1]}, 6, 7] float32 cpu" in str(caught.value) and "impl='sdpa'" in str(caught.value)
    attention(q, K, V, **options)
