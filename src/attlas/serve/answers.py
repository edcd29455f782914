"""Outputs of the engine in the forms of the API: texts, finish reasons, log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from attlas.engine.request import Output, TokenLogprobs
from attlas.serve.spelling import Place, Spelling


@dataclass
class Answer:
    """One choice as it grows. `place` is where the next token's text begins."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    place: Place = field(default_factory=Place)

    def add(self, output: Output) -> None:
        self.text.append(output.text)
        self.logprobs += output.logprobs or ()
        self.finish_reason = output.finish_reason or self.finish_reason


def chat_logprobs(found: Sequence[TokenLogprobs], spelling: Spelling) -> dict[str, Any]:
    """As chat completions report them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = spelling.bytes(token)
        return {"token": spelling.text(token), "logprob": _finite(logprob), "bytes": None if raw is None else list(raw)}

    return {
        "content": [
            {**entry(item.token, item.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in item.top]}
            for item in found
        ],
        "refusal": None,
    }


def completion_logprobs(
    found: Sequence[TokenLogprobs | None], spelling: Spelling, place: Place, first: int = 0
) -> dict[str, Any]:
    """As completions report them. None stands for the first token of a prompt, `first`, which nothing predicts."""
    tokens, logprobs, tops, offsets = [], [], [], []
    for item in found:
        token = first if item is None else item.token
        tokens.append(spelling.text(token, "bytes:"))
        logprobs.append(None if item is None else _finite(item.logprob))
        tops.append(None if item is None else _by_text(item, spelling))
        offsets.append(place.at)
        place.pass_by(spelling.bytes(token))
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _by_text(item: TokenLogprobs, spelling: Spelling) -> dict[str, float]:
    """The most likely tokens, and the one that stands there. Of two that are written alike the likelier one counts."""
    found: dict[str, float] = {}
    for token, logprob in (*item.top, (item.token, item.logprob)):
        found.setdefault(spelling.text(token, "bytes:"), _finite(logprob))
    return found


def _finite(logprob: float) -> float:
    """JSON has no infinity: a token that cannot be chosen has the lowest number that clients expect."""
    return max(logprob, -9999.0)
