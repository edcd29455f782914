"""The dense steps of the compiled core: right to rounding, and every row by itself to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attlas.cache import PartSpec
from attlas.cache.store import KvDtype, make_store
from attlas.errors import UnsupportedError
from attlas.kernels.cpu.dense import PackedLinear, gate, norm_, rotate_and_store_, unsupported
from attlas.kernels.cpu.library import ISA, status
from attlas.positions.rope import Rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
ISAS = [name for name, number in ISA.items() if number <= ISA.get(status(), 0)]


def close(got: torch.Tensor, want: torch.Tensor, scale: float = 1.0) -> None:
    tolerance = TOLERANCE[got.dtype] * scale
    torch.testing.assert_close(got.double(), want, atol=tolerance * float(want.abs().max()), rtol=tolerance)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_core_is_there():
    assert unsupported(torch.float32, torch.device("cpu")) is None
    assert "float64" in (unsupported(torch.float64, torch.device("cpu")) or "")
    assert "cuda" in (unsupported(torch.float32, torch.device("cuda")) or "")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(37, 31), (64, 32), (101, 67), (1, 1)])
def test_linear_agrees_with_fp64(inputs: int, outputs: int, dtype: torch.dtype, isa: str):
    weight, bias = random(outputs, inputs, dtype=dtype), random(outputs, dtype=dtype, seed=1)
    for rows in (1, 2, 3, 5, 8, 13, 211):
        x = random(rows, inputs, dtype=dtype, seed=rows)
        for b in (None, bias):
            want = F.linear(x.double(), weight.double(), None if b is None else b.double())
            close(PackedLinear(weight, b, isa=isa)(x), want, scale=2.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_to_the_bit_in_any_company(dtype: torch.dtype, isa: str):
    packed = PackedLinear(random(131, 577, dtype=dtype), isa=isa)
    x = random(401, 577, dtype=dtype, seed=3)
    whole = packed(x)
    for rows in (1, 2, 7, 8, 9, 64, 193):
        for start in (0, 5, 401 - rows):
            assert torch.equal(packed(x[start : start + rows]), whole[start : start + rows])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(packed(x), whole)
    finally:
        torch.set_num_threads(threads)


def test_linear_reads_rows_with_a_stride():
    weight, x = random(19, 23, dtype=torch.float32), random(7, 2 * 23, dtype=torch.float32)
    assert torch.equal(PackedLinear(weight)(x[:, 23:]), PackedLinear(weight)(x[:, 23:].contiguous()))


def test_not_a_number_stays_in_its_row():
    x = random(9, 37, dtype=torch.bfloat16)
    x[4, 11] = float("nan")
    bad = PackedLinear(random(41, 37, dtype=torch.bfloat16))(x).isnan()
    assert bad[4].all() and bad.sum() == 41


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [False, True])
def test_norm(dtype: torch.dtype, offset: bool):
    x, more, weight = (random(*s, dtype=dtype, seed=i) for i, s in enumerate([(13, 53), (13, 53), (53,)]))
    total = x + more
    wide = total.double()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + offset)
    got = x.clone()
    close(norm_(got, more, weight, 1e-5, unit_offset=offset), want)
    assert torch.equal(got, total)
    close(norm_(total, None, weight, 1e-5, unit_offset=offset), want)
    assert torch.equal(got, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(dtype: torch.dtype):
    x = random(11, 2 * 59, dtype=dtype) * 9
    x[0, :3] = torch.tensor([-200.0, 200.0, 0.0])
    wide = x.double()
    close(gate(x), F.silu(wide[:, :59]) * wide[:, 59:])
    x[3, 5] = float("nan")
    assert gate(x).isnan().nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [None, 10])
def test_rotation_and_store(dtype: torch.dtype, interleaved: bool, turned: int | None):
    heads, kv_heads, dim, tokens = 6, 2, 38, 5
    rope = Rope(dim, rotary_dim=turned, interleaved=interleaved)
    x = random(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    positions = torch.tensor([0, 3, 17, 5, 101])
    q, k, v = x.clone().unflatten(1, (-1, dim)).split((heads, kv_heads, kv_heads), dim=1)
    cos, sin = (t.flatten(1).contiguous() for t in rope.cos_sin(positions))
    pages = tuple(torch.full((3, 7, kv_heads, dim), 7.0, dtype=dtype) for _ in range(2))
    slots = torch.tensor([20, 0, 8, 3, 15])
    rotate_and_store_(x, heads, (cos, sin), interleaved, pages, slots)
    close(x.unflatten(1, (-1, dim))[:, :heads], rope(q, positions).double())
    close(pages[0].flatten(0, 1)[slots], rope(k, positions).double())
    assert torch.equal(pages[1].flatten(0, 1)[slots], v)
    untouched = [i for i in range(21) if i not in slots.tolist()]
    assert (pages[0].flatten(0, 1)[untouched] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_storing_eight_bits_is_what_the_store_does(dtype: torch.dtype, kv_dtype: KvDtype):
    heads, kv_heads, dim, tokens = 3, 2, 38, 11
    spec = PartSpec("kv", (("k", (kv_heads, dim)), ("v", (kv_heads, dim))))
    mine, theirs = (make_store(spec, 3, 8, dtype, torch.device("cpu"), kv_dtype) for _ in range(2))
    for s in (mine, theirs):
        for t in s.tensors:
            t.zero_()
    x = random(tokens, heads + 2 * kv_heads, dim, dtype=torch.float32) * 10.0 ** torch.arange(-6, 5)[:, None, None]
    x = (x * 4.0 ** -(torch.arange(dim) % 7)).clamp(-6e4, 6e4).to(dtype)
    x[4, heads:] = 0
    x[6, heads, 3], x[7, -1, 0] = float("nan"), float("inf")
    rope, positions = Rope(dim), torch.arange(tokens)
    angles = tuple(t.flatten(1).contiguous() for t in rope.cos_sin(positions))
    slots = torch.randperm(24, generator=torch.Generator().manual_seed(5))[:tokens]
    turned = x.flatten(1).clone()
    (k, v), scales = mine.held
    rotate_and_store_(turned, heads, angles, False, (k, v), slots, scales)  # type: ignore[arg-type]
    turned = turned.unflatten(1, (-1, dim))[:, heads:]
    theirs.put(slots, (turned[:, :kv_heads], turned[:, kv_heads:]))
    for got, want in zip(mine.gather(torch.arange(3)), theirs.gather(torch.arange(3)), strict=True):
        assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_without_rotation_keys_are_copied():
    x = random(3, 4 * 5, dtype=torch.float32)
    pages = (torch.zeros(2, 8, 1, 5), torch.zeros(2, 8, 1, 5))
    rotate_and_store_(x, 2, None, False, pages, torch.tensor([1, 9, 4]))
    assert torch.equal(pages[0].flatten(0, 1)[[1, 9, 4], 0], x[:, 10:15])


def test_an_instruction_set_that_is_not_there():
    if status() == "avx512_bf16":
        ISA["none"] = 4
        try:
            with pytest.raises(UnsupportedError, match="instruction set"):
                PackedLinear(torch.ones(3, 5), isa="none")
        finally:
            del ISA["none"]
