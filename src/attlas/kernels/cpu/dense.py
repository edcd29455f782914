"""The dense steps of a layer on the compiled core: linear maps with packed weights, RMS norm, gate, rotary write.

They are made for decoding: a linear map of few rows runs at the speed at which its weights can be read, and an output row is the
same to the bit however many rows there are (`attlas_cpu_linear` in csrc/linear_api.h). No gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from attlas.errors import UnsupportedError
from attlas.kernels.cpu.launch import CODES, DTYPES
from attlas.kernels.cpu.library import ISA, DecodeArgs, load, status


class LinearArgs(Structure):
    """Mirror of `AttlasLinear` in csrc/linear_api.h."""

    _fields_ = [
        *((name, c_int64) for name in ("dtype", "rows", "inputs", "outputs", "threads", "isa")),
        ("x", c_void_p),
        ("x_row", c_int64),
        *((name, c_void_p) for name in ("weight", "bias", "y")),
        ("y_row", c_int64),
    ]


class NormArgs(Structure):
    """Mirror of `AttlasNorm`."""

    _fields_ = [
        *((name, c_int64) for name in ("dtype", "rows", "dim", "threads", "isa")),
        *((name, c_double) for name in ("eps", "offset")),
        *((name, c_void_p) for name in ("x", "residual", "weight", "y")),
    ]


class GateArgs(Structure):
    """Mirror of `AttlasGate`."""

    _fields_ = [
        *((name, c_int64) for name in ("dtype", "rows", "dim", "threads", "isa")),
        *((name, c_void_p) for name in ("x", "y")),
    ]


class RotateArgs(Structure):
    """Mirror of `AttlasRotate`."""

    _fields_ = [
        *((name, c_int64) for name in ("dtype", "rows", "heads", "kv_heads", "dim", "turned", "interleaved", "threads", "isa")),
        *((name, c_void_p) for name in ("x", "cos", "sin", "k", "v", "slots")),
        ("kv_dtype", c_int64),
        *((name, c_void_p) for name in ("k_scale", "v_scale")),
    ]


class Op(Structure):
    """Mirror of `AttlasOp`."""

    _fields_ = [("op", c_int64), ("args", c_void_p)]


OPS: dict[type[Structure], int] = {LinearArgs: 0, NormArgs: 1, GateArgs: 2, RotateArgs: 3, DecodeArgs: 4}


class Steps:
    """Calls one after the other, without coming back to Python between them. The arguments may change between runs."""

    def __init__(self, calls: Sequence[Structure]) -> None:
        self.calls = list(calls)  # the library reads them where they lie
        self._ops = (Op * len(self.calls))(*(Op(OPS[type(a)], addressof(a)) for a in self.calls))

    def run(self) -> None:
        library = load()
        assert library is not None
        _check("program", library.attlas_cpu_program(self._ops, c_int64(len(self.calls))))


def workspace(args: DecodeArgs) -> int:
    """fp32 numbers of scratch memory that a decode needs."""
    library = load()
    assert library is not None
    return int(library.attlas_cpu_decode_workspace(byref(args)))


def unsupported(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the core cannot run the dense steps, None = it can."""
    if device.type != "cpu":
        return f"it runs on the cpu, not on {device.type}"
    library = load()
    if library is None:
        return status()
    if not hasattr(library, "attlas_cpu_program"):
        return "the compiled CPU core is older than this attlas: reinstall attlas"
    return None if dtype in DTYPES else f"it has no {dtype} kernels"


def _call(name: str, args: Structure) -> None:
    library = load()
    if library is None:
        raise UnsupportedError(f"the CPU core cannot run: {status()}")
    _check(name, getattr(library, f"attlas_cpu_{name}")(byref(args)))


def _check(name: str, code: int) -> None:
    if code == 1:
        raise UnsupportedError(f"the CPU core has no kernels of this instruction set on this machine ({status()})")
    if code == 2:
        raise MemoryError("the CPU core could not allocate its scratch memory")
    assert code == 0, f"attlas_cpu_{name} returned {code}"


