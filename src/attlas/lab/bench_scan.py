"""The linear recurrence and the long convolution: rates over the machine's matrix product, growth with length, cost of a decode
step.

Every case is checked against the definition in fp64 before it is timed. Rates count the chunk form's own flops: forward
2 T H (2 C K + 2 C V + 4 K V) / 2 with C = 64, and three times that for forward and backward together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attlas.kernels.cpu.library import status
from attlas.lab.measure import Thunk, fit_power_law, machine_stamp, time_interleaved
from attlas.ops.long_conv import long_conv
from attlas.ops.scan import scan
from attlas.registry import load_attr
from attlas.shapes import Aux, AuxRequest
from attlas.testing.budget import assert_budget

GEMM_SIZE, CHUNK = 1536, 64
DECAYS = ("per token", "per channel")


def run(
    *,
    tokens: int = 16384,
    heads: int = 8,
    dim: int = 64,
    repeats: int = 5,
    lengths: str = "1024,4096,16384,65536",
    peer: bool = True,
) -> dict[str, Any]:
    """Check and measure.

    tokens, heads, dim  of the rate cases
    repeats             timed rounds
    lengths             for the exponent of time over length
    peer                also time transformers' Mamba-2 chunk scan (decay per token) where transformers is installed
    """
    growth = [int(n) for n in lengths.split(",")]
    rates = [_rate(decay, tokens, heads, dim, repeats, peer) for decay in DECAYS]
    return {
        "machine": machine_stamp(),
        "core": status(),
        "threads": torch.get_num_threads(),
        "rates": rates,
        "exponents": {decay: _exponent(decay, growth, heads, dim) for decay in DECAYS},
        "decode": _decode_steps(heads, dim, repeats),
        "convolution": _convolution(65536, 8, repeats),
    }


def _inputs(decay: str, tokens: int, heads: int, dim: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    qkv = [torch.randn(1, tokens, heads, dim) for _ in range(3)]
    shape = (1, tokens, heads) if decay == "per token" else (1, tokens, heads, dim)
    return qkv, -0.1 * torch.rand(shape)


def _out(leaves: list[Tensor], *, form: str = "auto", impl: str = "auto") -> Tensor:
    """The outputs for (q, k, v, log_decay)."""
    return scan(*leaves[:3], log_decay=leaves[3], form=form, impl=impl, return_aux=AuxRequest(state=True))[0]


def _check(decay: str, heads: int, dim: int) -> None:
    """Outputs and gradients of a shorter sequence against the quadratic form in fp64."""
    qkv, log_decay = _inputs(decay, 301, heads, dim)

    def results(dtype: torch.dtype, form: str) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (*qkv, log_decay)]
        out = _out(leaves, form=form)
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]

    got, naive = results(torch.float32, "chunk"), results(torch.float32, "parallel")
    for a, b, c in zip(got, naive, results(torch.float64, "parallel"), strict=True):
        assert_budget(a, b, c, f"scan with decay {decay}: nothing is timed")


def _rate(decay: str, tokens: int, heads: int, dim: int, repeats: int, peer: bool) -> dict[str, Any]:
    _check(decay, heads, dim)
    qkv, log_decay = _inputs(decay, tokens, heads, dim)
    leaves = [t.requires_grad_() for t in (*qkv, log_decay)]

    def both(impl: str) -> Thunk:
        def call() -> object:
            return torch.autograd.grad(_out(leaves, form="chunk", impl=impl).sum(), leaves)

        return call

    def forward() -> object:
        with torch.no_grad():
            return scan(*leaves[:3], log_decay=leaves[3], form="chunk")

    a = torch.randn(GEMM_SIZE, GEMM_SIZE)
    contenders: dict[str, Thunk] = {"forward": forward, "both": both("auto"), "blocked": both("blocked"), "gemm": lambda: a @ a}
    if peer and decay == "per token" and (theirs := _mamba_peer(leaves)) is not None:
        contenders["transformers"] = theirs
    seconds = {name: t.median for name, t in time_interleaved(contenders, repeats, max_seconds=90).items()}
    work = 2 * tokens * heads * (2 * CHUNK * dim + 2 * dim * dim)
    limit = 2 * GEMM_SIZE**3 / seconds["gemm"]
    row = {"decay": decay, "seconds": seconds, "limit": limit}
    row["forward_of_limit"] = work / seconds["forward"] / limit
    row["both_of_limit"] = 3 * work / seconds["both"] / limit
    row["over_blocked"] = seconds["blocked"] / seconds["both"]
    row["over_transformers"] = seconds["transformers"] / seconds["both"] if "transformers" in seconds else None
    return row


def _mamba_peer(leaves: list[Tensor]) -> Thunk | None:
    """transformers' chunked scan, forward and backward, at its default chunk of 256: x = v, B = k, C = q, A = -1, dt =
    -log_decay."""
    try:
        theirs: Callable[..., Any] = load_attr("transformers.models.mamba2.modeling_mamba2:mamba2_chunk_scan")
    except (ImportError, AttributeError):
        return None
    q, k, v, log_decay = leaves

    def call() -> object:
        out = theirs(v, -log_decay, -torch.ones(v.shape[2]), k, q, 256)
        return torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), leaves)

    return call


def _exponent(decay: str, lengths: list[int], heads: int, dim: int) -> dict[str, Any]:
    times = []
    for n in lengths:
        qkv, log_decay = _inputs(decay, n, heads, dim)
        leaves = [t.requires_grad_() for t in (*qkv, log_decay)]
        call = {"scan": lambda x=leaves: torch.autograd.grad(_out(x).sum(), x)}
        times.append(time_interleaved(call, 3, max_seconds=20)["scan"].median)
    fit = fit_power_law(lengths, times, last=None)
    return {"lengths": lengths, "seconds": times, "exponent": None if fit is None else fit.exponent}


def _decode_steps(heads: int, dim: int, repeats: int) -> dict[str, Any]:
    """One token on the state after 1,024 and after 1,048,576 tokens."""
    calls: dict[str, Thunk] = {}
    for n in (1024, 1 << 20):
        state = torch.zeros(1, heads, dim, dim)
        for _ in range(n // 65536 or 1):
            qkv, log_decay = _inputs("per token", min(n, 65536), heads, dim)
            _, aux = scan(*qkv, log_decay=log_decay, initial_state=state, return_aux=AuxRequest(state=True))
            assert isinstance(aux, Aux) and aux.state is not None
            state = aux.state
        qkv, log_decay = _inputs("per token", 1, heads, dim)
        calls[str(n)] = partial(scan, *qkv, log_decay=log_decay, initial_state=state)
    seconds = {name: t.median for name, t in time_interleaved(calls, 4 * repeats).items()}
    return {"seconds": seconds, "ratio": seconds[str(1 << 20)] / seconds["1024"]}


def _convolution(tokens: int, channels: int, repeats: int) -> dict[str, Any]:
    """The FFT convolution against the direct one of torch."""
    torch.manual_seed(0)
    u, kernel = torch.randn(1, tokens, channels), torch.randn(channels, tokens) * torch.linspace(0, -12, tokens).exp()
    short = slice(0, 257)
    exact = torch.nn.functional.conv1d(
        u[:, short].mT.double(), kernel[:, short].flip(1).double()[:, None], padding=256, groups=channels
    )
    error = (long_conv(u[:, short], kernel).double() - exact[..., :257].mT).abs().max()
    assert error < 1e-4, f"long_conv is off by {error:.2g}: nothing is timed"
    weight = kernel.flip(1)[:, None]
    with torch.no_grad():
        fast = time_interleaved({"fft": lambda: long_conv(u, kernel)}, repeats)["fft"].median
        part = 4096  # the direct one is quadratic: timed on a part and scaled, a whole one takes minutes
        direct = {"d": lambda: torch.nn.functional.conv1d(u[:, :part].mT, weight[..., -part:], padding=part - 1, groups=channels)}
        slow = time_interleaved(direct, 3, max_seconds=30)["d"].median * (tokens / part) ** 2
    return {"tokens": tokens, "seconds": {"fft": fast, "direct (scaled from 4096)": slow}, "over_direct": slow / fast}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = []
    for row in result["rates"]:
        peer = "-" if row["over_transformers"] is None else f"{row['over_transformers']:.1f}x"
        lines.append(
            f"decay {row['decay']:12} forward {row['forward_of_limit']:.2f} of the matrix product, forward + "
            f"backward {row['both_of_limit']:.2f}; "
            f"over torch chunks {row['over_blocked']:.1f}x, over transformers {peer}"
        )
    for decay, fit in result["exponents"].items():
        lines.append(
            f"decay {decay:12} time exponent {fit['exponent']:.2f} over {fit['lengths'][0]} ... {fit['lengths'][-1]} tokens"
        )
    lines.append(f"decode step after 1,048,576 tokens / after 1,024: {result['decode']['ratio']:.2f}")
    lines.append(
        f"long convolution at {result['convolution']['tokens']} tokens: "
        f"{result['convolution']['over_direct']:.0f}x the direct one"
    )
    lines.append(f"core {result['core']}, {result['threads']} threads")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(run()))
