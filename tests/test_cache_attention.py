"""attention_cached: what is read from a cache is attention over the whole sequence."""

from __future__ import annotations

import itertools

import pytest
import torch

from attlas.cache import ContiguousPart, PagedPart, PagePool, PartSpec, RingPart, make_cache
from attlas.errors import OptionError, ShapeError, UnsupportedError
from attlas.masks import Causal, Dilated, Local, Padding, PerHead, Prefix, Sinks, Window
from attlas.ops.cached import attention_cached
from attlas.reference.softmax import attention as reference
from attlas.scores import Alibi, RelativeBias, Softcap
from attlas.shapes import AuxRequest, SeqInfo
from cache_streams import DV, HKV, LSE, SINKS, WINDOW, D, H, T, inputs, poison, spec, stream, truth

CHUNKS = {
    "whole": [T],
    "token by token": [1] * T,
    "chunks": [5, 11, 1, 1, 13, 12, 1, 17],  # below, at and above the window, with single tokens between
    "short start": [2, 1, 23, 1, 1, 19, 14],
}
MASKS = {
    "causal": (Causal(), None, 0),
    "window": (Causal() & Window.last(WINDOW), WINDOW, 0),
    "window alone": (Window.last(WINDOW), WINDOW, 0),
    "sinks alone": (Sinks(SINKS), 1, SINKS),
    "window of one": (Causal() & Window.last(1), 1, 0),
    "sinks": (Causal() & (Window.last(WINDOW) | Sinks(SINKS)), WINDOW, SINKS),
    "dilated": (Dilated(5, 0, 2), WINDOW, 0),
    "local": (Causal() & Local(7), 7, 0),
    "two windows": (PerHead((Window.last(3), Window.last(WINDOW), Causal() & Local(5)) * 2), WINDOW, 0),
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@pytest.mark.parametrize("name", MASKS)
def test_any_chunking_is_the_whole(name, layout, chunks):
    mask, window, sinks = MASKS[name]
    q, k, v = inputs(T)
    want, want_lse = truth(q, k, v, mask)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 5e-6)):  # fp32 decodes over the storage where a kernel can
        part = make_cache([spec(window, sinks)], 1, T, layout=layout, page_size=8, dtype=dtype).parts[0]
        poison(part)
        out, lse = stream(part, *(t.to(dtype) for t in (q, k, v)), chunks, mask=mask)
        assert (out - want).abs().max() < bound
        assert (lse - want_lse).abs().max() < bound


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_score_mod_scale_and_sink_reach_every_read(layout):
    mask = Causal() & (Window.last(WINDOW) | Sinks(SINKS))
    q, k, v = inputs(T, 1)
    sink = torch.linspace(-1, 1, H, dtype=torch.float64)
    for mod in (Alibi.for_heads(H), Softcap(2.5), Softcap(1.5) >> Alibi.for_heads(H), Alibi.for_heads(H) >> Softcap(1.5)):
        options = {"score_mod": mod, "scale": 0.7, "sink": sink}
        want, want_lse = truth(q, k, v, mask, **options)
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
            for window, sinks in ((WINDOW, SINKS), (None, 0)):
                part = make_cache([spec(window, sinks)], 1, None, layout=layout, page_size=8, dtype=dtype).parts[0]
                out, lse = stream(part, *(t.to(dtype) for t in (q, k, v)), [17, 1, 1, 29, 13], mask=mask, **options)
                assert (out - want).abs().max() < bound
                assert (lse - want_lse).abs().max() < bound


def test_rows_in_any_order_and_with_nothing_to_do():
    part = make_cache([spec()], 4, 29, dtype=torch.float64).parts[0]
    data = {r: inputs(n, r) for r, n in ((2, 17), (0, 5), (3, 11))}
    seq = SeqInfo((17, 0, 5, 11), starts=(0, 0, 0, 0), ids=(2, 1, 0, 3))
    q, k, v = (torch.cat([data[r][i] for r in (2, 0, 3)]) for i in range(3))
    part.write((k, v), seq)
    out = attention_cached(q, part, seq=seq, mask=Causal())
    for r, got in zip((2, 0, 3), out.split([17, 5, 11]), strict=True):
        assert (got - truth(*data[r], Causal())[0]).abs().max() < 1e-12
    none = attention_cached(q[:0], part, seq=SeqInfo(()), return_aux=LSE)
    assert none[0].shape == (0, H, DV) and none[1].lse.shape == (0, H) and none[1].lse.dtype == torch.float64
    assert attention_cached(q[:0], part, seq=SeqInfo((0, 0), ids=(1, 2)), mask=Causal()).shape == (0, H, DV)


