"""`attlas compare`: train and measure mechanisms under equal conditions, store what comes out at once, and report it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attlas.errors import AttlasError, DataError, UnsupportedError
from attlas.lab import pool
from attlas.lab.measure import useful_threads
from attlas.lab.mechanisms import Mechanism, choose, reference_of
from attlas.lab.options import CompareOptions
from attlas.lab.plan import FORMAT, Plan, Planner, sizes_of
from attlas.lab.progress import Progress, make_progress
from attlas.lab.results import Results
from attlas.lab.store import PLAN, Store
from attlas.lab.tasks.text import Corpus, load_corpus, require_length
from attlas.lab.trials import Trial, Trials, gate_trial


@dataclass(frozen=True)
class Asked:
    """What the user asked for, checked: nothing has been written yet."""

    options: CompareOptions
    mechanisms: tuple[Mechanism, ...]
    reference: Mechanism
    corpus: Corpus | None
    sizes: dict[str, dict[str, Any]]

    @property
    def timed(self) -> tuple[Mechanism, ...]:
        """The mechanisms, and the reference when it is not among them."""
        return self.mechanisms if self.reference in self.mechanisms else (self.reference, *self.mechanisms)


def check(options: CompareOptions) -> Asked:
    """Resolve names, read the corpus, find the widths. Raises an AttlasError for anything that cannot be done."""
    if importlib.util.find_spec("plotly") is None:
        raise UnsupportedError("the report of `attlas compare` needs plotly: pip install 'attlas[lab]'")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedError(f"--device {options.device}: this torch finds no CUDA device")
    mechanisms = choose(options)
    reference = reference_of(mechanisms, options)
    corpus = None
    if "text" in options.stages:
        corpus = load_corpus(options.text)
        require_length(corpus, options.context)
    elif options.text:
        raise DataError(f"--text {options.text[0]}: no text is used by the stages {', '.join(options.stages)}")
    return Asked(options, mechanisms, reference, corpus, sizes_of(options, mechanisms, reference))


def run(options: CompareOptions, *, progress: Progress | None = None) -> Results:
    """Do the comparison, or what is left of it, and write results.json, results.csv and report.html into its folder.

    Every finished trial is stored at once. After Ctrl-C or a crash the same call goes on where it stopped and loses at most the
    trial that was running; on Ctrl-C a report on what is there is written before KeyboardInterrupt goes on.
    Raises UnknownNameError, OptionError, UnsupportedError or DataError before anything is written.
    """
    began = time.perf_counter()
    asked = check(options)
    with Store(options.folder, fresh=options.fresh) as store, progress or make_progress() as shown:
        old = _stored_plan(store)
        cores = options.threads or torch.get_num_threads()
        with _threads(options.threads or (old.machine["threads"] if old is not None else useful_threads())):
            return _run(asked, old, store, shown, began, cores)


@contextmanager
def _threads(wanted: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(asked: Asked, old: Plan | None, store: Store, shown: Progress, began: float, cores: int) -> Results:
    options = asked.options
    gates = [gate_trial(m, options) for m in asked.timed]
    for trial in gates:
        _gate(trial, store)
    green = [m for m, g in zip(asked.timed, gates, strict=True) if store.records[g.key]["status"] == "ok"]
    for m, g in zip(asked.timed, gates, strict=True):
        if m not in green:
            shown.note(f"{m.label}: red gate, neither trained nor timed: {store.records[g.key]['error']}")
    plan = _plan(asked, green, old, store, shown, began, cores)
    trained = [m for m in asked.mechanisms if m in green]
    trials = Trials(options, trained, green, asked.corpus, plan).all()
    again = Rebuild(options, tuple(m.label for m in green), plan.to_dict(), plan.workers)
    try:
        _do_all(trials, again, store, shown)
    except KeyboardInterrupt:
        done = sum(store.done(t.key) for t in trials)
        results = _write(asked, plan, gates + trials, store, began)
        shown.note(f"stopped: {done} of {len(trials)} trials are stored; the same command goes on from here ({results.report})")
        raise
    return _write(asked, plan, gates + trials, store, began)


def _stored_plan(store: Store) -> Plan | None:
    stored = store.plan()
    if stored is None or stored.get("format") != FORMAT:
        return None
    try:
        return Plan.from_dict(stored)
    except (AttlasError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{store.folder / PLAN} is not a plan of this version ({error!r}); --fresh starts over") from error


def _plan(
    asked: Asked, green: Sequence[Mechanism], old: Plan | None, store: Store, shown: Progress, began: float, cores: int
) -> Plan:
    if store.unreadable:
        shown.note(f"{store.unreadable} lines of {store.folder} cannot be read; those trials run again")
    trained = [m for m in asked.mechanisms if m in green]
    planner = Planner(asked.options, trained, green, asked.corpus, began, cores)
    if not planner.fits(old):
        shown.note("calibrating: how long is a step for each mechanism?")
    plan = planner.make(asked.sizes, old)
    if plan is not old:
        store.save_plan(plan.to_dict())
        for line in _told(plan, asked.options):
            shown.note(line)
    return plan


def _told(plan: Plan, options: CompareOptions) -> list[str]:
    """The budget in words."""
    lines = []
    if plan.workers > 1:
        lines.append(f"trainings run {plan.workers} side by side, each on one thread")
    if plan.text is not None:
        tokens = plan.text.steps * plan.text.batch * options.context
        lines.append(
            f"language: {plan.text.steps:,} steps of {plan.text.batch} x {options.context} bytes = {tokens:,} bytes for each"
        )
    if plan.recall is not None:
        lines.append(f"recall: at most {plan.recall.steps:,} steps of {plan.recall.batch} examples for each")
    if plan.speed:
        lines.append("lengths: " + ", ".join(f"{n:,}" for n in plan.speed))
    return lines


def _do_all(trials: Sequence[Trial], again: Rebuild, store: Store, shown: Progress) -> None:
    expected: dict[str, float] = {}
    finished: dict[str, float] = {}
    for t in trials:
        expected[t.stage] = expected.get(t.stage, 0.0) + t.seconds
        finished[t.stage] = finished.get(t.stage, 0.0) + (t.seconds if store.done(t.key) else 0.0)
    already = sum(store.done(t.key) for t in trials)
    if already:
        shown.note(f"{already} of {len(trials)} trials are stored already")
    shown.stages(expected, finished)
    todo = [t for t in trials if not store.done(t.key)]
    training = [t for t in todo if t.trains]
    if again.workers > 1 and len(training) > 1:
        _side_by_side(training, again, store, shown)
        todo = [t for t in todo if not t.trains]
    for trial in todo:
        _one(trial, store, shown)


def _silent(fraction: float, text: str = "") -> None:
    """The gates are too short to be shown."""


def _gate(trial: Trial, store: Store) -> None:
    if not store.done(trial.key):
        store.add(trial.attempt(_silent))


def _one(trial: Trial, store: Store, shown: Progress) -> None:
    """Run a trial in this process and store how it went."""
    shown.begin(trial.stage, trial.what, trial.seconds)
    record = trial.attempt(partial(shown.tick, trial.stage, trial.what))
    store.add(record)
    shown.end(trial.stage, trial.what, trial.told(record))


def _side_by_side(trials: Sequence[Trial], again: Rebuild, store: Store, shown: Progress) -> None:
    """Run trainings in worker processes and store each as it ends."""
    by_key = {t.key: t for t in trials}
    with closing(pool.run(list(by_key), min(again.workers, len(trials)), "attlas.lab.compare:jobs", (again,))) as events:
        for event in events:
            trial = by_key[event.key]
            if event.kind == "begin":
                shown.begin(trial.stage, trial.what, trial.seconds)
            elif event.kind == "tick":
                shown.tick(trial.stage, trial.what, event.fraction, event.words)
            else:
                record = event.record or trial.attempt_lost(event.words)
                store.add(record)
                shown.end(trial.stage, trial.what, trial.told(record))


@dataclass(frozen=True)
class Rebuild:
    """What a worker needs to make the same trials: the options, the labels of the mechanisms that are green, the plan."""

    options: CompareOptions
    green: tuple[str, ...]
    plan: dict[str, Any]
    workers: int


def jobs(again: Rebuild) -> dict[str, Callable[..., dict[str, Any]]]:
    """key -> the trial's `attempt`, for a worker."""
    options = again.options
    trained = [m for m in choose(options) if m.label in again.green]
    corpus = load_corpus(options.text) if "text" in options.stages else None
    made = Trials(options, trained, trained, corpus, Plan.from_dict(again.plan)).all()
    return {t.key: t.attempt for t in made if t.trains}


