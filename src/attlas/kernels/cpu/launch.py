"""Calls into the compiled core: tensors in, tensors out; no validation of user input, no choice between implementations."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.errors import UnsupportedError
from attlas.kernels.cpu.library import ISA, MAX_MODS, AttentionArgs, DecodeArgs, Stride, load, status
from attlas.kernels.cpu.pages import large_pages

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODES = {torch.int8: 3, torch.float8_e4m3fn: 4}  # keys and values that need scales
ALIBI, BIAS, SOFTCAP = 1, 2, 3
SPLIT = 512  # keys of one split of a decode: fixed, so that a row's result does not depend on its batch or on the threads
_TARGET_TASKS = 12


@dataclass(frozen=True)
class Mods:
    """Score modifications in order: `codes` out of ALIBI, BIAS, SOFTCAP, each at most once.

    alibi fp32 [H], bias fp32 [B|1, H|1, Tq, Tk] (last stride 1), positions int32 [Tq] and [Tk] (ALiBi only)
    """

    codes: tuple[int, ...] = ()
    softcap: float = 0.0
    alibi: Tensor | None = None
    bias: Tensor | None = None
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None


@dataclass(frozen=True)
class MapTensors:
    """A BlockMap as the core reads it: (row_ptr, cols, tile_ids, tiles); for backward (col_ptr, rows, tile_ids) by key block."""

    shape: tuple[int, int, int, int]  # batch, heads, block_q, block_k
    forward: tuple[Tensor, Tensor, Tensor, Tensor]
    backward: tuple[Tensor, Tensor, Tensor] | None = None


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _stride(t: Tensor) -> Stride:
    return Stride(t.stride(0), t.stride(1), t.stride(2))


def flat(t: Tensor) -> Tensor:
    """The tensor with stride 1 in the last dimension; a copy only where it has to be."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _attention_args(
    q: Tensor, k: Tensor, v: Tensor, blocks: MapTensors | None, mods: Mods, scale: float, isa: str
) -> AttentionArgs:
    a = AttentionArgs()
    a.dtype, a.threads, a.isa, a.scale = DTYPES[q.dtype], torch.get_num_threads(), ISA[isa], scale
    a.batch, a.q_len, a.heads, a.dim = q.shape
    a.k_len, a.kv_heads, a.dim_v = k.shape[1], k.shape[2], v.shape[3]
    a.q, a.k, a.v, a.sq, a.sk, a.sv = q.data_ptr(), k.data_ptr(), v.data_ptr(), _stride(q), _stride(k), _stride(v)
    a.map_batch = a.map_heads = 1
    a.block_q = a.block_k = 128
    if blocks is not None:
        a.map_batch, a.map_heads, a.block_q, a.block_k = blocks.shape
        a.row_ptr, a.cols, a.tile_ids, a.tiles = map(_pointer, blocks.forward)
        if blocks.backward is not None:
            a.col_ptr, a.rows, a.row_tile_ids = map(_pointer, blocks.backward)
    assert len(mods.codes) <= MAX_MODS
    a.num_mods, a.softcap = len(mods.codes), mods.softcap
    for i, code in enumerate(mods.codes):
        a.mods[i] = code
    a.alibi, a.q_pos, a.k_pos = map(_pointer, (mods.alibi, mods.q_pos, mods.k_pos))
    if mods.bias is not None:
        b = mods.bias.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        a.bias, a.bias_batch, a.bias_head, a.bias_row = b.data_ptr(), b.stride(0), b.stride(1), b.stride(2)
    return a


def _workspace(name: str, args: ctypes.Structure) -> int:
    """Numbers of working memory that a call needs."""
    library = load()
    if library is None:
        raise UnsupportedError(f"the CPU core cannot run: {status()}")
    return int(getattr(library, f"attlas_cpu_{name}_workspace")(ctypes.byref(args)))


def _run(name: str, args: ctypes.Structure) -> None:
    library = load()
    if library is None:
        raise UnsupportedError(f"the CPU core cannot run: {status()}")
    code = getattr(library, f"attlas_cpu_{name}")(ctypes.byref(args))
    if code == 1:
        raise UnsupportedError(f"the CPU core has no kernels of isa {args.isa} on this machine ({status()})")
    if code == 2:
        raise MemoryError("the CPU core could not allocate its scratch memory")
    assert code == 0, f"attlas_cpu_{name} returned {code}"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: MapTensors | None,
    mods: Mods,
    scale: float,
    sink: Tensor | None = None,
    isa: str = "auto",
) -> tuple[Tensor, Tensor]:
    """softmax(mods(scale q k^T)) v over the pairs of `blocks` (None = all).

    -> out [B, Tq, H, Dv], lse fp32 [B, Tq, H] (natural log).

    q [B, Tq, H, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv], fp32 / bf16 / fp16, any strides; sink fp32 [H]. Empty rows: 0, -inf.
    """
    q, k, v = flat(q), flat(k), flat(v)
    out = large_pages(q.new_empty(*q.shape[:3], v.shape[3]))
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    a = _attention_args(q, k, v, blocks, mods, scale, isa)
    a.out_w, a.so, a.lse, a.sink = out.data_ptr(), _stride(out), lse.data_ptr(), _pointer(sink)
    _run("attention_forward", a)
    return out, lse