def test_only_the_window_is_read():
    q, k, v = inputs(T)
    for part in (
        ContiguousPart(spec(), 1, T, dtype=torch.float64),
        PagedPart(spec(), 1, PagePool(spec(), 8, 8, dtype=torch.float64)),
    ):
        seen, plain = [], part.read
        part.write((k, v), SeqInfo((T,)))
        part.read = lambda row, span=None, plain=plain, seen=seen: seen.append(plain(row, span).axis.span) or plain(row, span)
        out = attention_cached(q[-1:], part, seq=SeqInfo((1,), starts=(T - 1,)), mask=Causal() & Window.last(WINDOW))
        assert seen == [(T - WINDOW, T - 1)]
        assert (out - truth(q, k, v, Causal() & Window.last(WINDOW))[0][-1:]).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["contiguous", "ring", "paged"])
def test_nothing_of_unused_memory_is_read(kind, dtype):
    """Slots never written, forgotten by truncate, and of other rows hold NaN."""
    window = 13 if kind == "ring" else None
    mask = Causal() & Window.last(13)
    part = make_cache([spec(window)], 3, 47, layout="paged" if kind == "paged" else "contiguous", page_size=8, dtype=dtype).parts[
        0
    ]
    poison(part)
    q, k, v = (t.to(dtype) for t in inputs(47, 5))
    bad = tuple(torch.full_like(t, float("nan")) for t in (k, v))
    for row in (0, 2):
        part.write(tuple(t[:9] for t in bad), SeqInfo((9,), ids=(row,)))
        part.end_step()
    stream(part, q, k, v, [7, 3], row=1, mask=mask)
    part.write(tuple(t[:2] for t in bad), SeqInfo((2,), ids=(1,)))
    part.end_step()
    part.truncate({1: 10})
    part.reset([0])
    out, _ = stream(part, q, k, v, [1, 2, 1, 5, 28], row=1, mask=mask)
    assert (out - truth(q, k, v, mask)[0][10:]).abs().max() < (1e-12 if dtype == torch.float64 else 5e-6)


def test_masks_and_biases_written_for_a_batch():
    lengths, rows = (9, 13, 9), (2, 0, 1)
    data = [inputs(n, i) for i, n in enumerate(lengths)]
    part = make_cache([spec()], 3, 13, dtype=torch.float64).parts[0]
    q, k, v = (torch.cat([d[i] for d in data]) for i in range(3))
    seq = SeqInfo(lengths, starts=(0, 0, 0), ids=rows)
    part.write((k, v), seq)
    batch_masks = (
        Causal() & Padding((5, 11, 7)),
        PerHead((Causal(), Window.last(3)) * 3) & Padding((5, 11, 7)),
        Causal() | Prefix((2, 3, 5)),
    )
    for mask in batch_masks:
        out = attention_cached(q, part, seq=seq, mask=mask)
        for i, got in enumerate(out.split(lengths)):
            per_head = torch.stack([mask.at(i, h).to_bool(lengths[i], lengths[i]) for h in range(H)])
            want = reference(
                *(t[None] for t in data[i]), mask_bool=per_head, score_mod=None, q_pos=None, k_pos=None, scale=D**-0.5
            )
            assert (got - want[0][0]).abs().max() < 1e-12
    bias = RelativeBias.dense(torch.randn(3, H, 13, 13, dtype=torch.float64))
    out = attention_cached(q, part, seq=seq, score_mod=bias)
    want, _ = truth(*data[1], None, score_mod=bias.rows(1, 2))
    assert (out.split(lengths)[1] - want).abs().max() < 1e-12
    with pytest.raises(ShapeError, match="written for 2 batch rows, not for 3"):
        attention_cached(q, part, seq=seq, mask=Padding((5, 11)))


