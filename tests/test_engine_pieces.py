"""How the tokens of a step are cut for the attention kernel, and that long chunks attend as the model's own forward does."""

from __future__ import annotations

import random

import pytest
import torch

from attlas.engine.fused import FusedRunner
from attlas.engine.pieces import Pieces, cut
from attlas.engine.runner import Runner
from attlas.shapes import SeqInfo
from engine_models import engine, prompt, small

Piece = tuple[int, int, int]


def pieces_of(found: Pieces) -> list[Piece]:
    """(sequence, first position, tokens) of each piece, in the order of the step's tokens."""
    at = 0
    out: list[Piece] = []
    for run in found.runs:
        assert (run.at, run.piece) == (at, len(out))
        for i in range(run.piece, run.piece + run.count):
            out.append((found.owners[i], int(found.ends[i]) - run.each, run.each))
        at = run.end
    assert len(out) == len(found.owners) == len(found.ends)
    return out


@pytest.mark.parametrize("alone", [False, True])
def test_pieces_are_the_tokens_in_order_and_a_sequence_is_cut_by_itself(alone: bool):
    r = random.Random(5)
    for _ in range(200):
        count = r.randint(1, 7)
        first = tuple(r.choice((0, 1, 37, 211, 700)) for _ in range(count))
        lengths = tuple(r.choice((0, 1, 1, 2, 5, 16, 17, 61, 131, 640)) for _ in range(count))
        seq = SeqInfo(lengths, starts=first)
        found = cut(seq, alone=alone)
        pieces = pieces_of(found)
        tokens = [(s, a + i) for s, a, n in pieces for i in range(n)]
        assert tokens == [(s, a + i) for s, (a, n) in enumerate(zip(first, lengths, strict=True)) for i in range(n)]
        assert not alone or all(n == 1 for _, _, n in pieces)
        for s in range(count):
            single = pieces_of(cut(SeqInfo(lengths[s : s + 1], starts=first[s : s + 1]), alone=alone))
            assert [(a, n) for _, a, n in single] == [(a, n) for t, a, n in pieces if t == s]
        if found.each:
            assert [n for _, _, n in pieces] == [found.each] * count == list(lengths)


def test_decoding_sequences_are_one_run():
    found = cut(SeqInfo((1,) * 13 + (160, 96), starts=(211,) * 13 + (0, 37)))
    assert [(run.count, run.each) for run in found.runs] == [(13, 1), (8, 32)]
    assert cut(SeqInfo((1,) * 13, starts=(211,) * 13)).each == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["full", "windows and full", "sinks", "alibi"])
def test_long_chunks(name: str, dtype: torch.dtype):
    model = small(name).to(dtype)
    mine, theirs = (engine(model, max_running=3, max_len=700) for _ in range(2))
    fused, plain = FusedRunner(model, mine.cache.caches), Runner(model, theirs.cache.caches)
    rows = [[made.cache.admit([0]).row for _ in range(3)] for made in (mine, theirs)]  # type: ignore[union-attr]
    for step, lengths in enumerate([(97, 5, 530), (1, 133, 1), (13, 64, 39), (3, 3, 3), (1, 1, 71)]):
        tokens = torch.tensor(prompt(sum(lengths), seed=step))
        with torch.inference_mode():
            got, want = (r._hidden(tokens, SeqInfo(lengths, ids=tuple(ids))) for r, ids in zip((fused, plain), rows, strict=True))
        limit = 2e-5 if dtype == torch.float32 else 0.08
        assert (got.float() - want.float()).abs().max() < limit * want.float().abs().max()
