"""The linear recurrence on the compiled core: fp32, decay per token (one per head or per channel), exact gradients."""

from __future__ import annotations

import ctypes
from ctypes import Structure, c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from attlas.errors import UnsupportedError
from attlas.kernels.cpu.library import MAX_DIM, Stride, load, status
from attlas.kernels.cpu.pages import large_pages
from attlas.numerics import first_order

RUN = 64  # tokens between two checkpoints of the state


class ScanArgs(Structure):
    """Mirror of `AttlasScan` in csrc/scan_api.h."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "length", "dim_k", "dim_v", "decay_dim", "threads", "isa")),
        ("scale", c_double),
        *((name, c_void_p) for name in ("q", "k", "v", "g")),
        *((name, Stride) for name in ("sq", "sk", "sv", "sg")),
        *((name, c_void_p) for name in ("state_in", "state_out", "out", "checkpoints", "dout")),
        ("sdo", Stride),
        *((name, c_void_p) for name in ("dstate_out", "dq", "dk", "dv", "dg", "dstate_in")),
    ]


def unsupported(q: Tensor, v: Tensor, *, low_rank: bool, bonus: bool) -> str | None:
    """Why the core cannot run the recurrence, None = it can."""
    if q.device.type != "cpu":
        return f"it runs on the cpu, not on {q.device.type}"
    if load() is None:
        return status()
    if not hasattr(load(), "attlas_cpu_scan_forward"):
        return "the compiled CPU core is older than this attlas: reinstall attlas"
    if q.dtype == torch.float64:
        return "it has no torch.float64 kernels"
    if low_rank:
        return "it has no delta rule or other low-rank transition"
    if bonus:
        return "it has no bonus (read before write)"
    return f"it has head dims up to {MAX_DIM}" if max(q.shape[-1], v.shape[-1]) > MAX_DIM else None


def scan(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], log_decay None or [B, T, H, 1 | K], initial_state [B, H, K, V], all fp32 -> (out, final
    state)."""
    leaves = (q, k, v, initial_state) if log_decay is None else (q, k, v, initial_state, log_decay)
    if torch.is_grad_enabled() and any(t.requires_grad for t in leaves):
        out, state = _Scan.apply(scale, q, k, v, initial_state, log_decay)
        return out, state
    out, state, _ = _forward(scale, q, k, v, initial_state, log_decay, keep=False)
    return out, state


def _rows(x: Tensor) -> tuple[Tensor, Stride]:
    """x [B, T, H, D] with stride 1 in the last dimension, and its other strides."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return x, Stride(x.stride(0), x.stride(1), x.stride(2))


def _args(scale: float, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None) -> tuple[ScanArgs, list[Tensor]]:
    """The arguments that forward and backward share, and the tensors that must outlive the call."""
    a, held = ScanArgs(), []
    a.batch, a.length, a.heads, a.dim_k = q.shape
    a.dim_v, a.decay_dim, a.scale, a.threads = v.shape[-1], 0 if g is None else g.shape[-1], scale, torch.get_num_threads()
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g)):
        if x is not None:
            x, stride = _rows(x.detach())
            held.append(x)
            setattr(a, name, x.data_ptr())
            setattr(a, f"s{name}", stride)
    return a, held


def _run(name: str, a: ScanArgs) -> None:
    library = load()
    if library is None:
        raise UnsupportedError(f"the CPU core cannot run: {status()}")
    code = getattr(library, f"attlas_cpu_scan_{name}")(ctypes.byref(a))
    if code == 2:
        raise MemoryError("the CPU core could not allocate its scratch memory")
    assert code == 0, f"attlas_cpu_scan_{name} returned {code}"


def _forward(
    scale: float, q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, g: Tensor | None, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(out, final state, checkpoints for backward)."""
    a, held = _args(scale, q, k, v, g)
    start = initial_state.detach().contiguous()
    out, state = large_pages(q.new_empty(*q.shape[:3], v.shape[-1])), torch.empty_like(start)
    checkpoints = None
    if keep:
        library = load()
        assert library is not None
        library.attlas_cpu_scan_state.restype = c_int64
        per_state = library.attlas_cpu_scan_state(ctypes.byref(a))
        checkpoints = large_pages(q.new_empty(q.shape[0] * q.shape[2] * -(-q.shape[1] // RUN) * per_state))
        a.checkpoints = checkpoints.data_ptr()
    a.state_in, a.state_out, a.out = start.data_ptr(), state.data_ptr(), out.data_ptr()
    _run("forward", a)
    del held
    return out, state, checkpoints


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: float, q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, g: Tensor | None) -> Any:
        out, state, checkpoints = _forward(scale, q, k, v, initial_state, g, keep=True)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, g, checkpoints, initial_state)
        return out, state

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Any, dout: Tensor, dstate: Tensor) -> Any:
        q, k, v, g, checkpoints, _ = saved
        a, held = _args(ctx.scale, q, k, v, g)
        (dout, a.sdo), dstate = _rows(dout), dstate.contiguous()
        dq, dk, dv = (large_pages(x.new_empty(x.shape)) for x in (q, k, v))
        dg = None if g is None else large_pages(g.new_empty(g.shape))
        dstart = torch.empty_like(dstate)
        a.dout, a.dstate_out, a.checkpoints = dout.data_ptr(), dstate.data_ptr(), checkpoints.data_ptr()
        a.dq, a.dk, a.dv, a.dstate_in = (t.data_ptr() for t in (dq, dk, dv, dstart))
        a.dg = None if dg is None else dg.data_ptr()
        _run("backward", a)
        del held
        return None, dq, dk, dv, dstart, dg