def test_batch_masks_on_rows_that_stand_alike():
    data = [inputs(7, seed) for seed in range(3)]
    part = make_cache([spec()], 3, 7, dtype=torch.float64).parts[0]
    q, k, v = (torch.cat([d[i] for d in data]) for i in range(3))
    seq = SeqInfo((7,) * 3)
    part.write((k, v), seq)
    out = attention_cached(q, part, seq=seq, mask=Causal() & Padding((5, 2, 7)))
    for i, (got, keys) in enumerate(zip(out.split(7), (5, 2, 7), strict=True)):
        assert (got - truth(*data[i], Causal() & Prefix(keys))[0]).abs().max() < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_reach_q_and_sink_but_not_the_cache(dtype, bound):
    q, k, v = (t.to(dtype).requires_grad_() for t in inputs(13))
    sink = torch.zeros(H, dtype=dtype, requires_grad=True)
    for window in (None, 7):
        part = make_cache([spec(window)], 1, None, dtype=dtype).parts[0]
        part.write((k, v), SeqInfo((13,)))
        mask = Causal() if window is None else Causal() & Window.last(window)
        out = attention_cached(q, part, seq=SeqInfo((13,)), mask=mask, sink=sink)
        got = torch.autograd.grad(out.square().sum(), (q, sink))
        want = torch.autograd.grad(truth(q, k.detach(), v.detach(), mask, sink=sink)[0].square().sum(), (q, sink))
        assert all((a - b).abs().max() < bound and b.abs().max() > 0 for a, b in zip(got, want, strict=True))
        part.end_step()
        part.write((k[:1], v[:1]), SeqInfo((1,)))
        assert not any(t.requires_grad for t in part.read(0).tensors)


def test_a_cache_in_another_dtype():
    q, k, v = inputs(17, dtype=torch.float32)
    part = make_cache([spec()], 1, 17, dtype=torch.bfloat16).parts[0]
    part.write((k, v), SeqInfo((17,)))
    assert part.nbytes() == 17 * HKV * (D + DV) * 2
    out = attention_cached(q, part, seq=SeqInfo((17,)), mask=Causal())
    assert out.dtype == torch.float32
    want, _ = truth(q.double(), k.bfloat16().double(), v.bfloat16().double(), Causal())
    assert (out - want).abs().max() < 1e-5
    last = attention_cached(q[-1:], part, seq=SeqInfo((1,)), mask=Causal())
    assert last.dtype == torch.float32 and (last - want[-1:]).abs().max() < 1e-5


def test_cross_attention_reads_a_memory_of_another_length():
    memories, queries = (5, 0, 19), (3, 2, 1)
    data = [inputs(n, i) for i, n in enumerate(memories)]
    q = inputs(6, 9)[0]
    part = make_cache([spec()], 3, 19, dtype=torch.float64).parts[0]
    part.write((torch.cat([d[1] for d in data]), torch.cat([d[2] for d in data])), SeqInfo(memories))
    out, aux = attention_cached(q, part, seq=SeqInfo(queries, memories, starts=(40, 0, 7)), return_aux=LSE)
    for i, (got, own) in enumerate(zip(out.split(queries), q.split(queries), strict=True)):
        if memories[i]:
            want = torch.softmax(torch.einsum("qhd,khd->hqk", own, data[i][1].repeat_interleave(3, 1)) * D**-0.5, -1)
            assert (got - torch.einsum("hqk,khd->qhd", want, data[i][2].repeat_interleave(3, 1))).abs().max() < 1e-12
        else:
            assert not got.any() and (aux.lse.split(queries)[i] == -torch.inf).all()


def test_positions_beyond_seventy_thousand():
    window = 31
    part = RingPart(spec(window, 2), 1, dtype=torch.float64)
    filler = torch.zeros(70_001, HKV, D, dtype=torch.float64), torch.zeros(70_001, HKV, DV, dtype=torch.float64)
    part.write(filler, SeqInfo((70_001,)))
    part.end_step()
    q, k, v = inputs(40)
    mask = Causal() & Window.last(window)
    out = []
    for i in range(40):
        seq = SeqInfo((1,), starts=(70_001 + i,))
        part.write((k[i : i + 1], v[i : i + 1]), seq)
        out.append(attention_cached(q[i : i + 1], part, seq=seq, mask=mask))
        part.end_step()
    assert (torch.cat(out)[window - 1 :] - truth(q, k, v, mask)[0][window - 1 :]).abs().max() < 1e-12
    assert part.read(0).axis.span == (0, 70_040) and len(part.read(0).axis) == window + 2


