"""Time, memory and the machine's own limits. The one place where attlas reads a clock.

Units: seconds, bytes, FLOP/s, bytes/s. Every timing is a median over interleaved rounds, with its quartiles beside it: a burst
of other work on the machine hits all contenders alike instead of the one that happened to run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attlas.errors import OptionError, UnsupportedError

Thunk = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call. `low` and `high` are the quartiles of the samples, so half of them lie between the two."""

    median: float
    low: float
    high: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        if not samples:
            raise OptionError("Timing.of: no samples")
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], tuple(samples))
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high, tuple(samples))

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a fraction of the median (0.1 = 10 %)."""
        return (self.high - self.low) / self.median if self.median > 0 else 0.0

    def to_dict(self) -> dict[str, float | int]:
        return {"median": self.median, "low": self.low, "high": self.high, "repeats": len(self.samples)}


def synchronise(device: torch.device | str = "cpu") -> None:
    """Wait until everything that was queued on `device` has run (nothing to do on a CPU)."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def _sample(function: Thunk, calls: int, device: torch.device | str) -> float:
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def time_interleaved(
    functions: Mapping[str, Thunk],
    repeats: int = 7,
    *,
    warmup: int = 1,
    min_sample: float = 1e-3,
    max_seconds: float | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time several functions in turns: one sample of each per round, the order rotated by one from round to round.

    repeats      rounds, that is samples per function
    warmup       calls of each function before the first round; they are not counted
    min_sample   a function faster than this many seconds is called several times per sample, so that the clock's grain vanishes
    max_seconds  stop after the first round that ends later than this (at least one round is always complete)
    """
    if repeats < 1 or warmup < 0:
        raise OptionError(f"time_interleaved(repeats={repeats}, warmup={warmup}): repeats must be >= 1 and warmup >= 0")
    names = list(functions)
    for name in names:
        for _ in range(warmup):
            functions[name]()
    calls = {}
    if min_sample > 0:
        for name in names:
            once = _sample(functions[name], 1, device)
            calls[name] = max(1, min(1000, math.ceil(min_sample / max(once, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for turn in range(repeats):
        shift = turn % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            samples[name].append(_sample(functions[name], calls.get(name, 1), device))
        if max_seconds is not None and time.perf_counter() - start > max_seconds:
            break
    return {name: Timing.of(values) for name, values in samples.items()}


@dataclass(frozen=True)
class PowerLaw:
    """`seconds = factor * length ** exponent`, least squares on log-log axes; `error` is the standard error of the exponent."""

    exponent: float
    factor: float
    error: float
    points: int

    def __call__(self, length: float) -> float:
        return self.factor * length**self.exponent


def fit_power_law(lengths: Sequence[float], values: Sequence[float], *, last: int | None = 4) -> PowerLaw | None:
    """Fit a power law to the `last` longest lengths (None = all); None when fewer than two distinct lengths carry a value > 0.

    Short lengths are dominated by constant overheads, so the exponent of the long ones is the one that says how the cost grows.
    """
    pairs = sorted((float(n), float(v)) for n, v in zip(lengths, values, strict=True) if v and v > 0 and math.isfinite(v))
    pairs = pairs[-last:] if last else pairs
    xs, ys = [math.log(n) for n, _ in pairs], [math.log(v) for _, v in pairs]
    if len(set(xs)) < 2:
        return None
    mx, my = statistics.fmean(xs), statistics.fmean(ys)
    sxx = sum((x - mx) ** 2 for x in xs)
    slope = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sxx
    offset = my - slope * mx
    rest = sum((y - offset - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    error = math.sqrt(rest / (len(xs) - 2) / sxx) if len(xs) > 2 else 0.0
    return PowerLaw(slope, math.exp(offset), error, len(xs))


# ---------------------------------------------------------------------------------------------------- the machine's own limits


def gemm_rate(
    dtype: torch.dtype = torch.float32, *, size: int = 1024, repeats: int = 7, device: torch.device | str = "cpu"
) -> float:
    """FLOP/s of one `size x size x size` matrix product (2 size^3 FLOP), median of `repeats`: the roof of all attention code."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)
    timing = time_interleaved({"gemm": lambda: torch.mm(a, b, out=out)}, repeats, warmup=2, device=device)["gemm"]
    return 2.0 * size**3 / timing.median


def copy_bandwidth(*, nbytes: int = 1 << 28, repeats: int = 7, device: torch.device | str = "cpu") -> float:
    """Bytes/s of a copy between two buffers of `nbytes`, bytes read plus bytes written; larger than any last-level cache."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    timing = time_interleaved({"copy": lambda: target.copy_(source)}, repeats, warmup=2, device=device)["copy"]
    return 2.0 * source.numel() * 4 / timing.median


def machine_limits(device: torch.device | str = "cpu") -> dict[str, float]:
    """`gemm_float32`, `gemm_bfloat16` in FLOP/s and `copy` in bytes/s, measured now."""
    return {
        "gemm_float32": gemm_rate(torch.float32, device=device),
        "gemm_bfloat16": gemm_rate(torch.bfloat16, device=device),
        "copy": copy_bandwidth(device=device),
    }


def useful_threads() -> int:
    """All of torch's threads, or 1 where they do not help: on a machine that others keep busy, threads that wait for each other
    can make small work many times slower. Decided by a matrix product timed both ways, in turns; torch is left as it was."""
    every = torch.get_num_threads()
    if every == 1:
        return 1
    a = torch.randn(256, 256)
    samples: dict[int, list[float]] = {1: [], every: []}
    try:
        for threads in (1, every) * 9:
            torch.set_num_threads(threads)
            a @ a  # the first product after a change wakes the threads
            samples[threads].append(_sample(lambda: a @ a, 8, "cpu"))
    finally:
        torch.set_num_threads(every)
    return 1 if statistics.median(samples[1]) < 0.9 * statistics.median(samples[every]) else every


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def machine_stamp(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge a time: processor, cores, threads, accelerator, memory, versions."""
    kind = torch.device(device).type
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory": memory,
        "device": kind,
        "accelerator": torch.cuda.get_device_name(device) if kind == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# ---------------------------------------------------------------------------------------------------- memory


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's library writes trace lines to file descriptor 2 on every start and stop; they would tear a live display."""
    try:
        saved = os.dup(2)
    except OSError:  # no descriptor 2 (a daemon): nothing to keep quiet
        yield
        return
    try:
        with open(os.devnull, "wb") as sink:  # noqa: PTH123
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def peak_allocated(function: Thunk, *, device: torch.device | str = "cpu") -> int:
    """Highest number of bytes of tensors that `function` held at once on top of what existed before it ran.

    CUDA: the allocator's own counter. CPU: the allocation events of torch's profiler, added up; scratch memory that a library
    takes from the C heap behind torch's back is not in it (see `peak_rss` for that).
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activity = torch.profiler.ProfilerActivity.CPU
    with _quiet_stderr(), torch.profiler.profile(activities=[activity], profile_memory=True, acc_events=False) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"))["traceEvents"]
    steps = [(e["ts"], int(e["args"]["Bytes"])) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, nbytes in sorted(steps, key=lambda s: s[0]):
        held += nbytes
        peak = max(peak, held)
    return peak


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise UnsupportedError(f"/proc/self/status has no {field}")


def _rss_child(pipe: Any, function: Callable[..., object], args: tuple, setup: Callable[..., object] | None) -> None:
    try:
        given = args if setup is None else (setup(*args),)
        if Path("/proc/self/status").exists():
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark of imports and set-up
            baseline = _status_bytes("VmRSS")
            function(*given)
            peak = _status_bytes("VmHWM")
        else:
            import resource

            baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
            function(*given)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((peak, baseline, None))
    except BaseException as error:  # the parent re-raises it
        pipe.send((0, 0, f"{type(error).__name__}: {error}"))
    finally:
        pipe.close()


@dataclass(frozen=True)
class PeakRss:
    """Resident memory of a process in bytes: `peak` in all, `baseline` before the call, `growth` = their difference."""

    peak: int
    baseline: int

    @property
    def growth(self) -> int:
        return max(0, self.peak - self.baseline)

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "growth": self.growth}


def peak_rss(function: Callable[..., object], args: tuple = (), *, setup: Callable[..., object] | None = None) -> PeakRss:
    """Peak resident memory of `function(*args)`, run in a fresh process of its own (spawned; a few seconds to start).

    setup  when given, the child calls `made = setup(*args)` first, which is not counted, and then `function(made)`
    Both must be importable (module level), because the child imports them. Linux and macOS; an error in the child is raised here.
    """
    if platform.system() not in ("Linux", "Darwin"):
        raise UnsupportedError(f"peak_rss: not available on {platform.system()}")
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_rss_child, args=(sender, function, args, setup))
    child.start()
    sender.close()
    try:
        peak, baseline, error = receiver.recv()
    except EOFError:
        child.join()
        raise UnsupportedError(f"peak_rss: the child process ended with code {child.exitcode} before it reported") from None
    child.join()
    if error:
        raise UnsupportedError(f"peak_rss: {error}")
    return PeakRss(peak, baseline)
