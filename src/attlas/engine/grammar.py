"""Answers that follow a JSON schema: which tokens may come next, by the library llguidance."""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
from torch import Tensor

from attlas.errors import OptionError, UnsupportedError

# One way to write a JSON text, so that an answer cannot go on with blanks for ever.
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Serialisable(Protocol):
    """A tokenizer that can be written as the JSON text of the tokenizers library."""

    ends: frozenset[int]

    def to_json(self) -> str: ...


class Grammars:
    """Compiles schemas for one tokenizer. The tokenizer's table is built at the first schema (about a second)."""

    def __init__(self, tokenizer: Serialisable | None, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._table: Any = None

    def compile(self, schema: str) -> Grammar:
        """Raises OptionError for a text that is no JSON schema, UnsupportedError without tokenizer or library."""
        if self.tokenizer is None or not self.tokenizer.ends:
            raise UnsupportedError("json_schema needs a tokenizer with an end token")
        try:
            import llguidance
        except ImportError as error:
            raise UnsupportedError("json_schema needs the package llguidance: pip install 'attlas[serve]'") from error
        try:
            json.loads(schema)
            compiled = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=LAYOUT)
        except ValueError as error:
            raise OptionError(f"SamplingParams: json_schema is not a JSON schema: {error}") from error
        if self._table is None:
            ends = sorted(self.tokenizer.ends)
            self._table = llguidance.LLTokenizer(self.tokenizer.to_json(), n_vocab=self.vocab_size, eos_token=ends)
        matcher = llguidance.LLMatcher(self._table, compiled)
        if matcher.is_error():
            raise OptionError(f"SamplingParams: json_schema cannot be used: {matcher.get_error().splitlines()[0]}")
        return Grammar(matcher, self.vocab_size)


class Grammar:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self.matcher, self.vocab_size = matcher, vocab_size

    def copy(self) -> Grammar:
        return Grammar(self.matcher.deep_copy(), self.vocab_size)

    def allowed(self) -> Tensor:
        """bool [vocab_size]: tokens that may come next. Where the text may end, the end tokens are among them."""
        words = torch.zeros((self.vocab_size + 31) // 32, dtype=torch.int32)
        self.matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * 4)
        bits = words[:, None] >> torch.arange(32, dtype=torch.int32)
        return (bits & 1).bool().flatten()[: self.vocab_size]

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether the text is whole and nothing but an end token could follow."""
        return bool(self.matcher.is_stopped())