@pytest.mark.parametrize("score_mod", [None, Alibi.for_heads(H)], ids=["plain", "alibi"])
@pytest.mark.parametrize("rollback", [0, 1, 2])
@pytest.mark.parametrize("mask", [Window.last(WINDOW), Window.last(WINDOW) | Sinks(SINKS) & Causal()], ids=["window", "sinks"])
def test_a_wrapped_ring_is_read_by_position(mask, rollback, score_mod):
    """Slots kept for a rollback are no keys, and a bias sees the distance, not the slot."""
    q, k, v = inputs(T)
    part = RingPart(spec(WINDOW, SINKS), 1, rollback=rollback, dtype=torch.float64)
    out, _ = stream(part, q, k, v, [T - 5, 1, 1, 2, 1], mask=mask, score_mod=score_mod)
    want, _ = truth(q, k, v, Causal() & mask, score_mod=score_mod)
    assert (out - want).abs().max() < 1e-12


def test_a_mask_that_asks_for_dropped_tokens_is_refused():
    q, k, v = inputs(T)
    for layout in ("contiguous", "paged"):
        part = make_cache([spec(WINDOW, SINKS)], 1, None, layout=layout, page_size=8, dtype=torch.float64).parts[0]
        part.write((k, v), SeqInfo((T,)))
        part.end_step()
        seq = SeqInfo((1,), starts=(T - 1,))
        gone = part.missing(0)[0]
        wide = Window.last(T - gone)  # the last key of this window is the first one that was dropped
        for mask in (None, Causal(), Causal() & wide, Window.last(WINDOW) | Local(1000), Causal() & ~Sinks(SINKS)):
            with pytest.raises(UnsupportedError, match="no longer holds"):
                attention_cached(q[-1:], part, seq=seq, mask=mask)
        for mask in (
            Window.last(WINDOW),
            Sinks(SINKS),
            Window.last(WINDOW) & ~Sinks(SINKS),
            Window.last(5) & Causal() | Sinks(2),
        ):
            assert attention_cached(q[-1:], part, seq=seq, mask=mask).isfinite().all()


def test_dropped_tokens_are_missed_in_a_batch_too():
    q, k, v = inputs(2 * T)
    for layout in ("contiguous", "paged"):
        part = make_cache([spec(WINDOW, SINKS)], 2, None, layout=layout, page_size=8, dtype=torch.float64).parts[0]
        part.write((k, v), SeqInfo((T, T)))
        part.end_step()
        seq = SeqInfo((1, 1), starts=(T - 1, T - 1))
        with pytest.raises(UnsupportedError, match="no longer holds"):
            attention_cached(q[:2], part, seq=seq, mask=Causal())
        assert attention_cached(q[:2], part, seq=seq, mask=Window.last(WINDOW)).isfinite().all()


