"""The accounts of a cache manager, counted again from the tables and the prefix tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from attlas.cache.groups import Group
from attlas.cache.ledger import RowLedger
from attlas.cache.radix import Node, PrefixTree
from attlas.cache.tables import NO_PAGE, real

Stand = tuple[str, Node | None, int]  # salt, node, blocks of a taken row


def audit(ledger: RowLedger, tree: PrefixTree, groups: Sequence[Group], rows: Mapping[int, Stand]) -> None:
    """Assert that the ledger, the tree, the tables and the rows' locks agree."""
    ledger.check()
    tree.check()
    for group in groups:
        group.check(group.parts[-1].lengths)
    _check_references(ledger, tree, groups)
    _check_locks(tree, groups, rows)


def _check_references(ledger: RowLedger, tree: PrefixTree, groups: Sequence[Group]) -> None:
    holders: Counter[int] = Counter()
    owners: dict[int, int] = {}
    for number, group in enumerate(groups):
        pages = [page for table in group.tables.pages for page in real(table)]
        holders.update(pages)
        aside = [page for row in group.aside for page in row.values()]
        for page in [*pages, *aside]:
            assert owners.setdefault(page, number) == number, f"page {page} belongs to two groups"
    references = holders + Counter(tree.pages())
    references.update(page for group in groups for row in group.aside for page in row.values())
    for page in range(ledger.total):
        assert ledger.holders(page) == holders[page], f"page {page}: {ledger.holders(page)} rows counted, {holders[page]} found"
        assert ledger.references(page) == references[page], f"page {page}: references"


def _check_locks(tree: PrefixTree, groups: Sequence[Group], rows: Mapping[int, Stand]) -> None:
    locks: Counter[int] = Counter()
    for row, (salt, node, blocks) in rows.items():
        path: list[Node] = []
        while node is not None:
            locks[id(node)] += 1
            path.insert(0, node)
            node = node.parent
        if not path:
            continue
        assert path[0].salt == salt and sum(n.blocks for n in path) == blocks, f"row {row} stands at another place of the tree"
        for number, group in enumerate(groups):
            theirs = [page for n in path for page in n.pages[number]]
            mine = group.tables.pages[row][:blocks]
            assert group.committed[row] == blocks
            assert all(a in (NO_PAGE, b) for a, b in zip(mine, theirs, strict=True)), f"row {row} has committed other pages"
    for node in tree.nodes():
        assert node.locks == locks[id(node)], "a lock that no row has"
