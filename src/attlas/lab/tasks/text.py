"""A corpus of real text as bytes: the Python installation's own sources and documentation, or the files that the user names.

Vocabulary: the 256 byte values; byte 0 stands between two documents and occurs in none. The split into training and validation
is by document: those with the smallest hashes of name and content are held out, whatever the order in which they were found.
Documents with equal content are kept once, so a copy cannot leak.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import math
import platform
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attlas.errors import DataError

VOCAB = 256
MAX_BYTES = 64 << 20
HELD_OUT = 0.1
# Tests repeat each other, encodings and parser tables are numbers, the rest is generated or depends on how Python was built.
SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3"}
)


@dataclass(frozen=True)
class Document:
    name: str
    data: bytes

    @property
    def digest(self) -> str:
        """Hash of name and content; it decides on which side of the split the document is."""
        return hashlib.sha256(self.name.encode() + b"\0" + self.data).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """train, validation: uint8 [bytes], documents joined by byte 0. The names tell which document is where."""

    source: str
    train: Tensor
    validation: Tensor
    train_names: tuple[str, ...]
    validation_names: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "train_bytes": self.train.numel(),
            "validation_bytes": self.validation.numel(),
            "train_documents": len(self.train_names),
            "validation_documents": len(self.validation_names),
            "notes": list(self.notes),
            "overlap": line_overlap(self),
            "unigram_bits": unigram_bits(self),
            "bigram_bits": bigram_bits(self),
        }


# ---------------------------------------------------------------------------------------------------- where documents come from


def python_documents() -> list[Document]:
    """The standard library's .py files, the help topics of pydoc and the licence of this Python, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        if SKIPPED.isdisjoint(parts) and not parts[-1].startswith("_sysconfigdata") and not parts[0].startswith("config-"):
            documents.append(Document("stdlib/" + "/".join(parts), _read(path)))
    documents += [Document(f"topics/{name}", text.encode()) for name, text in sorted(_help_topics().items())]
    for folder in (root, Path(sys.base_prefix)):
        for path in sorted(folder.glob("LICENSE*")):
            documents.append(Document(f"licence/{path.name}", _read(path)))
    if not documents:
        raise DataError(f"the Python at {root} has no source files to train on; name a text with --text FILE or --text FOLDER")
    return [d for d in documents if _problem(d.data) is None]


def _help_topics() -> dict[str, str]:
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        return {}


def file_documents(paths: Sequence[str | Path]) -> tuple[list[Document], list[str]]:
    """The files named, and every text file below the folders named (hidden ones excepted). Returns documents and remarks.

    A file that is named itself and cannot be used is an error; one that is found in a folder is passed over and counted.
    """
    documents, notes = [], []
    for given in map(Path, paths):
        if given.is_dir():
            found, passed = _folder_documents(given)
            if not found:
                raise DataError(f"--text {given}: the folder holds no readable UTF-8 text file ({passed} files passed over)")
            documents += found
            if passed:
                notes.append(f"{given}: {passed} files that are not UTF-8 text were passed over")
        else:
            data = _read(given)
            problem = _problem(data)
            if problem:
                raise DataError(f"--text {given}: {problem}")
            documents.append(Document(given.name, data))
    return documents, notes


def _folder_documents(folder: Path) -> tuple[list[Document], int]:
    documents, passed = [], 0
    for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix()):
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") or part == "__pycache__" for part in parts) or not path.is_file():
            continue
        try:
            data = _read(path)
        except DataError:
            passed += 1
            continue
        if _problem(data):
            passed += 1
        else:
            documents.append(Document("/".join(parts), data))
    return documents, passed


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _problem(data: bytes) -> str | None:
    """Why `data` is not a text, or None."""
    if not data.strip():
        return "the file is empty"
    if b"\0" in data:
        return "the file is binary (it holds zero bytes); a text in UTF-8 is needed"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"the file is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start}); convert it first"
    return None


# ---------------------------------------------------------------------------------------------------- the split


def build_corpus(documents: Iterable[Document], source: str, *, notes: Sequence[str] = (), max_bytes: int = MAX_BYTES) -> Corpus:
    """Remove copies, hold out about a tenth of the bytes in whole documents, and join each side.

    A single document cannot be split by document: its last tenth, cut at a line end, is held out then, and a remark says so.
    """
    kept, notes = _distinct(documents), list(notes)
    kept, left_out = _capped(kept, max_bytes)
    if left_out:
        notes.append(f"{left_out} documents beyond the first {max_bytes >> 20} MiB were left out")
    if not kept:
        raise DataError(f"{source}: no text")
    if len(kept) == 1:
        kept = _halve(kept[0])
        notes.append("one document only: its last tenth is held out, so training and validation share author and subject")
        held_out = {kept[-1].name}
    else:
        held_out = _held_out(kept)
    train = [d for d in kept if d.name not in held_out]
    validation = [d for d in kept if d.name in held_out]
    digest = hashlib.sha256("\n".join(f"{d.digest} {d.name in held_out:d}" for d in kept).encode()).hexdigest()
    return Corpus(
        source,
        _join(train),
        _join(validation),
        tuple(d.name for d in train),
        tuple(d.name for d in validation),
        digest[:16],
        tuple(notes),
    )


