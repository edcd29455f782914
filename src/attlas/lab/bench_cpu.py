"""The compiled CPU core against SDPA, FlexAttention, the naive formula and the machine itself, gated on correctness.

python -m attlas.lab.bench_cpu [case ...]

Each case is checked first: a sample of query rows (and their gradients) against the reference in fp64, with an error of at
most twice that of the naive formula in the same dtype. Then everything is timed in turns, the machine's matrix product and
copy among it, so that all ratios of a row come from one run. Rates: useful FLOP (pairs that the mask allows: 4 D a pair
forward, 10 D backward) over the matrix product's rate; bytes of keys and values over the copy's (bytes read plus written, of
ordinary torch tensors; the seconds also have a plain read of 256 MiB).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attlas.errors import OptionError
from attlas.kernels.cpu import launch
from attlas.kernels.cpu.library import status
from attlas.kernels.cpu.pages import large_pages
from attlas.lab.measure import Thunk, machine_stamp, time_interleaved
from attlas.masks import Causal, Global, Grid, Mask, Random, Window
from attlas.masks.geometry import Axis
from attlas.ops.attention import attention
from attlas.reference import softmax as reference

GEMM_SIZE, COPY_FLOATS = 1536, 1 << 26
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One row of the table. bars: least allowed ratio to the limit, to SDPA, to FlexAttention (None = no bar)."""

    name: str
    kind: str  # forward, backward, decode, paged
    dtype: torch.dtype
    tokens: int
    dim: int
    mask: Mask | None = None
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    limit_bar: float | None = None
    sdpa_bar: float | None = None
    flex_bar: float | None = None

    @property
    def pairs(self) -> int:
        """Allowed pairs of all batch rows and heads."""
        return self.batch * self.heads * (self.tokens**2 if self.mask is None else self.mask.count((self.tokens, self.tokens)))

    @property
    def flops(self) -> int:
        return self.pairs * self.dim * (10 if self.kind == "backward" else 4)

    @property
    def cache_bytes(self) -> int:
        return 2 * self.batch * self.tokens * self.kv_heads * self.dim * self.dtype.itemsize


def cases() -> tuple[Case, ...]:
    """The cases with their bars."""
    window, bird = Causal() & Window.last(512), Window(96, 96) | Global(tuple(range(128))) | Random(3, 64, 0, 256)
    found = []
    for d in (64, 128):
        found.append(Case(f"fp32 causal D{d}", "forward", F32, 8192, d, Causal(), limit_bar=0.9, sdpa_bar=1.2))
    found.append(Case("fp32 window 512", "forward", F32, 8192, 64, window, limit_bar=0.8, flex_bar=2.0))
    for t in (2048, 8192):
        for d in (64, 128):
            found.append(Case(f"bf16 full T{t} D{d}", "forward", BF16, t, d, None, limit_bar=0.65, sdpa_bar=1.6))
            found.append(Case(f"bf16 causal T{t} D{d}", "forward", BF16, t, d, Causal(), limit_bar=0.65, sdpa_bar=2.0))
    found += [
        Case("fp32 backward causal", "backward", F32, 4096, 64, Causal(), limit_bar=0.8, sdpa_bar=1.15),
        Case("fp32 backward window 512", "backward", F32, 8192, 64, window, limit_bar=0.8),
        Case("bf16 decode 32/8", "decode", BF16, 8192, 128, None, 1, 32, 8, limit_bar=0.6, sdpa_bar=20.0),
        Case("bf16 paged decode 32/8", "paged", BF16, 8192, 128, None, 1, 32, 8, limit_bar=0.9),
        Case("fp32 BigBird", "forward", F32, 16384, 64, bird, limit_bar=0.7),
        Case("fp32 short rows", "forward", F32, 128, 64, None, 64, 8, 8, sdpa_bar=1.0),
        Case("bf16 short rows", "forward", BF16, 128, 64, None, 64, 8, 8, sdpa_bar=1.0),
    ]
    return tuple(found)


