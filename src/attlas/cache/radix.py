"""Which beginnings of sequences lie in the cache: a radix tree over token ids, page by page, apart for each salt."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from attlas.cache.tables import NO_PAGE, real

PageKey = tuple[int, ...]


@dataclass(frozen=True)
class Retention:
    """Which pages of a prefix of n pages a group needs, to go on behind it: the first `front` and the last `trailing` (None =
    all)."""

    trailing: int | None = None
    front: int = 0

    def needs(self, block: int, blocks: int) -> bool:
        return self.trailing is None or block < self.front or block >= blocks - self.trailing


@dataclass(eq=False, slots=True)
class Node:
    """The tokens of an edge, and where each group keeps them: pages[group][i], -1 = not any more. `locks` counts the rows that
    stand at this node or below it."""

    parent: Node | None
    tokens: list[int]
    pages: list[list[int]]
    locks: int = 0
    used: int = 0  # clock of the last visit
    queued: bool = False  # it has an entry in the heap of leaves
    salt: str = ""  # of a root
    children: dict[PageKey, Node] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return len(self.pages[0])


@dataclass(frozen=True)
class Match:
    """The longest held beginning: `path` lists the nodes from the root and how many pages of each; `blocks` is the sum."""

    path: tuple[tuple[Node, int], ...]
    blocks: int

    def pages(self, group: int) -> list[int]:
        return [page for node, n in self.path for page in node.pages[group][:n]]


NOTHING = Match((), 0)


@dataclass(frozen=True)
class Insertion:
    """`node` ends with the inserted tokens; `taken` are pages that the tree refers to from now on; held[group][i] is the tree's
    page for each inserted page, which differs from the given one where the tree had it already."""

    node: Node
    taken: list[int]
    held: list[list[int]]


@dataclass(frozen=True)
class NodeView:
    """A node for a picture: depth 0 = below the root; `pages` held in each group; `age` in visits to the tree since its last."""

    salt: str
    depth: int
    tokens: tuple[int, ...]
    pages: tuple[int, ...]
    locks: int
    age: int


class PrefixTree:
    """Radix tree with page-aligned edges: children of a node differ in their first page of tokens. Two salts share nothing.

    retentions  one for each group of layers: what `match` asks of a group's pages
    The tree counts no references: `insert` says which pages it took, `evict` and `trim` which it gave up. A locked node is
    never removed, nor is a node above it. Cost of a match or an insertion: the tokens compared, page by page.
    Source: RadixAttention, Zheng et al. 2023, arXiv 2312.07104.
    """

    def __init__(self, page_size: int, retentions: Sequence[Retention]) -> None:
        self.page_size, self.retentions = page_size, tuple(retentions)
        self.queries = self.hits = 0  # tokens asked for at admissions, and tokens found
        self._roots: dict[str, Node] = {}
        self._clock = count(1)
        self._now = 0
        self._serial = count()
        self._leaves: list[tuple[int, int, Node]] = []

    # ---- finding ------------------------------------------------------------------------------------------------------------

    def match(self, tokens: Sequence[int], salt: str = "") -> Match:
        """The longest beginning, in whole pages, behind which every group can go on. Changes nothing."""
        root = self._roots.get(salt)
        if root is None or tuple(tokens[: self.page_size]) not in root.children:
            return NOTHING  # asked for each waiting request in each step, and often all there is to say
        path = self._find(root, list(tokens))
        blocks = self._usable(path, sum(n for _, n in path))
        kept, left = [], blocks
        for node, n in path:
            if left > 0:
                kept.append((node, min(n, left)))
            left -= n
        return Match(tuple(kept), blocks)

    def _find(self, node: Node | None, tokens: list[int]) -> list[tuple[Node, int]]:
        path: list[tuple[Node, int]] = []
        size, at = self.page_size, 0
        while node is not None and at + size <= len(tokens):
            node = node.children.get(tuple(tokens[at : at + size]))
            if node is not None:
                shared = self._shared(node, tokens, at)
                path.append((node, shared))
                at += shared * size
                if shared < node.blocks:
                    break
        return path

    def _shared(self, node: Node, tokens: list[int], at: int) -> int:
        """Whole pages that the node's tokens have in common with tokens[at:]; the first is known to agree."""
        size, n = self.page_size, 1
        if node.tokens == tokens[at : at + len(node.tokens)]:
            return node.blocks
        while node.tokens[n * size : (n + 1) * size] == tokens[at + n * size : at + (n + 1) * size]:
            n += 1
        return n

    def _usable(self, path: list[tuple[Node, int]], blocks: int) -> int:
        """The longest prefix of which every group has the pages that it needs."""
        bounded = [(g, rule, rule.trailing) for g, rule in enumerate(self.retentions) if rule.trailing is not None]
        absent = {g: [i for i, page in enumerate(Match(tuple(path), blocks).pages(g)) if page == NO_PAGE] for g, _, _ in bounded}
        longest = -1
        while longest != blocks:  # what one group makes shorter, another may make shorter still
            longest = blocks
            for group, rule, trailing in bounded:
                gaps = absent[group]
                while gaps and gaps[-1] >= blocks:
                    gaps.pop()
                if gaps and gaps[0] < rule.front:
                    blocks = min(blocks, gaps[0])
                elif gaps and gaps[-1] >= blocks - trailing:
                    blocks = gaps[-1]
        return blocks

    def claim(self, match: Match, salt: str = "") -> Node:
        """Lock the end of a match (the salt's root when it is empty), splitting an edge there, and note the visit."""
        node = self._roots.setdefault(salt, Node(None, [], [[] for _ in self.retentions], salt=salt))
        if match.path:
            node, n = match.path[-1]
            if n < node.blocks:
                node = self._split(node, n)
        self._visit(node)
        self.lock(node)
        return node

    def _visit(self, node: Node | None) -> None:
        self._now = next(self._clock)
        while node is not None:
            node.used, node = self._now, node.parent

    # ---- growing ------------------------------------------------------------------------------------------------------------

    def insert(self, below: Node, tokens: Sequence[int], pages: Sequence[Sequence[int]]) -> Insertion:
        """Put whole pages of tokens behind `below`, which the caller has locked, pages[group][i] for each (-1 = none). Where the
        tree has them it keeps its own, and fills those that it lacks."""
        own, rest = [list(p) for p in pages], list(tokens)
        assert all(len(p) * self.page_size == len(rest) for p in own), "whole pages, one for each group"
        taken: list[int] = []
        held: list[list[int]] = [[] for _ in own]
        node, at = below, 0
        for child, n in self._find(below, rest):
            node = child if n == child.blocks else self._split(child, n)
            for group, mine in enumerate(own):
                theirs = node.pages[group]
                for i in range(n):
                    if theirs[i] == NO_PAGE != mine[at + i]:
                        theirs[i] = mine[at + i]
                        taken.append(theirs[i])
                held[group] += theirs
            at += n
        if at < len(own[0]):
            fresh = [p[at:] for p in own]
            node = self._append(node, rest[at * self.page_size :], fresh, grow=node is below)
            for group, new in enumerate(fresh):
                held[group] += new
                taken += real(new)
        self._visit(node)
        return Insertion(node, taken, held)

    def _append(self, node: Node, tokens: list[int], pages: list[list[int]], grow: bool) -> Node:
        """New pages behind a node: into its own edge where nobody but the caller stands at it, else as a child."""
        if grow and node.parent is not None and node.locks == 1 and not node.children:
            node.tokens += tokens
            for mine, new in zip(node.pages, pages, strict=True):
                mine += new
            return node
        child = Node(node, tokens, [list(p) for p in pages])
        node.children[self._key(tokens)] = child
        self._queue(child)
        return child

    def _key(self, tokens: list[int]) -> PageKey:
        return tuple(tokens[: self.page_size])

    def _split(self, node: Node, n: int) -> Node:
        """Cut an edge behind its n-th page; returns the new node above. The old node keeps the end, and those who stand there."""
        assert 0 < n < node.blocks and node.parent is not None
        cut = n * self.page_size
        upper = Node(node.parent, node.tokens[:cut], [p[:n] for p in node.pages], node.locks, node.used)
        node.parent.children[self._key(upper.tokens)] = upper
        node.parent, node.tokens, node.pages = upper, node.tokens[cut:], [p[n:] for p in node.pages]
        upper.children[self._key(node.tokens)] = node
        return upper

    # ---- locks --------------------------------------------------------------------------------------------------------------

    def lock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None:
            at.locks += 1
            at = at.parent

    def unlock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None:
            assert at.locks > 0, "unlocked more often than locked"
            at.locks -= 1
            if not at.locks:
                self._queue(at)
            at = at.parent

    def above(self, node: Node, blocks: int) -> Node:
        """The node that ends `blocks` pages before the end of `node`; an edge is split there."""
        while blocks and blocks >= node.blocks:
            blocks -= node.blocks
            assert node.parent is not None, "above the root"
            node = node.parent
        return self._split(node, node.blocks - blocks) if blocks else node

    # ---- giving up ----------------------------------------------------------------------------------------------------------

    def _queue(self, node: Node) -> None:
        """Make a leaf that nobody has locked a candidate for eviction; an empty root goes at once."""
        if node.locks or node.children:
            return
        if node.parent is None:
            del self._roots[node.salt]
        elif not node.queued:
            node.queued = True
            heapq.heappush(self._leaves, (node.used, next(self._serial), node))

    def evict(self, pages: int) -> list[int]:
        """Give up the end of the leaf that nobody has locked and that was visited longest ago: at least `pages` pages, or all
        of it. Returns them; [] when there is no such leaf."""
        gone: list[int] = []
        while self._leaves and not gone:
            used, _, node = heapq.heappop(self._leaves)
            node.queued = False
            if node.used != used:
                self._queue(node)
            elif not node.locks and not node.children:
                gone = self._shorten(node, pages)
        return gone

    def _shorten(self, node: Node, pages: int) -> list[int]:
        """Take pages off the end of a leaf until there are enough; without any left it goes, and its parent may be a leaf."""
        gone: list[int] = []
        key, parent = self._key(node.tokens), node.parent
        assert parent is not None
        while node.blocks and len(gone) < pages:
            gone += real(p.pop() for p in node.pages)
            del node.tokens[-self.page_size :]
        if not node.blocks:
            del parent.children[key]
        self._queue(node if node.blocks else parent)
        return gone

    def trim(self, pages: int, idle: Callable[[int], bool]) -> list[int]:
        """Give up at least `pages` pages, as far as there are, that are idle and belong to groups which need only the last ones,
        also of locked nodes; the nodes visited longest ago first. Shortens later matches, breaks nobody."""
        gone: list[int] = []
        bounded = [group for group, rule in enumerate(self.retentions) if rule.trailing is not None]
        for node in sorted((node for _, _, node in self._nodes()), key=lambda n: n.used) if bounded else ():
            for group in bounded:
                for i, page in enumerate(node.pages[group]):
                    if len(gone) >= pages:
                        return gone
                    if page != NO_PAGE and idle(page):
                        node.pages[group][i] = NO_PAGE
                        gone.append(page)
        return gone

    # ---- looking at it ------------------------------------------------------------------------------------------------------

    def _nodes(self) -> Iterator[tuple[str, int, Node]]:
        """(salt, depth, node) without the roots, parents before children."""
        stack = [(salt, -1, root) for salt, root in self._roots.items()]
        while stack:
            salt, depth, node = stack.pop()
            if node.parent is not None:
                yield salt, depth, node
            stack += [(salt, depth + 1, child) for child in node.children.values()]

    def nodes(self) -> list[Node]:
        """Roots included."""
        return [*self._roots.values(), *(node for _, _, node in self._nodes())]

    def walk(self) -> Iterator[NodeView]:
        """Every node, parents before children."""
        for salt, depth, node in self._nodes():
            held = tuple(len(real(p)) for p in node.pages)
            yield NodeView(salt, depth, tuple(node.tokens), held, node.locks, self._now - node.used)

    def pages(self) -> list[int]:
        """Every page that the tree refers to."""
        return [page for _, _, node in self._nodes() for pages in node.pages for page in real(pages)]

    def rename(self, moved: dict[int, int]) -> None:
        """Page p is called moved.get(p, p) from now on."""
        for _, _, node in self._nodes():
            node.pages = [[moved.get(page, page) for page in pages] for pages in node.pages]

    def check(self) -> None:
        """Assert what must hold between calls."""
        pages = self.pages()
        assert len(set(pages)) == len(pages), "a page lies twice in the tree"
        full = [group for group, rule in enumerate(self.retentions) if rule.trailing is None]
        for root in self._roots.values():
            assert root.parent is None and not root.tokens and (root.children or root.locks), "an empty root"
            assert root.locks >= sum(child.locks for child in root.children.values())
        for salt, _, node in self._nodes():
            assert node.blocks and all(len(p) * self.page_size == len(node.tokens) for p in node.pages), f"{salt!r}: edge"
            assert not any(NO_PAGE in node.pages[group] for group in full), "a group that needs all pages lacks one"
            assert node.parent is not None and node.parent.children[self._key(node.tokens)] is node, "lost child"
            assert node.locks >= sum(child.locks for child in node.children.values()), "a locked node below an unlocked one"
            assert node.queued or node.locks or node.children, "a leaf that eviction does not know of"
            assert node.parent.used >= node.used, "visited later than its parent"
