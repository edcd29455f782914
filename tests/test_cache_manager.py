"""The cache manager: rows, shared prefixes, windows, swapping, moving; schedules at random against a plain model of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attlas.cache import CacheError, CacheManager, OutOfPagesError, PartSpec
from attlas.cache.lanes import deal, pages_for
from attlas.errors import OptionError, UnsupportedError
from attlas.shapes import SeqInfo
from cache_world import FULL, KV, MODELS, PAGE, STATE, WINDOW, World

FULL_MODEL = MODELS["full"]


def world(specs=FULL_MODEL, **options) -> World:
    return World(specs, 0, **({"rows": 3, "pages": 23, "rollback": 0} | options))


def start(w: World, tokens: list[int], salt: str = "") -> int:
    admission = w.manager.admit(tokens, salt)
    w.rows[admission.row], w.salts[admission.row] = tokens[: admission.cached_tokens], salt
    assert w.manager.reserve(admission.row, len(tokens) - admission.cached_tokens)
    w.write({admission.row: tokens[admission.cached_tokens :]})
    return admission.row


def end(w: World, row: int, keep: bool = True) -> None:
    tokens = w.rows.pop(row)
    w.manager.release(row, tokens if keep else None)


# ---- at random --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_no_schedule_loses_a_page_or_a_token(name):
    pages = {"mixed": 110, "lanes": 60, "two parts": 60}.get(name, 40)
    for seed in range(12):
        World(MODELS[name], seed, pages=pages).run(30)
        World(MODELS[name], seed, pages=pages, prefix_caching=False, rollback=0, swap_bytes=0).run(10)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_no_schedule_loses_a_quantised_token(kv_dtype):
    for seed in range(5):
        World(MODELS["mixed"], seed, pages=110, kv_dtype=kv_dtype).run(25)


@given(name=st.sampled_from(sorted(MODELS)), seed=st.integers(0, 2**32), pages=st.integers(9, 130), rollback=st.integers(0, 9))
def test_schedules_that_hypothesis_makes_up(name, seed, pages, rollback):
    World(MODELS[name], seed, rows=3, pages=pages, rollback=rollback).run(12)


@pytest.mark.heavy
def test_ten_thousand_schedules():
    for seed in range(10_000):
        name = list(MODELS)[seed % len(MODELS)]
        w = World(MODELS[name], seed, pages=30 + seed % 97, rows=2 + seed % 5, rollback=seed % 4)
        w.run(8 + seed % 9)


# ---- prefixes ---------------------------------------------------------------------------------------------------------------


def test_a_finished_sequence_serves_the_next_one():
    w = world()
    end(w, start(w, list(range(37))))
    assert w.manager.stats().cached == 4 and w.manager.match(list(range(37))) == 32
    assert w.manager.match(list(range(32))) == 24  # at least one token is left to compute
    assert w.manager.match([9, *range(1, 37)]) == 0 and w.manager.match(list(range(37)), "tenant") == 0
    row = start(w, [*range(32), 5, 6])
    assert w.manager.stats().used == 5 and w.manager.stats().cached == 0
    assert (w.manager.stats().queries, w.manager.stats().hits) == (71, 32)
    w.compare()
    end(w, row, keep=False)
    assert w.manager.stats().cached == 4
    w.finish()


def test_a_running_sequence_serves_another_one_after_its_commit():
    w = world()
    first = start(w, list(range(29)))
    assert w.manager.match(list(range(29))) == 0
    w.manager.commit(first, w.rows[first])
    second = start(w, [*range(24), 99])
    assert w.manager.stats().used == 5  # 4 of the first; 3 of them shared, and 1
    w.compare()
    end(w, first)
    end(w, second)
    w.finish()


def test_equal_sequences_that_ran_at_once_end_in_the_same_pages():
    w = world()
    first, second = start(w, list(range(29))), start(w, list(range(30)))
    assert w.manager.stats().used == 8
    w.manager.commit(first, w.rows[first])
    w.manager.commit(second, w.rows[second])
    assert w.manager.stats().used == 5
    w.compare()
    w.write({first: [7], second: [8]})
    w.compare()


def test_cached_pages_go_when_they_are_needed_and_the_oldest_first():
    w = world(pages=10)
    end(w, start(w, list(range(40))))
    end(w, start(w, list(range(100, 133))))
    assert (w.manager.stats().cached, w.manager.stats().free, w.manager.free_pages()) == (9, 1, 10)
    row = start(w, list(range(200, 224)))
    assert w.manager.stats().evictions == 2 and w.manager.match(list(range(41))) == 24
    assert w.manager.match(list(range(100, 133))) == 32
    assert not w.manager.reserve(row, 8 * PAGE) and w.manager.stats().cached == 7  # refused: nothing has changed
    assert w.manager.reserve(row, 7 * PAGE) and w.manager.stats().cached == 0
    w.manager.check()


def test_without_prefix_caching_nothing_stays():
    w = world(prefix_caching=False)
    row = start(w, list(range(37)))
    w.manager.commit(row, w.rows[row])
    end(w, row)
    assert w.manager.stats().free == 23 and w.manager.match(list(range(37))) == 0
    assert not CacheManager(MODELS["state"], rows=1, pages=3).prefix_caching
    assert not CacheManager(MODELS["grouped"], rows=1, pages=3).prefix_caching


def test_a_prefix_of_window_layers_is_found_where_the_window_is_whole():
    w = world(MODELS["mixed"], pages=120)
    row = start(w, list(range(70)))
    w.manager.commit(row, w.rows[row])  # right after the prompt: every page is still there
    assert w.manager.match([*range(40), 500]) == 40
    w.write({row: list(range(70, 96))})
    w.write({row: list(range(96, 110))})
    w.manager.commit(row, w.rows[row])
    second = start(w, [*range(40), 500, 501])
    w.compare()
    end(w, second)
    end(w, row)
    assert w.manager.match(list(range(110))) == 104
    w.finish()


# ---- pages ------------------------------------------------------------------------------------------------------------------


def test_one_table_for_the_layers_that_keep_the_same_tokens():
    m = CacheManager([(FULL,), (WINDOW,), (WINDOW,), (FULL,), (WINDOW,), (WINDOW,)], rows=2, pages=11)
    tables = [cache.parts[0].tables for cache in m.caches]
    assert tables[0] is tables[3] and len({id(t) for t in tables}) == 3
    token = (2 * 3 + 5) * 4
    assert m.page_bytes == 2 * 16 * token and m.nbytes() == 11 * m.page_bytes  # the memory of two layers serves all six
    specs = [(FULL,)] * 3 + [(WINDOW,)] * 15
    assert [len(d.members) for d in deal(specs)] == [3] * 6
    assert CacheManager(specs, rows=1, pages=1, kv_dtype="int8").page_bytes == 3 * 16 * (2 * 3 + 5 + 4 * 3)
    assert pages_for(specs, 160, 16) == 60 and pages_for(specs, 160, 16, chunk=16) == 10 + 5 * 5


def test_a_bound_on_the_pages_of_a_row_holds():
    for name, specs in MODELS.items():
        for chunk in (1, 5, 29):
            w = World(specs, chunk, rows=1, pages=300, rollback=0)
            row = w.manager.admit([0]).row
            w.rows[row], w.salts[row], most = [], "", 0
            for _ in range(150 // chunk):
                assert w.manager.reserve(row, chunk)
                most = max(most, w.manager.stats().used)
                w.write({row: w.new_tokens(chunk)})
            assert most <= pages_for(specs, len(w.rows[row]), PAGE, chunk), name


def test_rolling_pages_come_back_at_the_end_of_a_step():
    w = world([(WINDOW,)] * 2, pages=8, prefix_caching=False)
    row = start(w, list(range(59)))
    assert w.manager.stats().used == 2 and w.manager.free_pages() == 6
    for t in range(200):
        assert w.manager.reserve(row, 1)
        w.write({row: [t]})
        assert w.manager.stats().used <= 3
    w.compare()


def test_forks_share_pages_until_they_write():
    w = world()
    row = start(w, list(range(20)))
    copy = w.manager.fork(row)
    w.rows[copy], w.salts[copy] = list(w.rows[row]), ""
    assert w.manager.stats().used == 3 and w.manager.pages_needed(copy, 1) == 1 == w.manager.pages_needed(row, 4)
    assert w.manager.reserve(row, 1) and w.manager.reserve(copy, 1) and w.manager.stats().used == 4
    w.write({row: [1], copy: [2]})
    w.compare()
    assert w.manager.fork(row) is not None and w.manager.fork(row) is None


def test_a_write_without_a_reservation_takes_what_it_needs_or_changes_nothing():
    w = world(pages=4)
    row = w.manager.admit([1]).row
    w.rows[row], w.salts[row] = [], ""
    w.write({row: list(range(25))})
    with pytest.raises(OutOfPagesError, match=r"2 pages are needed, but .* can give 0: 2 too few"):
        w.write({row: list(range(16))})
    w.rows[row] = w.rows[row][:25]
    w.compare()


def test_what_the_layers_of_a_step_remember_is_forgotten_when_pages_change():
    w = world(prefix_caching=False)
    row = start(w, list(range(13)))
    end(w, row)
    w.manager.resize(40)
    w.manager.admit([1])
    w.rows[row], other = [], w.manager.admit([1]).row
    w.rows[other], w.salts[other] = [], ""
    assert w.manager.reserve(other, 9)  # takes the pages that the first row had
    w.write({row: list(range(20, 33))})
    w.write({other: [3] * 9})
    w.compare()


def test_what_was_reserved_ahead_counts_as_waste_until_it_is_cut():
    w = world()
    row = start(w, list(range(17)))
    assert w.manager.stats().tokens == 17 and w.manager.stats().waste == pytest.approx(7 / 24)
    assert w.manager.reserve(row, 40)
    assert w.manager.stats().used == 8 and w.manager.stats().waste == pytest.approx(47 / 64)
    w.manager.truncate(row, 16)
    w.rows[row] = w.rows[row][:16]
    assert w.manager.stats().used == 2 and w.manager.stats().waste == 0
    w.compare()


def test_a_step_that_failed_half_way_can_be_taken_back():
    w = world()
    row = start(w, list(range(13)))
    part = w.manager.caches[0].parts[0]
    part.write(tuple(torch.zeros(3, *shape) for _, shape in KV), SeqInfo((3,), starts=(13,), ids=(row,)))
    with pytest.raises(CacheError, match=r"its layers have seen \[13, 16\] tokens"):
        w.manager.fork(row)
    w.manager.truncate(row, 13)
    w.compare()


# ---- moving -----------------------------------------------------------------------------------------------------------------


def test_a_swapped_row_comes_back_bit_for_bit():
    for name in MODELS:
        w = world(MODELS[name], pages=60, swap_bytes=30_000)
        row = start(w, w.new_tokens(43))
        used = w.manager.stats().used
        handle = w.manager.swap_out(row)
        assert handle.length == 43 and w.manager.stats().swap_bytes == handle.nbytes > 0 and w.manager.stats().swapped == 1
        assert w.manager.stats().used == 0
        tokens = w.rows.pop(row)
        other = start(w, w.new_tokens(17))
        back = w.manager.swap_in(handle)
        w.rows[back], w.salts[back] = tokens, ""
        end(w, other)
        w.compare()
        assert w.manager.stats().used == used and w.manager.stats().swap_bytes == 0
        with pytest.raises(CacheError, match="once"):
            w.manager.swap_in(handle)
        w.finish()


def test_swapping_stays_within_its_bytes_and_waits_for_pages():
    w = world(pages=6, swap_bytes=2 * 2 * PAGE * 11 * 4)
    row = start(w, list(range(17)))
    assert w.manager.swap_out(row) is None and w.manager.length(row) == 17
    w.manager.truncate(row, 16)
    handle = w.manager.swap_out(row)
    w.rows.pop(row)
    assert handle.nbytes == 2 * 2 * PAGE * 11 * 4 == w.manager.stats().swap_bytes
    other = start(w, list(range(35)))
    assert w.manager.swap_in(handle) is None
    end(w, other, keep=False)
    assert w.manager.swap_in(handle) is not None
    assert world(swap_bytes=0).manager.stats().swap_bytes == 0


def test_defragmented_rows_read_views():
    w = world(MODELS["mixed"], pages=90)
    rows = [start(w, list(range(100 * i, 100 * i + 5))) for i in range(3)]
    for t in range(7):
        w.write({row: [t] * 4 for row in rows})
    parts = [cache.parts[0] for cache in w.manager.caches]

    def views() -> int:
        inside = {t.untyped_storage().data_ptr() for part in parts for t in part.store.tensors}
        return sum(p.read(r, (20, 40)).tensors[0].untyped_storage().data_ptr() in inside for p in parts for r in rows)

    before = views()
    assert w.manager.defragment() > 0 and before < views() == 15 and w.manager.defragment() == 0
    w.compare()


def test_a_pool_grows_and_shrinks_under_its_rows():
    w = world(pages=9)
    end(w, start(w, list(range(30))))
    row = start(w, list(range(100, 140)))
    w.manager.resize(31)
    assert w.manager.stats().total == 31 and w.manager.match(list(range(30))) == 24
    w.compare()
    w.manager.resize(6)
    assert w.manager.stats().total == 6 and w.manager.match(list(range(30))) == 8  # one page is left for it
    w.compare()
    with pytest.raises(CacheError, match="the rows hold 5"):
        w.manager.resize(4)
    end(w, row)
    w.finish()


# ---- refusals ---------------------------------------------------------------------------------------------------------------


def test_parts_leave_rows_to_the_manager():
    m = CacheManager([(FULL,)], rows=2, pages=3)
    for act in (
        lambda c: c.truncate({0: 0}),
        lambda c: c.reorder([0, 1]),
        lambda c: c.fork(0, 1),
        lambda c: c.reset([0]),
        lambda c: c.load(c.save()),
    ):
        with pytest.raises(UnsupportedError, match="belong to a CacheManager"):
            act(m.caches[0])


def test_nonsense_is_refused():
    for options in ({"rows": 0}, {"pages": -1}, {"swap_bytes": -1}, {"rollback": -1}, {"page_size": 7}, {"kv_dtype": "int4"}):
        with pytest.raises(OptionError):
            CacheManager([(FULL,)], **({"rows": 2, "pages": 3} | options))
    with pytest.raises(OptionError):
        CacheManager([], rows=1, pages=1)
    with pytest.raises(OptionError, match="8 bits"):
        CacheManager([(STATE,)], rows=1, pages=1, kv_dtype="int8")
    with pytest.raises(OptionError, match="no part of kind"):
        CacheManager([(PartSpec("kvv", KV),)], rows=1, pages=1)
    w = world([(STATE,), (WINDOW,)])
    row = start(w, list(range(30)))
    for act in (
        lambda m: m.truncate(row, 29),
        lambda m: m.truncate(row, 31),
        lambda m: m.release(row, None, "other"),
        lambda m: m.release(2, None),
        lambda m: m.reserve(2, 1),
        lambda m: m.commit(2, [1]),
    ):
        with pytest.raises((CacheError, UnsupportedError)):
            act(w.manager)
        w.compare()