@dataclass(frozen=True)
class Gradients:
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None  # fp32 [B, H, Tq, Tk]
    delta: Tensor  # fp32 [B, Tq, H]: rowsum(dout * out) - dlse, 0 for empty rows


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: MapTensors | None,
    mods: Mods,
    scale: float,
    saved: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    want_bias: bool = False,
    isa: str = "auto",
) -> Gradients:
    """Gradients from saved = (out, lse) and grads = (dout, dlse | None); probabilities are recomputed. Deterministic, O(T) memory
    (dbias excepted)."""
    q, k, v, out, dout = (flat(t) for t in (q, k, v, saved[0], grads[0]))
    lse, dlse = saved[1].contiguous(), None if grads[1] is None else grads[1].float().contiguous()
    a = _attention_args(q, k, v, blocks, mods, scale, isa)
    lanes = max(1, min(-(-_TARGET_TASKS // max(1, a.batch * a.kv_heads)), -(-a.k_len // a.block_k)))
    dq, dk, dv = (large_pages(x.new_empty(x.shape)) for x in (q, k, v))
    delta = torch.empty(q.shape[:3], dtype=torch.float32)
    dbias = torch.zeros(q.shape[0], q.shape[2], q.shape[1], k.shape[1], dtype=torch.float32) if want_bias else None
    a.out, a.so, a.lse, a.dout, a.sdo = out.data_ptr(), _stride(out), lse.data_ptr(), dout.data_ptr(), _stride(dout)
    a.dlse, a.delta, a.lanes = _pointer(dlse), delta.data_ptr(), lanes
    a.dq, a.dk, a.dv, a.dbias = dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), _pointer(dbias)
    alone = lanes == 1 and dq.dtype == torch.float32  # then dq itself is where it is summed
    sums = dq if alone else large_pages(torch.empty(_workspace("backward", a), dtype=torch.float32))
    a.dq_lanes = sums.data_ptr()
    _run("attention_backward", a)
    return Gradients(dq, dk, dv, dbias, delta)


@dataclass(frozen=True)
class Visible:
    """Which keys of its cache a token at position p sees: [p - left, p] (causal) or [p - left, length), and the first `sinks`.

    left counts other keys, None = all of them.
    """

    causal: bool = True
    left: int | None = None
    sinks: int = 0


def set_scales(a: DecodeArgs, k: Tensor, scales: tuple[Tensor, ...]) -> None:
    """Tell the call how keys and values are stored; the tensors must live until it has run."""
    a.kv_dtype = CODES.get(k.dtype, 0)
    assert bool(a.kv_dtype) == bool(scales)
    if scales:
        a.k_scale, a.v_scale = (t.data_ptr() for t in scales)
        a.sks, a.svs = map(_stride, scales)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int] | Tensor,
    visible: Visible,
    scale: float,
    *,
    block_table: Tensor | None = None,
    softcap: float = 0.0,
    alibi: Tensor | None = None,
    sink: Tensor | None = None,
    scales: tuple[Tensor, ...] = (),
    isa: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The newest q.shape[1] tokens of each sequence over its cache, split along the keys.

    -> out [B, Tq, H, Dv], lse fp32 [B, Tq, H] (natural log).

    q            [B, Tq, H, D]; token t of sequence b stands at lengths[b] - Tq + t
    k, v         [B, capacity, Hkv, D | Dv], or pages [P, page_size, Hkv, D | Dv] with block_table int32 [B, max_blocks]
    lengths      tokens in each cache, the new ones included; only the pages that hold them are looked at
    softcap, alibi (fp32 [H]), sink (fp32 [H])   0 / None = without; softcap comes before ALiBi
    scales       where k and v are int8 or float8_e4m3fn: (of k, of v), fp32 and shaped like those without the last dimension;
                 what counts is number times scale
    A row's result does not depend on the other sequences or on the threads. Bytes read: the visible keys and values, once.
    """
    q, k, v = flat(q), flat(k), flat(v)
    count = torch.as_tensor(lengths, dtype=torch.int64).contiguous()
    a = DecodeArgs()
    a.dtype, a.threads, a.isa, a.scale, a.softcap = DTYPES[q.dtype], torch.get_num_threads(), ISA[isa], scale, softcap
    a.batch, a.q_len, a.heads, a.dim = q.shape
    a.kv_heads, a.dim_v, a.split = k.shape[2], v.shape[3], SPLIT
    set_scales(a, k, scales)
    table = None if block_table is None else block_table.to(torch.int32).contiguous()
    if table is not None:
        a.block_table, a.max_blocks, a.page_size = table.data_ptr(), table.shape[1], k.shape[1]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    a.q, a.k, a.v, a.out, a.lse, a.lengths = (t.data_ptr() for t in (q, k, v, out, lse, count))
    a.sq, a.sk, a.sv, a.so = _stride(q), _stride(k), _stride(v), _stride(out)
    a.causal, a.window_left, a.num_sinks = int(visible.causal), -1 if visible.left is None else visible.left, visible.sinks
    a.alibi, a.sink = _pointer(alibi), _pointer(sink)
    workspace = torch.empty(_workspace("decode", a), dtype=torch.float32)
    a.partial = workspace.data_ptr()
    _run("decode", a)
    return out, lse
