"""Outputs of the engine in the forms of the API: texts, finish reasons, log probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from attlas.engine.request import Output, TokenLogprobs

TokenText = Callable[[int], str]


@dataclass
class Answer:
    """One choice as it grows. `offset` is where the next token's text begins, in characters."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    offset: int = 0

    def add(self, output: Output) -> None:
        self.text.append(output.text)
        self.logprobs += output.logprobs or ()
        self.finish_reason = output.finish_reason or self.finish_reason


def chat_logprobs(found: Sequence[TokenLogprobs], text_of: TokenText) -> dict[str, Any]:
    """As chat completions report them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = text_of(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}

    return {
        "content": [
            {**entry(item.token, item.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in item.top]}
            for item in found
        ],
        "refusal": None,
    }


def completion_logprobs(found: Sequence[TokenLogprobs | None], text_of: TokenText, offset: int, first: int = 0) -> dict[str, Any]:
    """As completions report them. None stands for the first token of a prompt, `first`, which nothing predicts."""
    tokens, logprobs, tops, offsets = [], [], [], []
    for item in found:
        text = text_of(first if item is None else item.token)
        tokens.append(text)
        logprobs.append(None if item is None else _finite(item.logprob))
        tops.append(None if item is None else {text_of(token): _finite(logprob) for token, logprob in item.top})
        offsets.append(offset)
        offset += len(text)
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _finite(logprob: float) -> float:
    """JSON has no infinity: a token that cannot be chosen has the lowest number that clients expect."""
    return max(logprob, -9999.0)
