"""Split-KV decode over 8-bit keys and values: attention over number times scale, without the numbers being written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attlas.cache import PagedPart, PagePool, PartSpec
from attlas.kernels.cpu import launch
from attlas.kernels.cpu.library import ISA, status
from attlas.masks import Causal
from attlas.ops.cached import attention_cached
from attlas.shapes import SeqInfo
from test_cpu_decode import BANDS, LENGTHS, VISIBLE, exact, paged

CODES = (torch.int8, torch.float8_e4m3fn)
CAPACITY = 1100


def stored(heads: int, dim: int, code: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers of every size that occurs, [3, CAPACITY, heads, dim], and scales; garbage behind the end of each sequence."""
    if code == torch.int8:
        numbers = torch.randint(-127, 128, (3, CAPACITY, heads, dim)).to(code)
    else:
        numbers = (torch.randn(3, CAPACITY, heads, dim) * 10.0 ** torch.randint(-4, 3, (dim,))).clamp(-448, 448).to(code)
    scales = torch.rand(3, CAPACITY, heads) * 3 / numbers.float().abs().amax()
    for b, n in enumerate(LENGTHS):
        scales[b, n:] = float("nan")
    return numbers, scales


def scattered(numbers: Tensor, scales: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    pages, table = paged(numbers.float().nan_to_num(), page)
    return pages.nan_to_num().to(numbers.dtype), paged(scales[..., None], page)[0].squeeze(-1), table


@pytest.mark.parametrize("name", VISIBLE)
@pytest.mark.parametrize("sizes", [(1, 8, 2, 32, 32), (3, 6, 3, 40, 72), (7, 5, 1, 33, 17), (1, 3, 3, 128, 64), (5, 2, 2, 16, 8)])
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("code", CODES)
def test_it_is_attention_over_number_times_scale(name: str, sizes: tuple[int, ...], isa: str, code: torch.dtype) -> None:
    if ISA[isa] > ISA[status()]:
        isa = "auto"
    seen, (tq, heads, kv_heads, dim, dim_v) = VISIBLE[name], sizes
    torch.manual_seed(sum(sizes))
    (k, ks), (v, vs) = stored(kv_heads, dim, code), stored(kv_heads, dim_v, code)
    (kp, kps, table), (vp, vps, _) = scattered(k, ks, 16), scattered(v, vs, 16)
    wide_k, wide_v = k.float() * ks[..., None], v.float() * vs[..., None]
    sink, alibi = torch.randn(heads), torch.rand(heads)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q = torch.randn(3, tq, heads, dim).to(dtype)
        for extra in ({}, {"alibi": alibi}, {"softcap": 2.0, "sink": sink}):
            out, lse = launch.decode(q, k, v, LENGTHS, seen, dim**-0.5, isa=isa, scales=(ks, vs), **extra)  # type: ignore[arg-type]
            same = launch.decode(q, kp, vp, LENGTHS, seen, dim**-0.5, block_table=table, isa=isa, scales=(kps, vps), **extra)  # type: ignore[arg-type]
            assert torch.equal(out, same[0]) and torch.equal(lse, same[1])
            assert out.dtype == dtype and not out.isnan().any()
            for b, n in enumerate(LENGTHS):
                row = q[b].float(), wide_k[b], wide_v[b], n, seen
                want, want_lse = exact(*row, torch.float64, **extra)  # type: ignore[arg-type]
                error = (out[b] - want).abs().max() / want.abs().max()
                if dtype == torch.float32:
                    assert error < 1e-5
                    assert (lse[b] - want_lse).abs().max() < 2e-5
                else:
                    naive = (exact(q[b], *(t.to(dtype) for t in row[1:3]), n, seen, dtype, **extra)[0] - want).abs().max()  # type: ignore[arg-type]
                    assert error * want.abs().max() <= 2 * naive + BANDS[dtype], (dtype, extra.keys(), b)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tq", [1, 2, 7])
def test_a_sequence_is_the_same_to_the_bit_in_any_company(code: torch.dtype, dtype: torch.dtype, tq: int) -> None:
    torch.manual_seed(3)
    (k, ks), (v, vs) = stored(2, 24, code), stored(2, 40, code)
    q = torch.randn(3, tq, 6, 24).to(dtype)
    (kp, kps, table), (vp, vps, _) = scattered(k, ks, 8), scattered(v, vs, 8)
    together, lse = launch.decode(q, kp, vp, LENGTHS, launch.Visible(), 0.2, block_table=table, scales=(kps, vps))
    before = torch.get_num_threads()
    for b, n in enumerate(LENGTHS):
        torch.set_num_threads(1 + b)
        own = slice(b, b + 1)
        alone, alone_lse = launch.decode(q[own], k[own], v[own], (n,), launch.Visible(), 0.2, scales=(ks[own], vs[own]))
        assert torch.equal(together[b], alone[0]) and torch.equal(lse[b], alone_lse[0])
    torch.set_num_threads(before)


@pytest.mark.parametrize("tq", [2, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_head_and_behind_the_mask(tq: int, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    (k, ks), (v, vs) = stored(2, 16, torch.int8), stored(2, 16, torch.int8)
    q, n = torch.randn(1, tq, 4, 16).to(dtype), 50
    k, ks, v, vs = k[:1], ks[:1], v[:1], vs[:1]
    clean, _ = launch.decode(q, k, v, (n,), launch.Visible(), 0.25, scales=(ks, vs))
    spoiled = vs.clone()
    spoiled[0, n - 1, 1] = float("nan")
    dirty, _ = launch.decode(q, k, v, (n,), launch.Visible(), 0.25, scales=(ks, spoiled))
    assert torch.equal(dirty[:, :, :2], clean[:, :, :2])  # another key/value head
    assert torch.allclose(dirty[:, :-1].float(), clean[:, :-1].float(), atol=1e-2) and dirty[:, -1, 2:].isnan().all()
    spoiled = ks.clone()
    spoiled[0, n - 1, 1] = float("nan")
    dirty, lse = launch.decode(q, k, v, (n,), launch.Visible(), 0.25, scales=(spoiled, vs))
    assert torch.allclose(dirty[:, :-1].float(), clean[:, :-1].float(), atol=1e-2)
    assert dirty[:, -1, 2:].isnan().all() and lse[:, -1, 2:].isnan().all()


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_pages_are_read_without_a_copy(kv_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode over a quantised part never asks it for dequantised tokens."""
    spec = PartSpec("kv", (("k", (2, 16)), ("v", (2, 24))))
    part = PagedPart(spec, 2, PagePool(spec, 20, 8, dtype=torch.bfloat16, kv_dtype=kv_dtype))  # type: ignore[arg-type]
    torch.manual_seed(6)
    seq = SeqInfo((37, 61))
    part.write((torch.randn(98, 2, 16), torch.randn(98, 2, 24)), seq)
    held = [part.read(row).tensors for row in range(2)]
    monkeypatch.setattr(type(part.pool.store), "_pick", None)
    q = torch.randn(2, 6, 16)
    got = attention_cached(q, part, seq=SeqInfo((1, 1)), mask=Causal())
    for row, (k, v) in enumerate(held):
        s = torch.einsum("hd,thd->ht", q[row] / math.sqrt(16), k.float().repeat_interleave(3, 1))
        want = torch.einsum("ht,thd->hd", s.softmax(-1), v.float().repeat_interleave(3, 1))
        assert torch.allclose(got[row], want, atol=5e-2)
