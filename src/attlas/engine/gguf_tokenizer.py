"""The tokenizer that a GGUF file carries in its metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attlas.engine.tokenizer import ChatTemplate, Tokenizer
from attlas.errors import DataError, UnsupportedError
from attlas.models.gguf import open_gguf
from attlas.registry import suggest

CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that texts are split at before anything else

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
    """The byte-level BPE tokenizer (model "gpt2") and the chat template in a GGUF file. Raises DataError for a file without them,
    UnsupportedError for another kind of tokenizer."""
    reader = open_gguf(path)

    def value(key: str) -> Any:
        found = reader.get_field(f"tokenizer.{key}")
        return None if found is None else found.contents()

    kind = value("ggml.model")
    if kind is None:
        raise DataError(f"{path} holds no tokenizer")
    if kind != "gpt2":
        raise UnsupportedError(
            f"{path}: tokenizers of kind {kind!r} are not read from GGUF files (gpt2 is); give a tokenizer.json"
        )
    tokens, kinds = value("ggml.tokens"), value("ggml.token_type")
    inner = _byte_level(tokens, value("ggml.merges"), value("ggml.pre") or "default", str(path))
    _add_special(inner, tokens, kinds or [])
    bos, eos = value("ggml.bos_token_id"), value("ggml.eos_token_id")
    ends = {i for i in (eos, value("ggml.eot_token_id")) if i is not None}
    if bos is not None and value("ggml.add_bos_token"):
        _put_first(inner, tokens[bos], bos)
    special = {name: tokens[i] for name, i in (("bos_token", bos), ("eos_token", eos)) if i is not None}
    template = value("chat_template")
    return Tokenizer(inner, ends=frozenset(ends), bos=bos, chat=None if template is None else ChatTemplate(template, special))


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

    found = [(text, kind) for text, kind in zip(tokens, kinds, strict=False) if kind in (CONTROL, USER_DEFINED)]
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in found if kind == CONTROL])
    inner.add_tokens([AddedToken(t, special=False, normalized=False) for t, kind in found if kind == USER_DEFINED])


def _put_first(inner: Any, text: str, id: int) -> None:
    from tokenizers.processors import TemplateProcessing

    inner.post_processor = TemplateProcessing(single=f"{text} $A", special_tokens=[(text, id)])
