"""The linear recurrence and the long convolution: rates over the machine's matrix product and over named peers, growth with
length, cost of a decode step, the length from which a layer beats softmax attention, and the drift of a state in fp32.

Every case is checked before it is timed. Rates count the chunk form's own flops: forward 2 T H (C K + C V + 2 K V) with C = 64,
and three times that for forward and backward together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attlas.catalogue.index import build
from attlas.kernels.cpu.library import status
from attlas.lab.measure import Thunk, fit_power_law, machine_stamp, time_interleaved
from attlas.lab.progress import Progress, make_progress
from attlas.ops.long_conv import long_conv
from attlas.ops.scan import scan
from attlas.reference.linear import scan_recurrent
from attlas.registry import load_attr
from attlas.shapes import Aux, AuxRequest
from attlas.testing.budget import assert_budget

GEMM_SIZE, CHUNK = 1536, 64
DECAYS = ("per token", "per channel")
LAYERS = ("retnet", "gla")
# Rough seconds of a stage on two cores: only the bar of the progress reads them. Quick ones come first.
SECONDS = {"decode": 8.0, "convolution": 12.0, "growth": 12.0, "rates": 60.0, "crossover": 45.0, "drift": 15.0}
# What the rows are held against: (at least or at most, bound).
BARS = {
    "both_of_limit": (">=", 0.5),
    "over_best": (">=", 3.0),
    "exponent": ("<=", 1.05),
    "ratio": ("<=", 1.1),
    "over_direct": (">=", 100.0),
}


def run(
    *,
    tokens: int = 16384,
    heads: int = 8,
    dim: int = 64,
    repeats: int = 5,
    lengths: str = "1024,4096,16384,65536",
    peer: bool = True,
    only: str = ",".join(SECONDS),
    quiet: bool = False,
) -> dict[str, Any]:
    """Check and measure.

    tokens, heads, dim  of the rate cases
    repeats             timed rounds
    lengths             for the exponent of time over length
    peer                also time transformers' Mamba-2 chunk scan (decay per token) where transformers is installed
    only                stages, separated by commas: decode, convolution, growth, rates, crossover, drift
    quiet               no progress on stderr
    """
    chosen = [name for name in SECONDS if name in {part.strip() for part in only.split(",")}]
    growth = [int(n) for n in lengths.split(",")]
    work: dict[str, Callable[[Callable[[float], None]], Any]] = {
        "decode": lambda tick: _decode_steps(heads, dim, repeats, tick),
        "convolution": lambda tick: _convolution(65536, 2, repeats),
        "growth": lambda tick: {decay: _exponent(decay, growth, heads, dim, tick) for decay in DECAYS},
        "rates": lambda tick: [_rate(decay, tokens, heads, dim, repeats, peer) for decay in DECAYS],
        "crossover": lambda tick: [_crossover(name, heads, dim, tick) for name in LAYERS],
        "drift": lambda tick: _drift(100_000, tick),
    }
    result: dict[str, Any] = {"machine": machine_stamp(), "core": status(), "threads": torch.get_num_threads()}
    with make_progress(quiet) as progress:
        progress.stages({name: SECONDS[name] for name in chosen}, {})
        for name in chosen:
            progress.begin(name, name, SECONDS[name])
            result[name] = work[name](_ticker(progress, name))
            progress.end(name, name, "; ".join(SENTENCES[name](result[name])))
    return result


def _ticker(progress: Progress, name: str) -> Callable[[float], None]:
    return lambda share: progress.tick(name, name, min(share, 1.0))


def _inputs(decay: str, tokens: int, heads: int, dim: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    qkv = [torch.randn(1, tokens, heads, dim) for _ in range(3)]
    shape = (1, tokens, heads) if decay == "per token" else (1, tokens, heads, dim)
    return qkv, -1e-3 - 0.1 * torch.rand(shape)


def _out(leaves: list[Tensor], *, form: str = "auto", impl: str = "auto") -> Tensor:
    """The outputs for (q, k, v, log_decay)."""
    return scan(*leaves[:3], log_decay=leaves[3], form=form, impl=impl, return_aux=AuxRequest(state=True))[0]


def _state(qkv: list[Tensor], log_decay: Tensor, start: Tensor | None = None) -> Tensor:
    """The state after all tokens."""
    q, k, v = qkv
    _, aux = scan(q, k, v, log_decay=log_decay, initial_state=start, return_aux=AuxRequest(state=True))
    assert isinstance(aux, Aux) and aux.state is not None
    return aux.state


# ---- rates --------------------------------------------------------------------------------------------------------------------


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
    towards = torch.randn(1, tokens, heads, dim)

    def both(run: Callable[[list[Tensor]], Tensor]) -> Thunk:
        return lambda: torch.autograd.grad(run(leaves), leaves, towards)

    def forward() -> object:
        with torch.no_grad():
            return scan(*leaves[:3], log_decay=leaves[3], form="chunk")

    peers = _peers(decay, peer)
    with torch.no_grad():
        ours = _out(leaves, form="chunk")
        for name, theirs in peers.items():
            error = (theirs(leaves) - ours).abs().max() / ours.abs().max()
            assert error < 1e-4, f"{name} differs by {error:.2g} with decay {decay}: nothing is timed"
    a = torch.randn(GEMM_SIZE, GEMM_SIZE)
    contenders: dict[str, Thunk] = {"forward": forward, "both": both(partial(_out, form="chunk")), "gemm": lambda: a @ a}
    contenders |= {name: both(theirs) for name, theirs in peers.items()}
    timings = time_interleaved(contenders, repeats, max_seconds=60)
    seconds = {name: t.median for name, t in timings.items()}
    work = 2 * tokens * heads * (2 * CHUNK * dim + 2 * dim * dim)
    limit = 2 * GEMM_SIZE**3 / seconds["gemm"]
    best = min(peers, key=lambda name: seconds[name])
    return {
        "decay": decay,
        "seconds": seconds,
        "spread": {name: t.spread for name, t in timings.items()},
        "limit": limit,
        "forward_of_limit": work / seconds["forward"] / limit,
        "both_of_limit": 3 * work / seconds["both"] / limit,
        "best_peer": best,
        "over_best": seconds[best] / seconds["both"],
        "over": {name: seconds[name] / seconds["both"] for name in peers},
    }


def _peers(decay: str, wanted: bool) -> dict[str, Callable[[list[Tensor]], Tensor]]:
    """What computes the same on a CPU: name -> outputs for (q, k, v, log_decay)."""
    peers: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "a loop over chunks in torch": lambda leaves: plain_chunks(*leaves),
        "attlas in torch": partial(_out, form="chunk", impl="blocked"),
    }
    if not wanted or decay != "per token":
        return peers
    try:
        theirs: Callable[..., Any] = load_attr("transformers.models.mamba2.modeling_mamba2:mamba2_chunk_scan")
    except (ImportError, AttributeError):
        return peers

    def mamba(leaves: list[Tensor]) -> Tensor:  # x = v, B = k, C = q / sqrt(K), A = -1, dt = -log_decay, of which v must be free
        q, k, v, log_decay = leaves
        out = theirs(v / -log_decay[..., None], -log_decay, -torch.ones(v.shape[2]), k, q * q.shape[-1] ** -0.5, 256)
        return out[0] if isinstance(out, tuple) else out

    return {"transformers' Mamba-2 chunk scan": mamba, **peers}


def plain_chunks(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, size: int = 128) -> Tensor:
    """The chunk form as one writes it in torch: a loop, decay factored at the start of the chunk (enough where it is mild)."""
    decay = log_decay if log_decay.dim() == 4 else log_decay[..., None]
    q, k, v, decay = (x.transpose(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v, decay))
    state, outs = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for x, y, z, g in zip(*(t.split(size, 2) for t in (q, k, v, decay)), strict=True):
        total = g.cumsum(2)
        left, right, end = x * total.exp(), y * (-total).exp(), total[:, :, -1, :, None].exp()
        outs.append((left @ right.mT).tril() @ z + left @ state)
        state = end * (state + right.mT @ z)
    return torch.cat(outs, 2).transpose(1, 2)


# ---- growth, decode, crossover ------------------------------------------------------------------------------------------------


def _exponent(decay: str, lengths: list[int], heads: int, dim: int, tick: Callable[[float], None]) -> dict[str, Any]:
    times = []
    for n in lengths:
        qkv, log_decay = _inputs(decay, n, heads, dim)
        leaves = [t.requires_grad_() for t in (*qkv, log_decay)]
        towards = torch.randn(1, n, heads, dim)
        call = {"scan": lambda x=leaves, y=towards: torch.autograd.grad(_out(x), x, y)}
        times.append(time_interleaved(call, 5, max_seconds=10)["scan"].median)
        tick(sum(lengths[: len(times)]) / sum(lengths) / 2 + 0.5 * (decay == DECAYS[1]))
    fit = fit_power_law(lengths, times, last=None)
    return {"lengths": lengths, "seconds": times, "exponent": None if fit is None else fit.exponent}


def _decode_steps(heads: int, dim: int, repeats: int, tick: Callable[[float], None]) -> dict[str, Any]:
    """One token on the state after 1,024 and after 1,048,576 tokens."""
    calls: dict[str, Thunk] = {}
    for n in (1024, 1 << 20):
        state = torch.zeros(1, heads, dim, dim)
        pieces = n // 65536 or 1
        qkv, log_decay = _inputs("per token", min(n, 65536), heads, dim)
        for i in range(pieces):
            state = _state(qkv, log_decay, state)
            tick((i + 1) / pieces)
        qkv, log_decay = _inputs("per token", 1, heads, dim)
        step = partial(scan, *qkv, log_decay=log_decay, initial_state=state)
        exact = partial(scan, *(t.double() for t in qkv), log_decay=log_decay.double(), initial_state=state.double())
        got, want = step(), exact()
        assert isinstance(got, Tensor) and isinstance(want, Tensor)
        assert (got - want).abs().max() < 1e-4 * want.abs().max(), "the decode step is off: nothing is timed"
        calls[str(n)] = step
    seconds = {name: t.median for name, t in time_interleaved(calls, 20 * repeats).items()}
    return {"seconds": seconds, "ratio": seconds[str(1 << 20)] / seconds["1024"]}


def _crossover(name: str, heads: int, dim: int, tick: Callable[[float], None]) -> dict[str, Any]:
    """The layer against our causal softmax attention of the same width, forward and backward, at growing lengths."""
    width = heads * dim
    layer, softmax = build(name, width, num_heads=heads), build("causal", width, num_heads=heads)
    few = torch.randn(1, 67, width)
    assert_budget(layer(few), layer.use("blocked")(few), layer.double()(few.double()), f"{name}: nothing is timed")
    layer = layer.float().use("auto")
    rows, wins = [], 0
    lengths = [256, 512, 1024, 2048, 4096, 8192]
    for n in lengths:
        x, towards = torch.randn(1, n, width, requires_grad=True), torch.randn(1, n, width)

        def call(mixer: Any, x: Tensor = x, towards: Tensor = towards) -> Thunk:
            return lambda: torch.autograd.grad(mixer(x), [x, *mixer.parameters()], towards)

        timed = time_interleaved({name: call(layer), "causal": call(softmax)}, 5, max_seconds=6)
        rows.append({"length": n, "seconds": {key: t.median for key, t in timed.items()}})
        wins = wins + 1 if 1.05 * timed[name].median < timed["causal"].median else 0  # less is noise
        tick((LAYERS.index(name) + sum(lengths[: len(rows)]) / sum(lengths)) / len(LAYERS))
        if wins == 2:
            break
    return {"layer": name, "rows": rows, "from": rows[-wins]["length"] if wins else None, "dim": width, "heads": heads}


# ---- convolution, drift -------------------------------------------------------------------------------------------------------


def _convolution(tokens: int, channels: int, repeats: int) -> dict[str, Any]:
    """The FFT convolution of Hyena against torch's direct one on the same channels; that takes minutes, so half of the tokens are
    timed, and taken times four."""
    torch.manual_seed(0)
    u, kernel = torch.randn(1, tokens, channels), torch.randn(channels, tokens) * torch.linspace(0, -12, tokens).exp()
    weight = kernel.flip(1)[:, None]

    half = tokens // 2

    def direct() -> Tensor:
        return torch.nn.functional.conv1d(u[:, :half].mT, weight[..., -half:], padding=half - 1, groups=channels)[..., :half].mT

    with torch.no_grad():
        slow = 4 * time_interleaved({"direct": direct}, 1, warmup=0, min_sample=0)["direct"].median
        few = 4097
        whole = torch.nn.functional.conv1d(u[:, :few].mT.double(), weight[..., -few:].double(), padding=few - 1, groups=channels)
        exact = whole[..., :few].mT
        error = ((long_conv(u[:, :few], kernel).double() - exact).abs().max() / exact.abs().max()).item()
        assert error < 1e-5, f"long_conv is off by {error:.2g}: nothing is reported"
        fast = time_interleaved({"fft": lambda: long_conv(u, kernel)}, repeats)["fft"].median
    return {"tokens": tokens, "channels": channels, "seconds": {"fft": fast, "direct": slow}, "over_direct": slow / fast}


def _drift(steps: int, tick: Callable[[float], None]) -> dict[str, Any]:
    """The state after `steps` tokens in fp32, token by token and in chunks, against fp64. Decay 0 to 0.002 a token."""
    torch.manual_seed(0)
    qkv = [torch.randn(1, steps, 2, 16) for _ in range(3)]
    log_decay = -2e-3 * torch.rand(1, steps, 2)
    with torch.inference_mode():
        exact = _state([x.double() for x in qkv], log_decay.double())
        chunked = _state(qkv, log_decay)
        state, wide, at = torch.zeros(1, 2, 16, 16), log_decay[..., None].expand_as(qkv[1]), 0
        while at < steps:
            here = slice(at, at + 1000)
            part = [x[:, here] for x in qkv]
            _, state = scan_recurrent(
                *part, log_decay=wide[:, here], a=None, b=None, bonus=None, initial_state=state, scale=0.25
            )  # fmt: skip
            at += 1000
            tick(at / steps)
    budget = assert_budget(chunked, state, exact, f"the state after {steps} tokens")
    size = exact.abs().max().item()
    return {"steps": steps, "in chunks": budget.error / size, "token by token": budget.naive / size}


# ---- words ---------------------------------------------------------------------------------------------------------------------


def _held(name: str, value: float) -> str:
    sign, bound = BARS[name]
    good = value >= bound if sign == ">=" else value <= bound
    return f"(bar {sign} {bound:g}: {'met' if good else 'MISSED'})"


def _rate_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        others = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in row["over"].items())
        lines.append(
            f"decay {row['decay']}: forward + backward {row['both_of_limit']:.2f} of the matrix product's "
            f"{row['limit'] / 1e9:.0f} GF/s {_held('both_of_limit', row['both_of_limit'])}, forward {row['forward_of_limit']:.2f}"
        )
        lines.append(
            f"decay {row['decay']}: {row['over_best']:.1f}x the best peer, {row['best_peer']} "
            f"{_held('over_best', row['over_best'])}; all: {others}"
        )
    return lines


def _growth_lines(fits: dict[str, Any]) -> list[str]:
    return [
        f"decay {decay}: time grows with the power {fit['exponent']:.2f} of the length over {fit['lengths'][0]} ... "
        f"{fit['lengths'][-1]} tokens {_held('exponent', fit['exponent'])}"
        for decay, fit in fits.items()
    ]


def _decode_lines(found: dict[str, Any]) -> list[str]:
    micro = found["seconds"]["1024"] * 1e6
    return [
        f"decode step: {micro:.0f} us; after 1,048,576 tokens {found['ratio']:.2f} times as long {_held('ratio', found['ratio'])}"
    ]


def _crossover_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        last = row["rows"][-1]
        ratio = last["seconds"]["causal"] / last["seconds"][row["layer"]]
        since = "never within the lengths tried" if row["from"] is None else f"from {row['from']} tokens on"
        lines.append(
            f"{row['layer']}, dim {row['dim']}, {row['heads']} heads, forward + backward: faster than causal softmax attention "
            f"{since} ({ratio:.1f}x at {last['length']})"
        )
    return lines


def _convolution_lines(found: dict[str, Any]) -> list[str]:
    return [
        f"long convolution of Hyena at {found['tokens']} tokens: {found['over_direct']:.0f}x torch's direct one, timed on half, "
        f"times four {_held('over_direct', found['over_direct'])}"
    ]


def _drift_lines(found: dict[str, Any]) -> list[str]:
    return [
        f"state in fp32 after {found['steps']} tokens: off by {found['in chunks']:.1e} of its size in chunks, "
        f"{found['token by token']:.1e} token by token (inside the error budget)"
    ]


SENTENCES: dict[str, Callable[[Any], list[str]]] = {
    "decode": _decode_lines,
    "convolution": _convolution_lines,
    "growth": _growth_lines,
    "rates": _rate_lines,
    "crossover": _crossover_lines,
    "drift": _drift_lines,
}


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = [line for name, words in SENTENCES.items() if name in result for line in words(result[name])]
    return "\n".join([*lines, f"core {result['core']}, {result['threads']} threads"])


if __name__ == "__main__":
    print(table(run()))
