"""The compiled CPU core against brute force in fp64: forward, backward, masks, score modifications, edges."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor

from attlas.kernels.cpu import attention as cpu
from attlas.kernels.cpu import launch, torch_ops
from attlas.kernels.cpu.library import ISA, load, status
from attlas.masks import Blocks, Causal, Dense, Documents, Grid, Mask, Padding, PerHead, Sinks, Window
from attlas.reference import softmax as reference
from attlas.scores import Alibi, RelativeBias, Softcap
from attlas.shapes import SeqInfo

BANDS = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def needs_core() -> None:
    assert load() is not None, f"build the core first: {status()}"


def isas() -> list[str]:
    best = ISA.get(status(), 0)
    return [name for name, level in ISA.items() if 0 < level <= best]


def inputs(B: int, Tq: int, Tk: int, H: int, Hkv: int, D: int, Dv: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(B + Tq + Tk + H + D)
    shapes = ((B, Tq, H, D), (B, Tk, Hkv, D), (B, Tk, Hkv, Dv), (B, Tq, H, Dv))
    return [torch.randn(s).to(dtype) for s in shapes]


def truth(q, k, v, mask=None, grid=None, score_mod=None, scale=None, sink=None, dtype=torch.float64):  # type: ignore[no-untyped-def]
    grid = grid or Grid.dense(q.shape[1], k.shape[1])
    return reference.attention(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        mask_bool=None if mask is None else mask.dense(grid),
        score_mod=score_mod,
        q_pos=grid.q.positions(),
        k_pos=grid.k.positions(),
        scale=scale if scale is not None else 1 / math.sqrt(q.shape[-1]),
        sink=sink,
    )


def run(q, k, v, mask=None, grid=None, score_mod=None, scale=None, sink=None, needs_grad=True):  # type: ignore[no-untyped-def]
    grid = grid or Grid.dense(q.shape[1], k.shape[1])
    scale = scale if scale is not None else 1 / math.sqrt(q.shape[-1])
    assert cpu.unsupported(q, k, v, mask=mask, grid=grid, score_mod=score_mod, needs_grad=needs_grad) is None
    return cpu.attention(q, k, v, mask=mask, grid=grid, score_mod=score_mod, scale=scale, sink=sink, needs_grad=needs_grad)


def within_budget(got: Tensor, naive: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    size = exact.abs().max().item() if exact.numel() else 0.0
    error, allowed = (got - exact).abs().max().item(), 2 * (naive - exact).abs().max().item() + BANDS[dtype] * max(1.0, size)
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


MASKS: dict[str, Mask | None] = {
    "all": None,
    "causal": Causal(),
    "start": Causal(align="start"),
    "window": Causal() & Window.last(37),
    "both sides": Window(29, 17),
    "sinks": (Causal() & Window.last(41)) | Sinks(3),
    "documents": Documents((61, 7, 149)) & Causal(),
    "blocks": Blocks(((1, 0, 1, 1), (0, 0, 0, 0), (1, 1, 1, 0)), 89),
    "heads": PerHead((Causal(), Window(5, 5), Causal() & Window.last(2), Window(0, 0), Causal(), Window(3, None))),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_gradients_follow_the_definition(name: str, dtype: torch.dtype) -> None:
    needs_core()
    mask = MASKS[name]
    q, k, v, g = inputs(2, 223, 263, 6, 2, 37, 53, dtype)
    dlse = torch.randn(2, 223, 6)

    def all_of(function, kind):  # type: ignore[no-untyped-def]
        leaves = [t.detach().clone().to(kind).requires_grad_() for t in (q, k, v)]
        out, lse = function(*leaves, mask=mask)
        ((out * g.to(out.dtype)).sum().to(lse.dtype) + (lse.masked_fill(lse.isinf(), 0) * dlse).sum()).backward()
        return [out.detach(), *(t.grad for t in leaves)], lse.detach()

    got, lse = all_of(run, dtype)
    exact, exact_lse = all_of(truth, torch.float64)
    naive, _ = all_of(lambda *a, mask: truth(*a, mask=mask, dtype=dtype), dtype)
    for x, n, e in zip(got, naive, exact, strict=True):
        assert x.dtype == dtype
        within_budget(x, n, e, dtype)
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    assert (lse - exact_lse).masked_fill(exact_lse.isinf(), 0).abs().max() < 1e-4


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_of_this_machine(isa: str, dtype: torch.dtype) -> None:
    needs_core()
    if isa not in isas():
        with pytest.raises(ValueError, match="no kernels"):
            launch.forward(*inputs(1, 3, 5, 2, 1, 8, 8)[:3], None, launch.Mods(), 1.0, isa=isa)
        return
    q, k, v, g = inputs(1, 101, 139, 4, 2, 43, 29, dtype)
    mask = Causal() & Window.last(53)
    tensors, shape = torch_ops.map_tensors(mask.block_map((101, 139), block_q=64, block_k=32), backward=True)
    blocks = torch_ops._blocks(tensors, shape)
    out, lse = launch.forward(q, k, v, blocks, launch.Mods(), 0.2, isa=isa)
    found = launch.backward(q, k, v, blocks, launch.Mods(), 0.2, (out, lse), (g, None), isa=isa)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    exact, _ = truth(*leaves, mask=mask, scale=0.2)
    exact.backward(g.double())
    near = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    naive, _ = truth(*near, mask=mask, scale=0.2, dtype=dtype)
    naive.backward(g.to(naive.dtype))
    within_budget(out, naive.detach(), exact.detach(), dtype)
    for x, n, e in zip((found.dq, found.dk, found.dv), near, leaves, strict=True):
        within_budget(x, n.grad, e.grad, dtype)  # type: ignore[arg-type]


def test_score_modifications_sink_and_their_gradients() -> None:
    needs_core()
    q, k, v, g = inputs(2, 131, 167, 3, 3, 32, 24)
    mask = Causal() & Window.last(97)
    bias, table, slopes, sink = torch.randn(3, 131, 167), torch.randn(32, 3), torch.rand(3), torch.randn(3)
    mods = {
        "softcap": ((), lambda: Softcap(1.5)),
        "alibi": ((), lambda: Alibi(slopes)),
        "slopes": ((slopes,), lambda s: Alibi(s)),
        "bias": ((bias,), lambda b: RelativeBias.dense(b)),
        "one bias for all heads": ((bias[:1],), lambda b: RelativeBias.dense(b)),
        "bias, softcap": ((bias,), lambda b: RelativeBias.dense(b) >> Softcap(2.0)),
        "softcap, bias, alibi": ((bias,), lambda b: Softcap(2.0) >> RelativeBias.dense(b) >> Alibi(slopes)),
        "t5": ((table,), lambda t: RelativeBias(t)),
    }
    for name, (params, make) in mods.items():
        found = []
        for function, kind in (
            (run, torch.float32),
            (truth, torch.float64),
            (lambda *a, **o: truth(*a, **o, dtype=torch.float32), torch.float32),
        ):
            leaves = [t.detach().clone().to(kind).requires_grad_() for t in (q, k, v, sink, *params)]
            out, lse = function(*leaves[:3], mask=mask, score_mod=make(*leaves[4:]), sink=leaves[3])
            (out * g.to(kind)).sum().add(lse.sum()).backward()
            found.append([out.detach(), *(t.grad for t in leaves)])
        for i, (x, e, n) in enumerate(zip(*found, strict=True)):
            size = e.abs().max().item()
            error, naive = (x - e).abs().max().item(), (n - e).abs().max().item()
            assert error <= 2 * naive + 4e-6 * max(1.0, size), (name, i, error, naive)


def test_negative_and_zero_scale() -> None:
    q, k, v, _ = inputs(1, 17, 31, 2, 1, 16, 16)
    for scale in (-0.7, 0.0):
        got, exact = run(q, k, v, scale=scale, needs_grad=False), truth(q, k, v, scale=scale)
        assert (got[0] - exact[0]).abs().max() < 2e-6 and (got[1] - exact[1]).abs().max() < 2e-6


@pytest.mark.parametrize("tq, tk", [(1, 1), (5, 1), (1, 0), (3, 0), (0, 7), (129, 2), (2, 385)])
def test_tiny_and_empty_sizes(tq: int, tk: int) -> None:
    q, k, v, g = inputs(2, tq, tk, 4, 2, 8, 5)
    for mask in (None, Causal()):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out, lse = run(*leaves, mask=mask)
        exact, exact_lse = truth(q, k, v, mask=mask)
        assert torch.allclose(out.double(), exact, atol=2e-6) and torch.allclose(lse.double(), exact_lse, atol=2e-6)
        out.backward(g)
        assert all(t.grad is not None and t.grad.isfinite().all() for t in leaves)


def test_large_logits() -> None:
    q, k, v, _ = inputs(1, 67, 71, 2, 2, 32, 32)
    q, k = 30 * q, 30 * k
    got, exact, naive = (
        run(q, k, v, mask=Causal()),
        truth(q, k, v, mask=Causal()),
        truth(q, k, v, mask=Causal(), dtype=torch.float32),
    )
    within_budget(got[0], naive[0], exact[0], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_garbage_in_masked_keys_and_values_stays_there(dtype: torch.dtype) -> None:
    q, k, v, g = inputs(1, 151, 151, 2, 1, 32, 40, dtype)
    mask = Causal()
    clean = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    run(*clean, mask=mask)[0].backward(g)
    expected, _ = run(q, k, v, mask=mask)
    k[:, 90:], v[:, 90:] = float("nan"), float("inf")
    g = g.clone()
    g[:, 90:] = 0
    dirty = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, lse = run(*dirty, mask=mask)
    assert torch.equal(out[:, :90], expected[:, :90]) and lse[:, :90].isfinite().all() and out[:, 90:].isnan().any()
    out.backward(g)
    assert dirty[0].grad[:, :90].isfinite().all()  # type: ignore[index]
    assert torch.allclose(dirty[0].grad[:, :90].float(), clean[0].grad[:, :90].float(), atol=2e-2)  # type: ignore[index]


def test_rows_without_keys_give_nothing_and_get_nothing() -> None:
    q, k, v, g = inputs(2, 131, 131, 2, 2, 16, 16)
    mask = Padding((0, 77))
    q[0], g[0] = float("nan"), float("nan")
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, lse = run(*leaves, mask=mask)
    assert (out[0] == 0).all() and lse[0].eq(-math.inf).all()
    out.backward(g)
    for t in leaves:
        assert t.grad is not None and t.grad[1].isfinite().all() and (t.grad[0] == 0).all()
    assert (leaves[1].grad[1, 77:] == 0).all()  # type: ignore[index]


def test_packed_is_one_by_one() -> None:
    lengths, keys = (3, 130, 0, 71), (9, 200, 4, 71)
    q, k, v, _ = inputs(1, sum(lengths), sum(keys), 4, 2, 24, 24)
    seq = SeqInfo(lengths, keys)
    out, lse = run(q, k, v, mask=Causal(), grid=Grid.packed(seq))
    at = ak = 0
    for n, m in zip(lengths, keys, strict=True):
        one, one_lse = truth(q[:, at : at + n], k[:, ak : ak + m], v[:, ak : ak + m], mask=Causal())
        assert torch.allclose(out[:, at : at + n].double(), one, atol=3e-6)
        assert torch.allclose(lse[:, at : at + n].double(), one_lse, atol=3e-6)
        at, ak = at + n, ak + m


def test_any_strides_and_no_copy_of_head_major_views() -> None:
    q, k, v, _ = inputs(2, 41, 43, 4, 2, 24, 24)
    expected, _ = run(q, k, v, mask=Causal())
    head_major = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert all(launch.flat(t).data_ptr() == t.data_ptr() for t in head_major)
    odd = [torch.stack([t, t], -1)[..., 0] for t in (q, k, v)]
    for case in (head_major, odd, [q.flip(1).flip(1), k[:, :, :1].expand(-1, -1, 2, -1), v]):
        k_used = k[:, :, :1].expand(-1, -1, 2, -1).contiguous() if case[1].stride(2) == 0 else k
        want = expected if k_used is k else run(q, k_used, v, mask=Causal())[0]
        assert torch.equal(run(*case, mask=Causal())[0], want)


def test_same_bits_for_every_thread_count_and_batch() -> None:
    q, k, v, g = inputs(3, 259, 259, 4, 2, 32, 32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
            out, lse = run(*leaves, mask=Causal())
            out.backward(g)
            results.append([out.detach(), lse.detach(), *(t.grad for t in leaves)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = run(q[1:2], k[1:2], v[1:2], mask=Causal())[0]
    assert torch.equal(alone[0], results[0][0][1])


def test_concurrent_calls_from_python_threads() -> None:
    q, k, v, _ = inputs(1, 257, 257, 4, 4, 32, 32)
    expected = run(q, k, v, mask=Causal(), needs_grad=False)[0]
    wrong: list[int] = []

    def work() -> None:
        for i in range(20):
            if not torch.equal(run(q, k, v, mask=Causal(), needs_grad=False)[0], expected):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_reasons_for_refusal() -> None:
    q = torch.zeros(1, 3, 2, 8)
    grid = Grid.dense(3, 3)

    def why(a: Tensor, mod=None) -> str | None:  # type: ignore[no-untyped-def]
        return cpu.unsupported(a, a, a, mask=None, grid=grid, score_mod=mod, needs_grad=False)

    assert "float64" in (why(q.double()) or "")
    assert "meta" in (why(q.to("meta")) or "")
    assert "once" in (why(q, Softcap(1.0) >> Softcap(2.0)) or "")
    assert "head dims" in (why(torch.zeros(1, 3, 2, 1031)) or "")
    assert why(q, Softcap(1.0)) is None


def test_training_after_inference() -> None:
    """What a call under inference_mode leaves behind (block maps, positions) serves a training step of the same shape."""
    q, k, v, _ = inputs(1, 157, 157, 2, 2, 16, 16, torch.float32)
    alibi = Alibi(torch.tensor([0.5, 0.25]))
    with torch.inference_mode():
        run(q, k, v, mask=Causal(), score_mod=alibi)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, _ = run(*leaves, mask=Causal(), score_mod=alibi)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))


def test_custom_ops_pass_opcheck_and_compile() -> None:
    q, k, v, g = inputs(1, 67, 67, 4, 2, 16, 16)
    sink, bias = torch.randn(4), torch.randn(1, 4, 67, 67)
    tensors, shape = torch_ops.map_tensors(Causal().block_map((67, 67)), backward=True)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    args = (*leaves, tensors, shape, 0.25, sink.requires_grad_(), [launch.BIAS], 0.0, None, bias.requires_grad_(), [])
    torch.library.opcheck(torch_ops.cpu_attention, args)
    lengths = torch.tensor([67])
    torch.library.opcheck(torch_ops.cpu_decode, (q[:, -1:], k, v, lengths, None, 0.25, True, -1, 0, 0.0, None, None))

    def layer(q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor]) -> Tensor:
        return torch_ops.cpu_attention(2 * q, k, v, blocks, shape, 0.25, None, [], 0.0, None, None, [])[0] + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (layer, compiled):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        f(*leaves, tensors).backward(g)
        grads.append([t.grad for t in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dense_masks_of_batch_and_head() -> None:
    q, k, v, _ = inputs(2, 61, 83, 4, 2, 16, 16)
    mask = Dense(torch.rand(2, 4, 61, 83) < 0.1)
    got, exact = run(q, k, v, mask=mask), truth(q, k, v, mask=mask)
    assert torch.allclose(got[0].double(), exact[0], atol=3e-6)
