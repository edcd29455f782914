"""From tokens to text as it comes: characters that span tokens are held until they are whole, stop texts until they are
decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
LONGEST_CHARACTER = 4  # tokens that one character may span: a byte each


class Decoder(Protocol):
    def decode(self, ids: list[int]) -> str: ...


class Detokenizer:
    """Feed tokens with `add`, take text that is final.

    A tokenizer may decode a token differently after another one (word boundaries, bytes of one character), so new text is the
    difference of two decodings of the last few tokens. Cost: two short decodings per token.
    `stop`: texts that end the answer. `stopped` becomes True when one is complete; it and what follows never come out.
    `after`: the tokens that the answer follows. Some tokenizers drop a space at the beginning of a text; an answer is none.
    """

    def __init__(self, decoder: Decoder | None, stop: tuple[str, ...] = (), after: Sequence[int] = ()) -> None:
        self.decoder, self.stop = decoder, stop
        self.stopped = False
        self._recent: list[int] = []  # tokens that the next ones are decoded together with
        self._shown = 0  # how many of them have come out
        self._held = ""
        if decoder is not None:
            self._recent = _whole_end(decoder, after)
            self._shown = len(self._recent)

    def add(self, token: int) -> str:
        """Text that is final now that `token` has come."""
        if self.decoder is None or self.stopped:
            return ""
        self._recent.append(token)
        before = self.decoder.decode(self._recent[: self._shown])
        whole = self.decoder.decode(self._recent)
        if whole.endswith(REPLACEMENT) and len(self._recent) - self._shown < LONGEST_CHARACTER:
            return ""
        self._recent, self._shown = self._recent[self._shown :], len(self._recent) - self._shown
        return self._decide(whole[len(before) :])

    def flush(self) -> str:
        """The rest, when the answer ends without a stop text."""
        if self.decoder is None or self.stopped:
            return ""
        before = self.decoder.decode(self._recent[: self._shown])
        text = self._decide(self.decoder.decode(self._recent)[len(before) :])
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decide(self, text: str) -> str:
        """What of held and new text can come out: all before a stop text, or before what may become one."""
        text = self._held + text
        found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _whole_end(decoder: Decoder, tokens: Sequence[int]) -> list[int]:
    """The fewest last tokens that end with a whole character; none where the text ends inside one."""
    ends = (list(tokens[-n:]) for n in range(1, min(LONGEST_CHARACTER, len(tokens)) + 1))
    return next((end for end in ends if not decoder.decode(end).endswith(REPLACEMENT)), [])


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
