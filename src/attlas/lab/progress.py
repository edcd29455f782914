"""What the user sees while a comparison runs: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
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
        """A trial begins. Several may run side by side; stage and what name one."""

    def tick(self, stage: str, what: str, fraction: float, text: str = "") -> None:
        """A running trial has come this far."""

    def end(self, stage: str, what: str, line: str) -> None:
        """A running trial is stored; `line` says what came out."""


class Plain(Progress):
    """One line per event, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.start = time.monotonic()

    def _line(self, text: str) -> None:
        print(f"[{clock(time.monotonic() - self.start)}] {text}", file=self.stream, flush=True)

    def note(self, text: str) -> None:
        self._line(text)

    def end(self, stage: str, what: str, line: str) -> None:
        self._line(f"{TITLES.get(stage, stage).lower()}: {line}")


@dataclass
class _Stage:
    """total, done: predicted seconds; fresh: those done in this run. running: what -> seconds, fraction, words."""

    task: int
    total: float
    done: float
    fresh: float = 0.0
    began: float | None = None
    running: dict[str, tuple[float, float, str]] = field(default_factory=dict)


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
        self.shown: dict[str, _Stage] = {}

    def __enter__(self) -> Live:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for stage in self.shown.values():
            self.bars.update(stage.task, what="")  # type: ignore[arg-type]
        self.bars.stop()

    def note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, highlight=False)

    def stages(self, seconds: Mapping[str, float], done: Mapping[str, float]) -> None:
        for stage, total in seconds.items():
            task = self.bars.add_task(TITLES.get(stage, stage), total=max(total, 1e-9), left="", what="")
            self.shown[stage] = _Stage(task, total, done.get(stage, 0.0))
            self._draw(self.shown[stage])

    def begin(self, stage: str, what: str, seconds: float) -> None:
        at = self.shown[stage]
        at.began = at.began or time.monotonic()
        at.running[what] = (seconds, 0.0, "")
        self._draw(at)

    def tick(self, stage: str, what: str, fraction: float, text: str = "") -> None:
        at = self.shown[stage]
        at.running[what] = (at.running[what][0], fraction, text)
        self._draw(at)

    def end(self, stage: str, what: str, line: str) -> None:
        from rich.text import Text

        at = self.shown[stage]
        seconds, _, _ = at.running.pop(what)
        at.done += seconds
        at.fresh += seconds
        self._draw(at)
        # One print: the bars are drawn again after each.
        self.console.print(Text.assemble((f"{TITLES.get(stage, stage):<9} ", "bold cyan"), line))

    def _draw(self, at: _Stage) -> None:
        part = sum(seconds * fraction for seconds, fraction, _ in at.running.values())
        done = at.done + part
        rest = max(0.0, at.total - done)
        # Predicted seconds that have gone by per second of the clock: side by side, more than one.
        spent, gone = time.monotonic() - (at.began or time.monotonic()), at.fresh + part
        pace = gone / spent if spent > 1 and gone > 0 else 1.0
        if rest < 1e-6:
            left = "done"
        else:
            left = clock(rest / pace) if at.began else ""
        what = "   ".join(f"{name}  {text}".rstrip() for name, (_, _, text) in at.running.items())
        self.bars.update(at.task, completed=done, left=left, what=what)  # type: ignore[arg-type]


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
