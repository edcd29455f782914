"""Pages of 8-bit numbers: how far a read may be from what was written, and what attention over them may lose."""

from __future__ import annotations

import pytest
import torch

from attlas.cache import PagedPart, PagePool, PartSpec
from attlas.cache.store import QuantisedStore, make_store
from attlas.errors import OptionError
from attlas.masks import Causal, Window
from attlas.ops.cached import attention_cached
from attlas.shapes import SeqInfo
from cache_streams import DV, HKV, D, H, inputs, spec, truth

EIGHT_BIT = ("int8", "fp8")
WIDE = PartSpec("kv", (("k", (3, 37)), ("v", (2, 41))))


def store(kv_dtype: str, pages: int = 5, dtype: torch.dtype = torch.float32, of: PartSpec = WIDE) -> QuantisedStore:
    made = make_store(of, pages, 8, dtype, torch.device("cpu"), kv_dtype)
    assert isinstance(made, QuantisedStore)
    return made


def bound(x: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """What the docstring promises, and the rounding of the fp32 arithmetic."""
    scale = x.abs().amax(-1, keepdim=True) / (127 if kv_dtype == "int8" else 448)
    promised = scale / 2 if kv_dtype == "int8" else torch.maximum(x.abs() / 16, scale / 1024)
    return promised * (1 + 1e-5) + x.abs() * 1e-6


def tokens(n: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Heads and tokens of very different sizes, and some that are zero."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for _, shape in WIDE.tensors:
        x = torch.randn(n, *shape, generator=g) * 10.0 ** torch.randint(-6, 5, (n, shape[0], 1), generator=g)
        x[n // 2] = 0
        out.append(x)
    return tuple(out)


@pytest.mark.parametrize("kv_dtype", EIGHT_BIT)
def test_what_is_read_is_within_the_promised_error(kv_dtype):
    s, new = store(kv_dtype), tokens(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    s.put(order, new)
    read = [t[order] for t in s.gather(torch.arange(5), 0)]
    for x, y in zip(new, read, strict=True):
        assert ((x - y).abs() <= bound(x, kv_dtype)).all()
        assert (y[20] == 0).all() and (x - y).abs().max() > 0
        assert torch.equal(y.abs().amax(-1) > 0, x.abs().amax(-1) > 0)


@pytest.mark.parametrize("kv_dtype", EIGHT_BIT)
def test_a_token_is_stored_the_same_in_any_company(kv_dtype):
    new = tokens(16)
    together, alone = store(kv_dtype), store(kv_dtype)
    together.put(torch.arange(16), new)
    for i in reversed(range(16)):
        alone.put(torch.tensor([i]), tuple(t[i : i + 1] for t in new))
    for a, b in zip(together.tensors, alone.tensors, strict=True):
        assert torch.equal(a[:2], b[:2])


@pytest.mark.parametrize("kv_dtype", EIGHT_BIT)
def test_a_number_that_is_not_finite_spoils_its_own_head_only(kv_dtype):
    s, (k, v) = store(kv_dtype), tokens(8)
    k[3, 1, 7], v[5, 0, 0] = float("inf"), float("nan")
    s.put(torch.arange(8), (k, v))
    read_k, read_v = s.gather(torch.tensor([0]))
    assert read_k[3, 1].isnan().all() and read_v[5, 0].isnan().all()
    assert read_k.isnan().sum() == 37 and read_v.isnan().sum() == 41


@pytest.mark.parametrize("kv_dtype", EIGHT_BIT)
def test_a_table_is_the_storage_itself(kv_dtype):
    """Number times scale is what a read gives; nothing is copied."""
    s, new = store(kv_dtype), tokens(40)
    s.put(torch.arange(40), new)
    where = torch.tensor([[3, 1, -1], [1, 4, 3]], dtype=torch.int32)
    table = s.table(where)
    assert table.block_table is where and [t.data_ptr() for t in table.tensors] == [t.data_ptr() for t in s.tensors[:2]]
    for code, scale, read in zip(table.tensors, table.scales, s.gather(torch.arange(5), 0), strict=True):
        assert torch.equal((code.float() * scale[..., None]).flatten(0, 1), read)


def test_bytes_are_one_a_number_and_four_a_head():
    plain = make_store(WIDE, 5, 8, torch.bfloat16, torch.device("cpu"), None)
    for kv_dtype in EIGHT_BIT:
        s = store(kv_dtype, dtype=torch.bfloat16)
        assert s.page_bytes == 8 * (3 * 37 + 2 * 41 + 4 * 5) and s.nbytes() == 5 * s.page_bytes < plain.nbytes()
    own = PartSpec("kv", WIDE.tensors, dtype=torch.float64)  # a part that asks for its own precision gets it
    assert make_store(own, 1, 8, torch.float64, torch.device("cpu"), "int8").nbytes() == 8 * 193 * 8
    with pytest.raises(OptionError, match="did you mean 'int8'"):
        make_store(WIDE, 1, 8, torch.float32, torch.device("cpu"), "int4")


def softmax_bound(q, k, v, k_error, v_error) -> torch.Tensor:
    """|sum p' v' - sum p v| <= max |v' - v| + (exp(2 d) - 1) max |v|: a score is off by at most d = |q| |k' - k| / sqrt(D)."""
    d = (q.norm(dim=-1).amax() * k_error.norm(dim=-1).amax()) * D**-0.5
    return v_error.max() + torch.expm1(2 * d) * v.abs().max()


@pytest.mark.parametrize("kv_dtype", EIGHT_BIT)
@pytest.mark.parametrize("window", [None, 11])
def test_attention_over_eight_bits_is_attention_over_what_is_read(kv_dtype, window):
    """Prefill, decode of several rows in one step, windows: equal to plain attention over the dequantised keys and values, and as
    near to that over the true ones as the error of the store allows."""
    mask = Causal() if window is None else Causal() & Window.last(window)
    part = PagedPart(spec(window), 3, PagePool(spec(window), 40, 8, dtype=torch.float32, kv_dtype=kv_dtype))
    data = [inputs(23 + row, row, torch.float32) for row in range(3)]
    outs = [[] for _ in data]
    seq = SeqInfo(tuple(19 + row for row in range(3)), ids=(0, 1, 2))
    steps = [seq] + [SeqInfo((1, 1, 1), ids=(0, 1, 2))] * 4
    for step in steps:
        at = part.lengths
        spans = [slice(at[r], at[r] + n) for r, n in zip(step.rows, step.lengths, strict=True)]
        q, k, v = (torch.cat([data[r][i][s] for r, s in zip(step.rows, spans, strict=True)]) for i in range(3))
        part.write((k, v), step)
        for out, new in zip(outs, attention_cached(q, part, seq=step, mask=mask).split(step.lengths), strict=True):
            out.append(new)
        part.end_step()
    for row, (q, k, v) in enumerate(data):
        n = len(q)
        whole = PagedPart(spec(), 1, PagePool(spec(), None, 8, dtype=torch.float32, kv_dtype=kv_dtype))
        whole.write((k, v), SeqInfo((n,)))
        k_read, v_read = whole.read(0).tensors
        got = torch.cat(outs[row])
        assert (got - truth(q, k_read, v_read, mask)[0]).abs().max() < 1e-5
        exact = truth(q, k, v, mask)[0]
        error = (got - exact).abs().max()
        assert 0 < error <= softmax_bound(q, k, v, k_read - k, v_read - v)
        assert k_read.shape == (n, HKV, D) and v_read.shape == (n, HKV, DV) and got.shape == (n, H, DV)


@pytest.mark.parametrize("kv_dtype", EIGHT_BIT)
def test_quantised_rows_fork_defragment_and_save(kv_dtype):
    part = PagedPart(WIDE, 2, PagePool(WIDE, 12, 8, dtype=torch.float32, kv_dtype=kv_dtype))
    new = tokens(21)
    part.write(new, SeqInfo((21,)))
    held = [t.clone() for t in part.read(0).tensors]
    part.fork(0, 1)
    part.write(tuple(t[:1] for t in new), SeqInfo((1,), ids=(1,)))
    assert all(torch.equal(a, b) for a, b in zip(part.read(0).tensors, held, strict=True))
    part.reset([1])
    part.defragment()
    assert all(torch.equal(a, b) for a, b in zip(part.read(0).tensors, held, strict=True))
    other = PagedPart(WIDE, 2, PagePool(WIDE, None, 8, dtype=torch.float32, kv_dtype=kv_dtype))
    other.load(part.save())
    for a, b in zip(other.read(0).tensors, held, strict=True):
        assert ((a - b).abs() <= bound(b, kv_dtype) * 0.1 + 1e-12).all()  # what was rounded once is (nearly) on the grid
