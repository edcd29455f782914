"""Text to tokens and back, and conversations to text: tokenizer.json, GGUF files, chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from attlas.errors import AttlasError, DataError, OptionError, UnsupportedError


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

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of a conversation that asks for the next answer; see `ChatTemplate.render`."""
        if self.chat is None:
            raise UnsupportedError("this model has no chat template")
        return self.encode(self.chat.render(messages, **variables), special=False)


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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model: a folder with tokenizer.json (and tokenizer_config.json, generation_config.json, config.json), a
    tokenizer.json by itself, or a GGUF file. Raises DataError, UnsupportedError."""
    path = Path(path)
    if path.suffix == ".gguf":
        from attlas.engine.gguf_tokenizer import from_gguf

        try:
            return from_gguf(path)
        except (AttlasError, ImportError):
            raise
        except Exception as error:  # a damaged file: whatever the libraries stumble over
            raise DataError(f"{path} holds a tokenizer that cannot be read: {error}") from error
    folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
    inner = _library().Tokenizer
    if not file.is_file():
        raise DataError(f"{file} does not exist{_other_form(folder)}")
    try:
        made = inner.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every unreadable file
        raise DataError(f"cannot read the tokenizer {file}: {error}") from error
    made.no_padding()
    made.no_truncation()
    return _with_config(made, folder)


def _other_form(folder: Path) -> str:
    """What to do about a tokenizer that lies there in another form."""
    found = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()]
    if not found:
        return ""
    return (
        f"; {', '.join(found)} is not read. Write the tokenizer.json once, with transformers (and sentencepiece): "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
    )


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UnsupportedError("tokenizers need the package tokenizers: pip install 'attlas[weights]'") from error
    return tokenizers


def _with_config(inner: Any, folder: Path) -> Tokenizer:
    """Special tokens and template from the files beside a tokenizer.json."""
    settings = _json(folder / "tokenizer_config.json")
    names = {name: _text(settings.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    special = {name: text for name, text in names.items() if text is not None}
    ends = {inner.token_to_id(special["eos_token"])} if "eos_token" in special else set()
    for file in ("generation_config.json", "config.json"):
        found = _json(folder / file).get("eos_token_id")
        ends |= {i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)}
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None)
    alone = folder / "chat_template.jinja"
    if template is None and alone.is_file():
        template = alone.read_text(encoding="utf-8")
    chat = ChatTemplate(template, special) if isinstance(template, str) else None
    bos = inner.token_to_id(special["bos_token"]) if "bos_token" in special else None
    return Tokenizer(inner, ends=frozenset(e for e in ends if isinstance(e, int)), bos=bos, chat=chat)


def _text(token: Any) -> str | None:
    """A token in tokenizer_config.json: its text, or an object that holds it."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path} is not JSON in UTF-8: {error}") from error
    return found if isinstance(found, dict) else {}
