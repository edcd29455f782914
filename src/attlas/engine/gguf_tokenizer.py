"""The tokenizer that a GGUF file carries in its metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attlas.engine.letters import SPACE
from attlas.engine.tokenizer import ChatTemplate, Tokenizer
from attlas.errors import DataError, UnsupportedError
from attlas.models.gguf import open_gguf
from attlas.registry import suggest

# Kinds of tokens. Texts are split at those that are unknown, control or user-defined before anything else.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where a file of kind "llama" does not say

# How texts are split into words before merging, by the file's name for it ("tokenizer.ggml.pre"): whether digits stand alone, and
# the pattern of a word, None = that of GPT-2.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: dict[str, tuple[bool, str | None]] = {
    "default": (False, None),
    "gpt-2": (False, None),
    "smollm": (True, None),
    "refact": (True, None),
    "starcoder": (True, None),
    "llama-bpe": (False, LLAMA3),
    "qwen2": (False, LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
}


def from_gguf(path: Path) -> Tokenizer:
    """The tokenizer and the chat template in a GGUF file: byte-level BPE (kind "gpt2") or SentencePiece's BPE (kind "llama").
    Raises DataError for a file without them, UnsupportedError for another kind of tokenizer."""
    reader = open_gguf(path)

    def value(key: str, default: Any = None) -> Any:
        found = reader.get_field(f"tokenizer.{key}")
        return default if found is None else found.contents()

    kind, tokens = value("ggml.model"), value("ggml.tokens")
    if kind is None or tokens is None:
        raise DataError(f"{path} holds no tokenizer; give a tokenizer.json")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(
            f"{path}: tokenizers of kind {kind!r} are not read from GGUF files (gpt2 and llama are); give a tokenizer.json"
        )
    sentencepiece = kind == "llama"
    kinds = value("ggml.token_type", [])
    bos, eos, unknown = (value(f"ggml.{n}_token_id", i if sentencepiece else None) for n, i in SENTENCEPIECE_IDS.items())
    if sentencepiece:
        prefix = bool(value("ggml.add_space_prefix", True))
        inner = _sentencepiece(tokens, value("ggml.scores"), kinds, unknown, prefix, str(path))
    else:
        inner = _byte_level(tokens, value("ggml.merges"), value("ggml.pre") or "default", str(path))
    _add_special(inner, tokens, kinds)
    ends = {i for i in (eos, value("ggml.eot_token_id")) if i is not None}
    if bos is not None and value("ggml.add_bos_token", sentencepiece):
        _put_first(inner, tokens[bos], bos)
    special = {name: tokens[i] for name, i in (("bos_token", bos), ("eos_token", eos)) if i is not None}
    template = value("chat_template")
    return Tokenizer(inner, ends=frozenset(ends), bos=bos, chat=None if template is None else ChatTemplate(template, special))


def _sentencepiece(tokens: list[str], scores: list[float] | None, kinds: list[int], unknown: int, prefix: bool, path: str) -> Any:
    """SentencePiece's BPE: of all neighbours whose text is a token, those of the best score are joined first. Characters without
    a token become bytes. A space is a letter of its own; where `prefix` says so, one is put before a text and before what follows
    a special token in it, as llama.cpp does (the library sentencepiece puts one before the whole text only)."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    if scores is None or {len(scores), len(kinds)} != {len(tokens)}:
        raise DataError(f"{path}: a tokenizer of kind 'llama' needs as many scores and token types as its {len(tokens)} tokens")
    ids = {text: i for i, text in enumerate(tokens)}
    whole = {text for text, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    pairs = [
        (-scores[ids[text]], ids[text[:cut]], ids[text[cut:]])
        for text in whole
        for cut in range(1, len(text))
        if text[:cut] in whole and text[cut:] in whole
    ]
    merges = [(tokens[a], tokens[b]) for _, a, b in sorted(pairs)]
    made = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=BYTE in kinds)
    )
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        made.normalizer = normalizers.Replace(" ", SPACE)
    made.decoder = decoders.Sequence(steps)
    return made


def _byte_level(tokens: list[str], merges: list[str], pre: str, path: str) -> Any:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if pre not in SPLITS:
        raise UnsupportedError(f"{path}: unknown way to split texts {pre!r}; {suggest(pre, SPLITS)}")
    digits, pattern = SPLITS[pre]
    pairs = [(a, b) for a, _, b in (m.partition(" ") for m in merges)]
    made = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    return made


def _add_special(inner: Any, tokens: list[str], kinds: list[int]) -> None:
    """Tokens that texts are split at keep the ids that they have in the vocabulary."""
    from tokenizers import AddedToken

    found = [(text, kind) for text, kind in zip(tokens, kinds, strict=False) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in found if kind != USER_DEFINED])
    inner.add_tokens([AddedToken(t, special=False, normalized=False) for t, kind in found if kind == USER_DEFINED])


def _put_first(inner: Any, text: str, id: int) -> None:
    from tokenizers.processors import TemplateProcessing

    inner.post_processor = TemplateProcessing(single=f"{text} $A", special_tokens=[(text, id)])
