"""What a comparison is asked to do. Checked when it is made, before anything is built or written."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from attlas.errors import OptionError
from attlas.registry import suggest

Stage = Literal["text", "recall", "speed", "cache"]
STAGES: tuple[Stage, ...] = ("text", "recall", "speed", "cache")
REFERENCE = "causal"


@dataclass(frozen=True)
class CompareOptions:
    """The settings of `attlas compare`.

    names           mechanisms to compare, with options after colons, e.g. sliding-window:window=64 (default: a selection)
    text            a file or folder of UTF-8 text to train on instead of this Python's own sources and documentation
    minutes         time for the whole comparison; steps and lengths are chosen to fit it, the same number of tokens for everybody
    seeds           independent runs of every training
    stages          what to do: text (bits per byte), recall (associative recall), speed (time and memory), cache (bytes)
    dim             width of the language model
    layers          layers of the language model
    heads           attention heads
    context         bytes of context of the language model
    window          keys that windows and blocks hold when their own option does not say it (default: context / 8)
    learning_rates  learning rates to try for every mechanism; the best is reported (default: one, scaled with dim)
    steps           training steps of the language models (default: as many as fit the time)
    recall_steps    training steps at most of the recall models (default: as many as fit the time)
    lengths         sequence lengths of the speed stage (default: doubling from 256 as far as the time allows)
    layer_dim       width of the single layer that the speed and cache stages measure (default: 64 times the heads)
    name            name of the comparison: results go to attlas-results/NAME
    out             folder for the results, instead of attlas-results/NAME
    fresh           forget what the folder holds and start over
    device          cpu or cuda
    threads         cores to use: threads in timings, processes in trainings (default: as many as torch finds useful)
    """

    names: tuple[str, ...] = ()
    text: tuple[Path, ...] = ()
    minutes: float = 4.0
    seeds: int = 1
    stages: tuple[Stage, ...] = STAGES
    dim: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 256
    window: int | None = None
    learning_rates: tuple[float, ...] = ()
    steps: int | None = None
    recall_steps: int | None = None
    lengths: tuple[int, ...] = ()
    layer_dim: int | None = None
    name: str = "compare"
    out: Path | None = None
    fresh: bool = False
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        self._check_stages()
        if not (math.isfinite(self.minutes) and self.minutes > 0):
            raise OptionError(f"--minutes {self.minutes}: it must be a number above 0")
        for field in ("seeds", "dim", "layers", "heads", "layer_dim", "window", "steps", "recall_steps", "threads"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise OptionError(f"--{field.replace('_', '-')} {value}: it must be at least 1")
        if self.context < 8:
            raise OptionError(f"--context {self.context}: it must be at least 8")
        for field in ("dim", "layer_dim"):
            if (getattr(self, field) or 0) % (2 * self.heads):
                shown = field.replace("_", "-")
                raise OptionError(
                    f"--{shown} {getattr(self, field)} --heads {self.heads}: {shown} must be a multiple of 2 * heads"
                )
        if any(n < 16 for n in self.lengths) or len(set(self.lengths)) != len(self.lengths):
            raise OptionError(f"--lengths {self.lengths}: lengths must differ and be at least 16")
        if any(not 0 < rate < 1 for rate in self.learning_rates):
            raise OptionError(f"--learning-rates {self.learning_rates}: rates must lie between 0 and 1")
        if not self.name or self.name in (".", "..") or set(self.name) & set('/\\:*?"<>|\0'):
            raise OptionError(f"--name {self.name!r}: a plain folder name is needed")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise OptionError(f"--device {self.device}: {suggest(self.device, ('cpu', 'cuda'))}")

    def _check_stages(self) -> None:
        if not self.stages:
            raise OptionError("--stages: at least one of " + ", ".join(STAGES))
        for stage in self.stages:
            if stage not in STAGES:
                raise OptionError(f"--stages {stage}: {suggest(stage, STAGES)}")

    @property
    def folder(self) -> Path:
        return self.out if self.out is not None else Path("attlas-results") / self.name

    @property
    def span(self) -> int:
        """Keys in a window or a block where the user does not say."""
        return self.window if self.window is not None else max(8, self.context // 8)

    @property
    def layer_width(self) -> int:
        """Width of the layer that is timed."""
        return self.layer_dim if self.layer_dim is not None else 64 * self.heads

    def ordered_stages(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in STAGES if stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        out = asdict(self)
        out["text"] = [str(t) for t in self.text]
        out["out"] = None if self.out is None else str(self.out)
        out["layer_dim"] = self.layer_width
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}

    def command(self) -> str:
        """The command line that asks for this."""
        parts = ["attlas compare", *self.names]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "names" or value == field.default:
                continue
            flag = "--" + field.name.replace("_", "-")
            if isinstance(value, bool):
                parts.append(flag)
            else:
                parts += [f"{flag} {v}" for v in (value if isinstance(value, tuple) else (value,))]
        return " ".join(parts)
