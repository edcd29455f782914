"""Each leaf against its definition written as plain Python, pair by pair; and that masks depend on positions alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attlas.masks import (
    All,
    Axis,
    Blocks,
    Causal,
    Dense,
    Dilated,
    Documents,
    Fixed,
    Global,
    Grid,
    Local,
    Mask,
    Nothing,
    Padding,
    PerHead,
    Prefix,
    Random,
    Segment,
    Sinks,
    Strided,
    Window,
)
from attlas.shapes import SeqInfo

MATRIX = ["1011", "0110", "1100"]


def document(position: int, lengths: list[int]) -> int:
    end, passed = 0, 0
    for length in lengths:
        end += length
        if length and position >= end:
            passed += 1
    return passed


def in_matrix(q: int, k: int, rows: list[str], size: int) -> bool:
    i, j = q // size, k // size
    return 0 <= i < len(rows) and 0 <= j < len(rows[0]) and rows[i][j] == "1"


def mix(x: int) -> int:
    """The finaliser of splitmix64 on unsigned integers."""
    m = 2**64 - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & m
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & m
    return x ^ (x >> 31)


def drawn(block: int, count: int, seed: int, span: int | None) -> set[int]:
    """Floyd's sample of `count` numbers below n."""
    n = block + 1 if span is None else span
    if n <= count:
        return set(range(n))
    chosen: set[int] = set()
    for i in range(count):
        j = n - count + i
        weyl = block * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95 + i * 0x2545F4914F6CDD1D + 0x632BE59BD9B4E019
        pick = (mix(weyl % 2**64) & (2**63 - 1)) % (j + 1)
        chosen.add(j if pick in chosen else pick)
    return chosen


