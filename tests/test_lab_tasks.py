"""What the lab trains on: the corpus and its split, and multi-query associative recall."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from attlas.errors import DataError, OptionError
from attlas.lab.tasks import text
from attlas.lab.tasks.mqar import IGNORE, RecallTask, recall_accuracy


def documents(number: int, size: int = 101) -> list[text.Document]:
    return [text.Document(f"d{i}", (f"document {i} says {i * i} " * size).encode()[: size + i]) for i in range(number)]


def parts(side: torch.Tensor) -> list[bytes]:
    return bytes(side.tolist()).split(b"\0")


# ---------------------------------------------------------------------------------------------------- the corpus


def test_the_split_keeps_documents_whole_and_loses_none():
    given = documents(53)
    corpus = text.build_corpus(given, "test")
    assert set(corpus.train_names) | set(corpus.validation_names) == {d.name for d in given}
    assert not set(corpus.train_names) & set(corpus.validation_names)
    by_name = {d.name: d.data for d in given}
    assert parts(corpus.train) == [by_name[n] for n in corpus.train_names]
    assert parts(corpus.validation) == [by_name[n] for n in corpus.validation_names]
    share = corpus.validation.numel() / (corpus.train.numel() + corpus.validation.numel())
    assert 0.08 < share < 0.16


def test_the_split_does_not_depend_on_the_order():
    given = documents(29)
    one, other = text.build_corpus(given, "test"), text.build_corpus(given[::-1], "test")
    assert set(one.validation_names) == set(other.validation_names)


def test_copies_are_kept_once_so_none_can_leak():
    given = documents(23)
    copies = [text.Document(f"copy of {d.name}", d.data + b"\n") for d in given]
    corpus = text.build_corpus([*given, *copies], "test")
    assert len(corpus.train_names) + len(corpus.validation_names) == 23
    assert text.line_overlap(corpus, shortest=1) < 0.5 < 1.0
    leaky = text.Corpus("leaky", corpus.train, corpus.train, corpus.train_names, corpus.train_names, "x")
    assert text.line_overlap(leaky, shortest=1) == 1.0


def test_equal_names_of_different_documents_are_told_apart():
    corpus = text.build_corpus([text.Document("a", b"one"), text.Document("a", b"two"), text.Document("b", b"three")], "test")
    assert set(corpus.train_names) | set(corpus.validation_names) == {"a", "a (2)", "b"}


def test_the_fingerprint_changes_with_any_byte():
    given = documents(7)
    changed = [*given[:-1], text.Document(given[-1].name, given[-1].data + b"!")]
    prints = {text.build_corpus(d, "test").fingerprint for d in (given, changed, given[1:])}
    assert len(prints) == 3
    assert text.build_corpus(given, "another source").fingerprint in prints


def test_a_single_document_is_cut_at_a_line_end_and_the_report_says_so():
    lines = [f"line number {i}\n" for i in range(100)]
    corpus = text.build_corpus([text.Document("book", "".join(lines).encode())], "test")
    whole = bytes(corpus.train.tolist()) + bytes(corpus.validation.tolist())
    assert whole == "".join(lines).encode()
    assert bytes(corpus.train.tolist()).endswith(b"\n")
    assert any("one document" in note for note in corpus.notes)


def test_the_largest_document_stays_in_training():
    given = [text.Document("book", b"many words " * 997), *documents(5)]
    assert "book" in text.build_corpus(given, "test").train_names


def test_a_limit_on_bytes_is_kept_and_told():
    corpus = text.build_corpus(documents(17, 1009), "test", max_bytes=5000)
    assert corpus.train.numel() + corpus.validation.numel() <= 5000 + 17
    assert any("left out" in note for note in corpus.notes)


def test_this_pythons_own_text():
    corpus = text.load_corpus()
    assert corpus.train.numel() > 1_000_000 and corpus.validation.numel() > 100_000
    names = corpus.train_names + corpus.validation_names
    assert "stdlib/argparse.py" in names and not any("/test/" in n or "site-packages" in n for n in names)
    assert int((corpus.train == 0).sum()) == len(corpus.train_names) - 1  # byte 0 stands between documents only
    again = text.build_corpus(text.python_documents(), "the same from another caller")
    assert again.fingerprint == corpus.fingerprint
    told = corpus.to_dict()
    assert told["overlap"] < 0.25
    assert told["bigram_bits"] < told["unigram_bits"] < 8


def test_files_and_folders_of_the_user(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a text\n" * 50)
    (tmp_path / "sub" / "b.md").write_text("ünïcödé\n" * 50)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\1\2")
    (tmp_path / ".hidden").write_text("secret")
    found, notes = text.file_documents([tmp_path])
    assert [d.name for d in found] == ["a.txt", "sub/b.md"]
    assert notes == [f"{tmp_path}: 1 files that are not UTF-8 text were passed over"]
    corpus = text.load_corpus([tmp_path / "a.txt", tmp_path / "sub"])
    assert set(corpus.train_names) | set(corpus.validation_names) == {"a.txt", "b.md"}


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "empty"), (b" \n\t", "empty"), (b"PK\3\4\0\0", "binary"), (b"caf\xe9 au lait", "not UTF-8 .*0xe9 at offset 3")],
)
def test_files_that_are_no_text(tmp_path, data, why):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(DataError, match=why):
        text.load_corpus([path])


def test_files_that_are_not_there_and_folders_without_text(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*missing: No such file"):
        text.load_corpus([tmp_path / "missing"])
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"no readable UTF-8 text file \(1 files passed over\)"):
        text.load_corpus([tmp_path])


def test_a_text_that_is_too_short_is_refused_with_numbers():
    corpus = text.build_corpus(documents(11), "short")
    text.require_length(corpus, 31)
    with pytest.raises(DataError, match=r"short: too short: \d+ bytes for \w+, a context of 997 needs at least"):
        text.require_length(corpus, 997)


def test_windows_are_pieces_of_their_own_side():
    corpus = text.build_corpus(documents(31), "test")
    train, held = bytes(corpus.train.tolist()), bytes(corpus.validation.tolist())
    batch = text.training_batch(corpus, 13, 17, torch.Generator().manual_seed(3))
    assert batch.shape == (13, 18) and batch.dtype == torch.int64
    assert all(bytes(row) in train for row in batch.tolist())
    again = text.training_batch(corpus, 13, 17, torch.Generator().manual_seed(3))
    assert torch.equal(batch, again)
    windows = text.validation_windows(corpus, 7, 17)
    assert all(bytes(row) in held for row in windows.tolist())
    assert windows.shape == (7, 18)
    # Asked for more than there are: as many as fit without sharing a target.
    assert text.validation_windows(corpus, 10**6, 17).shape[0] == (len(held) - 1) // 17


def test_byte_counting_predictors_against_their_definition():
    corpus = text.build_corpus([text.Document("a", b"abab" * 10), text.Document("b", b"abba" * 3)], "test")
    train, held = corpus.train.tolist(), corpus.validation.tolist()
    p = {b: (train.count(b) + 1) / (len(train) + 256) for b in range(256)}
    assert text.unigram_bits(corpus) == pytest.approx(-sum(math.log2(p[b]) for b in held) / len(held))
    pairs = list(pairwise(train))

    def joint(a: int, b: int) -> float:
        return (pairs.count((a, b)) + p[b]) / (sum(x == a for x, _ in pairs) + 1)

    expected = -sum(math.log2(joint(a, b)) for a, b in pairwise(held)) / (len(held) - 1)
    assert text.bigram_bits(corpus) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------- recall


def test_recall_examples_follow_the_definition():
    task = RecallTask(length=46, pairs=7, vocab=58)
    inputs, labels = task.batch(101, torch.Generator().manual_seed(1))
    assert inputs.shape == labels.shape == (101, 46)
    for row, answer in zip(inputs.tolist(), labels.tolist(), strict=True):
        keys, values = row[0:14:2], row[1:14:2]
        assert len(set(keys)) == len(set(values)) == 7
        assert all(1 <= k < 29 for k in keys) and all(29 <= v < 58 for v in values)
        value_of = dict(zip(keys, values, strict=True))
        asked = [i for i, a in enumerate(answer) if a != IGNORE]
        assert len(asked) == 7 and all(i >= 14 and i % 2 == 0 for i in asked)
        assert sorted(row[i] for i in asked) == sorted(keys)
        assert all(answer[i] == value_of[row[i]] for i in asked)
        assert all(row[i] == 0 for i in range(14, 46) if i not in asked)


def test_queries_come_soon_as_the_power_law_says():
    """Without replacement, the first of the draws falls on a slot with probability proportional to (slot + 1)^(a - 1); with one
    pair that is the distribution of the only query."""
    task = RecallTask(length=24, pairs=1, vocab=8, power=0.01)
    _, labels = task.batch(20011, torch.Generator().manual_seed(5))
    slot = ((labels != IGNORE).int().argmax(1) - 2) // 2
    seen = torch.bincount(slot, minlength=11).double() / 20011
    wanted = torch.arange(1, 12).double() ** (0.01 - 1)
    assert torch.allclose(seen, wanted / wanted.sum(), atol=0.012)
    flat, _ = RecallTask(length=24, pairs=1, vocab=8, power=1.0).batch(20011, torch.Generator().manual_seed(5))
    early = (flat[:, 2:].ne(0).int().argmax(1) < 10).double().mean()
    assert float(early) == pytest.approx(5 / 11, abs=0.02)


def test_all_keys_and_values_are_used_alike():
    task = RecallTask(length=16, pairs=3, vocab=22)
    inputs, _ = task.batch(7001, torch.Generator().manual_seed(2))
    keys = torch.bincount(inputs[:, 0:6:2].flatten(), minlength=22)
    assert keys[0] == 0 and keys[11:].sum() == 0
    assert (keys[1:11].double() / keys.sum() - 0.1).abs().max() < 0.01


def test_the_same_seed_gives_the_same_examples_and_fillers_can_be_random():
    task = RecallTask(length=32, pairs=5, vocab=26)
    one, other = (task.batch(11, torch.Generator().manual_seed(s)) for s in (9, 9))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    noisy, labels = RecallTask(length=32, pairs=5, vocab=26, random_fillers=True).batch(11, torch.Generator().manual_seed(9))
    same = one[0] != 0
    assert torch.equal(noisy[same], one[0][same]) and torch.equal(labels, one[1])
    assert (noisy == 0).sum() < (one[0] == 0).sum() / 4


@pytest.mark.parametrize("bad", [{"length": 30, "pairs": 8}, {"length": 33, "pairs": 2}, {"vocab": 16, "pairs": 8}, {"pairs": 0}])
def test_impossible_recall_tasks(bad):
    with pytest.raises(OptionError, match="RecallTask"):
        RecallTask(**{"length": 64, "pairs": 4, "vocab": 256, **bad})


def test_accuracy_is_averaged_per_example_first():
    labels = torch.tensor([[IGNORE, 5, 6, 7], [IGNORE, IGNORE, IGNORE, 5]])
    predicted = torch.tensor([[0, 5, 6, 0], [5, 5, 5, 0]])
    assert recall_accuracy(predicted, labels) == pytest.approx((2 / 3 + 0) / 2)
