"""Tokenizers from where they lie on this machine: tokenizer.json and what stands beside it, GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from attlas.engine.gguf_tokenizer import from_gguf
from attlas.engine.tokenizer import ChatTemplate, Tokenizer
from attlas.errors import AttlasError, DataError, UnsupportedError


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model: a folder with tokenizer.json (and tokenizer_config.json, generation_config.json, config.json), a
    tokenizer.json by itself, or a GGUF file. Raises DataError, UnsupportedError."""
    path = Path(path)
    if path.suffix == ".gguf":
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