DEFINITIONS: dict[str, tuple[Mask, Callable[[int, int], bool]]] = {
    "all": (All(), lambda q, k: True),
    "nothing": (Nothing(), lambda q, k: False),
    "causal": (Causal(), lambda q, k: k <= q),
    "window": (Window(5, 2), lambda q, k: -2 <= q - k <= 5),
    "window to the left": (Window(5, None), lambda q, k: q - k <= 5),
    "window to the right": (Window(None, 0), lambda q, k: q - k >= 0),
    "window without ends": (Window(None, None), lambda q, k: True),
    "last": (Window.last(7), lambda q, k: k in range(q - 6, q + 1)),
    "prefix": (Prefix(11), lambda q, k: k < 11),
    "no prefix": (Prefix(0), lambda q, k: k < 0),
    "sinks": (Sinks(3), lambda q, k: k < 3 and k <= q),
    "documents": (Documents([4, 0, 7, 2]), lambda q, k: document(q, [4, 0, 7, 2]) == document(k, [4, 0, 7, 2])),
    "global": (Global([13, 2, 2]), lambda q, k: q in (2, 13) or k in (2, 13)),
    "no globals": (Global([]), lambda q, k: False),
    "strided": (Strided(5), lambda q, k: (q - k) % 5 == 0),
    "fixed": (Fixed(7, 2), lambda q, k: q // 7 == k // 7 or k % 7 >= 5),
    "fixed without summary": (Fixed(7, 0), lambda q, k: q // 7 == k // 7),
    "dilated": (Dilated(2, 1, 3), lambda q, k: q - k in (-3, 0, 3, 6)),
    "dilated to the left": (Dilated(None, 0, 3), lambda q, k: q >= k and (q - k) % 3 == 0),
    "blocks": (Blocks(MATRIX, 5), lambda q, k: in_matrix(q, k, MATRIX, 5)),
    "random": (Random(2, 3, seed=7), lambda q, k: k >= 0 and k // 3 in drawn(q // 3, 2, 7, None)),
    "random in a span": (Random(3, 2, seed=-1, span=6), lambda q, k: k // 2 in drawn(q // 2, 3, -1, 6)),
    "local": (Local(6), lambda q, k: q // 6 == k // 6),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize(("Tq", "Tk"), [(29, 29), (7, 31), (31, 13), (1, 23), (0, 5), (5, 0)])
def test_leaf_is_its_definition(name: str, Tq: int, Tk: int) -> None:
    mask, allowed = DEFINITIONS[name]
    rows = mask.to_bool(Tq, Tk)
    assert rows.shape == (Tq, Tk) and rows.dtype == torch.bool
    assert rows.tolist() == [[allowed(q, k) for k in range(Tk)] for q in range(Tk - Tq, Tk)]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_complement_and_hull_follow_the_definition(name: str) -> None:
    mask, allowed = DEFINITIONS[name]
    assert (~mask).to_bool(19, 31).tolist() == [[not allowed(q, k) for k in range(31)] for q in range(12, 31)]
    for m, wanted in ((mask, True), (~mask, False)):
        for q in (0, 5, 17, 29):
            seen = [k for k in range(41) if allowed(q, k) == wanted]
            span = m.key_span(q, q)
            assert span is not None or not seen
            if span is not None:
                assert all(k >= (span[0] or 0) and (span[1] is None or k <= span[1]) for k in seen)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_classes_follow_the_definition(name: str) -> None:
    """EMPTY and FULL are never said of a block that is not; most blocks that are get it said."""
    mask, allowed = DEFINITIONS[name]
    corners = [(q, q + n, k, k + m) for q in range(0, 29, 3) for k in range(0, 29, 4) for n, m in ((0, 0), (2, 5), (9, 1))]
    found = mask.classify(*torch.tensor(corners).unbind(1)).tolist()
    for (q0, q1, k0, k1), said in zip(corners, found, strict=True):
        pairs = {allowed(q, k) for q in range(q0, q1 + 1) for k in range(k0, k1 + 1)}
        if said != 1:
            assert pairs == {said == 2}, (q0, q1, k0, k1)
        elif q0 == q1:  # of a single pair everything is known
            raise AssertionError((q0, k0, said))


def test_windows_count_what_they_say() -> None:
    assert int(Window(4, 0).to_bool(1, 23).sum()) == 5  # four other keys, and its own
    assert int(Window.last(4).to_bool(1, 23).sum()) == 4
    assert int(Window(3, 2).dense(Grid.at([11], range(23))).sum()) == 6
    assert Window.last(4) == Window(3, 0)


def test_causal_aligned_to_the_start_compares_array_indices() -> None:
    assert Causal("start").to_bool(3, 5).tolist() == [[k <= i for k in range(5)] for i in range(3)]
    assert torch.equal(Causal("start").to_bool(7, 7), Causal().to_bool(7, 7))
    packed = Causal("start").dense(Grid.packed(SeqInfo((2, 3), (5, 4))))
    assert packed.tolist() == [[k <= i for k in range(5)] + [False] * 4 for i in range(2)] + [
        [False] * 5 + [k <= i for k in range(4)] for i in range(3)
    ]


def test_masks_that_differ_by_row_or_head() -> None:
    assert Padding([3, 0, 5]).to_bool(2, 7).tolist() == [[[[k < n for k in range(7)]] * 2] for n in (3, 0, 5)]
    assert torch.equal(Prefix((3, 0, 5)).to_bool(2, 7), Padding([3, 0, 5]).to_bool(2, 7))
    heads = PerHead((Causal(), Window.last(2), Nothing())).to_bool(5, 7)
    assert heads.shape == (1, 3, 5, 7)
    for h, m in enumerate((Causal(), Window.last(2), Nothing())):
        assert torch.equal(heads[0, h], m.to_bool(5, 7))
    blocks = Blocks([MATRIX, MATRIX[::-1]], 2).to_bool(3, 7)
    assert blocks.shape == (1, 2, 3, 7)
    assert torch.equal(blocks[0, 1], Blocks(MATRIX[::-1], 2).to_bool(3, 7))
    both = (PerHead((Causal(), All())) & Padding([3, 7, 1])).to_bool(5, 7)
    assert both.shape == (3, 2, 5, 7)
    assert torch.equal(both[2, 0], (Causal() & Prefix(1)).to_bool(5, 7))
    mixed = PerHead((Padding([3, 7]), Causal())).to_bool(5, 7)
    assert mixed.shape == (2, 2, 5, 7) and torch.equal(mixed[1, 1], Causal().to_bool(5, 7))


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (2, 3, 5, 7), (2, 1, 5, 7), (1, 3, 5, 7), (1, 1, 5, 7), (1, 5, 7)])
def test_dense_is_the_tensor(shape: tuple[int, ...]) -> None:
    given = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.5
    mask = Dense(given)
    found = mask.to_bool(5, 7)
    assert torch.equal(found.expand(2, 3, 5, 7), given.expand(2, 3, 5, 7))
    assert (mask.batch, mask.heads) == (
        {(2, 3): (2, 3), (2, 1): (2, None), (1, 3): (None, 3), (3,): (None, 3)}.get(shape[:-2], (None, None))
    )
    assert torch.equal(mask.dense(Grid.at([4, 6], [1, 0, 3])), found[..., [2, 4], :][..., [1, 0, 3]])


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_chunk_is_rows_of_the_whole(name: str) -> None:
    """A chunk of a prefill, a decode step and a rolling buffer see what the same positions of the whole prefill see."""
    mask = DEFINITIONS[name][0] & Causal()
    whole = mask.to_bool(37, 37)
    for a, b in ((0, 11), (11, 12), (12, 37)):
        assert torch.equal(mask.dense(Grid.at(range(a, b), range(b))), whole[a:b, :b])
    slots = [32, 33, 34, 35, 36, 27, 28, 29, 30, 31]  # ten slots, written last at position 36
    assert torch.equal(mask.dense(Grid.at([36], slots)), whole[36:][:, slots])


@pytest.mark.parametrize("name", DEFINITIONS)
def test_packed_sequences_see_themselves_alone(name: str) -> None:
    seq = SeqInfo((5, 0, 7, 1), (11, 3, 7, 0))
    packed = DEFINITIONS[name][0].dense(Grid.packed(seq))
    assert packed.shape == (13, 21)
    q = k = 0
    inside = torch.zeros_like(packed)
    for i, (n, m) in enumerate(zip(seq.lengths, seq.keys, strict=True)):
        own = DEFINITIONS[name][0].dense(Grid.at(range(seq.first[i], seq.first[i] + n), range(m)))
        assert torch.equal(packed[q : q + n, k : k + m], own)
        inside[q : q + n, k : k + m] = True
        q, k = q + n, k + m
    assert not bool((packed & ~inside).any())


def test_every_leaf_runs_on_the_device_asked_for() -> None:
    grids = (Grid.dense(3, 7), Grid.at([6], [5, 6, 3, 4]), Grid.packed(SeqInfo((2, 3))))
    for mask, _ in DEFINITIONS.values():
        for grid in grids:
            found = (mask & Causal("start")).dense(grid, device="meta")
            assert found.device.type == "meta" and found.shape == grid.shape
    for mask in (Padding([3, 4]), PerHead((Causal(), Global([1]))), Dense(torch.ones(5, 7, dtype=torch.bool))):
        assert mask.dense(Grid.dense(3, 7), device="meta").device.type == "meta"


def test_random_is_uniform_and_depends_on_the_seed() -> None:
    mask = Random(3, 1, seed=5, span=11)
    times = mask.to_bool(11000, 11000)[:, :11].sum(0)
    assert int(times.sum()) == 3 * 11000
    assert bool(((times - 3000).abs() < 6 * (11000 * 3 / 11 * 8 / 11) ** 0.5).all()), times.tolist()
    others = [Random(3, 1, seed=s, span=11).to_bool(97, 97) for s in (0, 1, 2**40, -5)]
    for i, a in enumerate(others):
        assert all(not torch.equal(a, b) for b in others[:i])


def test_axes_join_what_continues() -> None:
    assert Axis.of(range(3, 9)) == Axis.of([3, 4, 5, 6, 7, 8]) == Axis.of(torch.arange(3, 9)) == Axis((Segment(6, 3),))
    assert Axis((Segment(2, 3), Segment(0, 99), Segment(4, 5, index=2))) == Axis((Segment(6, 3),))
    ring = Axis.of([8, 9, 5, 6, 7])
    assert ring.segments == (Segment(2, 8), Segment(3, 5, index=2))
    assert ring.positions().tolist() == [8, 9, 5, 6, 7] and ring.indices().tolist() == [0, 1, 2, 3, 4] and ring.span == (5, 9)
    assert Axis.of([]).span is None and len(Axis.of([])) == 0 and Axis.of([]).positions().tolist() == []
    assert Axis.of(range(9, 3, -2)).positions().tolist() == [9, 7, 5]


def test_grids_are_values() -> None:
    assert Grid.dense(3, 5) == Grid.at(range(2, 5), range(5)) and hash(Grid.dense(3, 5)) == hash(Grid.at([2, 3, 4], range(5)))
    assert Grid.dense(5, 3).q.positions().tolist() == [-2, -1, 0, 1, 2]
    packed = Grid.packed(SeqInfo((2, 3)))
    assert packed.packed and not Grid.dense(3, 5).packed and not Grid.packed(SeqInfo((5,))).packed
    assert packed.q.sequences().tolist() == [0, 0, 1, 1, 1] and packed.q.positions().tolist() == [0, 1, 0, 1, 2]
    assert packed.shape == (5, 5) and packed.num_sequences == 2
