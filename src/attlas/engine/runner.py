"""One forward for all tasks of a step: their tokens packed, each sequence on its own cache row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.cache.layer import Cache
from attlas.engine.scheduler import Task
from attlas.models.transformer import Transformer
from attlas.shapes import SeqInfo


@dataclass(frozen=True)
class Ran:
    """Logits [rows, V] that somebody asked for. first[i]: the row of task i's first one (-1 = it asked for none); a task that
    samples has a row for its last token and one for each draft; one that reports its prompt has a row for each token before."""

    logits: Tensor
    first: list[int]


class Runner:
    """Feeds packed tokens to a model and its caches."""

    def __init__(self, model: Transformer, caches: list[Cache]) -> None:
        self.model, self.caches = model, caches
        self.device = model.embed.tokens.weight.device

    @torch.inference_mode()
    def run(self, tasks: list[Task]) -> Ran:
        """Feed every task's tokens; their keys and values are in the cache afterwards."""
        fed = [t.fed for t in tasks]
        rows = tuple(t.sequence.row for t in tasks if t.sequence.row is not None)
        seq = SeqInfo(tuple(map(len, fed)), ids=rows)
        hidden = self._hidden(torch.tensor([token for part in fed for token in part], device=self.device), seq)
        index: list[int] = []
        first, at = [], 0
        for task, part in zip(tasks, fed, strict=True):
            wanted = _wanted(task)
            first.append(len(index) if wanted else -1)
            index.extend(range(at + len(part) - wanted, at + len(part)))
            at += len(part)
        every = len(index) == at
        return Ran(self._logits(hidden if every else hidden[torch.tensor(index, device=self.device, dtype=torch.int64)]), first)

    def _hidden(self, tokens: Tensor, seq: SeqInfo) -> Tensor:
        return self.model.hidden(tokens, seq=seq, cache=self.caches)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)


class OneByOne(Runner):
    """Every token in a forward of its own, which has the same shape whatever else is going on: the logits of a sequence are then
    the same to the bit in any company, for every mechanism and on every machine. Slow: all weights are read for each token."""

    def _hidden(self, tokens: Tensor, seq: SeqInfo) -> Tensor:
        rows = [row for row, n in zip(seq.rows, seq.lengths, strict=True) for _ in range(n)]
        where = [SeqInfo((1,), ids=(row,)) for row in rows]
        return torch.cat([self.model.hidden(t[None], seq=s, cache=self.caches) for t, s in zip(tokens, where, strict=True)])

    def _logits(self, hidden: Tensor) -> Tensor:
        if not len(hidden):
            return super()._logits(hidden)
        # A copy, because matrix libraries round differently for memory that begins elsewhere in a cache line.
        return torch.cat([self.model.logits(row[None].clone()) for row in hidden])


def _wanted(task: Task) -> int:
    """How many of the task's last tokens need logits."""
    if task.sequence.reports_prompt:
        return task.total
    return 1 + len(task.drafts) if task.samples else 0
