"""What came out of a comparison: the stored trials, gathered into one row per mechanism."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attlas._version import __version__
from attlas.lab.measure import fit_power_law
from attlas.lab.options import REFERENCE

OPERATIONS = ("prefill", "train", "decode")


@dataclass(frozen=True)
class Results:
    """options, plan: as plain data. mechanisms: label -> {name, options, card, call, parameters ...}. records: by stage.

    `complete` is False when trials are missing (the comparison was interrupted); `report` is the HTML file.
    """

    folder: Path
    options: dict[str, Any]
    command: str
    plan: dict[str, Any]
    mechanisms: dict[str, dict[str, Any]]
    records: dict[str, list[dict[str, Any]]]
    complete: bool = True
    seconds: float = 0.0
    report: Path | None = field(default=None, compare=False)

    # ---- trials by what they are --------------------------------------------------------------------------------------------

    def outcomes(self, stage: str, label: str | None = None) -> list[dict[str, Any]]:
        """Results of the trials of a stage that went well, those of one mechanism if a label is given."""
        good = [r["result"] for r in self.records.get(stage, []) if r["status"] == "ok"]
        return [r for r in good if label is None or r.get("label") == label]

    def failures(self) -> list[tuple[str, str, str]]:
        """(stage, what, why) of every trial that failed, diverged or is red, and of every length at which a mechanism could not
        be timed."""
        bad = [(s, r["what"], r["error"]) for s, records in self.records.items() for r in records if r["status"] != "ok"]
        for r in self.outcomes("speed"):
            bad += [("speed", label, v["problem"]) for label, v in r.get("layers", {}).items() if "problem" in v]
        return bad

    def red(self) -> dict[str, str]:
        """Mechanisms whose gate is red -> why. They are neither trained nor timed."""
        return {r["what"]: r["error"] for r in self.records.get("gate", []) if r["status"] == "red"}

    def limits(self) -> dict[str, float]:
        """The machine's own limits, measured in the same run; empty when the speed stage was not asked for."""
        return next((r["limits"] for r in self.outcomes("speed") if "limits" in r), {})

    def throughput(self) -> dict[str, float]:
        """Training tokens per second of the language models, timed in turns."""
        for r in self.outcomes("speed"):
            if "step" in r:
                return {k: r["tokens"] / v["median"] for k, v in r["step"].items()}
        return {}

    def layers(self, label: str) -> dict[int, dict[str, Any]]:
        """length -> {prefill, train, decode: {median, low, high, repeats}, ...} of one mechanism, shortest first."""
        found = {r["length"]: r["layers"].get(label) for r in self.outcomes("speed") if "layers" in r}
        return {n: v for n, v in sorted(found.items()) if v and "prefill" in v}

    def series(self, label: str, what: str) -> tuple[list[int], list[float]]:
        """Lengths and medians of an operation ("prefill", "train", "decode") or a number ("train_peak", ...)."""
        rows = self.layers(label)
        return list(rows), [v[what]["median"] if isinstance(v[what], Mapping) else v[what] for v in rows.values()]

    def common_length(self) -> int | None:
        """The longest length at which every mechanism has been timed."""
        timed = [set(self.layers(label)) for label in self.mechanisms if self.layers(label)]
        shared = set.intersection(*timed) if timed else set()
        return max(shared, default=None)

    # ---- rows ---------------------------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per mechanism, in the order in which they were named. Missing numbers are None. Units are in the names."""
        return [self._row(label) for label in self.mechanisms]

    def _row(self, label: str) -> dict[str, Any]:
        m = self.mechanisms[label]
        row: dict[str, Any] = {"mechanism": label, "family": m["card"].get("family"), "status": self._status(label)}
        row |= self._text_row(label) | self._recall_row(label) | self._speed_row(label)
        return row

    def _status(self, label: str) -> str:
        if label in self.red():
            return "red gate"
        worst = [r["status"] for rs in self.records.values() for r in rs if r.get("label") == label and r["status"] != "ok"]
        return worst[0] if worst else "ok"

    def _text_row(self, label: str) -> dict[str, Any]:
        runs, rate = best_rate(self.outcomes("text", label), "bits", min)
        bits = [r["bits"] for r in runs]
        speed = self.throughput().get(label)
        if speed is None and runs:
            speed = statistics.median(r["tokens_per_second"] for r in runs)
        return {
            "parameters": self.mechanisms[label].get("parameters"),
            "bits_per_byte": mean(bits),
            "bits_low": min(bits, default=None),
            "bits_high": max(bits, default=None),
            "bits_error": mean([r["bits_error"] for r in runs if r["bits_error"] is not None]),
            "bits_to_causal": self.bits_between(label, REFERENCE)[0],
            "bits_to_causal_error": self.bits_between(label, REFERENCE)[1],
            "learning_rate": rate,
            "tokens": runs[0]["tokens"] if runs else None,
            "train_tokens_per_second": speed,
        }

    def bits_between(self, label: str, other: str) -> tuple[float | None, float | None]:
        """Bits per byte of `label` minus those of `other` (means over seeds), and the standard error of that difference: of the
        choice of windows, compared one by one, and, with two seeds or more, of the choice of seeds, compared one by one too."""
        mine, theirs = self._window_bits(label), self._window_bits(other)
        if not mine or len(mine) != len(theirs):
            return None, None
        errors = [_standard_error([a - b for a, b in zip(mine, theirs, strict=True)])]
        seeds = [{r["seed"]: r["bits"] for r in best_rate(self.outcomes("text", k), "bits", min)[0]} for k in (label, other)]
        errors.append(_standard_error([seeds[0][s] - seeds[1][s] for s in seeds[0].keys() & seeds[1].keys()]))
        known = [e for e in errors if e is not None]
        return statistics.fmean(mine) - statistics.fmean(theirs), math.hypot(*known) if known else None

    def _window_bits(self, label: str) -> list[float]:
        runs, _ = best_rate(self.outcomes("text", label), "bits", min)
        return [statistics.fmean(values) for values in zip(*(r["per_window"] for r in runs), strict=True)]

    def _recall_row(self, label: str) -> dict[str, Any]:
        runs, rate = best_rate(self.outcomes("recall", label), "accuracy", max)
        values = [r["accuracy"] for r in runs]
        return {
            "recall": mean(values),
            "recall_low": min(values, default=None),
            "recall_high": max(values, default=None),
            "recall_steps": round(statistics.fmean(r["steps"] for r in runs)) if runs else None,
            "recall_learning_rate": rate,
        }

    def _speed_row(self, label: str) -> dict[str, Any]:
        length, rows = self.common_length(), self.layers(label)
        here = rows.get(length) if length is not None else None
        reference = self.layers(REFERENCE).get(length) if length is not None else None
        out: dict[str, Any] = {"length": length}
        for what in OPERATIONS:
            seconds = here[what]["median"] if here else None
            law = fit_power_law(*self.series(label, what)) if rows else None
            out[f"{what}_seconds"] = seconds
            out[f"{what}_to_causal"] = seconds / reference[what]["median"] if seconds and reference else None
            out[f"{what}_exponent"] = law.exponent if law else None
        out["train_peak_bytes"] = here["train_peak"] if here else None
        out["cache_length"], out["cache_bytes"] = self._cache_row(label)
        out["longest_length"] = max(rows, default=None)
        out["faster_than_causal_from"] = self._crossover(label)
        limits = self.limits()
        out["prefill_of_gemm"] = here["flops"] / here["prefill"]["median"] / limits["gemm_float32"] if here and limits else None
        return out

    def _cache_row(self, label: str) -> tuple[int | None, int | None]:
        """The longest length whose cache was measured, and its bytes."""
        for r in self.outcomes("cache", label):
            last = max(r["sizes"], key=lambda s: s["length"])
            return last["length"], last["measured"]
        return None, None

    def _crossover(self, label: str) -> int | None:
        """The shortest length from which on this mechanism's prefill takes at least a twentieth less time than that of `causal`,
        at every length timed for both."""
        mine, theirs = self.layers(label), self.layers(REFERENCE)
        found = None
        for n in sorted(mine.keys() & theirs.keys(), reverse=True):
            if mine[n]["prefill"]["median"] >= 0.95 * theirs[n]["prefill"]["median"]:
                break
            found = n
        return None if label == REFERENCE else found

    # ---- as text ------------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "attlas": __version__,
            "command": self.command,
            "complete": self.complete,
            "seconds": self.seconds,
            "options": self.options,
            "plan": self.plan,
            "mechanisms": self.mechanisms,
            "rows": self.rows(),
            "trials": self.records,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        rows = self.rows()
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]) if rows else ["mechanism"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def best_rate(runs: Iterable[dict[str, Any]], measure: str, better: Any) -> tuple[list[dict[str, Any]], float | None]:
    """The runs at the learning rate whose mean over seeds is best, and that rate."""
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for r in runs:
        by_rate.setdefault(r["rate"], []).append(r)
    if not by_rate:
        return [], None
    # A rate at which some seed diverged has fewer runs; the most complete rates come first.
    most = max(len(v) for v in by_rate.values())
    full = {rate: v for rate, v in by_rate.items() if len(v) == most}
    rate = better(full, key=lambda k: math.fsum(r[measure] for r in full[k]) / most)
    return full[rate], rate
