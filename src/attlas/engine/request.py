"""What comes into an engine and what goes out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from attlas.errors import OptionError

FinishReason = Literal["stop", "length", "abort"]

MAX_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued.

    max_tokens          new tokens at most, for each of the n answers
    temperature         0 takes the most likely token; above 0 samples from softmax(logits / temperature)
    top_k               keep the k most likely tokens; 0 = all
    top_p               keep the smallest set of most likely tokens that holds this probability; 1 = all
    min_p               keep tokens at least this fraction as likely as the most likely one; 0 = all
    repetition_penalty  divides the positive and multiplies the negative logits of every token of prompt and answer; 1 = off
    presence_penalty    taken off the logits of tokens that the answer holds
    frequency_penalty   taken off the logits of a token once for each time that the answer holds it
    logit_bias          (token id, bias) pairs, added to the logits
    seed                of this request's own random stream; None = drawn when the request arrives. Answer i of n uses a stream
                        of its own that follows from the seed
    stop                texts that end an answer; they and what follows are left out of it
    stop_token_ids      tokens that end an answer; the token is the last of it, its text is left out
    ignore_eos          go on at the tokenizer's end token
    logprobs            report the log probability of each new token, and of this many most likely ones beside it (0 ... 20);
                        natural logarithm, of the model's own distribution at temperature 1
    prompt_logprobs     the same for the tokens of the prompt (none for the first); turns prefix sharing off for the request
    n                   independent answers
    json_schema         the answer is a JSON text that this schema (itself JSON text) allows, written on one line; "{}" allows
                        any JSON
    Order: logit_bias, penalties, grammar, temperature, top_k, top_p, min_p. Sources: min-p: Nguyen et al. 2024, arXiv 2407.01082;
    repetition penalty: Keskar et al. 2019, arXiv 1909.05858; top-p: Holtzman et al. 2020, arXiv 1904.09751.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    json_schema: str | None = None

    def __post_init__(self) -> None:
        self._integer("max_tokens", 1, None)
        self._integer("n", 1, None)
        self._integer("top_k", 0, None)
        self._number("temperature", 0, None)
        self._number("top_p", 0, 1, above=True)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0, None, above=True)
        self._number("presence_penalty", -2, 2)
        self._number("frequency_penalty", -2, 2)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name, 0, MAX_LOGPROBS)
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**64 - 1)
        self._lists()

    def _lists(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(s, str) and s for s in stop):
            self._refuse("stop", "it must hold texts that are not empty")
        object.__setattr__(self, "stop", stop)
        ids = tuple(self.stop_token_ids)
        if not all(_is_integer(i) and i >= 0 for i in ids):
            self._refuse("stop_token_ids", "it must hold token ids")
        object.__setattr__(self, "stop_token_ids", ids)
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias
        bias = tuple((i, b) for i, b in pairs)
        if not all(_is_integer(i) and i >= 0 and _is_number(b) and not math.isnan(b) for i, b in bias):
            self._refuse("logit_bias", "it must hold pairs of a token id and a number")
        object.__setattr__(self, "logit_bias", tuple((i, float(b)) for i, b in bias))
        if self.json_schema is not None and not isinstance(self.json_schema, str):
            self._refuse("json_schema", "it must be JSON text")

    def _integer(self, name: str, least: int, most: int | None) -> None:
        value = getattr(self, name)
        if not _is_integer(value) or value < least or (most is not None and value > most):
            self._refuse(name, f"it must be an integer {_range(least, most)}")

    def _number(self, name: str, least: float, most: float | None, *, above: bool = False) -> None:
        value = getattr(self, name)
        good = _is_number(value) and math.isfinite(value) and (value > least if above else value >= least)
        if not good or (most is not None and value > most):
            self._refuse(name, f"it must be a number {'above' if above else 'of at least'} {least}" + _at_most(most))

    def _refuse(self, name: str, wanted: str) -> None:
        raise OptionError(f"SamplingParams: {name}={getattr(self, name)!r}; {wanted}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _range(least: int, most: int | None) -> str:
    return f"of at least {least}" if most is None else f"from {least} to {most}"


def _at_most(most: float | None) -> str:
    return "" if most is None else f" and at most {most}"


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities (natural) at one place: of the token that stands there, and (id, log probability) of the most likely
    ones, most likely first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """What one step added to one answer.

    index            which of the request's n answers
    token_ids        new tokens
    text             new text; text that may still turn out to begin a stop text is held back until that is decided
    logprobs         one entry for each new token where the request asked for them, else None
    finish_reason    None while the answer goes on; "stop" (end token, stop text, complete JSON), "length", "abort"
    prompt_tokens    tokens of the prompt
    cached_tokens    how many of them were found in the cache when the request was admitted
    prompt_logprobs  with the first output of answer 0 where asked for: one entry for each prompt token but the first
    admitted         when the request left the queue, in seconds of the monotonic clock; None = it has not
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    admitted: float | None = None


@dataclass(frozen=True)
class EngineStats:
    """Counts since the engine was made, and the state of the moment.

    running, waiting, swapped   sequences that have a cache row; requests that wait for one; sequences copied aside
    preemptions                 times that a running sequence had to give up its pages
    prompt_tokens               tokens of admitted prompts, `cached_tokens` of which were found in the cache
    generated_tokens            tokens of answers
    drafted, accepted           tokens proposed by prompt look-up, and how many of them stood
    finished                    finish reason -> answers
    steps, step_seconds         forwards, and the seconds that all of them took; `last_step_seconds` the newest
    cache                       statistics of the cache
    """

    running: int = 0
    waiting: int = 0
    swapped: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    step_seconds: float = 0.0
    last_step_seconds: float = 0.0
    cache: Any = None
