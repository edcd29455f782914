"""Contiguous and rolling parts, the layer's cache, and what all parts have in common."""

from __future__ import annotations

import itertools

import pytest
import torch

from attlas.cache import Cache, CacheError, ContiguousPart, PagedPart, PartSpec, RingPart, make_cache
from attlas.errors import DataError, OptionError, ShapeError, UnsupportedError
from attlas.shapes import SeqInfo
from cache_numbers import ELEMENTS, SHAPES, all_parts, positions, spec, tokens, write

# ---- storage -----------------------------------------------------------------------------------------------------------------


def test_max_len_is_allocated_at_once_and_exactly():
    part = ContiguousPart(spec(), 3, 41, dtype=torch.bfloat16)
    assert part.nbytes() == 3 * 41 * ELEMENTS * 2
    for n in (1, 17, 23):
        write(part, n, 1)
        assert part.nbytes() == 3 * 41 * ELEMENTS * 2
    with pytest.raises(CacheError, match="would hold 42 tokens, but the cache was made with max_len=41"):
        write(part, 1, 1)
    assert part.lengths == (0, 41, 0)


def test_without_max_len_storage_grows_by_doubling():
    part = ContiguousPart(spec(), 2, dtype=torch.float64)
    assert part.nbytes() == 0
    sizes = []
    for _ in range(300):
        write(part, 1, 1)
        sizes.append(part.nbytes() // (2 * ELEMENTS * 8))
    assert sorted(set(sizes)) == [16, 32, 64, 128, 256, 512]
    assert all(size >= n + 1 for n, size in enumerate(sizes))
    assert positions(part, 1) == list(range(300))
    write(part, 1000, 0)
    assert part.nbytes() == 2 * 1300 * ELEMENTS * 8 or part.capacity == 1024
    assert positions(part, 0) == list(range(1000)) and positions(part, 1) == list(range(300))


def test_contiguous_reads_are_views():
    part = ContiguousPart(spec(), 4, 19)
    for row in (1, 2, 3):
        write(part, 11, row)
    storage = part._storage[0]
    assert part.read(2).tensors[0].data_ptr() == storage[2].data_ptr()
    dense = part.read_dense((1, 2, 3), (4, 8))
    assert dense.tensors[0].data_ptr() == storage[1, 4].data_ptr() and dense.tensors[0].shape == (3, 5, 3, 5)
    assert dense.axis.span == (4, 8)
    assert part.read_dense((1, 3)) is None and part.read_dense((2, 1)) is None and part.read_dense(()) is None
    write(part, 1, 3)
    assert part.read_dense((1, 2, 3)) is None and part.read_dense((1, 2)).axis.span == (0, 10)


def test_a_ring_has_window_and_sinks_slots_and_no_more():
    part = RingPart(spec(13, 3), 2)
    assert part.nbytes() == 2 * 16 * ELEMENTS * 4
    for n in (1, 5, 40, 1, 1, 2, 16, 17, 100):
        write(part, n)
        part.end_step()
        length = part.lengths[0]
        assert sorted(positions(part)) == sorted({p for p in range(length) if p < 3 or p >= length - 13})
        assert part.nbytes() == 2 * 16 * ELEMENTS * 4
        assert part.missing(0) == ((3, length - 13) if length > 16 else (0, 0))


def test_a_chunk_is_read_beside_the_old_tokens_until_the_step_ends():
    part = RingPart(spec(5, 2), 1)
    write(part, 9)
    part.end_step()
    write(part, 4)
    assert positions(part) == [0, 1, 7, 8, 4, 5, 6, 9, 10, 11, 12]
    assert part.nbytes() == (7 + 4) * ELEMENTS * 4
    write(part, 1)  # a second write in one step: its token must not push out what the first query of the step reads
    assert sorted(positions(part)) == [0, 1, *range(4, 14)]
    part.end_step()
    assert sorted(positions(part)) == [0, 1, *range(9, 14)]
    assert part.nbytes() == 7 * ELEMENTS * 4


def test_a_wrapped_ring_is_one_view_of_three_segments():
    part = RingPart(spec(5, 2), 3)
    for row in range(3):
        write(part, 11, row)
    part.end_step()
    held = part.read(1)
    assert [(s.position, s.length) for s in held.axis.segments] == [(0, 2), (7, 4), (6, 1)]
    assert held.tensors[0].data_ptr() == part._storage[0][1].data_ptr()
    dense = part.read_dense((0, 1, 2))
    assert dense.axis == held.axis and dense.tensors[0].data_ptr() == part._storage[0].data_ptr()
    write(part, 2, 1)
    assert part.read_dense((0, 1)) is None


def test_rows_of_one_length_that_lack_different_tokens_have_no_common_view():
    part = RingPart(spec(5, 2), 2, rollback=1)
    write(part, 20, 0)
    write(part, 19, 1)
    part.end_step()
    part.truncate({0: 19})
    assert part.lengths == (19, 19) and part.missing(0) != part.missing(1)
    assert part.read_dense((0, 1)) is None
    write(part, 1, 0)
    write(part, 1, 1)
    assert part.missing(0) == part.missing(1) and part.read_dense((0, 1)) is not None


def test_positions_of_a_ring_do_not_end():
    part = RingPart(spec(5, 2), 1)
    write(part, 70_003)
    part.end_step()
    assert sorted(positions(part)) == [0, 1, *range(69_998, 70_003)]
    write(part, 1)
    assert sorted(positions(part)) == [0, 1, *range(69_999, 70_004)]


def test_a_ring_for_short_rows_allocates_only_these():
    for max_len, slots in ((4, 4), (2, 2), (1, 1), (7, 7), (50, 7)):
        part = RingPart(spec(5, 2), 1, max_len)
        assert part.nbytes() == slots * ELEMENTS * 4
        write(part, 1)
        write(part, max_len - 1)
        part.end_step()
        assert sorted(positions(part)) == sorted({p for p in range(max_len) if p < 2 or p >= max_len - 5})
        with pytest.raises(CacheError, match=f"max_len={max_len}"):
            write(part, 1)


@pytest.mark.parametrize("rollback", [0, 1, 4])
def test_a_ring_takes_back_what_its_rollback_allows(rollback):
    part = RingPart(spec(5, 2), 1, rollback=rollback)
    assert part.nbytes() == (7 + rollback) * ELEMENTS * 4
    write(part, 30)
    part.end_step()
    with pytest.raises(UnsupportedError, match=f"shortest possible length is {29 - rollback}"):
        part.truncate({0: 28 - rollback})
    assert part.lengths == (30,)
    part.truncate({0: 29 - rollback})
    length = 29 - rollback
    assert set(positions(part)) >= {0, 1, *range(length - 4, length)}  # the next query, at `length`, is its own fifth key
    write(part, 3)
    assert set(positions(part)) >= {0, 1, *range(length - 4, length + 3)}
    part.truncate({0: 1})
    assert positions(part) == [0]
    write(part, 1)
    assert positions(part) == [0, 1]


def test_a_step_can_be_undone_before_it_ends():
    part = RingPart(spec(5, 2), 1)
    write(part, 20)
    part.end_step()
    write(part, 6)
    part.truncate({0: 22})
    assert sorted(positions(part)) == [0, 1, *range(15, 22)]
    part.truncate([20])
    assert sorted(positions(part)) == [0, 1, *range(15, 20)]
    part.end_step()
    assert sorted(positions(part)) == [0, 1, *range(15, 20)]
    write(part, 3)
    part.reset()
    write(part, 9)  # the first query of the step is now the one at position 0
    assert positions(part) == list(range(9))
    part = RingPart(spec(5, 2), 1, rollback=1)
    write(part, 20)
    part.end_step()
    write(part, 1)
    part.truncate({0: 19})
    write(part, 3)  # and here the one at 19, which reads from 15 on
    assert sorted(positions(part)) == [0, 1, *range(15, 22)]


# ---- what all parts have in common -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", all_parts(3), ids=repr)
def test_bad_writes_say_what_is_wrong(part):
    write(part, 4, 1)
    k, v = tokens(2)
    bad = [
        (ShapeError, "stores 2 tensors", (k,), SeqInfo((2,))),
        (ShapeError, "k must be", (k[:1], v), SeqInfo((2,))),
        (ShapeError, "v must be", (k, v[:, :3]), SeqInfo((2,))),
        (ShapeError, "must be on", (k.to("meta"), v.to("meta")), SeqInfo((2,))),
        (CacheError, r"rows are 0 \.\.\. 2", (k, v), SeqInfo((2,), ids=(3,))),
        (CacheError, "one row", (k, v), SeqInfo((1, 1), ids=(1, 1))),
        (CacheError, r"are \(4,\), not \(3,\)", (k, v), SeqInfo((2,), starts=(3,), ids=(1,))),
        (CacheError, r"are \(4,\), not \(0,\)", (k, v), SeqInfo((2,), lengths_k=(2,), ids=(1,))),
    ]
    for kind, words, new, seq in bad:
        with pytest.raises(kind, match=words):
            part.write(new, seq)
    assert part.lengths == (0, 4, 0)
    part.write((k, v), SeqInfo((2,), ids=(1,)))  # no starts: goes on where the row stands
    assert part.lengths == (0, 6, 0)
    part.write(tuple(t[:0] for t in (k, v)), SeqInfo((0,), starts=(99,), ids=(1,)))  # nothing to write stands nowhere
    part.reset()


@pytest.mark.parametrize("part", all_parts(3), ids=repr)
def test_bad_changes_say_what_is_wrong(part):
    write(part, 4, 1)
    bad = [
        (lambda: part.read(3), "row 3"),
        (lambda: part.missing(-1), "row -1"),
        (lambda: part.truncate({1: 5}), "between 0 and the present length"),
        (lambda: part.truncate({1: -1}), "between 0 and the present length"),
        (lambda: part.truncate([0, 1]), "a length for each row"),
        (lambda: part.truncate({4: 0}), "row 4"),
        (lambda: part.reorder([0, 1]), "one source row for each row"),
        (lambda: part.reorder([0, 1, 7]), "row 7"),
        (lambda: part.fork(0, 3), "row 3"),
        (lambda: part.fork(5, 0), "row 5"),
        (lambda: part.reset([0, 9]), "row 9"),
    ]
    for act, words in bad:
        with pytest.raises(CacheError, match=words):
            act()
        assert part.lengths == (0, 4, 0) and positions(part, 1) == [0, 1, 2, 3]
    part.reset()


@pytest.mark.parametrize("part", all_parts(2), ids=repr)
def test_storage_made_in_inference_mode_is_usable_outside(part):
    kind = type(part)
    with torch.inference_mode():
        made = make_cache([part.spec], 1, layout="paged" if kind is PagedPart else "contiguous").parts[0]
        write(made, 21)
        made.end_step()
    write(made, 1)
    made.end_step()
    write(made, 30)
    made.end_step()
    assert made.lengths == (52,) and positions(made)[0] == 0
    source = torch.ones(1, requires_grad=True)
    made.write(tuple(source * t for t in tokens(1, 52)), SeqInfo((1,)))
    assert not made.read(0).tensors[0].requires_grad


# ---- specs and the layer's cache ---------------------------------------------------------------------------------------------


def test_specs_compare_by_value_and_refuse_nonsense():
    assert PartSpec("kv", [["k", [2, 3]], ["v", [2, 3]]]) == PartSpec("kv", (("k", (2, 3)), ("v", (2, 3))))
    assert spec().elements() == ELEMENTS
    for make in (
        lambda: PartSpec("kv", ()),
        lambda: PartSpec("kv", (("k", (2,)), ("k", (2,)))),
        lambda: spec(0),
        lambda: spec(3, -1),
        lambda: RingPart(spec(), 1),
        lambda: RingPart(spec(3), 1, rollback=-1),
        lambda: make_cache([spec()], 0),
        lambda: make_cache([spec()], 1, layout="heap"),
        lambda: make_cache([PartSpec("kvv", SHAPES)], 1),
        lambda: make_cache([], 1),
        lambda: Cache([ContiguousPart(spec(), 1), ContiguousPart(spec(), 2)]),
    ):
        with pytest.raises(OptionError):
            make()


def test_make_cache_chooses_parts_by_spec_and_layout():
    state = PartSpec("state", (("s", (2, 3)),), dtype=torch.float64)
    latent = PartSpec("latent", (("c", (7,)), ("k_rope", (4,))))
    cache = make_cache([spec(), spec(5, 1), latent, state], 2, 40, dtype=torch.bfloat16)
    assert [type(p).__name__ for p in cache.parts] == ["ContiguousPart", "RingPart", "ContiguousPart", "StatePart"]
    assert [p.spec for p in cache.parts] == [spec(), spec(5, 1), latent, state]
    assert cache.nbytes() == 2 * (40 * ELEMENTS * 2 + 6 * ELEMENTS * 2 + 40 * 11 * 2 + 6 * 8)
    paged = make_cache([spec(), spec(5, 1), state], 2, 41, layout="paged", page_size=8)
    assert [type(p).__name__ for p in paged.parts] == ["PagedPart", "PagedPart", "StatePart"]
    assert paged.parts[0].pool.total == 2 * 6


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_what_is_done_to_a_cache_is_done_to_every_part_or_to_none(layout):
    cache = make_cache([spec(), spec(5, 1)], 3, layout=layout, page_size=8)

    def step(n: int, row: int) -> None:
        for part in cache.parts:
            write(part, n, row)
        cache.end_step()

    step(30, 0)
    step(3, 2)
    assert cache.rows == 3 and cache.lengths == (30, 0, 3)
    with pytest.raises(UnsupportedError):
        cache.truncate({0: 10})
    assert [part.lengths for part in cache.parts] == [(30, 0, 3)] * 2
    cache.truncate([29, 0, 2])
    cache.fork(0, 1)
    cache.reorder(torch.tensor([2, 1, 1]))
    assert [part.lengths for part in cache.parts] == [(2, 29, 29)] * 2
    state = cache.save()
    other = make_cache([spec(), spec(5, 1)], 3)
    other.load(state)
    for row, part in itertools.product(range(3), range(2)):
        assert set(positions(other.parts[part], row)) <= set(positions(cache.parts[part], row))
    with pytest.raises(DataError, match="no part for"):
        other.load(state | {"7.lengths": torch.zeros(3)})
    cache.reset(iter([1]))
    assert [part.lengths for part in cache.parts] == [(2, 0, 29)] * 2
    cache.reset()
    assert cache.lengths == (0, 0, 0)
