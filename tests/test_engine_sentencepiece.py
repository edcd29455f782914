"""SentencePiece's BPE in GGUF files, against a literal loop of its rule and against what transformers makes of the same file."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from attlas.engine.detokenizer import Detokenizer
from attlas.engine.tokenizer import Tokenizer
from attlas.engine.tokenizer_files import load_tokenizer

SPACE = "\u2581"
TEXTS = [
    "the cat sat on the mat, then the other cat sat there",
    "one  two   three\nfour\ttabs",
    "\u00fcn\u00efc\u00f6d\u00e9 \U0001f98a and \u65e5\u672c",
    "aaaaaaa aaa aa a",
    "",
    "x",
]
SPECIAL, USER = ["<unk>", "<s>", "</s>"], "<tool>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def pieces() -> list[str]:
    """What a BPE learns from the first two texts and the fourth, best first; then single letters, without those of the third."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers, trainers

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    inner.train_from_iterator([TEXTS[0], TEXTS[1], TEXTS[3]] * 3, trainers.BpeTrainer(vocab_size=79, show_progress=False))
    found = [text for text, _ in sorted(inner.get_vocab().items(), key=lambda item: item[1])]
    return [t for t in found if len(t) > 1] + [t for t in found if len(t) == 1]


def scores() -> dict[str, float]:
    return {text: -float(i) for i, text in enumerate(pieces())}


def gguf_file(path: Path, *, prefix: bool = True, architecture: str = "llama", said: bool = True) -> Path:
    """`said`: whether the file names its special tokens, instead of leaving the usual ones to the reader."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*SPECIAL, *BYTES, *pieces(), USER])
    writer.add_token_scores([0.0] * 3 + [0.0] * 256 + list(scores().values()) + [0.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces()) + [4])
    if said:
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    if not prefix:
        writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def literal(text: str, prefix: bool = True) -> list[str]:
    """While two neighbours make a piece: join those of the best score, the leftmost of several."""
    known = scores()
    parts = list((SPACE if prefix and text else "") + text.replace(" ", SPACE))
    while True:
        pairs = [(-known[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in known]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = ["".join(parts[i : i + 2])]
    return [t for part in parts for t in ([part] if part in known else [f"<0x{b:02X}>" for b in part.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_the_rule(tmp_path: Path, prefix: bool):
    made = load_tokenizer(gguf_file(tmp_path / "a.gguf", prefix=prefix))
    for text in [*TEXTS, "  begins with spaces", " ", "ends "]:
        ids = made.encode(text)
        assert ids[0] == 1 and [made.token(i) for i in ids[1:]] == literal(text, prefix)
        assert made.encode(text, special=False) == ids[1:]
        assert made.decode(ids) == text
    assert (made.ends, made.bos) == ({2}, 1)
    assert any(len(made.token(i)) > 3 for i in made.encode(TEXTS[0])[1:])
    whole = made.encode(f"x{USER}</s>")
    assert [made.token(i) for i in whole[-2:]] == [USER, "</s>"] and made.decode(whole) == f"x{USER}"
    unsaid = load_tokenizer(gguf_file(tmp_path / "b.gguf", prefix=prefix, said=False))
    assert (unsaid.encode(TEXTS[0]), unsaid.ends, unsaid.bos) == (made.encode(TEXTS[0]), {2}, 1)


def test_it_is_what_transformers_makes_of_the_file(tmp_path: Path):
    from transformers import AutoTokenizer

    file = gguf_file(tmp_path / "a.gguf", architecture="phi3")  # whose texts all begin with a space, as SentencePiece does it
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    mine = load_tokenizer(file)
    for text in [*TEXTS, "  begins with spaces", f"x {USER} y"]:
        assert mine.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"]


def test_a_streamed_answer_keeps_the_space_that_it_begins_with(tmp_path: Path):
    made: Tokenizer = load_tokenizer(gguf_file(tmp_path / "a.gguf"))
    ids = made.encode("the cat sat on \u65e5\u672c then")
    for cut in range(2, len(ids)):
        stream = Detokenizer(made, after=ids[:cut])
        text = "".join(stream.add(i) for i in ids[cut:]) + stream.flush()
        before = made.decode(ids[:cut])
        if not before.endswith("\ufffd"):
            assert before + text == made.decode(ids)
    assert Detokenizer(made).add(ids[1]) == "the"