def test_dilated_masks_are_checked_key_by_key():
    """The hull of a stride covers dropped keys, its keys do not: only counting can tell."""
    part = RingPart(spec(4, 1), 1, dtype=torch.float64)
    q, k, v = inputs(20)
    part.write((k, v), SeqInfo((20,)))
    part.end_step()
    seq = SeqInfo((1,), starts=(19,))
    assert part.missing(0) == (1, 16)
    only_the_first = Dilated(1, 0, 19)  # keys 19 and 0
    assert attention_cached(q[-1:], part, seq=seq, mask=only_the_first).isfinite().all()
    with pytest.raises(UnsupportedError):
        attention_cached(q[-1:], part, seq=seq, mask=Dilated(1, 0, 18))  # keys 19 and 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_errors_restate_the_call(dtype):
    q, k, v = (t.to(dtype) for t in inputs(7))
    part = make_cache([spec()], 2, 16, dtype=dtype).parts[0]
    part.write((k, v), SeqInfo((7,)))
    bad = [
        (ShapeError, "packed", {"q": q[:3], "seq": SeqInfo((7,))}),
        (ShapeError, "packed", {"q": q[None], "seq": SeqInfo((7,))}),
        (ShapeError, r"rows 0 \.\.\. 1", {"seq": SeqInfo((7,), ids=(2,))}),
        (ShapeError, "have seen", {"seq": SeqInfo((7,), lengths_k=(9,))}),
        (ShapeError, "write first", {"seq": SeqInfo((7,), ids=(1,))}),
        (OptionError, "SeqInfo", {"seq": (7,)}),
        (OptionError, "attlas mask", {"seq": SeqInfo((7,)), "mask": torch.ones(7, 7, dtype=torch.bool)}),
        (OptionError, "score mod", {"seq": SeqInfo((7,)), "score_mod": lambda s: s}),
        (OptionError, "AuxRequest", {"seq": SeqInfo((7,)), "return_aux": True}),
        (UnsupportedError, "state", {"seq": SeqInfo((7,)), "return_aux": AuxRequest(state=True)}),
        (ValueError, "impl", {"seq": SeqInfo((7,)), "impl": "fastest"}),
        (ShapeError, "head", {"q": q[:, :5], "seq": SeqInfo((7,))}),
        (ShapeError, "head_dim", {"q": q[..., :3], "seq": SeqInfo((7,))}),
        (ShapeError, "sink", {"seq": SeqInfo((7,)), "sink": torch.zeros(HKV, dtype=dtype)}),
        (OptionError, "finite", {"seq": SeqInfo((7,)), "scale": float("nan")}),
        (ShapeError, "heads", {"seq": SeqInfo((7,)), "score_mod": Alibi.for_heads(H + 1)}),
    ]
    for kind, words, options in bad:
        with pytest.raises(kind, match=words):
            attention_cached(options.pop("q", q), part, **options)
    three = make_cache([PartSpec("kv", (("k", (HKV, D)), ("v", (HKV, D)), ("w", (1,))))], 1, 8, dtype=dtype).parts[0]
    three.write((k, k, torch.zeros(7, 1, dtype=dtype)), SeqInfo((7,)))
    with pytest.raises(ShapeError, match="3 tensors"):
        attention_cached(q, three, seq=SeqInfo((7,)))


def test_every_implementation_can_be_named():
    q, k, v = inputs(13)
    part = RingPart(spec(7), 1, dtype=torch.float64)
    part.write((k, v), SeqInfo((13,)))
    mask = Causal() & Window.last(7)
    want, _ = truth(q, k, v, mask)
    for impl in ("blocked", "reference"):
        assert (attention_cached(q, part, seq=SeqInfo((13,)), mask=mask, impl=impl) - want).abs().max() < 1e-12
    with pytest.raises(UnsupportedError):
        attention_cached(q, part, seq=SeqInfo((13,)), mask=mask, impl="sdpa")


def test_beam_search_and_speculation_over_every_layout():
    """Fork, reorder and truncate between steps give the sequences that their names promise."""
    mask = Causal() & Window.last(5)
    for layout, window in itertools.product(("contiguous", "paged"), (None, 5)):
        cache = make_cache([spec(window)], 3, 40, layout=layout, page_size=8, rollback=3, dtype=torch.float64)
        part = cache.parts[0]
        data = [[list(t) for t in inputs(12, seed)] for seed in range(3)]
        for row in range(3):
            stream(part, *(torch.stack(t) for t in data[row]), [12], row=row, mask=mask)
        cache.fork(0, 1)
        data[1] = [list(t) for t in data[0]]
        cache.reorder([2, 1, 1])
        data = [[list(t) for t in data[i]] for i in (2, 1, 1)]
        cache.truncate([12, 10, 12])
        data[1] = [t[:10] for t in data[1]]
        for row in range(3):
            fresh = inputs(3, 10 + row)
            for whole, more in zip(data[row], fresh, strict=True):
                whole.extend(more)
            q, k, v = (torch.stack(t) for t in data[row])
            out, _ = stream(part, q, k, v, [2, 1], row=row, mask=mask)
            assert (out - truth(q, k, v, mask)[0][-3:]).abs().max() < 1e-12
