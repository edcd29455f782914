"""One training loop for both tasks, and how their results are measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.lab.build import RecallModel
from attlas.lab.tasks.mqar import IGNORE, RecallTask, recall_accuracy
from attlas.lab.tasks.text import Corpus, training_batch, validation_windows
from attlas.models.transformer import Transformer

Tick = Callable[[int, int, float], None]  # step, steps, loss: for a display


class Diverged(ArithmeticError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW (betas 0.9, 0.95; decay 0.1 on matrices), linear warm-up over the first tenth of the steps
    (100 at most), then a cosine down to a tenth of the rate; gradient norm clipped to 1."""

    steps: int
    batch: int
    rate: float
    seed: int = 0

    def rate_at(self, step: int) -> float:
        warm = min(100, max(1, self.steps // 10))
        if step < warm:
            return self.rate * (step + 1) / warm
        phase = (step - warm) / max(1, self.steps - warm)
        return self.rate * (0.55 + 0.45 * math.cos(math.pi * phase))


@dataclass
class Trained:
    """losses: nats, one per step. seconds: wall time in steps alone (no evaluation). checks: what `check` returned, by step."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)

    @property
    def step_median(self) -> float:
        return statistics.median(self.step_seconds) if self.step_seconds else math.nan

    def curve(self, points: int = 60) -> list[tuple[int, float]]:
        """(step, mean loss in nats of the steps since the last point)."""
        size = max(1, math.ceil(len(self.losses) / points))
        blocks = [self.losses[i : i + size] for i in range(0, len(self.losses), size)]
        return [(min((i + 1) * size, len(self.losses)), statistics.fmean(b)) for i, b in enumerate(blocks)]


def make_optimizer(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor], rate: float) -> float:
    """One step; returns the loss in nats."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def train(
    model: nn.Module,
    recipe: Recipe,
    loss_of_step: Callable[[], Tensor],
    *,
    check: Callable[[], float] | None = None,
    check_every: int = 0,
    enough: float | None = None,
    tick: Tick | None = None,
) -> Trained:
    """Train; every `check_every` steps and at the end call `check`, and stop early once it returns `enough` or more."""
    optimizer, record = make_optimizer(model, recipe.rate), Trained()
    for step in range(recipe.steps):
        start = time.perf_counter()
        loss = train_step(model, optimizer, loss_of_step, recipe.rate_at(step))
        record.step_seconds.append(time.perf_counter() - start)
        if not math.isfinite(loss):
            raise Diverged(f"the loss became {loss} at step {step + 1} of {recipe.steps}")
        record.losses.append(loss)
        if tick is not None:
            tick(step + 1, recipe.steps, loss)
        last = step + 1 == recipe.steps
        if check is not None and (last or (check_every and (step + 1) % check_every == 0)):
            value = check()
            record.checks.append((step + 1, value))
            if enough is not None and value >= enough:
                break
    return record


# ---------------------------------------------------------------------------------------------------- bytes


def text_loss(model: Transformer, corpus: Corpus, batch: int, context: int, seed: int, device: str) -> Callable[[], Tensor]:
    """Loss of the next batch; all mechanisms see the same batches in the same order."""
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))

    def loss() -> Tensor:
        window = training_batch(corpus, batch, context, generator).to(device)
        return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    return loss


@dataclass(frozen=True)
class HeldOut:
    """bits: bits per byte over held-out windows; error: standard error over windows; per_window: bits of each, in one order for
    all models, so that two can be compared window by window; by_position: (first, last, bits) of each eighth of the context."""

    bits: float
    error: float
    per_window: tuple[float, ...]
    by_position: tuple[tuple[int, int, float], ...]


@torch.no_grad()
def held_out_bits(model: Transformer, corpus: Corpus, windows: int, context: int, device: str, *, batch: int = 16) -> HeldOut:
    """Bits per byte on the validation side: every byte predicted from the bytes before it in its window."""
    costs = []
    for part in validation_windows(corpus, windows, context).split(batch):
        part = part.to(device)
        logits = model(part[:, :-1]).float()
        nats = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        costs.append(nats.view(part.shape[0], context).double().cpu() / math.log(2))
    bits = torch.cat(costs)
    per_window = bits.mean(1)
    error = float(per_window.std() / len(per_window) ** 0.5) if len(per_window) > 1 else math.nan
    edges = sorted({round(i * context / 8) for i in range(9)})
    by_position = tuple((a, b - 1, float(bits[:, a:b].mean())) for a, b in pairwise(edges))
    return HeldOut(float(bits.mean()), error, tuple(per_window.tolist()), by_position)


# ---------------------------------------------------------------------------------------------------- recall


def recall_loss(model: RecallModel, task: RecallTask, batch: int, seed: int, device: str) -> Callable[[], Tensor]:
    """Loss of the next batch of fresh examples, at the queries only; all mechanisms see the same examples."""
    generator = torch.Generator().manual_seed(2_000_003 * (seed + 1))

    def loss() -> Tensor:
        inputs, labels = (t.to(device) for t in task.batch(batch, generator))
        asked = labels != IGNORE
        return F.cross_entropy(model.logits(model(inputs)[asked]), labels[asked])

    return loss


@torch.no_grad()
def held_out_recall(model: RecallModel, task: RecallTask, examples: int, device: str) -> float:
    """Accuracy on examples that no training seed draws."""
    inputs, labels = (t.to(device) for t in task.batch(examples, torch.Generator().manual_seed(7)))
    predicted = torch.cat([model.logits(model(part)).argmax(-1) for part in inputs.split(128)])
    return recall_accuracy(predicted.cpu(), labels.cpu())
