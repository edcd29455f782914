"""Multi-query associative recall: keys and values are shown once, then each key is asked for once more, somewhere later.

Task (Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv:2312.04927). Of a
vocabulary of V tokens, 1 ... V/2 - 1 are keys, V/2 ... V - 1 are values, 0 is filler. One example of T tokens with K pairs:

    k_1 v_1 k_2 v_2 ... k_K v_K | slots of two tokens, (T - 2K) / 2 of them: a queried key and a filler, or two fillers

Keys are distinct, values are distinct. Each key stands in one slot; slots are drawn without replacement with probability
proportional to (slot + 1) ** (a - 1), slot = 0, 1, 2 ..., so with a = 0.01 most queries come soon. The label at a query is
the key's value, all other labels are -100. Accuracy: the share of queries that the arg-max answers, averaged per example,
then over examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.errors import OptionError

IGNORE = -100


@dataclass(frozen=True)
class RecallTask:
    """length T, pairs K, vocab V, power a; fillers stay 0 (`random_fillers=False`) or become uniform random tokens."""

    length: int = 64
    pairs: int = 8
    vocab: int = 256
    power: float = 0.01
    random_fillers: bool = False

    def __post_init__(self) -> None:
        if self.length % 2 or self.pairs < 1 or 4 * self.pairs > self.length:
            raise OptionError(f"{self}: length must be even and at least 4 * pairs")
        if self.vocab % 2 or self.pairs > self.vocab // 2 - 1:
            raise OptionError(f"{self}: vocab must be even and have more than 2 * pairs tokens")

    def batch(self, examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """inputs, labels: int64 [examples, length]."""
        half, slots = self.vocab // 2, (self.length - 2 * self.pairs) // 2
        keys = 1 + self._distinct(examples, half - 1, generator)
        values = half + self._distinct(examples, half, generator)
        weights = torch.arange(1, slots + 1, dtype=torch.float64) ** (self.power - 1)
        # Exponential clocks with these rates ring in the order of draws without replacement.
        clocks = torch.empty(examples, slots, dtype=torch.float64).exponential_(generator=generator) / weights
        where = 2 * self.pairs + 2 * clocks.argsort(dim=1)[:, : self.pairs]
        inputs = torch.zeros(examples, self.length, dtype=torch.int64)
        inputs[:, 0 : 2 * self.pairs : 2] = keys
        inputs[:, 1 : 2 * self.pairs : 2] = values
        inputs.scatter_(1, where, keys)
        labels = torch.full_like(inputs, IGNORE).scatter_(1, where, values)
        if self.random_fillers:
            noise = torch.randint(self.vocab, inputs.shape, generator=generator)
            inputs = torch.where(inputs == 0, noise, inputs)
        return inputs, labels

    def _distinct(self, examples: int, choices: int, generator: torch.Generator) -> Tensor:
        """[examples, pairs]: distinct numbers below `choices`, every arrangement equally likely."""
        return torch.rand(examples, choices, generator=generator).argsort(dim=1)[:, : self.pairs]


def recall_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of right answers among each example's queries, averaged over the examples. predicted, labels: [examples, T]."""
    asked = labels != IGNORE
    right = ((predicted == labels) & asked).sum(1).double() / asked.sum(1).clamp_min(1)
    return float(right.mean())
