"""What the user sees while a comparison runs: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TextIO

TITLES = {
    "gate": "Gate",
    "text": "Language",
    "recall": "Recall",
    "speed": "Speed",
    "cache": "Cache",
}


def clock(seconds: float) -> str:
    """95 -> '1:35', 3725 -> '1:02:05'."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Progress:
    """Says nothing. The other two override what they show. Seconds are predictions, made up front and corrected on the way."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def note(self, text: str) -> None:
        """A line about the comparison as a whole."""

    def stages(self, seconds: Mapping[str, float], done: Mapping[str, float]) -> None:
        """Predicted seconds of every stage, and how many of them are in the store already."""

    def begin(self, stage: str, what: str, seconds: float) -> None:
        """A trial begins."""

    def tick(self, fraction: float, text: str = "") -> None:
        """The running trial has come this far."""

    def end(self, line: str) -> None:
        """The running trial is stored; `line` says what came out."""


class Plain(Progress):
    """One line per event, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.start = time.monotonic()
        self.stage = ""

    def _line(self, text: str) -> None:
        print(f"[{clock(time.monotonic() - self.start)}] {text}", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        self._line(text)

    def begin(self, stage: str, what: str, seconds: float) -> None:
        self.stage = TITLES.get(stage, stage).lower()

    def end(self, line: str) -> None:
        self._line(f"{self.stage}: {line}")


class Live(Progress):
    """A bar per stage with the time left in it, and the results as they come above the bars. Needs rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True)
        columns = (
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("[dim]{task.fields[left]:>7}"),
            TextColumn("{task.fields[what]}", markup=False),
        )
        self.bars = Bars(*columns, console=self.console, refresh_per_second=6)
        self.tasks: dict[str, int] = {}
        self.expected: dict[str, float] = {}
        self.at = ("", 0.0, 0.0, 0.0)  # stage, seconds already done in it, predicted seconds of the trial, when it began
        self.factor: dict[str, float] = {}  # seconds taken / seconds predicted, per stage

    def __enter__(self) -> Live:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for task in self.tasks.values():
            self.bars.update(task, what="")  # type: ignore[arg-type]
        self.bars.stop()

    def note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)

    def stages(self, seconds: Mapping[str, float], done: Mapping[str, float]) -> None:
        for stage, total in seconds.items():
            task = self.bars.add_task(TITLES.get(stage, stage), total=max(total, 1e-9), left="", what="")
            self.bars.update(task, completed=done.get(stage, 0.0))
            self.tasks[stage], self.expected[stage] = task, total
        self.before = dict(done)

    def begin(self, stage: str, what: str, seconds: float) -> None:
        self.at = (stage, self.before.get(stage, 0.0), seconds, time.monotonic())
        self.what = what
        self.tick(0.0)

    def tick(self, fraction: float, text: str = "") -> None:
        stage, base, seconds, began = self.at
        spent = time.monotonic() - began
        if fraction > 0.05 and seconds > 0 and spent > 0.5:
            self.factor[stage] = 0.7 * self.factor.get(stage, 1.0) + 0.3 * spent / (fraction * seconds)
        done = base + fraction * seconds
        left = (self.expected.get(stage, 0.0) - done) * self.factor.get(stage, 1.0)
        what = f"{self.what}  {text}" if text else self.what
        self.bars.update(self.tasks[stage], completed=done, left=clock(left), what=what)  # type: ignore[arg-type]

    def end(self, line: str) -> None:
        from rich.text import Text

        stage, base, seconds, _ = self.at
        self.before[stage] = base + seconds
        finished = self.before[stage] >= self.expected.get(stage, 0.0) - 1e-6
        self.bars.update(self.tasks[stage], completed=self.before[stage], what="")  # type: ignore[arg-type]
        if finished:
            self.bars.update(self.tasks[stage], left="done")  # type: ignore[arg-type]
        # One print: the bars are drawn again after each.
        self.console.print(Text.assemble((f"{TITLES.get(stage, stage):<9} ", "bold cyan"), line))


def make_progress(quiet: bool = False) -> Progress:
    """Bars when stderr is a terminal and rich is installed, else lines; nothing when quiet."""
    if quiet:
        return Progress()
    if sys.stderr.isatty():
        try:
            return Live()
        except ImportError:
            pass
    return Plain()
