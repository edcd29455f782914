"""Pages: the pool's accounting, sharing and copying on write, tables, windows, defragmentation."""

from __future__ import annotations

import pytest
import torch

from attlas.cache import CacheError, OutOfPagesError, PagedPart, PagePool, PartSpec, RingPart, make_cache
from attlas.errors import OptionError, UnsupportedError
from attlas.shapes import SeqInfo

SHAPES = (("k", (2, 3)), ("v", (5,)))
PAGE = 8


def spec(window: int | None = None, sinks: int = 0) -> PartSpec:
    return PartSpec("kv", SHAPES, window, sinks)


def make(rows: int, pages: int | None, window: int | None = None, sinks: int = 0) -> PagedPart:
    pool = PagePool(spec(window, sinks), pages, PAGE)
    for t in pool.tensors:
        t.fill_(float("nan"))
    return PagedPart(spec(window, sinks), rows, pool)


def write(part: PagedPart, counts: dict[int, int], value: int = 0) -> None:
    """Token p of each row holds value + p."""
    starts = [part.lengths[row] for row in counts]
    base = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, counts.values(), strict=True)]).float() + value
    new = tuple(base.view(-1, *[1] * len(shape)).expand(-1, *shape) for _, shape in SHAPES)
    part.write(new, SeqInfo(tuple(counts.values()), starts=tuple(starts), ids=tuple(counts)))


def contents(part: PagedPart, row: int) -> list[float]:
    held = part.read(row)
    assert torch.equal(held.tensors[0][:, 1, 2], held.tensors[1][:, 3])
    return held.tensors[1][:, 0].tolist()


def test_pages_are_taken_as_tokens_come_and_given_back_as_they_go():
    part = make(2, 7)
    for n, pages in ((1, 1), (7, 1), (1, 2), (16, 4)):
        write(part, {0: n})
        assert part.pool.used == pages == len(part.pages(0)) and part.pool.free == 7 - pages
        assert part.nbytes() == pages * PAGE * 11 * 4
    part.truncate({0: 16})
    assert part.pool.used == 2
    part.truncate({0: 1})
    assert part.pool.used == 1
    part.reset([0])
    assert part.pool.used == 0 and part.nbytes() == 0 and part.pool.nbytes() == 7 * PAGE * 11 * 4
    part.pool.check()


def test_an_empty_pool_says_how_many_pages_are_needed_and_nothing_changes():
    part = make(3, 5)
    write(part, {0: 17, 1: 9})
    before = part.pages(0), part.pages(1), part.block_table.clone()
    with pytest.raises(OutOfPagesError, match=r"3 pages are needed, but .* has 0 free: 3 too few") as caught:
        write(part, {0: 8, 2: 10})
    assert (caught.value.needed, caught.value.free) == (3, 0)
    assert part.lengths == (17, 9, 0) and part.pages(2) == ()
    assert (part.pages(0), part.pages(1)) == before[:2] and torch.equal(part.block_table, before[2])
    part.pool.check()
    write(part, {0: 7, 1: 7})  # what is left of the last pages
    assert part.lengths == (24, 16, 0)


def test_a_pool_without_a_number_grows_and_keeps_what_it_holds():
    part = make(2, None)
    assert part.pool.total == 0
    write(part, {0: 100}, 1000)
    write(part, {1: 300}, 5000)
    write(part, {0: 100}, 1000)
    assert contents(part, 0) == [1000 + p for p in range(200)] and contents(part, 1) == [5000 + p for p in range(300)]
    part.pool.check()


def test_a_fork_shares_pages_until_one_side_writes():
    part = make(3, 9)
    write(part, {0: 19}, 100)
    part.fork(0, 1)
    part.fork(0, 2)
    assert part.pool.used == 3 and part.nbytes() == 3 * PAGE * 11 * 4
    assert [part.pool.references(p) for p in part.pages(0)] == [3, 3, 3]
    assert part.pages_needed([1], [1]) == 1 and part.pages_needed([1], [6]) == 2 and part.pages_needed([0, 1, 2], [1, 1, 1]) == 2
    write(part, {1: 1}, 500)
    assert part.pages(1)[:2] == part.pages(0)[:2] and part.pages(1)[2] != part.pages(0)[2]
    assert part.pool.used == 4
    write(part, {0: 1, 2: 1}, 700)  # two owners are left: one of them copies, the other keeps the page
    assert part.pool.used == 5 and len({part.pages(r)[2] for r in range(3)}) == 3
    for row, last in ((0, 719), (1, 519), (2, 719)):
        assert contents(part, row) == [*(100 + p for p in range(19)), last]
    part.reset([0, 2])
    assert part.pool.used == 3 and contents(part, 1)[:19] == [100 + p for p in range(19)]
    part.pool.check()