class PackedLinear:
    """y = x W^T + bias with W [out, in] laid out once for the machine's vectors. x [T, in] -> y [T, out], of the weights' dtype,
    fp32 sums. The packed copy takes the memory of the weights (outputs rounded up to whole vectors)."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, isa: str = "auto") -> None:
        weight = weight.detach().contiguous()
        self.outputs, self.inputs = weight.shape
        self.bias = None if bias is None else bias.detach().to(weight.dtype).contiguous()
        self._args = a = LinearArgs()
        a.dtype, a.isa, a.inputs, a.outputs, a.threads = DTYPES[weight.dtype], ISA[isa], *reversed(weight.shape), 1
        a.threads = torch.get_num_threads()
        library = load()
        if library is None:
            raise UnsupportedError(f"the CPU core cannot run: {status()}")
        library.attlas_cpu_linear_bytes.restype = c_int64
        self.packed = torch.empty(max(library.attlas_cpu_linear_bytes(byref(a)), 0), dtype=torch.uint8)
        a.weight, a.x_row, a.y = weight.data_ptr(), self.inputs, self.packed.data_ptr()
        _call("linear_pack", a)
        a.weight, a.bias = self.packed.data_ptr(), None if self.bias is None else self.bias.data_ptr()
        self.dtype = weight.dtype

    def arguments(self) -> LinearArgs:
        """A copy of the call's arguments, without x and y."""
        return LinearArgs.from_buffer_copy(self._args)

    def __call__(self, x: Tensor) -> Tensor:
        return self.into(x, x.new_empty(x.shape[0], self.outputs))

    def into(self, x: Tensor, y: Tensor) -> Tensor:
        """y [T, out], filled."""
        assert x.dtype == y.dtype == self.dtype and x.shape[1] == self.inputs and x.stride(1) == 1
        assert y.shape == (x.shape[0], self.outputs) and y.is_contiguous()
        a = self._args
        a.rows, a.x, a.x_row, a.y, a.y_row = x.shape[0], x.data_ptr(), x.stride(0), y.data_ptr(), self.outputs
        a.threads = torch.get_num_threads()
        _call("linear", a)
        return y


def norm_(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """x [T, D] += residual, in place; then x / sqrt(mean(x^2) + eps) * weight (1 + weight with unit_offset), rounded once."""
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    y = torch.empty_like(x)
    a = NormArgs(DTYPES[x.dtype], x.shape[0], x.shape[1], torch.get_num_threads(), 0, eps, float(unit_offset))
    a.x, a.weight, a.y = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    a.residual = None if residual is None else residual.data_ptr()
    _call("norm", a)
    return y


def gate(x: Tensor) -> Tensor:
    """silu(x[:, :n]) * x[:, n:] of x [T, 2 n], rounded once."""
    assert x.is_contiguous()
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    _call("gate", GateArgs(DTYPES[x.dtype], *y.shape, torch.get_num_threads(), 0, x.data_ptr(), y.data_ptr()))
    return y


def rotate_and_store_(
    x: Tensor,
    heads: int,
    angles: tuple[Tensor, Tensor] | None,
    interleaved: bool,
    storage: tuple[Tensor, Tensor],
    slots: Tensor,
    scales: tuple[Tensor, ...] = (),
) -> None:
    """x [T, (H + 2 Hkv) D] holds q, k, v of each token: turn q in place, write the turned k and v to `slots` int64 [T] of
    storage [..., Hkv, D] (pages, flattened), as 8-bit numbers and `scales` [..., Hkv] where those are given (k is then turned in
    place, too). angles = (cos, sin) fp32 [T, turned / 2], None = no rotation."""
    k, v = storage
    kv_heads, dim = k.shape[-2:]
    assert x.is_contiguous() and k.is_contiguous() and v.is_contiguous() and k.dtype == v.dtype
    assert k.dtype in CODES and len(scales) == 2 if scales else k.dtype == x.dtype
    assert x.shape[1] == (heads + 2 * kv_heads) * dim and v.shape == k.shape
    turned = 0 if angles is None else 2 * angles[0].shape[-1]
    a = RotateArgs(DTYPES[x.dtype], x.shape[0], heads, kv_heads, dim, turned, int(interleaved), torch.get_num_threads(), 0)
    a.x, a.k, a.v, a.slots = x.data_ptr(), k.data_ptr(), v.data_ptr(), slots.data_ptr()
    if scales:
        a.kv_dtype, a.k_scale, a.v_scale = CODES[k.dtype], *(t.data_ptr() for t in scales)
    if angles is not None:
        a.cos, a.sin = angles[0].data_ptr(), angles[1].data_ptr()
    _call("rotate", a)
