"""How single tokens are shown beside their log probabilities: their bytes, and where their text stands in the answer."""

from __future__ import annotations

import codecs
from typing import Protocol

from attlas.engine.detokenizer import REPLACEMENT
from attlas.engine.letters import BYTES, LETTERS, SPACE


class Speller(Protocol):
    def decode(self, ids: list[int]) -> str: ...

    def token(self, id: int) -> str: ...


class Spelling:
    """The spelling of a tokenizer's tokens."""

    def __init__(self, tokenizer: Speller) -> None:
        self.tokenizer = tokenizer

    def bytes(self, token: int) -> bytes | None:
        """What the token adds to a text, which may be a part of a character; None for special tokens, which add nothing."""
        text, spelled = self.tokenizer.decode([token]), self.tokenizer.token(token)
        if spelled.startswith(SPACE):  # decoded by itself it would be the beginning of a text, which loses its blank
            return spelled.replace(SPACE, " ").encode()
        if REPLACEMENT in text:
            if spelled in BYTES:
                return bytes([BYTES[spelled]])
            if all(letter in LETTERS for letter in spelled):
                return bytes(LETTERS[letter] for letter in spelled)
        return text.encode("utf-8", "replace") if text else None

    def text(self, token: int, escape: str = "") -> str:
        """The token's text: special ones by their name, parts of characters as `escape` and their bytes, such as \\xf0\\x9f."""
        found = self.bytes(token)
        if found is None:
            return self.tokenizer.token(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return escape + found.decode("utf-8", "backslashreplace")


class Place:
    """Where the next token's text begins, in characters: those that are whole by then."""

    def __init__(self) -> None:
        self.at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pass_by(self, token: bytes | None) -> None:
        self.at += len(self._decoder.decode(token or b""))
