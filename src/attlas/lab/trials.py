"""The trials of a comparison: what each one does, which key it has, how long it should take, and how its outcome is told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from attlas._version import __version__
from attlas.lab import build, gate, speed
from attlas.lab.measure import machine_limits, time_interleaved
from attlas.lab.mechanisms import Mechanism
from attlas.lab.options import CompareOptions
from attlas.lab.plan import RECALL_CHECK, RECALL_EXAMPLES, WINDOWS, Plan, Training, stepper
from attlas.lab.store import key_of
from attlas.lab.tasks.text import Corpus
from attlas.lab.train import Diverged, Recipe, held_out_bits, held_out_recall, recall_loss, text_loss, train

ENOUGH = 0.99
Ticker = Callable[[float, str], None]  # fraction of the trial, a word on how it goes


@dataclass(frozen=True)
class Trial:
    """stage and what (label, seed, length ...) say which one it is; settings decide its result and make its key."""

    stage: str
    what: str
    settings: dict[str, Any]
    seconds: float
    run: Callable[[Ticker], dict[str, Any]] = field(compare=False)
    tell: Callable[[dict[str, Any]], str] = field(compare=False)

    @property
    def key(self) -> str:
        return key_of({"stage": self.stage, **self.settings})

    @property
    def trains(self) -> bool:
        """Whether it may run beside others: timings may not."""
        return self.stage in ("text", "recall")

    def attempt(self, tick: Ticker) -> dict[str, Any]:
        """Run it; a record of how it went, whatever happens."""
        began = time.perf_counter()
        record: dict[str, Any] = {"key": self.key, "stage": self.stage, "what": self.what, "settings": self.settings}
        try:
            result = self.run(tick)
        except Diverged as error:
            record |= {"status": "diverged", "error": str(error)}
        except Exception as error:  # whatever goes wrong with one mechanism, the others go on
            record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        else:
            red = "; ".join(result.get("problems", ()))
            record |= {"status": "red", "error": red} if red else {"status": "ok"}
            record |= {"result": result}
        return {**record, "seconds": time.perf_counter() - began}

    def attempt_lost(self, why: str) -> dict[str, Any]:
        """The record of an attempt whose process died."""
        start = {"key": self.key, "stage": self.stage, "what": self.what, "settings": self.settings}
        return {**start, "status": "failed", "error": why, "seconds": 0.0}

    def told(self, record: dict[str, Any]) -> str:
        """The outcome in a line."""
        return self.tell(record["result"]) if record["status"] == "ok" else f"{self.what}: {record['error']}"


def common_settings(options: CompareOptions) -> dict[str, Any]:
    return {"version": __version__, "torch": torch.__version__, "device": options.device, "heads": options.heads}


def gate_trial(m: Mechanism, options: CompareOptions) -> Trial:
    """Whether the mechanism may be trained and timed at all."""
    length = 2 * options.span + 5
    at = m.settings_at(options.layer_width, options.heads)
    settings = {**common_settings(options), "mechanism": at, "dim": options.layer_width, "length": length}

    def run(tick: Ticker) -> dict[str, Any]:
        torch.manual_seed(0)
        mixer = m.build(options.layer_width, options.heads).to(options.device)
        return {"label": m.label, **gate.check(mixer, length).to_dict()}

    def tell(result: dict[str, Any]) -> str:
        return f"{m.label}: " + ("; ".join(result["problems"]) or "green")

    return Trial("gate", m.label, settings, 0.3, run, tell)


class Trials:
    """All trials of a plan, in order. `mechanisms`, `timed`: those whose gates are green."""

    def __init__(
        self,
        options: CompareOptions,
        mechanisms: Sequence[Mechanism],
        timed: Sequence[Mechanism],
        corpus: Corpus | None,
        plan: Plan,
    ) -> None:
        self.options, self.mechanisms, self.timed = options, list(mechanisms), list(timed)
        self.corpus, self.plan = corpus, plan
        self.common = common_settings(options)
        self.place = speed.Place(options.layer_width, options.heads, options.device)

    def all(self) -> list[Trial]:
        out: list[Trial] = []
        for stage in self.options.ordered_stages():
            out += {"text": self._texts, "recall": self._recalls, "speed": self._speeds, "cache": self._caches}[stage]()
        return out

    def _at(self, m: Mechanism) -> dict[str, Any]:
        """What decides about the layer that is timed."""
        return m.settings_at(self.options.layer_width, self.options.heads)

    # ---- bytes --------------------------------------------------------------------------------------------------------------

    def _texts(self) -> list[Trial]:
        plan = self.plan.text
        assert plan is not None
        return [self._text(m, r) for seed in range(self.options.seeds) for m in self.mechanisms for r in _recipes(plan, seed)]

    def _text(self, m: Mechanism, recipe: Recipe) -> Trial:
        o, corpus, sized, plan = self.options, self.corpus, self.plan.sizes["text"][m.label], self.plan.text
        assert corpus is not None and plan is not None
        settings = {
            **self.common, "mechanism": m.settings_at(o.dim, o.heads), "recipe": asdict(recipe), "hidden": sized.hidden,
            "dim": o.dim, "layers": o.layers, "context": o.context, "windows": WINDOWS, "corpus": corpus.fingerprint,
        }  # fmt: skip

        def run(tick: Ticker) -> dict[str, Any]:
            model = build.text_model(m, o, sized.hidden, recipe.seed)
            loss = text_loss(model, corpus, recipe.batch, o.context, recipe.seed, o.device)
            done = train(model, recipe, loss, tick=lambda at, of, nats: tick(0.95 * at / of, f"{nats / math.log(2):.2f} bits"))
            held = held_out_bits(model, corpus, WINDOWS, o.context, o.device)
            if not math.isfinite(held.bits):
                raise Diverged(f"the held-out loss is {held.bits}")
            per_step = recipe.batch * o.context
            return {
                "label": m.label,
                "seed": recipe.seed,
                "rate": recipe.rate,
                "parameters": sized.parameters,
                "bits": held.bits,
                "bits_error": _number(held.error),
                "per_window": [round(b, 5) for b in held.per_window],
                "by_position": [list(p) for p in held.by_position],
                "tokens": recipe.steps * per_step,
                "seconds": done.seconds,
                "tokens_per_second": per_step / done.step_median,
                "curve": [[step * per_step, nats / math.log(2)] for step, nats in done.curve()],
            }

        def tell(r: dict[str, Any]) -> str:
            return f"{_which(m, recipe, plan)}: {r['bits']:.3f} bits per byte, {r['tokens_per_second']:,.0f} tokens/s"

        seconds = plan.step_seconds.get(m.label, 0.05) * (recipe.steps + WINDOWS / (3 * recipe.batch))
        return Trial("text", _which(m, recipe, plan), settings, seconds, run, tell)

    # ---- recall -------------------------------------------------------------------------------------------------------------

    def _recalls(self) -> list[Trial]:
        plan = self.plan.recall
        assert plan is not None
        return [self._recall(m, r) for seed in range(self.options.seeds) for m in self.mechanisms for r in _recipes(plan, seed)]

    def _recall(self, m: Mechanism, recipe: Recipe) -> Trial:
        o, task, sized, plan = self.options, self.plan.task, self.plan.sizes["recall"][m.label], self.plan.recall
        assert plan is not None
        settings = {
            **self.common, "mechanism": m.settings_at(build.RECALL_HEAD_DIM * o.heads, o.heads), "recipe": asdict(recipe),
            "hidden": sized.hidden, "task": asdict(task),
            "examples": RECALL_EXAMPLES, "check": RECALL_CHECK, "enough": ENOUGH,
        }  # fmt: skip

        def run(tick: Ticker) -> dict[str, Any]:
            model = build.RecallModel(m, task, o.heads, sized.hidden, seed=recipe.seed).to(o.device)
            loss = recall_loss(model, task, recipe.batch, recipe.seed, o.device)
            done = train(
                model,
                recipe,
                loss,
                check=lambda: held_out_recall(model, task, RECALL_EXAMPLES, o.device),
                check_every=RECALL_CHECK,
                enough=ENOUGH,
                tick=lambda at, of, nats: tick(at / of, f"loss {nats:.2f}"),
            )
            return {
                "label": m.label,
                "seed": recipe.seed,
                "rate": recipe.rate,
                "parameters": sized.parameters,
                "accuracy": done.checks[-1][1],
                "steps": done.checks[-1][0],
                "solved": done.checks[-1][1] >= ENOUGH,
                "seconds": done.seconds,
                "curve": [list(c) for c in done.checks],
            }

        def tell(r: dict[str, Any]) -> str:
            return f"{_which(m, recipe, plan)}: {r['accuracy']:.1%} recalled after {r['steps']} steps"

        seconds = 1.1 * plan.step_seconds.get(m.label, 0.1) * recipe.steps
        return Trial("recall", _which(m, recipe, plan), settings, seconds, run, tell)

    # ---- speed --------------------------------------------------------------------------------------------------------------

    def _speeds(self) -> list[Trial]:
        stamp = {**self.common, "machine": self.plan.machine}

        def run_limits(tick: Ticker) -> dict[str, Any]:
            return {"limits": machine_limits(self.options.device)}

        def tell_limits(r: dict[str, Any]) -> str:
            limits = r["limits"]
            return f"this machine: {limits['gemm_float32'] / 1e9:.0f} GFLOP/s in fp32, copies {limits['copy'] / 1e9:.1f} GB/s"

        out = [Trial("speed", "machine limits", {**stamp, "what": "limits"}, 4.0, run_limits, tell_limits)]
        if self.plan.text is not None:
            out.append(self._throughput(stamp))
        return out + [self._length(stamp, n) for n in self.plan.speed]

    def _throughput(self, stamp: dict[str, Any]) -> Trial:
        """Training steps of the whole language models, in turns: rates that do not depend on when they were measured."""
        o, plan = self.options, self.plan
        assert plan.text is not None
        batch = plan.text.batch
        sizes = {m.label: plan.sizes["text"][m.label].hidden for m in self.mechanisms}
        who = [m.settings_at(o.dim, o.heads) for m in self.mechanisms]
        settings = {
            **stamp, "what": "throughput", "mechanisms": who, "hidden": sizes, "batch": batch, "dim": o.dim, "layers": o.layers,
            "context": o.context,
        }  # fmt: skip

        def run(tick: Ticker) -> dict[str, Any]:
            steppers = {m.label: stepper(m, o, self.corpus, plan, "text", batch) for m in self.mechanisms}
            timings = time_interleaved(steppers, 9, warmup=2, min_sample=0, max_seconds=8.0, device=o.device)
            return {"tokens": batch * o.context, "step": {k: t.to_dict() for k, t in timings.items()}}

        def tell(r: dict[str, Any]) -> str:
            rates = {k: r["tokens"] / v["median"] for k, v in r["step"].items()}
            fastest = max(rates, key=lambda k: rates[k])
            return f"language model training: {min(rates.values()):,.0f} to {rates[fastest]:,.0f} tokens/s ({fastest})"

        return Trial("speed", "training throughput", settings, 11 * sum(plan.text.step_seconds.values()), run, tell)

    def _length(self, stamp: dict[str, Any], length: int) -> Trial:
        labels = self.plan.speed[length]
        chosen = [m for m in self.timed if m.label in labels]
        seconds = self.plan.speed_seconds.get(length, 1.0)
        settings = {**stamp, "what": "length", "length": length, "dim": self.options.layer_width,
                    "mechanisms": [self._at(m) for m in chosen]}  # fmt: skip

        def run(tick: Ticker) -> dict[str, Any]:
            # Three of the CALLS are spent before the rounds begin.
            allowed = seconds * (speed.CALLS - 3) / speed.CALLS
            return {"length": length, "layers": speed.measure_length(chosen, length, self.place, max_seconds=allowed)}

        def tell(r: dict[str, Any]) -> str:
            times = {k: v["prefill"]["median"] for k, v in r["layers"].items() if "prefill" in v}
            if not times:
                return f"length {length:,}: nothing could be timed"
            fast, slow = min(times, key=lambda k: times[k]), max(times, key=lambda k: times[k])
            return f"length {length:,}: prefill {times[fast] * 1e3:.3g} ms ({fast}) to {times[slow] * 1e3:.3g} ms ({slow})"

        return Trial("speed", f"length {length:,}", settings, seconds, run, tell)

    # ---- cache --------------------------------------------------------------------------------------------------------------

    def _caches(self) -> list[Trial]:
        return [self._cache(m) for m in self.mechanisms]

    def _cache(self, m: Mechanism) -> Trial:
        lengths = self.plan.cache
        settings = {**self.common, "mechanism": self._at(m), "dim": self.options.layer_width, "lengths": list(lengths)}

        def run(tick: Ticker) -> dict[str, Any]:
            sizes = speed.cache_sizes(m, lengths, self.place)
            torch.manual_seed(0)
            mixer = m.build(self.options.layer_width, self.options.heads)
            beyond = [2**i for i in range(8, 18)]
            return {"label": m.label, "sizes": sizes, "formula": [[n, int(mixer.cache_bytes(n))] for n in beyond]}

        def tell(r: dict[str, Any]) -> str:
            last = r["sizes"][-1]
            return f"{m.label}: {last['measured'] / 1024:,.0f} KiB at {last['length']:,} tokens"

        return Trial("cache", m.label, settings, 0.3, run, tell)


def _recipes(plan: Training, seed: int) -> list[Recipe]:
    return [Recipe(plan.steps, plan.batch, rate, seed) for rate in plan.rates]


def _which(m: Mechanism, recipe: Recipe, plan: Training) -> str:
    rate = f" rate {recipe.rate:g}" if len(plan.rates) > 1 else ""
    return f"{m.label} seed {recipe.seed}{rate}"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