def _write(asked: Asked, plan: Plan, trials: Sequence[Trial], store: Store, began: float) -> Results:
    """Gather what is stored and write the three outputs."""
    from attlas.lab.report import render

    records: dict[str, list[dict[str, Any]]] = {}
    for trial in trials:
        if trial.key in store.records:
            records.setdefault(trial.stage, []).append(store.records[trial.key])
    results = Results(
        folder=store.folder,
        options=asked.options.to_dict(),
        command=asked.options.command(),
        plan=plan.to_dict(),
        mechanisms={m.label: _described(m, asked) for m in asked.mechanisms},
        records=records,
        complete=all(t.key in store.records for t in trials),
        seconds=sum(
            r["seconds"] / (plan.workers if r["stage"] in ("text", "recall") else 1) for rs in records.values() for r in rs
        ),
    )
    store.write("results.json", results.to_json())
    store.write("results.csv", results.to_csv())
    report: Path = store.write("report.html", render(results))
    return replace(results, report=report)


def _described(m: Mechanism, asked: Asked) -> dict[str, Any]:
    options = asked.options
    sizes = {stage: of[m.label] for stage, of in asked.sizes.items()}
    first = sizes.get("text") or sizes.get("recall")
    return {
        **m.settings_at(options.layer_width, options.heads),
        "card": dict(m.told),
        "call": m.call(options.layer_width, options.heads),
        "parameters": first.parameters if first else None,
        "hidden": {stage: s.hidden for stage, s in sizes.items()},
        "recall_parameters": sizes["recall"].parameters if "recall" in sizes else None,
    }
