"""How single tokens are shown beside their log probabilities: their bytes, and where their text stands in the answer."""

from __future__ import annotations

import codecs
import re
from typing import Protocol

from attlas.engine.detokenizer import REPLACEMENT

SPACE = "\u2581"  # how SentencePiece spells a blank
# The letters that byte-level tokenizers write bytes with: printable bytes stand for themselves, the others for the letters from
# U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
LETTERS = {chr(byte): byte for byte in PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)
}


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
            if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", spelled):
                return bytes([int(byte[1], 16)])
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