def _distinct(documents: Iterable[Document]) -> list[Document]:
    """The first of each group with equal content; equal names of different documents get a number."""
    seen: set[bytes] = set()
    names: dict[str, int] = {}
    kept = []
    for document in documents:
        key = hashlib.sha256(document.data.strip()).digest()
        if key in seen:
            continue
        seen.add(key)
        count = names[document.name] = names.get(document.name, 0) + 1
        kept.append(document if count == 1 else Document(f"{document.name} ({count})", document.data))
    return kept


def _capped(documents: list[Document], max_bytes: int) -> tuple[list[Document], int]:
    kept: list[Document] = []
    total = 0
    for document in documents:
        if total + len(document.data) > max_bytes and kept:
            continue
        kept.append(document if len(document.data) <= max_bytes else Document(document.name, document.data[:max_bytes]))
        total += len(document.data)
    return kept, len(documents) - len(kept)


def _halve(document: Document) -> list[Document]:
    data = document.data
    cut = data.rfind(b"\n", 0, int(len(data) * (1 - HELD_OUT))) + 1 or int(len(data) * (1 - HELD_OUT))
    return [Document(f"{document.name} (first part)", data[:cut]), Document(f"{document.name} (last part)", data[cut:])]


def _held_out(documents: list[Document]) -> set[str]:
    """Documents in the order of their hashes until a tenth of the bytes is reached; none that holds more than a third of all."""
    total = sum(len(d.data) for d in documents)
    chosen: set[str] = set()
    held = 0
    ordered = sorted(documents, key=lambda d: d.digest)
    small = [d for d in ordered if len(d.data) <= total / 3] or ordered
    for document in small:
        if held >= HELD_OUT * total or len(chosen) == len(documents) - 1:
            break
        chosen.add(document.name)
        held += len(document.data)
    return chosen


def _join(documents: Sequence[Document]) -> Tensor:
    joined = b"\0".join(d.data for d in documents)
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)


def _bytes(side: Tensor) -> bytes:
    return ctypes.string_at(side.data_ptr(), side.numel()) if side.numel() else b""


def load_corpus(texts: Sequence[str | Path] = (), *, max_bytes: int = MAX_BYTES) -> Corpus:
    """The user's texts, or, when there are none, this Python's own."""
    if not texts:
        source = f"Python {platform.python_version()} standard library, help topics and licence"
        return build_corpus(python_documents(), source, max_bytes=max_bytes)
    documents, notes = file_documents(texts)
    return build_corpus(documents, ", ".join(str(t) for t in texts), notes=notes, max_bytes=max_bytes)


def require_length(corpus: Corpus, context: int) -> None:
    """Raise DataError unless both sides can fill a few windows of `context` bytes."""
    for side, have, need in (
        ("training", corpus.train.numel(), 8 * (context + 1)),
        ("validation", corpus.validation.numel(), 2 * (context + 1)),
    ):
        if have < need:
            raise DataError(
                f"{corpus.source}: too short: {have} bytes for {side}, a context of {context} needs at least {need}; "
                "give more text or a smaller --context"
            )


# ---------------------------------------------------------------------------------------------------- windows


def training_batch(corpus: Corpus, batch: int, context: int, generator: torch.Generator) -> Tensor:
    """int64 [batch, context + 1]: windows at random places of the training side. Inputs are [:, :-1], targets [:, 1:]."""
    starts = torch.randint(corpus.train.numel() - context, (batch,), generator=generator)
    return corpus.train[starts[:, None] + torch.arange(context + 1)].long()


def validation_windows(corpus: Corpus, windows: int, context: int) -> Tensor:
    """int64 [n, context + 1]: n <= windows windows that share no target, spread evenly over the validation side."""
    count = min(windows, (corpus.validation.numel() - 1) // context)
    starts = torch.linspace(0, corpus.validation.numel() - context - 1, count).long()
    return corpus.validation[starts[:, None] + torch.arange(context + 1)].long()


# ---------------------------------------------------------------------------------------------------- yardsticks


def line_overlap(corpus: Corpus, shortest: int = 40) -> float:
    """Share of the validation side's lines of at least `shortest` bytes that also occur in the training side, word for word."""

    def lines(side: Tensor) -> list[bytes]:
        stripped = (line.strip() for line in _bytes(side).replace(b"\0", b"\n").split(b"\n"))
        return [line for line in stripped if len(line) >= shortest]

    known, held = set(lines(corpus.train)), lines(corpus.validation)
    return sum(line in known for line in held) / len(held) if held else 0.0


def unigram_bits(corpus: Corpus) -> float:
    """Bits per byte of the validation side under the byte frequencies of the training side (add-one smoothing)."""
    counts = torch.bincount(corpus.train.int(), minlength=VOCAB).double() + 1
    cost = -(counts / counts.sum()).log2()
    return float(cost[corpus.validation.long()].mean())


def bigram_bits(corpus: Corpus) -> float:
    """The same for the frequencies of pairs, interpolated with single bytes: a model that does not beat it has learned little."""
    single = torch.bincount(corpus.train.int(), minlength=VOCAB).double() + 1
    single = single / single.sum()
    pairs = corpus.train[:-1].int() * VOCAB + corpus.train[1:].int()
    counts = torch.bincount(pairs, minlength=VOCAB * VOCAB).double().view(VOCAB, VOCAB)
    joint = (counts + single) / (counts.sum(1, keepdim=True) + 1)
    held = corpus.validation.long()
    return float(-joint[held[:-1], held[1:]].log2().mean()) if held.numel() > 1 else math.nan
