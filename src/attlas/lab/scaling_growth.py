"""How the time of a mechanism grows with the length of the sequence, for every card that claims less than a square."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attlas.catalogue.card import Card
from attlas.catalogue.index import card, cards
from attlas.errors import AttlasError
from attlas.lab.gate import TOLERANCE
from attlas.lab.measure import Thunk, fit_power_law, time_interleaved
from attlas.nn.mixer import Mixer

DIM, HEADS = 64, 1
BAR, STEEPER = 1.25, 1.75  # largest allowed exponent of time over length; of cards that claim n^1.5
CONTRAST, CONTRAST_LONGEST = "full", 8192  # grows as the square; longer ones would take longer than everything else
CHECKED = 307  # tokens of the check: more than a window
# Where neither the default nor this says otherwise, a required option is that of the card's example.
SIZES: dict[str, Any] = {"window": 256, "block": 256, "stride": 256, "dilation": 4, "chunk": 256, "tokens": (0, 1)}
# Where an option means something else in one card, or a long sequence needs another value.
OF_CARD: dict[str, dict[str, Any]] = {
    "dilated-window": {"window": 64},
    "bigbird": {"block": 64},
    "learned-sink": {"window": 256},
}


def claims_less(entry: Card) -> bool:
    """Whether the card gives a time for whole sequences that does not grow as n^2."""
    clauses = entry.time.split(";")[0].split("O(")[1:]
    return entry.level >= 2 and any("n^2" not in clause for clause in clauses)


def grown(only: Sequence[str] = ()) -> tuple[Card, ...]:
    """The cards of this part, `full` first; `only`: those whose name contains one of the texts."""
    found = [card(CONTRAST), *(c for c in cards(min_level=2) if claims_less(c) and _alone(c))]
    return tuple(c for c in found if not only or any(text in c.name for text in only))


def quadratic(only: Sequence[str] = ()) -> list[str]:
    """Names of the cards that take whole sequences and claim n^2: no bar holds them, and only the contrast is measured."""
    found = [c for c in cards(min_level=2) if not claims_less(c) and _alone(c) and c.name != CONTRAST]
    return [c.name for c in found if not only or any(text in c.name for text in only)]


def bar(entry: Card) -> float | None:
    """The largest exponent that the claim allows; None for the contrast."""
    if entry.name == CONTRAST:
        return None
    return STEEPER if "n^1.5" in entry.time or "n^(1 + 1/k)" in entry.time else BAR


def _alone(entry: Card) -> bool:
    return bool({"causal", "bidirectional"} & entry.supports)  # cross-attention grows with its memory


def options_of(entry: Card, longest: int) -> dict[str, Any]:
    """Options for sequences of up to `longest` tokens: the defaults, and windows and blocks of 256 tokens."""
    chosen: dict[str, Any] = {}
    for name, parameter in entry.options.items():
        if name == "max_len":
            chosen[name] = longest
        elif name not in ("dim", "num_heads") and parameter.default is inspect.Parameter.empty:
            chosen[name] = SIZES.get(name, entry.example.get(name))
    if "shape" in chosen:
        chosen["shape"] = (-(-longest // 128), 128)
    if "layout" in chosen:  # a band of two blocks
        blocks = -(-longest // SIZES["block"])
        band = torch.eye(blocks, dtype=torch.bool)
        chosen |= {"layout": band | band.roll(1, 0), "block_size": SIZES["block"]}
    return chosen | OF_CARD.get(entry.name, {})


def build(entry: Card, longest: int) -> Mixer:
    heads = HEADS if "num_heads" in entry.options else None
    torch.manual_seed(0)
    return entry.build(DIM, heads, **options_of(entry, longest))


def check(entry: Card, longest: int) -> str | None:
    """What is wrong with outputs or gradients, None = nothing: against the brute-force implementation in the same dtype, or, for
    a mechanism that has none, against itself in fp64."""
    try:
        mixer = build(entry, longest)
        x = torch.randn(1, min(CHECKED, longest), DIM)
        truth = _truth(mixer.eval(), x)  # first: some mechanisms learn centroids while they run in train mode
        for name, a, b in zip(("output", "gradient"), results(mixer, x), truth, strict=True):
            error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
            if not error <= TOLERANCE:
                return f"{entry.name}: the {name} is off by {error:.1e} of the largest one"
    except (AttlasError, RuntimeError) as error:
        return f"{entry.name}: {type(error).__name__}: {error}"
    return None


def _truth(mixer: Mixer, x: Tensor) -> list[Tensor]:
    try:
        return results(copy.deepcopy(mixer).use("reference"), x)
    except AttlasError:
        return results(copy.deepcopy(mixer).double(), x.double())


def results(module: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, and the gradient of x for the loss sum(sin(output)), in fp32."""
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    return [out.detach().float(), torch.autograd.grad(out.sin().sum(), leaf)[0].float()]


def measure(entry: Card, lengths: Sequence[int], repeats: int, max_seconds: float) -> dict[str, Any]:
    """Forward, and forward and backward to the input and all weights, at every length in turns; exponents over all lengths.

    2 repeats + 1 rounds: what an exponent says hangs on the longest length, and of three samples of it two are easily disturbed.
    What is made once for a length and kept (compiled masks) is made before, and told as `first_seconds`: the first forward at the
    longest length less a later one.
    """
    longest = max(lengths)
    lengths = [n for n in lengths if entry.name != CONTRAST or n <= CONTRAST_LONGEST] or [min(lengths)]
    mixer = build(entry, longest)
    inputs = {n: torch.randn(1, n, DIM) for n in lengths}
    first = time_interleaved({"f": forward(mixer, inputs[lengths[-1]])}, 1, warmup=0, min_sample=0)["f"].median
    calls: dict[str, Thunk] = {}
    for n, x in inputs.items():
        calls |= {f"forward {n}": forward(mixer, x), f"training {n}": training(mixer, x)}
    times = time_interleaved(calls, 2 * repeats + 1, min_sample=0, max_seconds=max_seconds)
    row: dict[str, Any] = {"name": entry.name, "claim": entry.time, "lengths": list(lengths)}
    for what in ("forward", "training"):
        seconds = [times[f"{what} {n}"].median for n in lengths]
        fit = fit_power_law(lengths, seconds)
        row[what] = {
            "seconds": [times[f"{what} {n}"].to_dict() for n in lengths],
            "exponent": None if fit is None else fit.exponent,
            "error": None if fit is None else fit.error,
        }
    row["first_seconds"] = max(0.0, first - row["forward"]["seconds"][-1]["median"])
    row["bar"] = bar(entry)
    return row


def forward(module: Callable[[Tensor], Tensor], x: Tensor) -> Thunk:
    """One call without gradients."""

    def call() -> object:
        with torch.no_grad():
            return module(x)

    return call


def training(module: torch.nn.Module, x: Tensor) -> Thunk:
    """One call and the gradients of its sum with respect to x and all weights."""
    leaf = x.clone().requires_grad_()

    def call() -> object:
        module.zero_grad(set_to_none=True)
        leaf.grad = None
        module(leaf).sum().backward()
        return leaf.grad

    return call
