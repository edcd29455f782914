"""The prefix tree: matches, splits, locks, salts, eviction; against a plain dict of prefixes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from attlas.cache import PrefixTree, Retention
from attlas.cache.radix import Node

SIZE = 3
GONE = -1


def tree(*retentions: Retention) -> PrefixTree:
    return PrefixTree(SIZE, retentions or (Retention(),))


def put(t: PrefixTree, tokens: str, pages: list[int], salt: str = "", *more: list[int]) -> Node:
    """Insert and leave unlocked; tokens are letters."""
    root = t.claim(t.match((), salt), salt)
    done = t.insert(root, [ord(c) for c in tokens], [pages, *more])
    t.unlock(root)
    t.check()
    return done.node


def match(t: PrefixTree, tokens: str, salt: str = "", group: int = 0) -> list[int]:
    return t.match([ord(c) for c in tokens], salt).pages(group)


def edges(t: PrefixTree) -> list[tuple[int, str]]:
    return sorted((n.depth, "".join(map(chr, n.tokens))) for n in t.walk())


def test_whole_pages_match_and_a_rest_does_not():
    t = tree()
    put(t, "abcdefghi", [7, 5, 2])
    assert match(t, "abcdefghi") == [7, 5, 2] == match(t, "abcdefghixyz")
    assert match(t, "abcdefgh") == [7, 5] == match(t, "abcdefxhi")
    assert match(t, "abcde") == [7] and match(t, "ab") == match(t, "xbcdef") == match(t, "") == []
    assert edges(t) == [(0, "abcdefghi")]


def test_a_branch_splits_an_edge_between_pages():
    t = tree()
    put(t, "abcdefghi", [7, 5, 2])
    put(t, "abcdefxyz", [70, 50, 20])
    assert edges(t) == [(0, "abcdef"), (1, "ghi"), (1, "xyz")]
    assert match(t, "abcdefxyz") == [7, 5, 20] and match(t, "abcdefghi") == [7, 5, 2]


def test_an_insertion_says_what_it_took_and_what_was_there():
    t = tree()
    root = t.claim(t.match(()))
    t.insert(root, list(b"abcdefghi"), [[7, 5, 2]])
    again = t.insert(root, list(b"abcdefxyz"), [[70, 50, 20]])
    assert again.taken == [20] and again.held == [[7, 5, 20]] and again.node.tokens == list(b"xyz")
    same = t.insert(root, list(b"abcdef"), [[71, 51]])
    assert same.taken == [] and same.held == [[7, 5]] and same.node.tokens == list(b"abcdef")


def test_a_row_that_goes_on_lengthens_its_own_edge():
    t = tree()
    root = t.claim(t.match(()))
    node = t.insert(root, list(b"abcdef"), [[1, 2]]).node
    t.lock(node)
    t.unlock(root)
    assert t.insert(node, list(b"ghi"), [[3]]).node is node and edges(t) == [(0, "abcdefghi")]
    t.lock(node)  # another row stands there too: from now on its end must stay where it is
    below = t.insert(node, list(b"jkl"), [[4]]).node
    assert below is not node and edges(t) == [(0, "abcdefghi"), (1, "jkl")]
    t.check()


def test_salts_share_nothing():
    t = tree()
    put(t, "abcdef", [1, 2], "tenant")
    assert match(t, "abcdef") == match(t, "abcdef", "other") == [] and match(t, "abcdef", "tenant") == [1, 2]
    put(t, "abcdef", [3, 4], "other")
    assert match(t, "abcdef", "other") == [3, 4] and sorted({n.salt for n in t.walk()}) == ["other", "tenant"]
    assert sorted(t.evict(9) + t.evict(9)) == [1, 2, 3, 4] and not t.nodes()  # empty salts leave nothing behind


def test_eviction_takes_the_end_of_the_leaf_that_was_visited_longest_ago():
    t = tree()
    put(t, "abcdef", [1, 2])
    put(t, "abcxyz", [1, 3])
    put(t, "mnopqr", [4, 5])
    t.unlock(t.claim(t.match(list(b"abcdef"))))  # a visit
    assert t.evict(1) == [3] and t.evict(1) == [5] and t.evict(1) == [4] and t.evict(9) == [2]
    assert match(t, "abcdef") == [1] and t.evict(5) == [1] and t.evict(1) == [] and not t.nodes()
    t.check()


def test_what_is_locked_and_what_lies_above_it_stays():
    t = tree()
    put(t, "abcdefghi", [1, 2, 3])
    node = t.claim(t.match(list(b"abcdef")))
    assert edges(t) == [(0, "abcdef"), (1, "ghi")]
    assert t.evict(9) == [3] and t.evict(9) == []
    t.lock(node)
    t.unlock(node)
    assert t.evict(9) == []
    t.unlock(node)
    t.lock(node)  # it waits for its eviction already
    assert t.evict(9) == []
    t.unlock(node)
    assert t.evict(9) == [2, 1]


def test_a_locked_edge_that_splits_is_locked_on_both_sides():
    t = tree()
    put(t, "abcdefghi", [1, 2, 3])
    node = t.claim(t.match(list(b"abcdefghi")))
    put(t, "abcxyz", [1, 4])
    assert t.evict(9) == [4] and t.evict(9) == []
    upper = t.above(node, 1)
    t.lock(upper)
    t.unlock(node)
    t.check()
    assert t.evict(9) == [3] and match(t, "abcdefghi") == [1, 2]


def test_a_window_needs_the_last_pages_and_the_sinks():
    t = tree(Retention(), Retention(2, 1))
    put(t, "abcdefghijklmno", [1, 2, 3, 4, 5], "", [11, GONE, 13, 14, GONE])
    assert match(t, "abcdefghijklmno") == [1, 2, 3, 4] and match(t, "abcdefghijklmno", group=1) == [11, GONE, 13, 14]
    assert match(t, "abcdefghi") == [1]  # page 1 is missing for a prefix of three pages and for one of two
    put(t, "abcdefghijklmno", [1, 2, 3, 4, 5], "", [99, 12, 99, 99, 15])  # fills what was missing, keeps the rest
    assert match(t, "abcdefghijklmno", group=1) == [11, 12, 13, 14, 15]
    no_sink = tree(Retention(2, 1))
    put(no_sink, "abcdefghi", [GONE, 2, 3])
    assert match(no_sink, "abcdefghi") == []


def test_what_one_group_shortens_another_may_shorten_again():
    t = tree(Retention(1), Retention(2))
    put(t, "abcdefghijkl", [1, 2, 3, GONE], "", [11, GONE, GONE, 14])
    # four pages: group 0 lacks page 3; three and two: group 1 lacks page 2 or 1; one page is whole in both
    assert match(t, "abcdefghijkl") == [1]


def test_trimming_leaves_holes_where_nobody_looks():
    t = tree(Retention(), Retention(1))
    put(t, "abcdefghi", [1, 2, 3], "", [11, 12, 13])
    node = t.claim(t.match(list(b"abcdefghi")))
    assert t.evict(9) == [] and t.trim(1, lambda page: page != 11) == [12] and t.trim(9, lambda page: page == 13) == [13]
    assert match(t, "abcdefghi") == [1] and t.trim(9, lambda page: False) == []
    t.unlock(node)
    assert sorted(t.evict(9)) == [1, 2, 3, 11]


def test_a_picture_shows_every_node():
    t = tree(Retention(), Retention(1))
    put(t, "abcdefghi", [1, 2, 3], "s", [GONE, GONE, 13])
    put(t, "abcxyz", [1, 4], "s", [GONE, 14])
    node = t.claim(t.match(list(b"abcxyz"), "s"), "s")
    seen = {"".join(map(chr, n.tokens)): n for n in t.walk()}
    assert {k: (n.salt, n.depth, n.pages, n.locks) for k, n in seen.items()} == {
        "abc": ("s", 0, (1, 0), 1),
        "defghi": ("s", 1, (2, 1), 0),
        "xyz": ("s", 1, (1, 1), 1),
    }
    assert seen["xyz"].age == seen["abc"].age == 0 < seen["defghi"].age
    t.unlock(node)
    with pytest.raises(AssertionError, match="more often"):
        t.unlock(node)


class TreeMachine(RuleBasedStateMachine):
    """The tree beside a dict from (salt, tokens of whole pages) to the last page of that prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.tree, self.model = tree(), dict[tuple[str, tuple[int, ...]], int]()
        self.fresh = itertools.count()
        self.rows: list[tuple[str, tuple[int, ...], Node]] = []

    salts = st.sampled_from(["", "x"])
    pages = st.lists(st.sampled_from([(1, 1, 1), (1, 2, 1), (2, 1, 1)]), min_size=0, max_size=5)

    def longest(self, salt: str, tokens: tuple[int, ...]) -> list[int]:
        found = []
        for end in range(SIZE, len(tokens) + 1, SIZE):
            if (salt, tokens[:end]) not in self.model:
                break
            found.append(self.model[salt, tokens[:end]])
        return found

    @rule(salt=salts, pages=pages, rest=st.integers(0, SIZE - 1))
    def look(self, salt, pages, rest):
        tokens = tuple(x for p in pages for x in p)
        assert self.tree.match(list(tokens) + [1] * rest, salt).pages(0) == self.longest(salt, tokens)

    @rule(salt=salts, pages=pages)
    def take(self, salt, pages):
        tokens = tuple(x for p in pages for x in p)
        found = self.tree.match(tokens, salt)
        self.rows.append((salt, tokens[: found.blocks * SIZE], self.tree.claim(found, salt)))

    @rule(data=st.data(), pages=pages)
    def go_on(self, data, pages):
        if not self.rows or not pages:
            return
        at = data.draw(st.integers(0, len(self.rows) - 1))
        salt, tokens, node = self.rows[at]
        more = tuple(x for p in pages for x in p)
        own = [next(self.fresh) for _ in pages]
        done = self.tree.insert(node, more, [own])
        for i in range(len(pages)):
            page = self.model.setdefault((salt, tokens + more[: (i + 1) * SIZE]), own[i])
            assert done.held[0][i] == page and (page in done.taken) == (page == own[i])
        self.tree.lock(done.node)
        self.tree.unlock(node)
        self.rows[at] = salt, tokens + more, done.node

    @rule(data=st.data())
    def go_back(self, data):
        if self.rows:
            at = data.draw(st.integers(0, len(self.rows) - 1))
            salt, tokens, node = self.rows[at]
            blocks = data.draw(st.integers(0, len(tokens) // SIZE))
            upper = self.tree.above(node, blocks)
            self.tree.lock(upper)
            self.tree.unlock(node)
            self.rows[at] = salt, tokens[: len(tokens) - blocks * SIZE], upper

    @rule(data=st.data())
    def leave(self, data):
        if self.rows:
            self.tree.unlock(self.rows.pop(data.draw(st.integers(0, len(self.rows) - 1)))[2])

    @rule(count=st.integers(1, 7))
    def evict(self, count):
        gone = self.tree.evict(count)
        lost = {key for key, page in self.model.items() if page in gone}
        assert len(lost) == len(gone) <= count and (gone or not self.evictable())
        assert lost <= self.evictable()
        for key in lost:
            del self.model[key]
        for salt, tokens in self.model:  # what is left has all that comes before it
            assert len(tokens) == SIZE or (salt, tokens[:-SIZE]) in self.model

    def evictable(self) -> set[tuple[str, tuple[int, ...]]]:
        locked = {(salt, tokens[:end]) for salt, tokens, _ in self.rows for end in range(SIZE, len(tokens) + 1, SIZE)}
        return self.model.keys() - locked

    @invariant()
    def agrees(self):
        self.tree.check()
        assert sorted(self.tree.pages()) == sorted(self.model.values())
        assert sum(root.locks for root in self.tree.nodes() if root.parent is None) == len(self.rows)


TestTreeMachine = TreeMachine.TestCase
TestTreeMachine.settings = settings(max_examples=60, stateful_step_count=40)
