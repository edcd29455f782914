"""The implementations of `attention` that need no compiler, against each other and against the machine, gated on correctness.

python -m attlas.lab.bench_attention

Each case is checked first: a sample of query rows, and the gradients of a loss over them, against the reference in fp64, with an
error of at most twice that of the plain formula. A wrong result raises and nothing is timed or printed. Then everything is timed
in turns, the machine's matrix product among it, so that the ratios of a row come from one run. Rates count useful FLOP: pairs
that the mask allows, 4 D a pair forward and 10 D backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attlas.errors import OptionError
from attlas.lab.measure import PeakRss, Thunk, machine_stamp, peak_rss, time_interleaved
from attlas.masks import Axis, Causal, Global, Grid, Mask, Random, Window
from attlas.ops.attention import attention
from attlas.ops.call import make_call
from attlas.ops.explain import explain
from attlas.ops.select import IMPLS, run_call
from attlas.reference import softmax as reference
from attlas.testing.budget import assert_budget

GEMM_SIZE = 1024
PATTERNS: dict[str, Mask | None] = {
    "full": None,
    "causal": Causal(),
    "window 512": Causal() & Window.last(512),
    "window 512 and first": Causal() & (Window.last(512) | Global((0,))),
    "random blocks": Random(3, 64, seed=0) | Window(96, 96),
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    pattern: str
    backward: bool
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        return f"{self.pattern}, {'backward' if self.backward else 'forward'}, T{self.tokens} H{heads} D{self.dim}"

    @property
    def mask(self) -> Mask | None:
        return PATTERNS[self.pattern]

    @property
    def flops(self) -> int:
        pairs = self.tokens**2 if self.mask is None else self.mask.count((self.tokens, self.tokens))
        return self.heads * pairs * self.dim * (10 if self.backward else 4)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(0)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        return tuple(torch.randn(1, self.tokens, h, self.dim, generator=g).to(self.dtype) for h in heads)  # type: ignore[return-value]


def run(
    *,
    tokens: int = 8192,
    heads: int = 8,
    kv_heads: int | None = None,
    dim: int = 64,
    only: Sequence[str] = (),
    impls: Sequence[str] = ("blocked", "sdpa", "cpu"),
    repeats: int = 7,
    max_seconds: float = 60.0,
) -> dict[str, Any]:
    """Check and measure.

    tokens, heads, kv_heads (None = heads), dim  of one sequence in fp32
    only         texts; a case runs when its name contains one of them (none = all)
    impls        implementations to time; each where it can run the case
    repeats      timed rounds of a case
    max_seconds  stop the rounds of a case after this
    """
    kv_heads = heads if kv_heads is None else kv_heads
    every = [Case(p, b, tokens, heads, kv_heads, dim) for p in PATTERNS for b in (False, True)]
    chosen = [c for c in every if not only or any(text in c.name for text in only)]
    if not chosen:
        raise OptionError(f"bench attention: no case is named like {list(only)}; cases: {'; '.join(c.name for c in every)}")
    rows = [measure(c, impls, repeats, max_seconds) for c in chosen]
    return {"machine": machine_stamp(), "rows": rows, "decode": decode_overhead(repeats=repeats)}


def measure(case: Case, impls: Sequence[str], repeats: int, max_seconds: float) -> dict[str, Any]:
    """One row; AssertionError when a result is wrong, before anything is timed."""
    q, k, v = case.tensors()
    able = {i.name for i in IMPLS["attention"] if i.supports(make_call(q, k, v, mask=case.mask)) is None}
    running = [name for name in impls if name in able]
    for impl in running:
        check(case, impl)
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=case.dtype) for _ in range(2))
    contenders: dict[str, Thunk] = {"gemm": lambda: torch.mm(a, b)}
    for impl in running:
        contenders[impl] = subject(case, impl)
    times = time_interleaved(contenders, repeats, max_seconds=max_seconds)
    gemm = 2 * GEMM_SIZE**3 / times["gemm"].median
    return {
        "name": case.name,
        "gemm": gemm,
        "seconds": {name: t.to_dict() for name, t in times.items()},
        "rate": {name: case.flops / times[name].median for name in running},
        "of_gemm": {name: case.flops / times[name].median / gemm for name in running},
        "auto": explain("attention", q, k, v, mask=case.mask).impl,
    }


def subject(case: Case, impl: str) -> Thunk:
    """The timed call."""
    q, k, v = case.tensors()
    if not case.backward:
        return lambda: attention(q, k, v, mask=case.mask, impl=impl)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(q, k, v, mask=case.mask, impl=impl)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def check(case: Case, impl: str, sample: int = 37) -> None:
    """Sampled rows of `impl` within the error budget, and for a backward case the gradients of a loss over them."""
    q, k, v = case.tensors()
    rows = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(1))[:sample].sort().values
    mask = None if case.mask is None else case.mask.dense(Grid.at(Axis.of(rows), range(case.tokens)))

    def definition(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q[:, rows], k, v)]
        out, _ = reference.attention(*leaves, mask_bool=mask)
        return [out.detach(), *(torch.autograd.grad(out.sum(), leaves) if case.backward else ())]

    leaves = [x.requires_grad_(case.backward) for x in (q, k, v)]
    out = attention(q, k, v, mask=case.mask, impl=impl)
    got = [out.detach()[:, rows]]
    if case.backward:
        weight = torch.zeros_like(out).index_fill_(1, rows, 1.0)
        dq, dk, dv = torch.autograd.grad(out, leaves, weight)
        got += [dq[:, rows], dk, dv]
    truth, plain = definition(torch.float64), definition(case.dtype)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), got, plain, truth, strict=False):
        assert_budget(x, y, z, f"{case.name}, {impl}: {name}")


def decode_overhead(*, keys: int = 1024, heads: int = 8, kv_heads: int = 2, dim: int = 64, repeats: int = 7) -> dict[str, Any]:
    """Seconds of one decode step of `blocked` and of its two products and softmax alone, at another position in every call."""
    q, k, v = torch.randn(1, 1, heads, dim), *(torch.randn(1, keys, kv_heads, dim) for _ in range(2))
    position = [keys]

    def step() -> object:
        position[0] += 1
        last = position[0]
        grid = Grid.at(range(last - 1, last), range(last - keys, last))
        return run_call(make_call(q, k, v, mask=Causal() & Window.last(keys), grid=grid), "blocked")

    def products() -> object:
        scores = torch.bmm(q.view(kv_heads, -1, dim) * dim**-0.5, k[0].permute(1, 2, 0))
        return torch.bmm(torch.softmax(scores, -1), v[0].transpose(0, 1))

    found = products()
    assert isinstance(found, Tensor)
    run_once = step()
    assert isinstance(run_once, tuple) and torch.allclose(run_once[0].flatten(), found.flatten(), atol=1e-5)
    times = time_interleaved({"step": step, "products": products}, repeats)
    return {"keys": keys, **{name: t.to_dict() for name, t in times.items()}}


def forward_backward(tensors: tuple[Tensor, Tensor, Tensor, Tensor, str]) -> None:
    """What `peak_memory` measures; importable, because another process runs it."""
    q, k, v, grad, impl = tensors
    attention(q, k, v, mask=Causal(), impl=impl).backward(grad)


def _setup(tokens: int, heads: int, dim: int, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    for leaf_tokens in (97, tokens):  # the first, short call loads libraries and starts thread pools
        made = [torch.randn(1, leaf_tokens, heads, dim, requires_grad=i < 3) for i in range(4)]
        if leaf_tokens != tokens:
            forward_backward((made[0], made[1], made[2], made[3].detach(), impl))
    return made[0], made[1], made[2], made[3].detach(), impl


def peak_memory(tokens: int = 32768, heads: int = 8, dim: int = 64, *, impl: str = "blocked") -> dict[str, Any]:
    """Peak resident memory of a causal forward and backward pass in fp32, in a process of its own, beyond q, k, v and grad_out.

    ratio = growth / bytes of q, k, v and out together. out and the three gradients alone are a ratio of 1; a matrix of scores
    would be one of tokens / (4 dim).
    """
    found: PeakRss = peak_rss(forward_backward, (tokens, heads, dim, impl), setup=_setup)
    base = 4 * tokens * heads * dim * 4
    return {"tokens": tokens, "impl": impl, "base": base, **found.to_dict(), "ratio": found.growth / base}


def table(result: dict[str, Any]) -> str:
    """The result as text: rates, and their share of the matrix product's rate."""
    names = sorted({name for row in result["rows"] for name in row["rate"]})
    lines = [f"{'case':<50} {'gemm':>9} " + " ".join(f"{n:>18}" for n in names) + "  auto"]
    for row in result["rows"]:
        cells = [f"{row['rate'][n] / 1e9:8.1f} = {row['of_gemm'][n]:6.1%}" if n in row["rate"] else f"{'-':>17}" for n in names]
        lines.append(f"{row['name']:<50} {row['gemm'] / 1e9:9.1f} " + " ".join(f"{c:>18}" for c in cells) + f"  {row['auto']}")
    step, products = (result["decode"][n]["median"] * 1e6 for n in ("step", "products"))
    lines.append(
        f"rates in useful GFLOP/s; decode over {result['decode']['keys']} keys: {step:.0f} us, its products {products:.0f} us"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run()))
