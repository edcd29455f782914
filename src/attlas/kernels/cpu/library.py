"""Finds and describes the compiled CPU core: one shared library beside this file, spoken to through ctypes."""

from __future__ import annotations

import ctypes
import os
import re
from ctypes import POINTER, Structure, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

ABI = 4
MAX_BLOCK, MAX_DIM, MAX_MODS = 256, 1024, 4
ISA = {"auto": 0, "avx2": 1, "avx512": 2, "avx512_bf16": 3}


class Stride(Structure):
    _fields_ = [("batch", c_int64), ("row", c_int64), ("head", c_int64)]


class AttentionArgs(Structure):
    """Mirror of `AttlasAttention` in csrc/api.h."""

    _fields_ = [
        *(
            (name, c_int64)
            for name in ("dtype", "batch", "heads", "kv_heads", "q_len", "k_len", "dim", "dim_v", "threads", "isa")
        ),
        *((name, c_int64) for name in ("map_batch", "map_heads", "block_q", "block_k")),
        *((name, c_void_p) for name in ("row_ptr", "cols", "tile_ids", "tiles", "col_ptr", "rows", "row_tile_ids")),
        *((name, c_void_p) for name in ("q", "k", "v", "out", "out_w")),
        *((name, Stride) for name in ("sq", "sk", "sv", "so")),
        ("lse", c_void_p),
        ("scale", c_double),
        ("softcap", c_double),
        ("num_mods", c_int64),
        ("mods", c_int64 * MAX_MODS),
        ("alibi", c_void_p),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("bias_batch", "bias_head", "bias_row")),
        *((name, c_void_p) for name in ("q_pos", "k_pos", "sink", "dout")),
        ("sdo", Stride),
        *((name, c_void_p) for name in ("dlse", "delta", "dq_lanes")),
        ("lanes", c_int64),
        *((name, c_void_p) for name in ("dq", "dk", "dv", "dbias")),
    ]


class DecodeArgs(Structure):
    """Mirror of `AttlasDecode` in csrc/api.h."""

    _fields_ = [
        *((name, c_int64) for name in ("dtype", "batch", "heads", "kv_heads", "q_len", "dim", "dim_v", "threads", "isa")),
        *((name, c_void_p) for name in ("q", "k", "v", "out")),
        *((name, Stride) for name in ("sq", "sk", "sv", "so")),
        ("lse", c_void_p),
        ("block_table", c_void_p),
        ("max_blocks", c_int64),
        ("page_size", c_int64),
        ("lengths", c_void_p),
        ("scale", c_double),
        ("softcap", c_double),
        *((name, c_int64) for name in ("causal", "window_left", "num_sinks")),
        ("alibi", c_void_p),
        ("sink", c_void_p),
        ("split", c_int64),
        ("partial", c_void_p),
        ("kv_dtype", c_int64),
        ("k_scale", c_void_p),
        ("v_scale", c_void_p),
        ("sks", Stride),
        ("svs", Stride),
    ]


def library_path() -> Path | None:
    """The shared library that `load` would open: `$ATTLAS_CPU_LIBRARY`, else the one installed beside this file, else None."""
    override = os.environ.get("ATTLAS_CPU_LIBRARY")
    path = Path(override) if override else Path(__file__).parent / "libattlas_cpu.so"
    return path if path.exists() else None


def _gomp_parallel() -> int | None:
    """Where the OpenMP runtime that torch has loaded starts a team (GNU's has this function, and LLVM's and Intel's too); None
    when there is no runtime, or more than one."""
    maps = Path("/proc/self/maps")
    found = set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps.read_text())) if maps.exists() else set()
    mine = {path for path in found if "/torch" in path} or found
    if len(mine) != 1:
        return None
    try:
        return ctypes.cast(ctypes.CDLL(mine.pop()).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None


@lru_cache(maxsize=1)
def _open() -> tuple[ctypes.CDLL | None, str]:
    path = library_path()
    if path is None:
        return None, "the compiled CPU core is not installed (no C++ compiler when attlas was built)"
    try:
        lib = ctypes.CDLL(str(path))
        lib.attlas_cpu_isa.restype = c_char_p
        if lib.attlas_cpu_abi() != ABI:
            return None, f"{path.name} has interface {lib.attlas_cpu_abi()}, this attlas needs {ABI}: reinstall attlas"
        for name, struct in (("attention_forward", AttentionArgs), ("attention_backward", AttentionArgs), ("decode", DecodeArgs)):
            function = getattr(lib, f"attlas_cpu_{name}")
            function.restype, function.argtypes = c_int, [POINTER(struct)]
        for name, struct in (("backward", AttentionArgs), ("decode", DecodeArgs)):
            function = getattr(lib, f"attlas_cpu_{name}_workspace")
            function.restype, function.argtypes = c_int64, [POINTER(struct)]
        lib.attlas_cpu_use_openmp.argtypes, lib.attlas_cpu_use_openmp.restype = [c_void_p], None
        lib.attlas_cpu_use_openmp(_gomp_parallel())
        if lib.attlas_cpu_isa() == b"none":
            return None, "this processor has no AVX2"
    except (OSError, AttributeError) as error:
        return None, f"{path.name} cannot be loaded: {error}"
    return lib, lib.attlas_cpu_isa().decode()


def load() -> ctypes.CDLL | None:
    """The library, or None; `status()` says why."""
    return _open()[0]


def status() -> str:
    """The instruction set in use ("avx2", "avx512", "avx512_bf16"), or the reason why the CPU core cannot run."""
    return _open()[1]
