"""Shared-prefix decode: pages that all rows share are read once, and the results are those of every row alone."""

from __future__ import annotations

import pytest
import torch

from attlas.cache import PagedPart, PagePool, PartSpec
from attlas.kernels.cpu.library import load
from attlas.masks import Causal, Sinks, Window
from attlas.ops import attention_cached, decode
from attlas.scores import Alibi, Softcap
from attlas.shapes import AuxRequest, SeqInfo

PAGE, SHARED, ROWS = 16, 304, 5
TAILS = (3, 31, 1, 17, 40)


def shared_rows(dtype: torch.dtype = torch.float32) -> PagedPart:
    """Rows with one prefix in common (19 pages) and tails of their own."""
    g = torch.Generator().manual_seed(3)
    spec = PartSpec("kv", (("k", (2, 24)), ("v", (2, 20))))
    part = PagedPart(spec, ROWS, PagePool(spec, 64, PAGE, dtype=dtype))

    def tokens(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(n, 2, 24, generator=g).to(dtype), torch.randn(n, 2, 20, generator=g).to(dtype)

    part.write(tokens(SHARED), SeqInfo((SHARED,), ids=(0,)))
    for row in range(1, ROWS):
        part.fork(0, row)
    for row, n in enumerate(TAILS):
        part.write(tokens(n), SeqInfo((n,), ids=(row,)))
    return part


def queries(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(ROWS * n, 6, 24, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("score_mod", [None, Softcap(3.0)])
@pytest.mark.parametrize("sunk", [False, True])
def test_results_are_those_of_each_row_alone(n, score_mod, sunk):
    part = shared_rows()
    rows = tuple(r for r in range(ROWS) if TAILS[r] >= n)
    q = queries(n)[: len(rows) * n]
    sink = torch.linspace(-1, 1, 6) if sunk else None
    seq = SeqInfo((n,) * len(rows), ids=rows)
    call = {"seq": seq, "mask": Causal(), "score_mod": score_mod, "sink": sink, "return_aux": AuxRequest(lse=True)}
    want, want_aux = attention_cached(q.double(), part, **call)
    part.cascade = True
    got, aux = attention_cached(q, part, **call)
    assert (got - want).abs().max() < 3e-6 and (aux.lse - want_aux.lse).abs().max() < 3e-6


def test_it_runs_where_it_says_so(monkeypatch):
    """Liveness: the flag changes how the prefix is read, and rules that tell tokens of the prefix apart do not cascade."""
    if load() is None:  # without the compiled core nothing reads pages in place, and the flag has nothing to change
        assert decode.rule_for(queries(1), mask=Causal(), score_mod=None, scale=None, sink=None, impl="auto") is None
        return
    from attlas.ops import reader

    calls = []
    plain = reader.cascade_pages
    monkeypatch.setattr(reader, "cascade_pages", lambda *a: calls.append(a[-1]) or plain(*a))
    part, q, seq = shared_rows(), queries(1), SeqInfo((1,) * ROWS)
    attention_cached(q, part, seq=seq, mask=Causal())
    assert calls == []
    part.cascade = True
    attention_cached(q, part, seq=seq, mask=Causal())
    assert calls == [SHARED]
    for mask in (Causal() & Window.last(50), Causal() & (Window.last(9) | Sinks(4))):
        attention_cached(q, part, seq=seq, mask=mask)
    attention_cached(q, part, seq=seq, mask=Causal(), score_mod=Alibi.for_heads(6))
    attention_cached(q[:1], part, seq=SeqInfo((1,), ids=(2,)), mask=Causal())
    assert calls == [SHARED]


def test_bf16_stays_in_the_budget():
    part, exact = shared_rows(torch.bfloat16), shared_rows(torch.bfloat16)
    q, seq = queries(1, torch.bfloat16), SeqInfo((1,) * ROWS)
    want = attention_cached(q.double(), exact, seq=seq, mask=Causal())
    naive = attention_cached(q, exact, seq=seq, mask=Causal(), impl="reference")
    part.cascade = True
    got = attention_cached(q, part, seq=seq, mask=Causal())
    assert (got - want).abs().max() <= 2 * (naive - want).abs().max() + 2**-8 * want.abs().max()