def test_whole_pages_are_never_copied():
    part = make(2, 4)
    write(part, {0: 16})
    part.fork(0, 1)
    assert part.pages_needed([0, 1], [8, 8]) == 2
    write(part, {0: 8, 1: 8}, 50)
    assert part.pool.used == 4 and part.pages(0)[:2] == part.pages(1)[:2]
    part.pool.check()


def test_a_shared_page_that_was_cut_is_copied_before_it_is_written():
    part = make(2, 6)
    write(part, {0: 13}, 100)
    part.fork(0, 1)
    part.truncate({1: 10})
    write(part, {1: 2}, 900)
    assert contents(part, 0) == [100 + p for p in range(13)]
    assert contents(part, 1) == [*(100 + p for p in range(10)), 910, 911]
    part.pool.check()


def test_beam_search_moves_references_and_not_tokens():
    part = make(4, 12)
    write(part, {r: 9 + r for r in range(4)}, 100)
    tables = [part.pages(r) for r in range(4)]
    part.reorder([3, 3, 0, 3])
    assert [part.pages(r) for r in range(4)] == [tables[3], tables[3], tables[0], tables[3]]
    assert part.lengths == (12, 12, 9, 12) and part.pool.used == 4
    part.pool.check()


def test_a_prefix_is_attached_from_another_row_and_from_another_part():
    part = make(2, 8)
    other = PagedPart(spec(), 1, part.pool)
    write(part, {0: 21}, 100)
    part.attach(1, part.pages(0)[:2], 16)
    other.attach(0, part.pages(0)[:2], 13)
    write(part, {1: 1}, 300)
    write(other, {0: 1}, 800)
    assert contents(part, 1) == [*(100 + p for p in range(16)), 316]
    assert contents(other, 0) == [*(100 + p for p in range(13)), 813]
    assert contents(part, 0) == [100 + p for p in range(21)]
    for act, words in (
        (lambda: part.attach(0, (1,), 8), "not empty"),
        (lambda: other.reset() or other.attach(0, part.pages(0), 16), "take 2 pages, got 3"),
        (lambda: other.attach(0, (7,), 8), "not in use"),
    ):
        with pytest.raises(CacheError, match=words):
            act()
    part.reset()
    other.reset()
    assert part.pool.used == 0
    part.pool.check()


def test_tables_and_slots_are_int32_and_lead_to_the_tokens():
    part = make(3, 9)
    write(part, {0: 3, 2: 11}, 100)
    write(part, {0: 9, 2: 2}, 100)
    table = part.block_table
    assert table.dtype == torch.int32 and table.shape == (3, 2)
    assert table.tolist() == [list(part.pages(0)), [-1, -1], list(part.pages(2))]
    seq = SeqInfo((4, 0, 3), starts=(8, 0, 11), ids=(0, 1, 2))
    slots = part.slot_mapping(seq)
    assert slots.dtype == torch.int32
    flat = part.pool.tensors[1].flatten(0, 1)
    assert flat[slots.long()[:4], 0].tolist() == [108, 109, 110, 111]
    assert slots.tolist()[6] == -1 and flat[slots.long()[4:6], 0].tolist() == [111, 112]  # position 13 has not come yet
    part.reset([2])
    assert part.block_table.tolist() == [list(part.pages(0)), [-1, -1], [-1, -1]]


