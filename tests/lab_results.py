"""Made-up results of a comparison, for tests of what is made from them. The numbers follow rules that tests can recompute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attlas.lab.mechanisms import choose
from attlas.lab.options import CompareOptions
from attlas.lab.results import Results

LENGTHS = (256, 512, 1024, 2048, 4096)
WINDOWED = ("sliding-window", "local", "global", "streaming", "dilated-window")
MACHINE: dict[str, Any] = {
    "cpu": "Test CPU", "isa": "AVX2", "cores": 2, "threads": 2, "memory": 16 << 30, "device": "cpu", "accelerator": None,
    "system": "Linux x86_64", "python": "3.12.1", "torch": "2.11.0",
}  # fmt: skip
CORPUS = {
    "source": "made-up text", "fingerprint": "0123456789abcdef", "train_bytes": 9000, "validation_bytes": 1000,
    "train_documents": 90, "validation_documents": 10, "notes": [], "overlap": 0.0625, "unigram_bits": 4.55, "bigram_bits": 3.53,
}  # fmt: skip
TRAINING = {"steps": 500, "batch": 2, "rates": [0.003], "step_seconds": {}}


def seconds(label: str, what: str, length: int) -> float:
    """Made-up times: quadratic, or linear for windows; decoding grows linearly or not at all."""
    windowed = label in WINDOWED
    scale = {"prefill": 1.0, "train": 3.5, "decode": 0.02}[what]
    if what == "decode":
        return scale * (1e-2 if windowed else 1e-2 + 2e-6 * length)
    return scale * (4e-6 * length * 64 / 40 if windowed else 4e-9 * length**2 + 1e-6 * length)


def timing(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.97 * median, "high": 1.05 * median, "repeats": 7}


def layer(label: str, n: int) -> dict[str, Any]:
    times = {what: timing(seconds(label, what, n)) for what in ("prefill", "train", "decode")}
    held = 2048 * (32 if label in WINDOWED else n)
    return {**times, "flops": 4 * n * n * 128, "cache_bytes": held, "prefill_peak": 4000 * n, "train_peak": 9000 * n}


def record(stage: str, what: str, result: dict[str, Any], status: str = "ok", **rest: Any) -> dict[str, Any]:
    return {"key": f"{stage} {what}", "stage": stage, "what": what, "status": status, "result": result, "seconds": 1.0, **rest}


def text_result(label: str, i: int, seed: int = 0) -> dict[str, Any]:
    bits = 2.7 + 0.03 * i + 0.004 * seed
    windows = [bits + 0.2 * ((j * 7) % 11 - 5) / 5 for j in range(11)]
    by_position = [(32 * j, 32 * j + 31, bits + 0.2 / (1 + j) - (0 if label in WINDOWED else 0.01 * j)) for j in range(8)]
    curve = [[2048 * (j + 1), bits + 4.5 / (1 + 0.22 * j)] for j in range(60)]
    return {
        "label": label, "seed": seed, "rate": 0.003, "parameters": 115136, "bits": bits, "bits_error": 0.04, "curve": curve,
        "per_window": windows, "by_position": by_position, "tokens": 256000, "seconds": 12.0,
        "tokens_per_second": 21000 + 800 * i,
    }  # fmt: skip


def recall_result(label: str, i: int, seed: int = 0) -> dict[str, Any]:
    top = 0.61 + 0.02 * i if label in WINDOWED else 0.995
    curve = [[25 * (j + 1), top * (j + 1) ** 2 / (8**2)] for j in range(8)]
    return {
        "label": label, "seed": seed, "rate": 0.01, "parameters": 62144, "accuracy": top, "steps": 200, "solved": top >= 0.99,
        "seconds": 6.0, "curve": curve,
    }  # fmt: skip


def cache_result(label: str) -> dict[str, Any]:
    def held(n: int) -> int:
        return 2048 * (min(n, 32) if label in WINDOWED else n // (4 if label == "multi-query" else 1))

    sizes = [{"length": n, "measured": held(n), "formula": held(n)} for n in LENGTHS]
    return {"label": label, "sizes": sizes, "formula": [[2**e, held(2**e)] for e in range(8, 18)]}


def results(folder: Path, names: tuple[str, ...] = (), *, red: str | None = None, complete: bool = True) -> Results:
    """A whole comparison of the named mechanisms (none: the default selection)."""
    options = CompareOptions(names=names, out=folder)
    chosen = choose(options)
    able = [m.label for m in chosen if m.label != red]
    records: dict[str, list[dict[str, Any]]] = {"gate": []}
    for m in chosen:
        problems = ["decoding differs"] if m.label == red else []
        outcome = {"label": m.label, "problems": problems, "length": 69, "decode_error": 1e-7}
        status = {"status": "red", "error": "decoding differs"} if problems else {}
        records["gate"].append(record("gate", m.label, outcome, **status))
    records["text"] = [record("text", label, text_result(label, i)) for i, label in enumerate(able)]
    records["recall"] = [record("recall", label, recall_result(label, i)) for i, label in enumerate(able)]
    limits = {"gemm_float32": 60e9, "gemm_bfloat16": 120e9, "copy": 18e9}
    step = {label: timing(512 / (21000 + 700 * i)) for i, label in enumerate(able)}
    records["speed"] = [
        record("speed", "machine limits", {"limits": limits}),
        record("speed", "training throughput", {"tokens": 512, "step": step}),
        *(record("speed", f"length {n}", {"length": n, "layers": {label: layer(label, n) for label in able}}) for n in LENGTHS),
    ]
    records["cache"] = [record("cache", label, cache_result(label)) for label in able]
    described = {
        m.label: {**m.settings_at(256, 4), "card": dict(m.told), "call": m.call(256, 4), "parameters": 115136,
                  "hidden": {"text": 171, "recall": 32}, "recall_parameters": 62144}
        for m in chosen
    }  # fmt: skip
    plan = {
        "machine": MACHINE, "corpus": CORPUS, "text": TRAINING, "recall": {**TRAINING, "batch": 64, "rates": [0.01]},
        "speed": {str(n): able for n in LENGTHS}, "cache": list(LENGTHS),
        "task": {"length": 64, "pairs": 8, "vocab": 256, "power": 0.01, "random_fillers": False},
    }  # fmt: skip
    return Results(folder, options.to_dict(), options.command(), plan, described, records, complete, seconds=231.0)
