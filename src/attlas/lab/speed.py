"""Time and memory of one layer against the length of the sequence, for all mechanisms in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.errors import UnsupportedError
from attlas.lab.measure import Thunk, Timing, peak_allocated, time_interleaved
from attlas.lab.mechanisms import Mechanism
from attlas.nn.mixer import Mixer

FIRST, LONGEST = 256, 65536
DECODES = 9  # single tokens decoded per round: short samples, so that a median passes over interruptions
REPEATS = 7
# A length costs this many calls of everything: the check, two to warm up, at least three rounds, the memory pass.
CALLS = 7.0
OPERATIONS = ("prefill", "train", "decode")


@dataclass(frozen=True)
class Place:
    """Width and heads of the layer, and the device that it runs on."""

    dim: int
    heads: int
    device: str = "cpu"


@dataclass
class Layer:
    """One mechanism's layer and its input at one length. Batch 1, float32."""

    mixer: Mixer
    x: Tensor
    grad: Tensor

    @classmethod
    def of(cls, mixer: Mixer, length: int, device: str) -> Layer:
        generator = torch.Generator().manual_seed(length)
        x = torch.randn(1, length, mixer.dim, generator=generator).to(device)
        return cls(mixer, x, torch.randn(1, length, mixer.dim, generator=generator).to(device))

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """All tokens at once into a new cache."""
        cache = self.mixer.new_cache(1, self.x.shape[1])
        return self.mixer(self.x, cache=cache)

    def train(self) -> None:
        """Forward and backward to the input and all weights."""
        leaf = self.x.detach().requires_grad_(True)
        self.mixer(leaf).backward(self.grad)
        self.mixer.zero_grad(set_to_none=True)

    def decoder(self, calls: int) -> Thunk:
        """A function that decodes one token behind `length` cached ones and more; `calls`: how often it may be called."""
        with torch.no_grad():
            cache = self.mixer.new_cache(1, self.x.shape[1] + calls)
            self.mixer(self.x, cache=cache)
        token = self.x[:, -1:]

        @torch.no_grad()
        def decode() -> None:
            self.mixer(token, cache=cache)

        return decode


def layers(mechanisms: Sequence[Mechanism], length: int, place: Place) -> dict[str, Layer]:
    out = {}
    for m in mechanisms:
        torch.manual_seed(0)
        out[m.label] = Layer.of(m.build(place.dim, place.heads).to(place.device), length, place.device)
    return out


def measure_length(
    mechanisms: Sequence[Mechanism], length: int, place: Place, *, max_seconds: float | None = None
) -> dict[str, dict[str, object]]:
    """label -> {prefill, train, decode: Timing as a dict (decode per token), *_peak: bytes, flops, cache_bytes}.

    Before anything is timed, the output at this length must be finite; a mechanism that fails gets {"problem": why} and no times.
    """
    built = layers(mechanisms, length, place)
    out: dict[str, dict[str, object]] = {}
    functions: dict[tuple[str, str], Thunk] = {}
    for label, layer in built.items():
        found, problem = _operations(layer, length)
        if problem:
            out[label] = {"problem": problem}
            continue
        functions |= {(label, what): function for what, function in found.items()}
        out[label] = {"flops": layer.mixer.flops(length), "cache_bytes": layer.mixer.cache_bytes(length)}
    # min_sample=0: one call per sample, so that the decoding functions are called as often as their caches have room for.
    many = {(*key, i): f for key, f in functions.items() for i in range(DECODES if key[1] == "decode" else 1)}
    named = {"\0".join(map(str, key)): f for key, f in many.items()}
    timings = time_interleaved(named, REPEATS, warmup=1, min_sample=0, max_seconds=max_seconds, device=place.device)
    for (label, what), function in functions.items():
        samples = [s for i in range(DECODES if what == "decode" else 1) for s in timings[f"{label}\0{what}\0{i}"].samples]
        out[label][what] = Timing.of(samples).to_dict()
        if what != "decode":
            out[label][f"{what}_peak"] = peak_allocated(function, device=place.device)
    return out


def _operations(layer: Layer, length: int) -> tuple[dict[str, Thunk], str | None]:
    """What is timed, each done once; or why this mechanism has no times at this length."""
    try:
        if not bool(layer.prefill().isfinite().all()):
            return {}, f"the output at length {length} is not finite"
        found = {"prefill": layer.prefill, "train": layer.train, "decode": layer.decoder(DECODES * (REPEATS + 1) + 1)}
        found["train"]()
        found["decode"]()
    except Exception as error:
        return {}, f"at length {length}: {type(error).__name__}: {error}"
    return found, None


