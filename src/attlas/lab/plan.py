"""The budget of a comparison, decided once, up front, from a short calibration, and kept with the results.

Everybody gets the same number of steps on the same batches, so the steps follow from the time that all mechanisms together
need for one. The plan is stored: a comparison that is resumed keeps its steps, even if the machine is now faster or slower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from attlas._version import __version__
from attlas.lab import build, speed
from attlas.lab.measure import Thunk, machine_stamp, time_interleaved
from attlas.lab.mechanisms import Mechanism
from attlas.lab.options import CompareOptions, Stage
from attlas.lab.store import key_of
from attlas.lab.tasks.mqar import RecallTask
from attlas.lab.tasks.text import Corpus
from attlas.lab.train import make_optimizer, recall_loss, text_loss, train_step

FORMAT = 1
SHARE: Mapping[Stage, float] = {"text": 0.44, "recall": 0.31, "speed": 0.22, "cache": 0.03}
MARGIN = 0.9  # of the time is given away; the rest absorbs what a calibration of seconds cannot know
WINDOWS = 128  # held-out windows
RECALL_BATCH, RECALL_EXAMPLES, RECALL_CHECK = 32, 256, 25
CACHE_LENGTHS, LONGEST_CACHE = (256, 512, 1024, 2048), 8192
TASK = RecallTask()
MOST_WORKERS, BESIDE = 8, 0.9  # a process beside others runs at this pace: they share caches and memory
FEWEST, MOST_TEXT, MOST_RECALL = 20, 3000, 1200


@dataclass(frozen=True)
class Training:
    """steps (at most), batch, learning rates to try, and predicted seconds of one step by label."""

    steps: int
    batch: int
    rates: tuple[float, ...]
    step_seconds: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """basis, who: hashes of what the budget rests on and of the mechanisms; the same in both = the same plan."""

    basis: str
    who: str
    machine: dict[str, Any]
    corpus: dict[str, Any] | None
    sizes: dict[str, dict[str, build.Sized]]  # stage -> label -> size
    text: Training | None = None
    recall: Training | None = None
    speed: dict[int, list[str]] = field(default_factory=dict)  # length -> labels
    speed_seconds: dict[int, float] = field(default_factory=dict)
    cache: tuple[int, ...] = ()
    task: RecallTask = TASK
    workers: int = 1  # trainings that run side by side, each on one thread
    version: str = __version__
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        out = asdict(self)
        for name in ("speed", "speed_seconds"):
            out[name] = {str(k): v for k, v in out[name].items()}
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        def training(d: Mapping[str, Any] | None) -> Training | None:
            return None if d is None else Training(d["steps"], d["batch"], tuple(d["rates"]), dict(d["step_seconds"]))

        return cls(
            basis=data["basis"],
            who=data["who"],
            machine=data["machine"],
            corpus=data["corpus"],
            sizes={s: {k: build.Sized(**v) for k, v in of.items()} for s, of in data["sizes"].items()},
            text=training(data["text"]),
            recall=training(data["recall"]),
            speed={int(k): list(v) for k, v in data["speed"].items()},
            speed_seconds={int(k): v for k, v in data["speed_seconds"].items()},
            cache=tuple(data["cache"]),
            task=RecallTask(**data["task"]),
            workers=data["workers"],
            version=data["version"],
            format=data["format"],
        )


def basis_of(options: CompareOptions, corpus: Corpus | None, machine: Mapping[str, Any]) -> str:
    """Hash of what the budget rests on: all options but names and places, the corpus, the machine, the version of attlas."""
    asked = {k: v for k, v in options.to_dict().items() if k not in ("names", "text", "name", "out", "fresh")}
    fingerprint = None if corpus is None else corpus.fingerprint
    return key_of({"options": asked, "corpus": fingerprint, "machine": dict(machine), "version": __version__, "format": FORMAT})


def who_of(timed: Sequence[Mechanism], options: CompareOptions) -> str:
    return key_of({"who": [[m.label, m.settings_at(options.layer_width, options.heads)] for m in timed]})


def sizes_of(options: CompareOptions, mechanisms: Sequence[Mechanism], reference: Mechanism) -> dict[str, dict[str, build.Sized]]:
    """Feed-forward widths by stage; raises UnsupportedError for a mechanism that cannot be brought to the common size."""
    out = {}
    if "text" in options.stages:
        out["text"] = build.text_sizes(mechanisms, reference, options)
    if "recall" in options.stages:
        out["recall"] = build.recall_sizes(mechanisms, reference, TASK, options.heads)
    return out


class Planner:
    """Makes a plan. `timed`: the mechanisms and the reference. `began`: time.perf_counter() when the comparison began.
    `cores`: how many trainings may run side by side."""

    def __init__(
        self,
        options: CompareOptions,
        mechanisms: Sequence[Mechanism],
        timed: Sequence[Mechanism],
        corpus: Corpus | None,
        began: float,
        cores: int = 1,
    ) -> None:
        self.cores = cores
        self.options, self.corpus, self.began = options, corpus, began
        self.mechanisms, self.timed = list(mechanisms), list(timed)
        self.machine = machine_stamp(options.device)
        self.basis, self.who = basis_of(options, corpus, self.machine), who_of(self.timed, options)

    def fits(self, old: Plan | None) -> bool:
        """Whether a stored plan is the plan of exactly this comparison."""
        return old is not None and (old.basis, old.who) == (self.basis, self.who)

    def make(self, sizes: dict[str, dict[str, build.Sized]], old: Plan | None = None) -> Plan:
        """A plan for the options. `old` itself where it rests on the same basis and mechanisms; its steps where only the
        mechanisms differ, so that trainings which are done stay comparable."""
        if old is not None and self.fits(old):
            return old
        plan = Plan(
            basis=self.basis,
            who=self.who,
            machine=self.machine,
            corpus=None if self.corpus is None else self.corpus.to_dict(),
            sizes={s: {m.label: of[m.label] for m in self.mechanisms} for s, of in sizes.items()},
        )
        plan = replace(plan, workers=self.workers)
        keep = old if old is not None and old.basis == plan.basis else None
        seconds = self._calibrate(plan)
        budget = self._budget()
        if "text" in seconds:
            text = self._text(seconds["text"], budget["text"])
            kept = keep.text if keep is not None else None
            plan = replace(plan, text=text if kept is None else replace(text, steps=kept.steps, batch=kept.batch))
        if "recall" in seconds:
            recall = self._recall(seconds["recall"], budget["recall"])
            kept = keep.recall if keep is not None else None
            plan = replace(plan, recall=recall if kept is None else replace(recall, steps=kept.steps))
        if "speed" in self.options.stages:
            plan = self._speed(plan, budget["speed"])
        if "cache" in self.options.stages:
            shared = [n for n, labels in plan.speed.items() if len(labels) == len(self.timed) and n <= LONGEST_CACHE]
            plan = replace(plan, cache=tuple(shared or CACHE_LENGTHS))
        return plan

    @property
    def workers(self) -> int:
        """Trainings side by side: one for each core, on a processor."""
        trainings = len(self.mechanisms) * self.options.seeds * len({"text", "recall"} & set(self.options.stages))
        cores = self.cores if self.machine["device"] == "cpu" else 1
        return max(1, min(cores, trainings, MOST_WORKERS))

    # ---- calibration ------------------------------------------------------------------------------------------------------

    def _calibrate(self, plan: Plan) -> dict[str, dict[str, float]]:
        """stage -> label -> seconds of one training step, measured in turns."""
        out = {}
        if "text" in plan.sizes:
            out["text"] = self._step_seconds(plan, "text", 2)
        if "recall" in plan.sizes:
            out["recall"] = self._step_seconds(plan, "recall", RECALL_BATCH)
        return out

    def _step_seconds(self, plan: Plan, stage: str, batch: int) -> dict[str, float]:
        steppers = {m.label: stepper(m, self.options, self.corpus, plan, stage, batch) for m in self.mechanisms}
        steppers = {label: step for label, step in steppers.items() if works(step)}
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if self.workers > 1 else threads)
        try:
            timings = time_interleaved(steppers, 4, warmup=2, min_sample=0, max_seconds=6.0, device=self.options.device)
        finally:
            torch.set_num_threads(threads)
        return {label: t.median for label, t in timings.items()}

    def _budget(self) -> dict[str, float]:
        """Seconds of computing for each stage: its share of what is left after start-up, gate, machine limits and report, times
        the number of processes that compute."""
        fixed = (
            5.0
            + 0.5 * len(self.mechanisms)
            + (5.0 if self.workers > 1 else 0.0)
            + (4.0 + len(self.timed) if "speed" in self.options.stages else 0.0)
        )
        left = 60 * self.options.minutes - (time.perf_counter() - self.began) - fixed
        total = sum(SHARE[s] for s in self.options.stages)
        side_by_side = max(1.0, BESIDE * self.workers)
        pace = {"text": side_by_side, "recall": side_by_side}
        return {s: max(1.0, MARGIN * left * SHARE[s] / total * pace.get(s, 1.0)) for s in self.options.stages}

    # ---- budgets ----------------------------------------------------------------------------------------------------------

    def _text(self, seconds: dict[str, float], budget: float) -> Training:
        rates = self.options.learning_rates or (3e-3 * math.sqrt(64 / max(64, self.options.dim)),)
        runs = self.options.seeds * len(rates)
        batch, scale = 2, 1.0
        while True:
            # Evaluation is forward only: about a third of a step's time per window.
            per_step = scale * max(1e-9, sum(seconds.values())) * runs
            steps = int(budget / per_step - WINDOWS / (3 * batch))
            if steps <= MOST_TEXT or batch >= 32:
                break
            batch, scale = 2 * batch, 2 * scale
        steps = self.options.steps or min(MOST_TEXT, max(FEWEST, steps))
        return Training(steps, batch, rates, {k: scale * v for k, v in seconds.items()})

    def _recall(self, seconds: dict[str, float], budget: float) -> Training:
        rates = self.options.learning_rates or (1e-2,)
        runs = self.options.seeds * len(rates)
        checks = 1 + RECALL_EXAMPLES / (3 * RECALL_BATCH) / RECALL_CHECK
        steps = int(budget / (checks * max(1e-9, sum(seconds.values())) * runs))
        steps = self.options.recall_steps or min(MOST_RECALL, max(FEWEST, steps))
        return Training(steps, RECALL_BATCH, rates, dict(seconds))

    def _speed(self, plan: Plan, budget: float) -> Plan:
        o, began = self.options, time.perf_counter()
        costs = speed.estimate(self.timed, speed.Place(o.layer_width, o.heads, o.device))
        if o.lengths:
            lengths = {n: [m.label for m in self.timed] for n in sorted(o.lengths)}
        else:
            lengths = speed.choose_lengths(costs, budget - (time.perf_counter() - began), 0.4 * speed.available_memory())
        seconds = {n: speed.CALLS * sum(costs[label].time(n) for label in labels) for n, labels in lengths.items()}
        return replace(plan, speed=lengths, speed_seconds=seconds)


def works(call: Callable[[], object]) -> bool:
    """Whether a call goes through. One that does not is left out of the calibration; its trial will say why."""
    try:
        call()
    except Exception:
        return False
    return True


def stepper(m: Mechanism, options: CompareOptions, corpus: Corpus | None, plan: Plan, stage: str, batch: int) -> Thunk:
    """A function that does one training step of the mechanism's model."""
    hidden = plan.sizes[stage][m.label].hidden
    model: torch.nn.Module
    if stage == "text":
        assert corpus is not None
        model = build.text_model(m, options, hidden)
        loss = text_loss(model, corpus, batch, options.context, 0, options.device)
    else:
        model = build.RecallModel(m, plan.task, options.heads, hidden).to(options.device)
        loss = recall_loss(model, plan.task, batch, 0, options.device)
    optimizer = make_optimizer(model, 1e-3)
    return lambda: train_step(model, optimizer, loss, 1e-3)
