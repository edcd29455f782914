"""Split-KV decode of the compiled core against brute force in fp64: contiguous and paged caches, windows, sinks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attlas.kernels.cpu import attention as cpu
from attlas.kernels.cpu import launch
from attlas.kernels.cpu.library import ISA, load, status
from attlas.masks import All, Causal, Grid, Mask, Sinks, Window
from attlas.ops.merge import merge

BANDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LENGTHS = (1031, 7, 517)


def exact(
    q: Tensor, k: Tensor, v: Tensor, n: int, seen: launch.Visible, dtype: torch.dtype, **extra: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """One sequence by the definition: q [Tq, H, D], k, v [capacity, Hkv, .] of which n are used."""
    tq, heads, dim = q.shape
    group = heads // k.shape[1]
    q, k, v = (t.to(dtype).transpose(0, 1) for t in (q, k[:n], v[:n]))
    s = q @ k.repeat_interleave(group, 0).mT / math.sqrt(dim)
    q_pos, k_pos = torch.arange(n - tq, n)[:, None], torch.arange(n)
    if extra.get("softcap"):
        s = extra["softcap"] * torch.tanh(s / extra["softcap"])
    if extra.get("alibi") is not None:
        s = s - extra["alibi"][:, None, None].to(dtype) * (q_pos - k_pos).abs()  # type: ignore[index, union-attr]
    ok = torch.ones(tq, n, dtype=torch.bool)
    if seen.causal:
        ok &= k_pos <= q_pos
    if seen.left is not None:
        ok &= (q_pos - k_pos <= seen.left) | ((k_pos < seen.sinks) & (k_pos <= q_pos))
    s = s.masked_fill(~ok, -math.inf)
    v = v.repeat_interleave(group, 0)
    if extra.get("sink") is not None:
        s = torch.cat([s, extra["sink"].to(dtype)[:, None, None].expand(heads, tq, 1)], -1)  # type: ignore[union-attr]
        v = torch.cat([v, v.new_zeros(heads, 1, v.shape[-1])], 1)
    return (s.softmax(-1) @ v).transpose(0, 1), s.logsumexp(-1).T


def paged(x: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """The rows of x [B, n, H, D] scattered over pages in random order; unused memory is NaN."""
    b, n = x.shape[:2]
    blocks = -(-n // page)
    torch.manual_seed(5)
    order = torch.randperm(b * blocks + 3)[: b * blocks]
    pages = x.new_full((b * blocks + 3, page, *x.shape[2:]), float("nan"))
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, blocks * page - n), value=float("nan"))
    pages[order] = padded.reshape(b * blocks, page, *x.shape[2:])
    return pages, order.view(b, blocks).int()


VISIBLE = {
    "causal": launch.Visible(),
    "all": launch.Visible(causal=False),
    "window": launch.Visible(left=61),
    "window and sinks": launch.Visible(left=200, sinks=5),
    "wide sinks": launch.Visible(left=3, sinks=131),
}


@pytest.mark.parametrize("name", VISIBLE)
@pytest.mark.parametrize("sizes", [(1, 8, 2, 32, 32), (3, 6, 3, 40, 72), (7, 5, 1, 33, 17), (1, 3, 3, 128, 64), (5, 2, 2, 16, 8)])
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_decode_follows_the_definition(name: str, sizes: tuple[int, ...], isa: str) -> None:
    assert load() is not None, status()
    if ISA[isa] > ISA[status()]:
        isa = "auto"
    seen, (tq, heads, kv_heads, dim, dim_v) = VISIBLE[name], sizes
    torch.manual_seed(sum(sizes))
    sink, alibi = torch.randn(heads), torch.rand(heads)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q = torch.randn(3, tq, heads, dim).to(dtype)
        k, v = torch.randn(3, 1100, kv_heads, dim).to(dtype), torch.randn(3, 1100, kv_heads, dim_v).to(dtype)
        for b, n in enumerate(LENGTHS):
            k[b, n:], v[b, n:] = float("nan"), float("inf")
        (kp, table), (vp, _) = paged(k, 16), paged(v, 16)
        for extra in ({}, {"sink": sink}, {"alibi": alibi}, {"softcap": 2.0, "sink": sink}):
            scale = 1 / math.sqrt(dim)
            out, lse = launch.decode(q, k, v, LENGTHS, seen, scale, isa=isa, **extra)  # type: ignore[arg-type]
            same = launch.decode(q, kp, vp, LENGTHS, seen, scale, block_table=table, isa=isa, **extra)  # type: ignore[arg-type]
            assert torch.equal(out, same[0]) and torch.equal(lse, same[1])
            for b, n in enumerate(LENGTHS):
                want, want_lse = exact(q[b], k[b], v[b], n, seen, torch.float64, **extra)  # type: ignore[arg-type]
                naive, _ = exact(q[b], k[b], v[b], n, seen, dtype, **extra)  # type: ignore[arg-type]
                error, budget = (out[b] - want).abs().max(), 2 * (naive - want).abs().max() + BANDS[dtype]
                assert error <= budget, (dtype, extra.keys(), b, error, budget)
                assert (lse[b] - want_lse).abs().max() < 2e-5


@pytest.mark.parametrize("page", [8, 32, 256])
def test_page_sizes_and_batch_invariance(page: int) -> None:
    torch.manual_seed(page)
    q, k, v = torch.randn(3, 2, 8, 24), torch.randn(3, 1031, 2, 24), torch.randn(3, 1031, 2, 24)
    (kp, table), (vp, _) = paged(k, page), paged(v, page)
    together, lse = launch.decode(q, kp, vp, LENGTHS, launch.Visible(), 0.2, block_table=table)
    before = torch.get_num_threads()
    for b, n in enumerate(LENGTHS):
        torch.set_num_threads(1 + b)
        alone, alone_lse = launch.decode(q[b : b + 1], k[b : b + 1], v[b : b + 1], (n,), launch.Visible(), 0.2)
        assert torch.equal(together[b], alone[0]) and torch.equal(lse[b], alone_lse[0])
    torch.set_num_threads(before)


def test_garbage_in_a_key_of_the_future_of_a_chunk() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(1, t, 2, 16).to(dtype) for t in (4, 50, 50))
        clean, _ = launch.decode(q, k, v, (50,), launch.Visible(), 0.25)
        k[:, 49], v[:, 49] = float("nan"), float("nan")
        dirty, _ = launch.decode(q, k, v, (50,), launch.Visible(), 0.25)
        assert torch.allclose(dirty[:, :3].float(), clean[:, :3].float(), atol=1e-2) and dirty[:, 3].isnan().all()


def test_empty_cache_and_sink_only() -> None:
    q, k = torch.randn(2, 0, 4, 8), torch.randn(2, 5, 2, 8)
    assert launch.decode(q, k, k, (5, 5), launch.Visible(), 1.0)[0].shape == (2, 0, 4, 8)
    one, sink = torch.randn(2, 1, 4, 8), torch.randn(4)
    out, lse = launch.decode(one, k, k, (0, 5), launch.Visible(causal=False), 1.0)
    assert (out[0] == 0).all() and lse[0].eq(-math.inf).all() and lse[1].isfinite().all()
    out, lse = launch.decode(one, k, k, (0, 5), launch.Visible(causal=False), 1.0, sink=sink)
    assert (out[0] == 0).all() and torch.allclose(lse[0, 0], sink)


@pytest.mark.parametrize(
    "mask, expected",
    [
        (None, launch.Visible(causal=False)),
        (All(), launch.Visible(causal=False)),
        (Causal(), launch.Visible()),
        (Causal(align="start"), None),
        (Causal() & Window.last(5), launch.Visible(left=4)),
        (Causal() & Window(4, 4), launch.Visible(left=4)),
        ((Causal() & Window.last(5)) | Sinks(2), launch.Visible(left=4, sinks=2)),
        (Causal() & (Window(4, None) | Sinks(2)), launch.Visible(left=4, sinks=2)),
        (Window(4, 3), None),
        (Sinks(3), None),
        (Window(4, None), launch.Visible(causal=False, left=4)),
    ],
)
def test_masks_become_windows(mask: Mask | None, expected: launch.Visible | None) -> None:
    assert cpu.visible(mask) == expected
    if expected is None or mask is None:
        return
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 3, 4, 8), torch.randn(1, 41, 2, 8), torch.randn(1, 41, 2, 8)
    grid = Grid.dense(3, 41)
    got, lse = cpu.attention(q, k, v, mask=mask, grid=grid, score_mod=None, scale=0.3, sink=None, needs_grad=False)
    want, want_lse = cpu.attention(q, k, v, mask=mask, grid=grid, score_mod=None, scale=0.3, sink=None, needs_grad=True)
    assert torch.allclose(got, want, atol=2e-6) and torch.allclose(lse, want_lse, atol=2e-6)


def test_a_shared_prefix_and_own_tails_merge_to_the_whole() -> None:
    torch.manual_seed(2)
    prefix, tails, heads = 97, (3, 41), 4
    q = torch.randn(2, 1, heads, 16)
    kp, vp = torch.randn(1, prefix, 2, 16), torch.randn(1, prefix, 2, 16)
    kt, vt = torch.randn(2, 41, 2, 16), torch.randn(2, 41, 2, 16)
    # every query is a row over the one prefix: it is read once for all of them
    shared = launch.decode(q.transpose(0, 1), kp, vp, (prefix,), launch.Visible(causal=False), 0.25)
    own = launch.decode(q, kt, vt, tails, launch.Visible(), 0.25)
    out, lse = merge([(shared[0].transpose(0, 1), shared[1].transpose(0, 1)), own])
    for b, n in enumerate(tails):
        k, v = (torch.cat([p[0], t[b, :n]])[None] for p, t in ((kp, kt), (vp, vt)))
        whole, whole_lse = launch.decode(q[b : b + 1], k, v, (prefix + n,), launch.Visible(), 0.25)
        assert torch.allclose(out[b], whole[0], atol=2e-6) and torch.allclose(lse[b], whole_lse[0], atol=2e-6)
