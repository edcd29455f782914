"""Score modifications over tokens whose positions are not consecutive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from attlas.scores import ScoreMod


@dataclass(frozen=True, eq=False)
class AtPositions(ScoreMod):
    """`mod`, where array index i stands for position `positions[i]` (queries and keys alike, one sequence)."""

    mod: ScoreMod
    positions: Tensor

    def __call__(self, scores: Tensor, q_pos: Tensor, k_pos: Tensor, heads: Tensor | None = None) -> Tensor:
        return self.mod(scores, self.positions[q_pos], self.positions[k_pos], heads)

    @property
    def heads(self) -> int | None:
        return self.mod.heads

    @property
    def batch(self) -> int | None:
        return self.mod.batch

    def rows(self, start: int, stop: int) -> AtPositions:
        return replace(self, mod=self.mod.rows(start, stop))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.mod.tensors()

    def replace_tensors(self, tensors: Sequence[Tensor]) -> AtPositions:
        return replace(self, mod=self.mod.replace_tensors(tensors))
