"""Text to tokens and back, and conversations to text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from attlas.engine.token_width import Width, width_of
from attlas.errors import OptionError, UnsupportedError


class Tokenizer:
    """A tokenizer of the library tokenizers with what an engine needs beside it.

    inner  a tokenizers.Tokenizer
    ends   ids of the tokens that end an answer
    bos    id of the token that begins a text, None = the model needs none
    chat   the model's chat template, None = it has none
    """

    def __init__(
        self, inner: Any, *, ends: frozenset[int] = frozenset(), bos: int | None = None, chat: ChatTemplate | None = None
    ) -> None:
        self.inner, self.ends, self.bos, self.chat = inner, ends, bos, chat

    @property
    def vocab_size(self) -> int:
        return int(self.inner.get_vocab_size())

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text. Names of special tokens in it become those tokens; `special` puts the beginning token before it
        where the tokenizer has one."""
        return list(self.inner.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; bytes that are no character become U+FFFD."""
        return str(self.inner.decode(list(ids)))

    def token(self, id: int) -> str:
        """The token as the vocabulary spells it."""
        return str(self.inner.id_to_token(id))

    def to_json(self) -> str:
        """The JSON text that the tokenizers library reads."""
        return str(self.inner.to_str())

    @cached_property
    def _width(self) -> Width | None:
        return width_of(self.inner)

    def fewest_tokens(self, text: str) -> int:
        """A text is at least so many tokens: told from its length in no time, once a first call has read the vocabulary. 0 where
        nothing is known of the tokenizer."""
        return 0 if self._width is None else self._width.fewest(text)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """A conversation as the model wants to see it, special tokens included; see `ChatTemplate.render`."""
        if self.chat is None:
            raise UnsupportedError("this model has no chat template")
        return self.chat.render(messages, **variables)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of a conversation that asks for the next answer."""
        return self.encode(self.chat_text(messages, **variables), special=False)


@dataclass(frozen=True)
class ChatTemplate:
    """How a model wants to see a conversation: a Jinja template, as tokenizer_config.json and GGUF files bring it.

    special  names such as bos_token -> text, which templates use
    The template comes with the model: it runs in Jinja's sandbox, without access to anything but its variables.
    """

    source: str
    special: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of messages {"role": ..., "content": ...}. OptionError when the template refuses them."""
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise UnsupportedError("chat templates need the package jinja2: pip install 'attlas[serve]'") from error

        def refuse(reason: str) -> None:
            raise OptionError(f"the chat template refuses the messages: {reason}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        values = {**self.special, "messages": messages, "add_generation_prompt": add_generation_prompt, **variables}
        try:
            return str(environment.from_string(self.source).render(values))
        except OptionError:
            raise
        except Exception as error:  # a template is a program: it may divide by zero as well as be misspelt
            raise OptionError(f"the chat template cannot render these messages: {error}") from error