def test_a_window_gives_back_the_pages_that_lie_outside():
    part = make(1, 7, window=11, sinks=3)
    for n, pages in ((20, 3), (7, 3), (1, 3), (5, 4), (100, 0)):
        if not pages:
            with pytest.raises(OutOfPagesError):
                write(part, {0: n})
            continue
        write(part, {0: n})
        part.end_step()
        length = part.lengths[0]
        held = set(part.read(0).axis.positions().tolist())
        assert held >= {0, 1, 2, *range(length - 11, length)} and len(held) <= 11 + 3 + 2 * PAGE
        assert part.pool.used == pages
        gap = range(*part.missing(0))
        assert held == set(range(length)) - set(gap)
        assert all(part.pages(0)[p // PAGE] == -1 for p in gap)
    part.fork(0, 0)
    part.reset()
    part.pool.check()
    assert part.pool.used == 0


def test_a_rollback_keeps_pages_that_a_window_alone_would_give_back():
    for rollback, pages in ((0, 2), (9, 3)):
        cache = make_cache([spec(11)], 1, 64, layout="paged", page_size=PAGE, rollback=rollback)
        part = cache.parts[0]
        write(part, {0: 36})
        cache.end_step()
        assert part.pool.used == pages  # 36 - 11 = 25 lies in block 3 of 5, 36 - 20 = 16 in block 2
        if rollback:
            cache.truncate([36 - rollback - 1])
            write(part, {0: 2})
            assert contents(part, 0) == list(range(16, 28)) and part.missing(0) == (0, 16)
        else:
            with pytest.raises(UnsupportedError, match="the shortest possible length is 34"):
                cache.truncate([26])
    with pytest.raises(OptionError, match="rollback"):
        make_cache([spec()], 1, layout="paged", rollback=-1)


def test_a_window_keeps_a_loaded_page_that_holds_both_ends_of_a_gap():
    source = RingPart(spec(11, 12), 1)
    base = torch.arange(25.0)
    source.write(tuple(base.view(-1, *[1] * len(shape)).expand(-1, *shape) for _, shape in SHAPES), SeqInfo((25,)))
    source.end_step()
    part = make(1, None, window=11, sinks=3)
    part.load(source.save())
    assert part.missing(0) == (12, 14) and contents(part, 0) == [*range(12), *range(14, 25)]
    write(part, {0: 15})
    part.end_step()
    assert part.missing(0) == (12, 24) and contents(part, 0) == [*range(12), *range(24, 40)]


def test_defragmented_rows_are_views():
    part = make(3, 40)
    for _ in range(3):
        write(part, {0: PAGE, 1: PAGE, 2: PAGE + 1}, 100)
    want = [contents(part, r) for r in range(3)]
    inside = {t.untyped_storage().data_ptr() for t in part.pool.tensors}

    def view(row: int) -> bool:
        return part.read(row).tensors[0].untyped_storage().data_ptr() in inside

    assert not any(view(r) for r in range(3))
    part.fork(2, 1)
    assert part.defragment() == 3  # rows 1 and 2 share pages and stay
    assert view(0) and not view(2)
    part.reset([1])
    assert part.defragment() == 4 and part.defragment() == 0
    assert view(2) and [contents(part, r) for r in (0, 2)] == [want[0], want[2]]
    assert torch.equal(part.read(2, (9, 17)).tensors[1][:, 0], torch.arange(109.0, 118.0))
    part.pool.check()
    full = make(2, 6)
    for _ in range(3):
        write(full, {0: PAGE, 1: PAGE})
    assert full.defragment() == 0 and contents(full, 1) == list(range(24))


def test_pools_refuse_nonsense():
    for options in ({"page_size": 7}, {"page_size": 257}, {"num_pages": -1}):
        with pytest.raises(OptionError):
            PagePool(spec(), **({"num_pages": 3, "page_size": 8} | options))
    pool = PagePool(spec(), 3, 256)
    pages = pool.allocate(2)
    pool.retain(pages[:1])
    pool.release(pages)
    assert (pool.free, pool.used, pool.references(pages[0])) == (2, 1, 1)
    for act in (
        lambda: pool.release([pages[1]]),
        lambda: pool.retain([pages[1]]),
        lambda: pool.release([3]),
        lambda: pool.release([-1]),
    ):
        with pytest.raises(CacheError, match="not in use"):
            act()
    pool.check()
    with pytest.raises(CacheError, match="made for"):
        PagedPart(PartSpec("kv", (("k", (2, 3)),)), 1, pool)
    with pytest.raises(OutOfPagesError):
        pool.allocate(3)
    assert pool.free == 2
    pool._free.append(pages[0])
    with pytest.raises(AssertionError):
        pool.check()
