"""The engine: requests in, outputs out, one forward per step."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence as Sized
from dataclasses import replace
from time import perf_counter
from typing import Protocol

from torch import Tensor

from attlas.engine.detokenizer import Detokenizer
from attlas.engine.drafts import LookUp
from attlas.engine.grammar import Grammars
from attlas.engine.memory import Memory
from attlas.engine.options import EngineOptions
from attlas.engine.request import EngineStats, FinishReason, Output, SamplingParams, TokenLogprobs
from attlas.engine.sampler import Chosen, Slot, choose, prompt_reports
from attlas.engine.scheduler import Scheduler, Task
from attlas.engine.sequence import Sequence, State
from attlas.errors import OptionError, UnsupportedError
from attlas.models.transformer import Transformer


class TextCodec(Protocol):
    """What an engine asks of a tokenizer; `attlas.engine.tokenizer.Tokenizer` has it."""

    ends: frozenset[int]

    def decode(self, ids: list[int]) -> str: ...

    def to_json(self) -> str: ...


class Engine:
    """Continuous batching over one model: every `step` runs the next tokens of all running requests, and chunks of the prompts of
    new ones, in one packed forward over a shared paged cache.

    model      a decoder whose mixers can all decode
    tokenizer  for texts, stop texts, end tokens and schemas; None = token ids only
    A request's tokens follow from its prompt and parameters (with its seed); the company changes logits by rounding at most, and
    with options.batch_invariant not at all. Not thread-safe: one thread calls, others talk to that thread.
    """

    def __init__(self, model: Transformer, tokenizer: TextCodec | None = None, *, options: EngineOptions | None = None) -> None:
        self.options = options = options or EngineOptions()
        self.model, self.tokenizer = model, tokenizer
        self.memory = Memory(model, options)
        self.cache, self.runner, self.max_len = self.memory.manager, self.memory.runner, self.memory.max_len
        self.scheduler = Scheduler(self.cache, options, self._draft)
        self._grammars = Grammars(tokenizer, model.config.vocab_size)
        self._live: dict[str, dict[int, Sequence]] = {}
        self._lookups: dict[Sequence, LookUp] = {}
        self._queued: list[Output] = []
        self._arrivals = 0
        self._counts = Counter[str]()
        self._finished = Counter[str]()
        self._seconds = self._last_seconds = 0.0

    # ---- requests -----------------------------------------------------------------------------------------------------------

    def add(self, request_id: str, prompt: Sized[int], params: SamplingParams, *, salt: str = "", priority: int = 0) -> None:
        """Queue a request.

        request_id  a name that no unfinished request has
        prompt      token ids, at least one
        salt        requests share cached prefixes only with requests of the same salt
        priority    larger ones go first, and give way last
        Raises OptionError or UnsupportedError, naming what is wrong; then nothing is queued.
        """
        prompt = tuple(int(t) for t in prompt)
        self._check(request_id, prompt, params)
        grammar = None if params.json_schema is None else self._grammars.compile(params.json_schema)
        ends = frozenset(params.stop_token_ids)
        if self.tokenizer is not None and not params.ignore_eos:
            ends |= self.tokenizer.ends
        if params.prompt_logprobs is not None:  # every prompt token has to be computed
            salt = f"{salt}\0{request_id}\0{self._arrivals}"
        first = Sequence(
            request_id=request_id,
            index=0,
            prompt=prompt,
            params=params,
            salt=salt,
            priority=priority,
            arrival=self._arrivals,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            ends=ends,
            limit=min(self.max_len, len(prompt) + params.max_tokens),
            detokenizer=Detokenizer(self.tokenizer, params.stop, prompt),
            grammar=grammar,
            siblings=tuple(range(1, params.n)),
        )
        self._arrivals += 1
        self._live[request_id] = {0: first}
        self.scheduler.waiting.append(first)

    def _check(self, request_id: str, prompt: tuple[int, ...], params: SamplingParams) -> None:
        call = f"Engine.add({request_id!r}, prompt of {len(prompt)} tokens)"
        vocabulary = self.model.config.vocab_size
        if request_id in self._live:
            raise OptionError(f"{call}: a request of this name is not finished yet")
        if not prompt:
            raise OptionError(f"{call}: the prompt is empty; give at least one token (a beginning-of-sequence token)")
        if wrong := [t for t in prompt if not 0 <= t < vocabulary][:5]:
            raise OptionError(f"{call}: token ids {wrong} are outside the vocabulary of {vocabulary}")
        if len(prompt) >= self.max_len:
            raise OptionError(f"{call}: prompt and answer together have at most {self.max_len} tokens here")
        for name, ids in (("logit_bias", [i for i, _ in params.logit_bias]), ("stop_token_ids", params.stop_token_ids)):
            if wrong := [i for i in ids if i >= vocabulary][:5]:
                raise OptionError(f"{call}: {name} holds {wrong}, outside the vocabulary of {vocabulary}")
        if params.stop and self.tokenizer is None:
            raise UnsupportedError(f"{call}: stop={params.stop!r} needs a tokenizer")

    def abort(self, request_id: str) -> bool:
        """End a request now; its pages are free at once, and the next step reports it. False when no such request is alive."""
        found = self._live.get(request_id)
        if found is None:
            return False
        for sequence in list(found.values()):
            unborn = sequence.siblings
            self._queued.append(self._output(sequence, [], "", "abort"))
            self._end(sequence, "abort")
            self._queued += [Output(request_id, i, finish_reason="abort", prompt_tokens=len(sequence.prompt)) for i in unborn]
            self._finished["abort"] += len(unborn)
        return True

    def has_work(self) -> bool:
        """Whether `step` would do or report something."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._queued)

    def stats(self) -> EngineStats:
        scheduler, count = self.scheduler, self._counts
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) - scheduler.swapped,
            swapped=scheduler.swapped,
            preemptions=scheduler.preemptions,
            prompt_tokens=scheduler.prompt_tokens,
            cached_tokens=scheduler.cached_tokens,
            generated_tokens=count["generated"],
            drafted=count["drafted"],
            accepted=count["accepted"],
            finished=dict(self._finished),
            steps=count["steps"],
            step_seconds=self._seconds,
            last_step_seconds=self._last_seconds,
            cache=self.cache.stats(),
        )

    # ---- a step -------------------------------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Run one forward and return what it added to each answer."""
        outputs, self._queued = self._queued, []
        start = perf_counter()
        tasks = self.scheduler.plan()
        if tasks:
            ran = self.runner.run(tasks)
            slots, owners = self._slots(tasks, ran.first)
            self._report_prompts(tasks, ran.logits, ran.first)
            chosen = iter(choose(ran.logits, slots))
            for task, count in zip(tasks, owners, strict=True):
                outputs += self._advance(task, [next(chosen) for _ in range(count)])
            self._last_seconds = perf_counter() - start
            self._seconds += self._last_seconds
            self._counts["steps"] += 1
        return outputs

    def _slots(self, tasks: list[Task], first: list[int]) -> tuple[list[Slot], list[int]]:
        """The tokens to choose, and how many of them belong to each task."""
        slots: list[Slot] = []
        owners = []
        for task, row in zip(tasks, first, strict=True):
            before = len(slots)
            if task.samples:
                sequence, size = task.sequence, len(task.sequence.tokens)
                if sequence.reports_prompt:
                    row += task.count - 1
                slots += [Slot(sequence, size + j, row + j) for j in range(1 + len(task.drafts))]
                if sequence.siblings:
                    children = [self._child(sequence, i) for i in sequence.siblings]
                    slots += [Slot(child, size, row) for child in children]
            owners.append(len(slots) - before)
        return slots, owners

    def _child(self, parent: Sequence, index: int) -> Sequence:
        """Answer `index` of a request whose prompt has just been read."""
        child = replace(
            parent,
            index=index,
            siblings=(),
            tokens=list(parent.tokens),
            detokenizer=Detokenizer(self.tokenizer, parent.params.stop, parent.prompt),
            grammar=None if parent.grammar is None else parent.grammar.copy(),
            state=State.WAITING,
            row=None,
            computed=0,
            prompt_logprobs=[],
        )
        self._live[parent.request_id][index] = child
        return child

    def _advance(self, task: Task, chosen: list[Chosen]) -> list[Output]:
        """Book what one task has computed, and go on with the chosen tokens."""
        sequence, row = task.sequence, task.sequence.row
        assert row is not None
        if not task.samples:
            sequence.computed += task.count
            self.scheduler.commit(sequence)
            return []
        children = [self._live[sequence.request_id][i] for i in sequence.siblings]
        own, others = chosen[: 1 + len(task.drafts)], chosen[1 + len(task.drafts) :]
        stood = next((j for j, d in enumerate(task.drafts) if own[j].token != d), len(task.drafts))
        size = len(sequence.tokens)
        output = self._extend(sequence, own[: stood + 1])
        kept = min(stood, len(output.token_ids))
        if kept < len(task.drafts):
            self.cache.truncate(row, size + kept)
        sequence.siblings, sequence.computed = (), size + kept
        self.scheduler.commit(sequence)
        self._counts["drafted"] += len(task.drafts)
        self._counts["accepted"] += stood
        for child in children:
            self.scheduler.fork(sequence, child)
        outputs = [output, *(self._extend(child, [item]) for child, item in zip(children, others, strict=True))]
        for answer, found in zip([sequence, *children], outputs, strict=True):
            if found.finish_reason is not None:
                self._end(answer, found.finish_reason)
        return outputs

    def _extend(self, sequence: Sequence, chosen: list[Chosen]) -> Output:
        """Append chosen tokens until the answer ends."""
        text, reason = "", None
        taken: list[Chosen] = []
        for item in chosen:
            taken.append(item)
            sequence.tokens.append(item.token)
            more, reason = self._judge(sequence, item.token)
            text += more
            if reason is not None:
                break
        self._counts["generated"] += len(taken)
        return self._output(sequence, taken, text, reason)

    def _judge(self, sequence: Sequence, token: int) -> tuple[str, FinishReason | None]:
        """New text, and why the answer ends with this token."""
        if token in sequence.ends:
            return sequence.detokenizer.flush(), "stop"
        text = sequence.detokenizer.add(token)
        if sequence.detokenizer.stopped:
            return text, "stop"
        if sequence.grammar is not None:
            sequence.grammar.accept(token)
            if sequence.grammar.complete:
                return text + sequence.detokenizer.flush(), "stop"
        if len(sequence.tokens) >= sequence.limit:
            text += sequence.detokenizer.flush()
            return text, "stop" if sequence.detokenizer.stopped else "length"
        return text, None

    def _output(self, sequence: Sequence, taken: list[Chosen], text: str, reason: FinishReason | None) -> Output:
        logs: tuple[TokenLogprobs, ...] | None = None
        if sequence.params.logprobs is not None:
            logs = tuple(c.logprobs for c in taken if c.logprobs is not None)
        reports = tuple(sequence.prompt_logprobs) if sequence.prompt_logprobs else None
        sequence.prompt_logprobs = []
        return Output(
            sequence.request_id,
            sequence.index,
            tuple(c.token for c in taken),
            text,
            logs,
            reason,
            len(sequence.prompt),
            sequence.cached_tokens,
            reports,
            sequence.admitted_at,
        )

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(sequence)
        sequence.finish_reason = reason
        self._finished[reason] += 1
        self._lookups.pop(sequence, None)
        alive = self._live[sequence.request_id]
        del alive[sequence.index]
        if not alive:
            del self._live[sequence.request_id]

    # ---- beside the tokens --------------------------------------------------------------------------------------------------

    def _report_prompts(self, tasks: list[Task], logits: Tensor, first: list[int]) -> None:
        """Log probabilities of the prompt tokens that follow those just fed."""
        for task, row in zip(tasks, first, strict=True):
            sequence = task.sequence
            if not sequence.reports_prompt:
                continue
            after = sequence.prompt[sequence.computed + 1 : sequence.computed + 1 + task.count]
            told = len(sequence.prompt_logprobs) - sequence.computed  # before a preemption
            count = sequence.params.prompt_logprobs or 0
            sequence.prompt_logprobs += prompt_reports(logits[row + told : row + len(after)], list(after[told:]), count)

    def _draft(self, sequence: Sequence) -> list[int]:
        """Tokens that may follow; none where a token's rules depend on the ones before it."""
        room = sequence.limit - len(sequence.tokens) - 1
        wanted = min(self.options.speculative, room)
        if wanted <= 0 or sequence.grammar is not None or sequence.params.penalised or sequence.siblings:
            return []
        return self._lookups.setdefault(sequence, LookUp()).propose(sequence.tokens, wanted)