def run(
    *, only: Sequence[str] = (), repeats: int = 7, flex: bool = True, naive: bool = True, max_seconds: float = 60.0
) -> dict[str, Any]:
    """Check and measure.

    only     texts; a case runs when its name contains one of them (none = all)
    repeats  timed rounds of a case
    flex     also compile and time FlexAttention where it has the operation (half a minute a case)
    naive    also time the naive formula where its score matrix stays below a gigabyte
    """
    chosen = [c for c in cases() if not only or any(text in c.name for text in only)]
    if not chosen:
        raise OptionError(f"bench attention: no case is named like {list(only)}; cases: {', '.join(c.name for c in cases())}")
    rows = [measure(c, repeats, flex, naive, max_seconds) for c in chosen]
    return {"machine": machine_stamp(), "core": status(), "threads": torch.get_num_threads(), "rows": rows}


def measure(case: Case, repeats: int, flex: bool, naive: bool, max_seconds: float) -> dict[str, Any]:
    """One row; AssertionError when the result is wrong, before anything is timed."""
    torch.manual_seed(0)
    t = 1 if case.kind in ("decode", "paged") else case.tokens
    q = torch.randn(case.batch, t, case.heads, case.dim).to(case.dtype)
    k, v = (keys(case) for _ in range(2))
    check(case, q, k, v)
    contenders = {"attlas": subject(case, q, k, v), **peers(case, q, k, v, flex, naive), **limits(case)}
    if case.kind == "paged":
        contenders["contiguous"] = subject(Case(**{**vars(case), "kind": "decode"}), q, k, v)
    times = time_interleaved(contenders, repeats, max_seconds=max_seconds)
    seconds = {name: x.median for name, x in times.items()}
    work = case.cache_bytes if case.kind in ("decode", "paged") else case.flops
    if case.kind == "paged":
        limit = work / seconds["contiguous"]
    else:
        limit = (2 * GEMM_SIZE**3 if "gemm" in seconds else 8 * COPY_FLOATS) / seconds["gemm" if "gemm" in seconds else "copy"]
    row = {
        "name": case.name,
        "seconds": {name: x.to_dict() for name, x in times.items()},
        "rate": work / seconds["attlas"],
        "limit": limit,
        "of_limit": work / seconds["attlas"] / limit,
        "bars": {"limit": case.limit_bar, "sdpa": case.sdpa_bar, "flex": case.flex_bar},
    }
    for peer in ("sdpa", "flex", "naive"):
        row[f"over_{peer}"] = seconds[peer] / seconds["attlas"] if peer in seconds else None
    return row


def keys(case: Case) -> Tensor:
    """Keys or values; those of a cache lie on large pages, as in the parts of attlas.cache."""
    shape = case.batch, case.tokens, case.kv_heads, case.dim
    made = torch.empty(shape, dtype=case.dtype)
    return (large_pages(made) if case.kind in ("decode", "paged") else made).copy_(torch.randn(shape))


def subject(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Thunk:
    """The measured call, attlas with impl="cpu" named outright so that nothing else can run in its place."""
    if case.kind == "decode":
        scale, length = 1 / math.sqrt(case.dim), [case.tokens] * case.batch
        return lambda: launch.decode(q, k, v, length, launch.Visible(), scale)
    if case.kind == "paged":
        page, scale, length = 16, 1 / math.sqrt(case.dim), [case.tokens] * case.batch
        order = torch.randperm(case.batch * case.tokens // page)
        pages = [large_pages(torch.empty(len(order), page, case.kv_heads, case.dim, dtype=case.dtype)) for _ in range(2)]
        for target, source in zip(pages, (k, v), strict=True):
            target[order] = source.view(target.shape)
        table = order.view(case.batch, -1).int()
        return lambda: launch.decode(q, pages[0], pages[1], length, launch.Visible(), scale, block_table=table)
    if case.kind == "forward":
        return lambda: attention(q, k, v, mask=case.mask, impl="cpu")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, mask=case.mask, impl="cpu")
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def peers(case: Case, q: Tensor, k: Tensor, v: Tensor, flex: bool, naive: bool) -> dict[str, Thunk]:
    """SDPA in its own layout, FlexAttention compiled (it has no CPU backward), the formula written out."""
    hq, hk, hv = heads = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    causal, found = case.mask == Causal(), dict[str, Callable[[], object]]()
    gqa = case.heads != case.kv_heads
    if case.mask is None or causal:
        if case.kind == "backward":
            leaves = [x.requires_grad_() for x in heads]
            out = F.scaled_dot_product_attention(hq, hk, hv, is_causal=causal)
            grad = torch.randn_like(out)
            found["sdpa"] = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)
        else:
            found["sdpa"] = lambda: F.scaled_dot_product_attention(hq, hk, hv, is_causal=causal, enable_gqa=gqa)
    if flex and case.flex_bar is not None:
        found["flex"] = flex_window(heads, 512)
    if naive and case.kind == "forward" and 4 * case.batch * case.heads * case.tokens**2 < 1 << 30:
        found["naive"] = lambda: ((hq @ hk.mT) / math.sqrt(case.dim)).softmax(-1) @ hv
    return found


