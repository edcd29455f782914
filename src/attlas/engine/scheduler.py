"""Who computes how many tokens in the next step.

There are no phases: a sequence has tokens that the cache does not hold yet, one while it decodes, many while its prompt is read
or read again, and a step feeds some of them under one budget. Sources: Orca, Yu et al. 2022; Sarathi-Serve, Agrawal et al. 2024,
arXiv 2403.02310; prefix-aware order: SGLang, Zheng et al. 2023, arXiv 2312.07104.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from attlas.cache.manager import CacheManager
from attlas.engine.options import EngineOptions
from attlas.engine.sequence import Sequence, State

PATIENCE = 8  # times that a waiting request may be overtaken because of its prefix; then it goes first
LOOKED_AT = 128  # waiting requests whose prefixes are compared; those behind them wait in order of arrival
HELD_BACK = 8  # steps that a request waits at most for others to compute what it begins with


@dataclass
class Task:
    """The part of a sequence in one step: its next `count` tokens and, behind the last one, drafted ones."""

    sequence: Sequence
    count: int
    drafts: list[int] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.count + len(self.drafts)

    @property
    def samples(self) -> bool:
        """Whether the next token can be chosen after this step."""
        return self.count == self.sequence.remaining

    @property
    def fed(self) -> list[int]:
        first = self.sequence.computed
        return self.sequence.tokens[first : first + self.count] + self.drafts


class Scheduler:
    """Keeps running and waiting sequences. Running ones go first, those that decode before those that read; what is left of the
    budget reads prompts of waiting ones, those with the longest cached prefix first. A waiting one that begins like a prompt
    that is being read is held back until that beginning is in the cache, so that it is computed once. When pages run out, the
    running sequence of the lowest rank gives up its own."""

    def __init__(self, cache: CacheManager, options: EngineOptions, draft: Callable[[Sequence], list[int]]) -> None:
        self.cache, self.options, self.draft = cache, options, draft
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preemptions = self.prompt_tokens = self.cached_tokens = 0

    @property
    def swapped(self) -> int:
        return sum(s.state is State.SWAPPED for s in self.waiting)

    # ---- one step -----------------------------------------------------------------------------------------------------------

    def plan(self) -> list[Task]:
        """The tasks of the next step; pages for them are reserved."""
        tasks: dict[Sequence, Task] = {}
        before = self.preemptions
        for sequence in sorted(self.running, key=lambda s: (s.remaining > 1, s.rank)):
            budget = self.options.max_batched_tokens - sum(t.total for t in tasks.values())
            if sequence.state is State.RUNNING and budget:
                self._schedule(sequence, budget, tasks)
        if self.preemptions == before:
            self._admit(tasks)
        return sorted(tasks.values(), key=lambda t: t.total)  # equal counts side by side: they attend in one call

    def _schedule(self, sequence: Sequence, budget: int, tasks: dict[Sequence, Task]) -> None:
        task = Task(sequence, min(sequence.remaining, budget))
        if task.samples and task.count < budget:
            task.drafts = self.draft(sequence)[: budget - task.count]
        assert sequence.row is not None
        while not self.cache.reserve(sequence.row, task.total):
            if task.drafts:
                task.drafts = []
                continue
            victim = max(self.running, key=lambda s: s.rank)
            tasks.pop(victim, None)
            self.preempt(victim)
            if victim is sequence:
                return
        tasks[sequence] = task

    def preempt(self, sequence: Sequence) -> None:
        """Take the row of a running sequence; it waits until there is room again."""
        assert sequence.row is not None
        self.preemptions += 1
        self.running.remove(sequence)
        handle = self.cache.swap_out(sequence.row) if self.options.preemption == "swap" else None
        if handle is not None:
            sequence.state, sequence.handle = State.SWAPPED, handle
        else:
            self._give_back(sequence)
            sequence.state, sequence.computed = State.WAITING, 0
        sequence.row = None
        self.waiting.insert(0, sequence)

    # ---- those that wait ----------------------------------------------------------------------------------------------------

    def _admit(self, tasks: dict[Sequence, Task]) -> None:
        def room() -> int:
            free = self.options.max_batched_tokens - sum(t.total for t in tasks.values())
            return free if len(self.running) < self.options.max_running else 0

        passed = 0
        for sequence in self._in_order() if self.waiting and room() else []:
            budget = room()
            if not budget or passed == LOOKED_AT:
                return
            if self._better_later(sequence):
                sequence.held_back += 1
                passed += 1
                continue
            if not self._place(sequence):
                return
            assert sequence.row is not None
            count = min(sequence.remaining, budget)
            if not self.cache.reserve(sequence.row, count):
                self._put_back(sequence)
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.state = State.RUNNING
            for other in self.waiting:
                other.waited += other.arrival < sequence.arrival
            tasks[sequence] = Task(sequence, count)

    def _in_order(self) -> list[Sequence]:
        self.waiting.sort(key=lambda s: s.rank)
        looked_at, rest = self.waiting[:LOOKED_AT], self.waiting[LOOKED_AT:]
        for s in looked_at:
            s.matched = self.cache.match(s.tokens, s.salt) if self.options.prefix_caching and s.state is State.WAITING else 0

        def order(s: Sequence) -> tuple[int, bool, int, int, int]:
            first = s.admitted or s.waited >= PATIENCE  # began before, or was overtaken often enough
            return -s.priority, not first, 0 if first else -s.matched, s.arrival, s.index

        return sorted(looked_at, key=order) + rest

    def _better_later(self, sequence: Sequence) -> bool:
        """Whether a running sequence is about to compute pages that this one would have to compute as well."""
        if not self.cache.prefix_caching or sequence.state is not State.WAITING or sequence.held_back >= HELD_BACK:
            return False
        longest = max((self._ahead(other, sequence) for other in self.running), default=0)
        return longest > 0 and self.cache.match(sequence.tokens, sequence.salt) < longest

    def _ahead(self, other: Sequence, sequence: Sequence) -> int:
        """Tokens, in whole pages, that both begin with; 0 when `other` has computed them all."""
        size, a, b = self.cache.page_size, other.tokens, sequence.tokens
        most = min(len(a), len(b) - 1) // size  # at least one token of `sequence` is left to compute
        if other.computed >= most * size or other.salt != sequence.salt or a[:size] != b[:size]:
            return 0
        common = bisect_left(range(1, most + 1), True, key=lambda n: a[: n * size] != b[: n * size]) * size
        return common if other.computed < common else 0

    def _place(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a row, if what it has to compute will fit."""
        if sequence.state is State.SWAPPED:
            sequence.row = self.cache.swap_in(sequence.handle)
            if sequence.row is None:
                return False
            sequence.handle = None
            return True
        admission = self.cache.admit(sequence.tokens, sequence.salt)
        if admission is None:
            return False
        sequence.row, sequence.computed = admission.row, admission.cached_tokens
        room = self.cache.free_pages() - len(self.running)  # everyone who runs may soon need a page
        if self.running and self.cache.pages_needed(admission.row, sequence.remaining) > room:
            self._put_back(sequence)
            return False
        if not sequence.admitted:
            sequence.admitted, sequence.admitted_at, sequence.cached_tokens = True, monotonic(), admission.cached_tokens
            self.prompt_tokens += len(sequence.prompt)
            self.cached_tokens += admission.cached_tokens
        return True

    def _put_back(self, sequence: Sequence) -> None:
        self._give_back(sequence)
        sequence.row, sequence.computed, sequence.state = None, 0, State.WAITING

    # ---- beginnings and ends ------------------------------------------------------------------------------------------------

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Start `child` as a copy of `parent`'s row; without room for it, it waits."""
        assert parent.row is not None
        row = self.cache.fork(parent.row) if len(self.running) < self.options.max_running else None
        child.admitted = True
        if row is None:
            self.waiting.append(child)
        else:
            child.row, child.computed, child.state = row, parent.computed, State.RUNNING
            self.running.append(child)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it stands; its pages are free, or cached for prompts that begin like it."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence.state is not State.FINISHED:
            self.waiting.remove(sequence)
            if sequence.handle is not None:
                self.cache.discard(sequence.handle)
        sequence.row, sequence.handle, sequence.state = None, None, State.FINISHED

    def commit(self, sequence: Sequence) -> None:
        """Let others share the pages that a running sequence has filled."""
        assert sequence.row is not None
        if sequence.params.prompt_logprobs is None:
            self.cache.commit(sequence.row, sequence.tokens)

    def _give_back(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        shared = sequence.params.prompt_logprobs is None
        self.cache.release(sequence.row, sequence.tokens[: sequence.computed] if shared else None, sequence.salt)
