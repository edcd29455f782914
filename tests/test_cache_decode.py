"""Batches of sequences over one part: ragged or in step, each gets what it would get alone."""

from __future__ import annotations

import pytest
import torch

from attlas.cache import ContiguousPart, PagedPart, PagePool, RingPart, make_cache
from attlas.kernels.cpu.library import load
from attlas.masks import Causal, Sinks, Window
from attlas.ops.cached import attention_cached
from attlas.scores import Alibi
from attlas.shapes import SeqInfo
from cache_streams import LSE, WINDOW, H, inputs, poison, spec, truth


@pytest.mark.parametrize("mask", [Causal(), Causal() & Window.last(WINDOW)], ids=["causal", "window"])
def test_ragged_over_pages_is_each_alone_over_contiguous_to_the_bit(mask):
    rows, lengths = (3, 0, 2), (37, 5, 18)
    data = [inputs(length + 9, seed, torch.float32) for seed, length in enumerate(lengths)]
    part = PagedPart(spec(), 5, PagePool(spec(), 17, 8, dtype=torch.float32))
    poison(part)
    done = [0, 0, 0]
    for counts in (lengths, (1, 1, 1), (1, 3, 1), (0, 1, 2), (1, 1, 1)):  # one prefill, then steps in which pages interleave
        seq = SeqInfo(counts, starts=tuple(done), ids=rows)
        pieces = [[t[a : a + n] for t in each] for each, a, n in zip(data, done, counts, strict=True)]
        q, k, v = (torch.cat([p[i] for p in pieces]) for i in range(3))
        part.write((k, v), seq)
        out, aux = attention_cached(q, part, seq=seq, mask=mask, return_aux=LSE)
        part.end_step()
        for i, (a, n) in enumerate(zip(done, counts, strict=True)):
            alone = ContiguousPart(spec(), 1, dtype=torch.float32)
            alone.write(tuple(t[: a + n] for t in data[i][1:]), SeqInfo((a + n,)))
            want, want_aux = attention_cached(
                data[i][0][a : a + n], alone, seq=SeqInfo((n,), starts=(a,)), mask=mask, return_aux=LSE
            )
            begin = sum(counts[:i])
            assert torch.equal(out[begin : begin + n], want)
            assert torch.equal(aux.lse[begin : begin + n], want_aux.lse)
        done = [a + n for a, n in zip(done, counts, strict=True)]
    assert len({part.pages(row)[0] for row in rows}) == 3


@pytest.mark.parametrize("window", [None, 7])
def test_rows_that_stand_alike_are_one_call(window, monkeypatch):
    mask = Causal() if window is None else Causal() & Window.last(window)
    part = make_cache([spec(window)], 5, 23, dtype=torch.float64).parts[0]
    data = [inputs(23, seed) for seed in range(5)]
    for begin, n in ((0, 13), (13, 1), (14, 1)):
        seq = SeqInfo((n,) * 3, starts=(begin,) * 3, ids=(1, 2, 3))
        q, k, v = (torch.cat([data[r][i][begin : begin + n] for r in (1, 2, 3)]) for i in range(3))
        part.write((k, v), seq)
        if begin:
            monkeypatch.setattr(type(part), "read", lambda *a: pytest.fail("a row was read alone"))
        out = attention_cached(q, part, seq=seq, mask=mask)
        part.end_step()
    monkeypatch.undo()
    for i, r in enumerate((1, 2, 3)):
        want, _ = truth(*(t[:15] for t in data[r]), mask)
        assert (out[i] - want[14]).abs().max() < 1e-12


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_a_ragged_step_is_one_kernel_call_that_copies_no_keys(layout, monkeypatch):
    """Sequences of any lengths and numbers of queries: nothing is gathered where the compiled core is installed."""
    lengths, counts = (29, 3, 18, 40), (1, 1, 2, 1)
    data = [inputs(n, i, torch.float32) for i, n in enumerate(lengths)]
    part = make_cache([spec()], 4, 48, layout=layout, page_size=8).parts[0]
    for row, (_, k, v) in enumerate(data):
        part.write((k, v), SeqInfo((len(k),), ids=(row,)))
    order = (2, 0, 3, 1)
    counts = tuple(counts[r] for r in order)
    q = torch.cat([data[r][0][-n:] for r, n in zip(order, counts, strict=True)])
    if load() is not None:
        for name in ("read", "read_dense"):
            monkeypatch.setattr(type(part), name, lambda *a: pytest.fail("keys were gathered"))
    for mask in (Causal(), Causal() & Window.last(7), Causal() & (Window.last(5) | Sinks(2))):
        out, aux = attention_cached(q, part, seq=SeqInfo(counts, ids=order), mask=mask, return_aux=LSE)
        for got, lse, r, n in zip(out.split(counts), aux.lse.split(counts), order, counts, strict=True):
            want, want_lse = truth(*(t.double() for t in data[r]), mask)
            assert (got - want[-n:]).abs().max() < 5e-6 and (lse - want_lse[-n:]).abs().max() < 5e-6