def flex_window(heads: list[Tensor], size: int) -> Thunk:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    t = heads[0].shape[2]
    block_mask = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < size), None, None, t, t, device="cpu")
    compiled: Any = torch.compile(flex_attention)
    with torch.no_grad():
        compiled(*heads, block_mask=block_mask)

    def call() -> object:
        with torch.no_grad():
            return compiled(*heads, block_mask=block_mask)

    return call


def limits(case: Case) -> dict[str, Thunk]:
    """The machine's own work, timed in the same rounds."""
    if case.kind in ("decode", "paged"):
        source = torch.ones(COPY_FLOATS)
        target = torch.empty_like(source)
        return {"copy": lambda: target.copy_(source), "read": source.sum}
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(case.dtype) for _ in range(2))
    out = torch.empty_like(a)
    return {"gemm": lambda: torch.mm(a, b, out=out)}


def check(case: Case, q: Tensor, k: Tensor, v: Tensor, sample: int = 37) -> None:
    """A sample of query rows against the reference in fp64; for backward, the gradients of a loss over these rows."""
    rows = torch.randperm(q.shape[1])[:sample].sort().values
    first = case.tokens - q.shape[1]
    grid = Grid.at(Axis.of((rows + first).tolist()), range(case.tokens))
    mask = None if case.mask is None else case.mask.dense(grid)

    def definition(kind: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(kind).requires_grad_() for x in (q[:, rows], k, v)]
        out, _ = reference.attention(
            *leaves,
            mask_bool=mask,
            score_mod=None,
            q_pos=rows + first,
            k_pos=torch.arange(case.tokens),
            scale=case.dim**-0.5,
            sink=None,
        )
        if case.kind != "backward":
            return [out.detach()]
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    if case.kind == "backward":
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, mask=case.mask, impl="cpu")
        grad = torch.zeros_like(out)
        grad[:, rows] = 1
        dq, dk, dv = torch.autograd.grad(out, leaves, grad)
        got = [out.detach()[:, rows], dq[:, rows], dk, dv]
    else:
        result: Any = subject(case, q, k, v)()
        got = [(result if isinstance(result, Tensor) else result[0])[:, rows]]
    band = {F32: 2e-6, BF16: 4e-3}[case.dtype]
    for x, near, exact in zip(got, definition(case.dtype), definition(torch.float64), strict=True):
        error, naive = (x - exact).abs().max().item(), (near - exact).abs().max().item()
        allowed = 2 * naive + band * max(1.0, exact.abs().max().item())
        assert error <= allowed, f"{case.name}: error {error:.2e}, allowed {allowed:.2e}: nothing is timed"


def table(result: dict[str, Any]) -> str:
    """The rows as text: rate, share of the limit, times over each peer; `!` marks a missed bar."""
    lines = [f"{'case':28} {'rate':>12} {'of limit':>14} {'x SDPA':>14} {'x Flex':>14} {'x naive':>8}"]
    for row in result["rows"]:
        unit = "GB/s" if "decode" in row["name"] else "GFLOP/s"

        def cell(value: float | None, bar: float | None) -> str:
            if value is None:
                return "-"
            return f"{value:.2f}" + (f" (>= {bar}){'' if value >= bar else '!'}" if bar is not None else "")

        bars = row["bars"]
        shares = [(row["of_limit"], bars["limit"]), (row["over_sdpa"], bars["sdpa"]), (row["over_flex"], bars["flex"])]
        cells = " ".join(f"{cell(value, bar):>14}" for value, bar in shares)
        lines.append(f"{row['name']:28} {row['rate'] / 1e9:>7.1f} {unit:8} {cells} {cell(row['over_naive'], None):>8}")
    lines.append(f"core {result['core']}, {result['threads']} threads; limit: matrix product, copy, or contiguous decode (paged)")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run(only=sys.argv[1:])))
