"""How few tokens a text can be, told from its length: what refuses one that is far too long before it is cut into tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attlas.engine.letters import BYTES, LETTERS

Part = Mapping[str, Any]

# Characters that a normalizer may make one of: a canonical decomposition has at most 4, so a composition joins at most 4.
JOINS = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Prepend": 1}
NOT_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


@dataclass(frozen=True)
class Width:
    """What one token stands for at most.

    letters  of the longest token, as it is spelled
    joins    characters of a text that may become one letter
    lost     None; or, where a letter is a byte of the text, those that have no letter: they vanish
    """

    letters: int
    joins: int = 1
    lost: bytes | None = None

    def fewest(self, text: str) -> int:
        """A text is at least so many tokens. Cost: one look at it."""
        if self.lost is None:
            return -(-len(text) // (self.joins * self.letters))
        return -(-len(text.encode(errors="ignore").translate(None, self.lost)) // self.letters)


def width_of(inner: Any) -> Width | None:
    """The width of the tokens of a tokenizers.Tokenizer; None = a token may stand for any length of text.

    It is known for BPE over bytes, and for BPE that falls back to bytes and has a token for each of them, behind steps that throw
    nothing away. It is not where unknown characters become one token together, where a word that is too long does, or where a
    token takes the blanks beside it.
    """
    told = json.loads(inner.to_str())
    model, added, joins = told["model"], told["added_tokens"], _joins(told["normalizer"])
    cuts = list(_steps(told["pre_tokenizer"], "pretokenizers"))
    drops = told["truncation"] is not None or not all(map(_keeps, cuts)) or not _adds_only(told["post_processor"])
    if joins is None or drops or any(token["lstrip"] or token["rstrip"] for token in added):
        return None
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    vocabulary = inner.get_vocab(with_added_tokens=False)
    over_bytes = any(cut["type"] == "ByteLevel" for cut in cuts)
    missing = [byte for text, byte in (LETTERS if over_bytes else BYTES).items() if text not in vocabulary]
    letters = max(1, *map(len, vocabulary), *(_spelled(inner, token["content"], over_bytes) for token in added))
    if over_bytes and inner.normalizer is None:
        return Width(letters, lost=bytes(missing))
    whole = NOT_IN_UTF8.issuperset(missing) and (over_bytes or model["byte_fallback"])
    return Width(letters, joins) if whole else None


def _steps(part: Part | None, inside: str) -> Iterator[Part]:
    """The parts of a sequence of sequences, in order."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for one in part[inside]:
        yield from _steps(one, inside)


def _joins(normalizer: Part | None) -> int | None:
    """How many characters of a text may become one before it is cut; None = any number."""
    joins = 1
    for step in _steps(normalizer, "normalizers"):
        if step["type"] == "Replace" and 0 < len(step["pattern"].get("String", "")) <= len(step["content"]):
            continue
        if step["type"] not in JOINS:
            return None
        joins *= JOINS[step["type"]]
    return joins


def _keeps(cut: Part) -> bool:
    """Whether a pre-tokenizer throws no character away."""
    return cut["type"] in ("ByteLevel", "Digits", "Metaspace") or (cut["type"] == "Split" and cut["behavior"] != "Removed")


def _adds_only(processor: Part | None) -> bool:
    """Whether a post-processor drops no tokens."""
    return all(
        step["type"] == "ByteLevel"
        or (step["type"] == "TemplateProcessing" and any("Sequence" in piece for piece in step["single"]))
        for step in _steps(processor, "processors")
    )


def _spelled(inner: Any, name: str, over_bytes: bool) -> int:
    """Letters of an added token, which is found in the text as it came or as it is normalised."""
    spellings = [name] if inner.normalizer is None else [name, inner.normalizer.normalize_str(name)]
    return max(len(spelling.encode() if over_bytes else spelling) for spelling in spellings)