def test_a_row_with_a_chunk_aside_does_not_change_how_others_are_read(monkeypatch):
    """Bits may depend on the way a sequence is read, so the way must not depend on its neighbours."""
    mask, counts = Causal() & Window.last(11), (5, 5)
    data = [inputs(14, i, torch.float32) for i in range(2)]
    part, alone = (RingPart(spec(11), 2, dtype=torch.float32) for _ in range(2))
    for p in (part, alone):
        for row, start in ((0, 9), (1, 2)):  # five more tokens fit into row 1 only
            p.write(tuple(t[:start] for t in data[row][1:]), SeqInfo((start,), ids=(row,)))
        p.end_step()
    q, k, v = (torch.cat([data[0][i][9:14], data[1][i][2:7]]) for i in range(3))
    part.write((k, v), SeqInfo(counts))
    alone.write((k[5:], v[5:]), SeqInfo((5,), ids=(1,)))
    read, plain = [], RingPart.read
    monkeypatch.setattr(RingPart, "read", lambda self, row, span=None: read.append(row) or plain(self, row, span))
    out = attention_cached(q, part, seq=SeqInfo(counts), mask=mask)
    assert read == ([0] if load() is not None else [0, 1])
    assert torch.equal(out[5:], attention_cached(q[5:], alone, seq=SeqInfo((5,), ids=(1,)), mask=mask))
    for got, each, start in zip(out.split(5), data, (9, 2), strict=True):
        want, _ = truth(*(t[: start + 5].double() for t in each), mask)
        assert (got - want[start:]).abs().max() < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_queries_may_stand_before_the_last_token(dtype):
    q, k, v = (t.to(dtype) for t in inputs(23))
    part = make_cache([spec()], 1, 23, dtype=dtype).parts[0]
    part.write((k, v), SeqInfo((23,)))
    for mask in (Causal(), Causal() & Window.last(4)):
        out = attention_cached(q[7:10], part, seq=SeqInfo((3,), starts=(7,)), mask=mask)
        assert (out - truth(q.double(), k.double(), v.double(), mask)[0][7:10]).abs().max() < 5e-6


def test_queries_of_different_positions_over_equal_memories_are_not_mixed_up():
    """Cross-attention with a position bias: the rows' views are alike, the queries stand elsewhere."""
    data = [inputs(9, seed) for seed in range(3)]
    part = make_cache([spec()], 3, 9, dtype=torch.float64).parts[0]
    part.write((torch.cat([d[1] for d in data]), torch.cat([d[2] for d in data])), SeqInfo((9,) * 3))
    q, mod = inputs(6, 7)[0], Alibi.for_heads(H)
    out = attention_cached(q, part, seq=SeqInfo((2,) * 3, starts=(4, 30, 4)), score_mod=mod)
    for got, own, row, start in zip(out.split(2), q.split(2), range(3), (4, 30, 4), strict=True):
        alone = make_cache([spec()], 1, 9, dtype=torch.float64).parts[0]
        alone.write(data[row][1:], SeqInfo((9,)))
        assert (got - attention_cached(own, alone, seq=SeqInfo((2,), starts=(start,)), score_mod=mod)).abs().max() < 1e-12
    assert (out[:2] - out[2:4]).abs().max() > 1e-3
