"""One answer on its way: its tokens, where it stands in the cache, and what decides its next token."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from attlas.engine.detokenizer import Detokenizer
from attlas.engine.grammar import Grammar
from attlas.engine.request import FinishReason, SamplingParams, TokenLogprobs


class State(Enum):
    WAITING = "waiting"  # has no row; tokens that were computed before may have to be computed again
    RUNNING = "running"
    SWAPPED = "swapped"  # its row lies aside
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """Answer `index` of a request.

    tokens    prompt and answer so far; the answer's tokens are known before they are in the cache
    computed  how many of them the cache row holds; the others are fed next. When all are fed, the next token is chosen
    arrival   running number of the request
    admitted_at  when it first left the queue, in seconds of the monotonic clock
    waited    admissions that went to others while this sequence waited
    held_back steps for which it waited because another sequence was computing its beginning
    siblings  indices of answers that start as copies of this one when its prompt is done
    """

    request_id: str
    index: int
    prompt: tuple[int, ...]
    params: SamplingParams
    salt: str
    priority: int
    arrival: int
    seed: int
    ends: frozenset[int]
    limit: int
    detokenizer: Detokenizer
    grammar: Grammar | None = None
    siblings: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    state: State = State.WAITING
    row: int | None = None
    handle: Any = None
    admitted: bool = False
    admitted_at: float | None = None
    cached_tokens: int = 0
    waited: int = 0
    held_back: int = 0
    matched: int = 0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.tokens = self.tokens or list(self.prompt)

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.index

    @property
    def remaining(self) -> int:
        """Tokens that have to be fed before the next one can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who goes first, and who gives way last: higher priority, then earlier arrival."""
        return -self.priority, self.arrival, self.index

    @property
    def reports_prompt(self) -> bool:
        """Whether the tokens that are fed next are reported with their log probabilities."""
        return self.params.prompt_logprobs is not None and self.generated == 0