# ---------------------------------------------------------------------------------------------------- which lengths fit


@dataclass(frozen=True)
class Cost:
    """seconds of one round (prefill, train, some decoding) and peak bytes, as (a, b) of a * n + b * n^2."""

    seconds: tuple[float, float]
    memory: tuple[float, float]

    def time(self, length: int) -> float:
        return self.seconds[0] * length + self.seconds[1] * length**2

    def bytes(self, length: int) -> float:
        return self.memory[0] * length + self.memory[1] * length**2


def _through(n: int, at_n: float, m: int, at_m: float) -> tuple[float, float]:
    """a, b >= 0 of a * length + b * length^2 through (n, at_n) and (m, at_m), n < m; else a line through m."""
    b = (at_m / m - at_n / n) / (m - n)
    if b <= 0:
        return at_m / m, 0.0
    a = at_m / m - b * m
    return (a, b) if a > 0 else (0.0, at_m / m**2)


def estimate(mechanisms: Sequence[Mechanism], place: Place, *, probes: tuple[int, int] = (192, 896)) -> dict[str, Cost]:
    """What a round costs each mechanism, from short measurements at two lengths. They are not among the lengths measured later,
    so that no mask of a position is known then from here: decoding meets each position for the first time."""
    seconds: dict[str, list[float]] = {m.label: [] for m in mechanisms}
    memory: dict[str, list[float]] = {m.label: [] for m in mechanisms}
    for length in probes:
        built = {k: v for k, v in layers(mechanisms, length, place).items() if _operations(v, length)[1] is None}

        def round_of(layer: Layer, length: int = length) -> Thunk:
            decode = layer.decoder(6 * DECODES)

            def once() -> None:
                layer.prefill()
                layer.train()
                for _ in range(DECODES):
                    decode()

            return once

        timings = time_interleaved({k: round_of(v) for k, v in built.items()}, 3, warmup=1, min_sample=0, device=place.device)
        for label, layer in built.items():
            seconds[label].append(timings[label].median)
            memory[label].append(float(peak_allocated(layer.train, device=place.device)))
    n, m = probes
    free = Cost((0.0, 0.0), (0.0, 0.0))  # a mechanism that fails at these lengths costs nothing; its trials will say why
    return {
        k: Cost(_through(n, seconds[k][0], m, seconds[k][1]), _through(n, memory[k][0], m, memory[k][1])) if len(v) == 2 else free
        for k, v in seconds.items()
    }


def choose_lengths(
    costs: Mapping[str, Cost], budget: float, memory: float, *, first: int = FIRST, longest: int = LONGEST
) -> dict[int, list[str]]:
    """length -> the mechanisms measured there: doubling lengths, cheap mechanisms further than dear ones, until `budget` seconds
    are given away. No mechanism is predicted to hold more than `memory` bytes. The first two lengths are always measured."""
    chosen: dict[int, list[str]] = {}
    left, length, alive = budget, first, sorted(costs)
    while length <= longest and alive:
        kept = []
        for label in sorted(alive, key=lambda k: costs[k].time(length)):
            price = CALLS * costs[label].time(length)
            if (price <= left and costs[label].bytes(length) <= memory) or length <= 2 * first:
                kept.append(label)
                left -= price
        if len(kept) < min(2, len(costs)):
            break  # there is nothing to compare with
        chosen[length] = [label for label in costs if label in kept]
        alive, length = kept, 2 * length
    return chosen


def available_memory() -> float:
    """Bytes that can be taken without swapping; a cautious 2 GB where the system does not say."""
    try:
        with open("/proc/meminfo") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("MemAvailable"):
                    return int(line.split()[1]) * 1024.0
    except OSError:
        pass
    return 2e9


def cache_sizes(mechanism: Mechanism, lengths: Sequence[int], place: Place, *, chunk: int = 256) -> list[dict]:
    """For each length: `measured`, bytes of a real cache after that many tokens went through the layer, and `formula`."""
    torch.manual_seed(0)
    mixer = mechanism.build(place.dim, place.heads).to(place.device)
    out = []
    for length in lengths:
        cache = mixer.new_cache(1, length)
        with torch.no_grad():
            for start in range(0, length, chunk):
                mixer(torch.zeros(1, min(chunk, length - start), place.dim, device=place.device), cache=cache)
        if tuple(cache.lengths) != (length,):
            raise UnsupportedError(f"{mechanism.label}: its cache counts {cache.lengths} tokens after {length}")
        out.append({"length": length, "measured": int(cache.nbytes()), "formula": int(mixer.cache_bytes(length))})
    return out
