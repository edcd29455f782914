"""A text is never fewer tokens than its length says, and where a tokenizer may lose characters nothing is said."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Inner

from attlas.engine.letters import BYTES, LETTERS, SPACE
from attlas.engine.token_width import Width, width_of
from serving import CONTEXT, Live, live

WORDS = ["ab", "abc", "abcd"]
MERGES = [("a", "b"), ("ab", "c"), ("abc", "d")]
ACCENTS = "\u1f82" * 5 + "e\u0301" * 7  # one character where composed, up to four where not


def bpe(alphabet: list[str], **options: Any) -> models.BPE:
    texts = list(dict.fromkeys([*alphabet, *"abcd", *WORDS]))
    return models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=MERGES, **options)


def over_bytes(alphabet: list[str] | None = None, normalizer: Any = None, cut: Any = None) -> Inner:
    inner = Inner(bpe(sorted(LETTERS) if alphabet is None else alphabet))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps if cut is None else [cut, *steps])
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.add_special_tokens([AddedToken("<|\u00e9nd|>", normalized=False)])
    inner.post_processor = processors.TemplateProcessing(single="<|\u00e9nd|> $A", special_tokens=[("<|\u00e9nd|>", 300)])
    return inner


def with_fallback(alphabet: list[str], *steps: Any) -> Inner:
    inner = Inner(bpe(["<unk>", SPACE, *alphabet], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE), *steps])
    return inner


FEW = [letter for letter, byte in LETTERS.items() if byte not in (4, 6, 0xC0, 0xF1, 0xF5, 0xFF)]
IN_UTF8 = [letter for letter, byte in LETTERS.items() if byte not in (0xC0, 0xC1) and byte < 0xF5]
KNOWN: dict[str, tuple[Inner, Width]] = {
    "bytes": (over_bytes(), Width(8, lost=b"")),
    "bytes, digits apart": (over_bytes(cut=pre_tokenizers.Digits(individual_digits=True)), Width(8, lost=b"")),
    "not all bytes": (over_bytes(FEW), Width(8, lost=bytes([0xC0, 0xF1, 0xF5, 0xFF, 4, 6]))),
    "composed": (over_bytes(IN_UTF8, normalizers.NFC()), Width(8, joins=4)),
    "decomposed": (over_bytes(normalizer=normalizers.NFKD()), Width(9)),
    "fallback": (with_fallback(list(BYTES)), Width(6)),
    "fallback, composed": (with_fallback(list(BYTES), normalizers.NFKC()), Width(6, joins=4)),
}


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=60, deadline=None)
@example("abcd" * 101)
@example("\x04\x06" * 50 + "\U00040000" * 20)
@example(ACCENTS * 9)
@example("<|\u00e9nd|>" * 13)
@example("  \u2581 <0x41> \ud55c\uae00" * 7)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_no_text_is_fewer_tokens(name: str, text: str):
    inner, width = KNOWN[name]
    for given_text in (text, unicodedata.normalize("NFD", text)):
        assert len(inner.encode(given_text, add_special_tokens=False).ids) >= width.fewest(given_text)


@pytest.mark.parametrize("name", KNOWN)
def test_the_width(name: str):
    inner, width = KNOWN[name]
    found = width_of(inner)
    assert found is not None and (found.letters, found.joins) == (width.letters, width.joins)
    assert (found.lost is None) == (width.lost is None) and sorted(found.lost or b"") == sorted(width.lost or b"")


def test_it_is_reached():
    inner = over_bytes()
    width = width_of(inner)
    assert width is not None
    text = "<|\u00e9nd|>" * 17  # 8 bytes each, the longest token
    assert len(inner.encode(text, add_special_tokens=False).ids) == width.fewest(text) == 17
    assert width.fewest("\ud800" * 9 + "x") == 1, "half a surrogate pair is no text; whoever encodes it says so"


def test_no_character_decomposes_into_more_than_the_table_says():
    assert max(len(unicodedata.normalize("NFD", chr(c))) for c in range(0x110000)) == 4


def changed(change: Callable[[Inner], Any], inner: Inner | None = None) -> Inner:
    made = over_bytes() if inner is None else inner
    change(made)
    return made


def set_to(name: str, value: Any) -> Callable[[Inner], None]:
    return lambda inner: setattr(inner, name, value)


UNKNOWN: dict[str, tuple[Callable[[], Inner], str]] = {
    "a token takes blanks": (lambda: changed(lambda i: i.add_tokens([AddedToken("<m>", lstrip=True)])), " " * 99 + "<m>"),
    "blanks are thrown away": (lambda: over_bytes(cut=pre_tokenizers.Split(Regex(r"\s"), "removed")), " " * 99 + "a"),
    "another way to cut": (lambda: over_bytes(cut=pre_tokenizers.Whitespace()), " " * 99 + "a"),
    "a normalizer that drops": (lambda: over_bytes(normalizer=normalizers.Strip()), " " * 99 + "a"),
    "a normalizer that shortens": (lambda: over_bytes(normalizer=normalizers.Replace("aa", "")), "a" * 99),
    "a pattern": (lambda: over_bytes(normalizer=normalizers.Replace(Regex("a+"), "aaa")), "a" * 99),
    "composed, and a byte lost": (lambda: over_bytes(FEW, normalizers.NFC()), "\x04" * 99),
    "cut off": (lambda: changed(lambda i: i.enable_truncation(3)), "a " * 99),
    "no text in the template": (
        lambda: changed(set_to("post_processor", processors.TemplateProcessing(single="a", special_tokens=[("a", 1)]))), "a" * 99,
    ),
    "a byte without a token": (lambda: with_fallback(list(BYTES)[1:]), "\x00" * 99),
    "no fallback": (lambda: Inner(bpe(["<unk>"], unk_token="<unk>", fuse_unk=True)), "\u65e5" * 99),
    "words": (lambda: Inner(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]", max_input_chars_per_word=7)), "a" * 99),
    "pieces": (lambda: Inner(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)), "\u65e5" * 99),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_where_characters_may_vanish_nothing_is_said(name: str):
    make, text = UNKNOWN[name]
    inner = make()
    assert width_of(inner) is None
    assert len(inner.encode(text).ids) < len(text) / 9, "the text shows why"


@pytest.fixture
def server() -> Any:
    with live() as made:
        yield made


def test_a_prompt_of_megabytes_is_refused_before_it_is_cut(server: Live, monkeypatch: pytest.MonkeyPatch):
    huge = "x" * 2_000_000
    tokenizer = server.app.service.tokenizer
    few = server.post("/tokenize", json={"prompt": huge})
    assert few.json()["count"] == len(huge), "texts are counted at any length"

    def never(text: str, *, special: bool = True) -> list[int]:
        raise AssertionError("cut into tokens")

    monkeypatch.setattr(tokenizer, "encode", never)
    asked = {
        "/v1/completions": ({"prompt": ["a", huge]}, "prompt"),
        "/v1/chat/completions": ({"messages": [{"role": "user", "content": huge}]}, "messages"),
    }
    for path, (body, param) in asked.items():
        done = server.post(path, json=body)
        error = done.json()["error"]
        assert done.status_code == 400 and (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert "has at least 40000" in error["message"] and f"is {CONTEXT} tokens" in error["message"]
    monkeypatch.undo()
    assert server.post("/v1/completions", json={"prompt": "abc", "max_tokens": 4}).json()["choices"][0]["text"] == "abca"
