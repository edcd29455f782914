"""Score modifications against the libraries that made them known, literal loops, and their own generic derivative."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attlas.errors import OptionError, ShapeError
from attlas.scores import Alibi, Chain, DenseBias, RelativeBias, ScoreMod, Softcap, t5_bucket

HEADS = (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 16, 20, 23, 25, 32, 40, 52, 64, 71, 112, 128)


def positions(q0: int, tq: int, k0: int, tk: int) -> tuple[Tensor, Tensor]:
    return torch.arange(q0, q0 + tq), torch.arange(k0, k0 + tk)


@pytest.mark.parametrize("heads", HEADS)
def test_alibi_slopes_are_those_of_bloom_and_mpt(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    ours = Alibi.for_heads(heads).slopes
    assert ours.shape == (heads,)
    bloom = build_alibi_tensor(torch.ones(1, 3), heads, torch.float32)[:, 0, 1]  # slope * 1
    mpt = build_mpt_alibi_tensor(heads, 3)[:, 0, 1].neg()  # slope * -1
    assert torch.allclose(ours, bloom, rtol=1e-6, atol=0)
    assert torch.allclose(ours, mpt, rtol=1e-6, atol=0)


def test_alibi_subtracts_slope_times_distance():
    slopes = torch.tensor([0.5, 0.03, 2.0], dtype=torch.float64)
    scores = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    q_pos, k_pos = torch.tensor([4, 9, 70_000, 2, 3]), torch.tensor([0, 5, 1, 69_990, 4, 2, 8])
    got = Alibi(slopes)(scores, q_pos, k_pos)
    for b in range(2):
        for h in range(3):
            for i, q in enumerate(q_pos.tolist()):
                for j, k in enumerate(k_pos.tolist()):
                    want = scores[b, h, i, j] - slopes[h] * abs(q - k)
                    assert math.isclose(got[b, h, i, j], want, rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 64), (16, 100), (64, 1000), (12, 37)])
def test_buckets_are_those_of_t5(bidirectional, num_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = torch.arange(-3001, 3002)
    theirs = T5Attention._relative_position_bucket(relative, bidirectional, num_buckets, max_distance)
    ours = t5_bucket(relative, num_buckets=num_buckets, bidirectional=bidirectional, max_distance=max_distance)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_bias_is_that_of_t5_attention(bidirectional):
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    torch.manual_seed(3)
    config = T5Config(d_model=24, num_heads=3, d_kv=8, is_decoder=not bidirectional)
    theirs = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    bias = theirs.compute_bias(149, 149)
    mod = RelativeBias(theirs.relative_attention_bias.weight, bidirectional=bidirectional)
    got = mod(torch.zeros(1, 3, 149, 149), *positions(0, 149, 0, 149))
    assert torch.equal(got, bias)


@given(
    tq=st.integers(1, 11),
    tk=st.integers(1, 13),
    q0=st.integers(-20, 400),
    k0=st.integers(0, 400),
    bidirectional=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_diagonal_layout_of_relative_bias_equals_look_up_of_each_pair(tq, tk, q0, k0, bidirectional):
    mod = RelativeBias(torch.randn(20, 3, dtype=torch.float64), bidirectional, max_distance=50)
    q_pos, k_pos = positions(q0, tq, k0, tk)
    scores = torch.zeros(3, tq, tk, dtype=torch.float64)
    got = mod(scores, q_pos, k_pos)
    order_q, order_k = torch.randperm(tq), torch.randperm(tk)
    shuffled = mod(scores, q_pos[order_q], k_pos[order_k])
    assert torch.equal(got[:, order_q][:, :, order_k], shuffled)
    for i in range(tq):
        bucket = t5_bucket(k_pos - q_pos[i], num_buckets=20, bidirectional=bidirectional, max_distance=50)
        assert torch.equal(got[:, i], mod.table[bucket].t())


def test_softcap_is_a_scaled_tanh():
    scores = torch.linspace(-90, 90, 37, dtype=torch.float64).view(1, 1, 37)
    got = Softcap(30.0)(scores, *positions(0, 1, 0, 37))
    assert torch.allclose(got, torch.tensor([30 * math.tanh(s / 30) for s in scores.flatten().tolist()], dtype=torch.float64))
    assert got.abs().max() < 30


def test_dense_bias_row_stands_for_the_position_that_ends_with_the_keys():
    bias = torch.randn(3, 5, 11)  # 5 query rows that stand at positions 6 ... 10
    mod = RelativeBias.dense(bias)
    assert isinstance(mod, DenseBias)
    zeros = torch.zeros(2, 3, 2, 4)
    got = mod(zeros, torch.tensor([7, 10]), torch.tensor([0, 3, 10, 4]))
    assert torch.equal(got, bias[:, [1, 4]][:, :, [0, 3, 10, 4]].expand(2, 3, 2, 4))
    assert torch.equal(mod(zeros, torch.tensor([8, 9]), torch.arange(2, 6)), bias[:, 2:4, 2:6].expand(2, 3, 2, 4))


@pytest.mark.parametrize(("q", "k"), [([5], [0]), ([11], [0]), ([6], [11]), ([6], [-1])])
def test_dense_bias_refuses_positions_outside(q, k):
    mod = RelativeBias.dense(torch.randn(3, 5, 11))
    with pytest.raises(ShapeError, match=r"RelativeBias\.dense"):
        mod(torch.zeros(3, 1, 1), torch.tensor(q), torch.tensor(k))


def test_chain_applies_left_to_right_and_is_flat():
    a, b, c = Softcap(2.0), Alibi.for_heads(3), Softcap(5.0)
    chain = a >> b >> c
    assert isinstance(chain, Chain) and chain.mods == (a, b, c) and (a >> (b >> c)).mods == chain.mods
    scores = torch.randn(3, 5, 7)
    at = positions(4, 5, 0, 7)
    assert torch.equal(chain(scores, *at), c(b(a(scores, *at), *at), *at))
    assert not torch.allclose(chain(scores, *at), a(b(c(scores, *at), *at), *at))
    assert chain.tensors() == b.tensors() and chain.heads == 3


def test_chain_refuses_different_head_counts():
    with pytest.raises(ShapeError, match="heads"):
        Alibi.for_heads(3) >> Alibi.for_heads(5)


def mods() -> dict[str, ScoreMod]:
    torch.manual_seed(11)
    slopes = Alibi(torch.rand(5, dtype=torch.float64))
    table = RelativeBias(torch.randn(12, 5, dtype=torch.float64), True, 40)
    decoder = RelativeBias(torch.randn(12, 5, dtype=torch.float64), False, 40)
    return {
        "alibi": slopes,
        "softcap": Softcap(1.7),
        "t5": table,
        "t5-decoder": decoder,
        "dense": RelativeBias.dense(torch.randn(5, 31, 31, dtype=torch.float64)),
        "dense-one-head": RelativeBias.dense(torch.randn(1, 31, 31, dtype=torch.float64)),
        "dense-batch": RelativeBias.dense(torch.randn(3, 5, 31, 31, dtype=torch.float64)),
        "dense-batch-one-head": RelativeBias.dense(torch.randn(3, 1, 31, 31, dtype=torch.float64)),
        "dense-batch-of-one": RelativeBias.dense(torch.randn(1, 5, 31, 31, dtype=torch.float64)),
        "chain": slopes >> Softcap(2.3) >> table,
    }


@pytest.mark.parametrize("name", list(mods()))
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("some_heads", [False, True])
def test_backward_agrees_with_autograd(name, scattered, some_heads):
    mod = mods()[name]
    heads = torch.tensor([3, 0]) if some_heads else None
    at = positions(13, 7, 2, 11)
    if scattered:
        at = tuple(p[torch.randperm(len(p))] for p in at)
    scores = torch.randn(3, 2 if some_heads else 5, 7, 11, dtype=torch.float64)
    grad = torch.randn_like(scores)
    fast = [torch.zeros_like(t) for t in mod.tensors()]
    slow = [torch.zeros_like(t) for t in mod.tensors()]
    got = mod.backward(scores, grad.clone(), *at, heads, fast)
    want = ScoreMod.backward(mod, scores, grad.clone(), *at, heads, slow)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(fast, slow, strict=True):
        assert b.abs().sum() > 0
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    unwanted = mod.backward(scores, grad.clone(), *at, heads, [None] * len(fast))
    assert torch.allclose(unwanted, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(mods()))
def test_heads_and_rows_select(name):
    mod = mods()[name]
    at = positions(13, 7, 2, 11)
    scores = torch.randn(3, 5, 7, 11, dtype=torch.float64)
    whole = mod(scores, *at)
    heads = torch.tensor([4, 1])
    assert torch.allclose(mod(scores[:, heads], *at, heads), whole[:, heads], rtol=1e-12, atol=1e-12)
    assert torch.equal(mod.rows(1, 3)(scores[1:3], *at), whole[1:3])


@pytest.mark.parametrize("name", list(mods()))
def test_replaced_tensors_are_used(name):
    mod = mods()[name]
    other = mod.replace_tensors([t + 1 for t in mod.tensors()])
    assert type(other) is type(mod) and repr(other) == repr(mod)
    assert all(torch.equal(a, b + 1) for a, b in zip(other.tensors(), mod.tensors(), strict=True))
    scores = torch.randn(3, 5, 7, 11, dtype=torch.float64)
    changed = not torch.equal(other(scores, *positions(13, 7, 2, 11)), mod(scores, *positions(13, 7, 2, 11)))
    assert changed == bool(mod.tensors())


def test_values_compare_and_print():
    assert Softcap(2.0) == Softcap(2.0) != Softcap(3.0)
    assert repr(Alibi.for_heads(3) >> Softcap(2.0)) == "Alibi(slopes=[3]) >> Softcap(cap=2.0)"
    with pytest.raises(TypeError):
        Softcap(2.0) >> 3


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Softcap(0.0), OptionError),
        (lambda: Softcap(-1.0), OptionError),
        (lambda: Alibi.for_heads(0), OptionError),
        (lambda: Alibi(torch.zeros(2, 3)), ShapeError),
        (lambda: RelativeBias(torch.zeros(5)), ShapeError),
        (lambda: RelativeBias(torch.zeros(3, 2)), OptionError),
        (lambda: RelativeBias(torch.zeros(32, 2), max_distance=8), OptionError),
        (lambda: RelativeBias.dense(torch.zeros(2, 3)), ShapeError),
    ],
)
def test_wrong_arguments_are_refused(make, error):
    with pytest.raises(error):
        make()
