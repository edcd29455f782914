"""The cache of a serving engine: rows over one pool of pages for all layers, with shared prefixes, swapping and resizing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from attlas.cache.audit import audit
from attlas.cache.groups import Group, GroupedLayerPart
from attlas.cache.lanes import lay_out
from attlas.cache.layer import Cache
from attlas.cache.part import CacheError, Part, PartSpec
from attlas.cache.radix import Node, NodeView
from attlas.cache.records import Admission, CacheStats, SwapHandle
from attlas.cache.space import PageSpace
from attlas.cache.store import KvDtype, make_store
from attlas.cache.swap import SwappedRow, SwapSpace, put_row, row_tensors, to_host
from attlas.errors import OptionError

__all__ = ["Admission", "CacheManager", "CacheStats", "SwapHandle"]


@dataclass(slots=True)
class TakenRow:
    """A row in use: where it stands in the prefix tree, and how many of its blocks lie there."""

    salt: str
    node: Node | None
    blocks: int


class CacheManager:
    """The caches of all layers of a model, for up to `rows` sequences at a time.

    mixers_specs    what each layer keeps: `[mixer.cache_specs() for mixer in ...]`, in the order of the model's caches
    pages           of page_size tokens, for one group of layers each: layers that keep the same tokens share a block table, and
                    all groups draw on one pool (see `lanes.lay_out`); a model of equal layers has one group, so that its rows
                    hold pages * page_size tokens in all
    dtype, device   of the caches; None = torch's defaults
    prefix_caching  keep the pages of finished sequences, and give them to later ones that start with the same tokens and salt. A
                    model with recurrent states, lookahead keys, or entries that stand for several tokens shares nothing, whatever
                    is said here: what they hold cannot be cut at a page of tokens. `self.prefix_caching` says what it came to
    swap_bytes      host memory for rows that are swapped out
    kv_dtype        "int8" or "fp8": store keys, values and latents in 8 bits (see `QuantisedStore`); None = in `dtype`
    rollback        tokens that windows keep beyond what the next query asks for, so that as many can be truncated between steps

    `caches` goes to `Transformer.forward(cache=...)`; a row is one sequence, SeqInfo.ids names the rows of a step. A step is:
    `reserve` each row, run the model, `commit` the rows. A layer that writes more than has been reserved takes what it needs,
    or raises OutOfPagesError. Everything else is done between steps. A row of the manager is the same row in every layer; the
    parts refuse to be forked, truncated or reset one by one. Layers that attend to an encoder's memory are not served.

    A page is free, held by rows, or cached: known to the prefix tree alone, and given up when pages run short, those visited
    longest ago first. Windows return what lies behind them at the end of a step (with prefix caching it is cached first).
    Source: PagedAttention, Kwon et al. 2023, arXiv 2309.06180; RadixAttention, Zheng et al. 2023, arXiv 2312.07104.
    """

    caches: list[Cache]

    def __init__(
        self,
        mixers_specs: Sequence[tuple[PartSpec, ...]],
        *,
        rows: int,
        pages: int,
        page_size: int = 16,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        prefix_caching: bool = True,
        swap_bytes: int = 0,
        kv_dtype: KvDtype | None = None,
        rollback: int = 0,
    ) -> None:
        call = f"CacheManager(rows={rows}, pages={pages}, swap_bytes={swap_bytes}, kv_dtype={kv_dtype!r}, rollback={rollback})"
        if rows < 1 or min(pages, swap_bytes, rollback) < 0 or not mixers_specs:
            raise OptionError(f"{call}: wanted at least one row and one layer, and nothing negative")
        where, wide = torch.empty(0, device=device).device, dtype or torch.get_default_dtype()
        self.rows, self.page_size = rows, page_size
        self._space = PageSpace(pages)
        layout = lay_out(
            mixers_specs,
            rows,
            dtype,
            where,
            lambda dealt: Group(dealt, rows, page_size, self._space, where),
            lambda spec: make_store(spec, pages, page_size, spec.dtype or wide, where, kv_dtype),
        )
        self.caches, self._groups, self._stores, self._own = layout.caches, layout.groups, layout.stores, layout.own
        if kv_dtype is not None and not self._groups:
            raise OptionError(f"{call}: these layers keep no tokens that could be stored in 8 bits")
        self._parts: list[Part] = [part for cache in self.caches for part in cache.parts]
        self._grouped = [part for part in self._parts if isinstance(part, GroupedLayerPart)]
        # Layers that share a table can truncate when the last of them can: it has seen the fewest tokens.
        last = [group.last for group in self._groups if group.last is not None and group.tokens_per_entry == 1]
        self._checked: list[Part] = [*last, *self._own, *self._grouped]
        self.prefix_caching = prefix_caching and bool(self._groups) and not (self._own or self._grouped)
        for group in self._groups:
            group.rollback, group.sharing = rollback, self.prefix_caching
        self._space.fill(self._groups, self._stores, page_size)
        self._tree, self._ledger = self._space.tree, self._space.ledger
        self._swap = SwapSpace(swap_bytes)
        self._taken: dict[int, TakenRow] = {}
        self._free_rows = list(range(rows))[::-1]

    def __repr__(self) -> str:
        pages = f"pages={self._ledger.total}, free={self._ledger.free}, cached={self._ledger.cached}"
        return f"CacheManager(layers={len(self.caches)}, groups={len(self._groups)}, rows={self.rows}, {pages})"

    # ---- rows come ----------------------------------------------------------------------------------------------------------

    def match(self, tokens: Sequence[int], salt: str = "") -> int:
        """How many leading tokens are held, in whole pages; at least one token is left to compute. Changes nothing."""
        return self._tree.match(tokens[:-1], salt).blocks * self.page_size if self.prefix_caching else 0

    def admit(self, tokens: Sequence[int], salt: str = "") -> Admission | None:
        """Take a row for a sequence and give it the longest held beginning of its tokens; None when no row is free. The row's
        first tokens to compute are tokens[cached_tokens:]."""
        if not self._free_rows:
            return None
        row, taken = self._free_rows.pop(), TakenRow(salt, None, 0)
        if self.prefix_caching:
            match = self._tree.match(tokens[:-1], salt)
            for number, group in enumerate(self._groups):
                group.attach(row, match.pages(number))
                group.committed[row] = match.blocks
            taken.node, taken.blocks = self._tree.claim(match, salt), match.blocks
            self._stand(row, match.blocks * self.page_size)
            self._tree.queries += len(tokens)
            self._tree.hits += match.blocks * self.page_size
        self._taken[row] = taken
        return Admission(row, taken.blocks * self.page_size)

    def fork(self, row: int) -> int | None:
        """A new row with the same tokens, sharing all pages until one of the two writes; None when no row is free."""
        taken, length = self._row(row, "fork"), self._even_length(row, "fork")
        if not self._free_rows:
            return None
        into = self._free_rows.pop()
        for group in self._groups:
            group.fork(row, into, group.entries(length))
            group.committed[into] = taken.blocks
        for part in self._own:
            part.fork(row, into)
        self._stand(into, length)
        if taken.node is not None:
            self._tree.lock(taken.node)
        self._taken[into] = TakenRow(taken.salt, taken.node, taken.blocks)
        return into

    # ---- pages --------------------------------------------------------------------------------------------------------------

    def length(self, row: int) -> int:
        """Tokens that all layers have seen of a row: those of the last part, which is written last."""
        return self._parts[-1].lengths[row]

    def pages_needed(self, row: int, new_tokens: int) -> int:
        """Pages that `reserve` would take now."""
        self._row(row, "pages_needed")
        return sum(group.pages_needed(row, length, new) for group, length, new in self._step(row, new_tokens))

    def free_pages(self) -> int:
        """Pages that no row holds: free, or cached and given up on demand."""
        return self._space.available

    def reserve(self, row: int, new_tokens: int) -> bool:
        """Make sure that the row has the pages of its next `new_tokens`, giving up cached pages where needed. False = not now;
        then nothing has changed."""
        needed = self.pages_needed(row, new_tokens)
        if needed > self._space.available:
            return False
        if needed:
            self._space.room(needed)
            for group, length, new in self._step(row, new_tokens):
                group.prepare(row, length, new)
        return True

    def _step(self, row: int, new_tokens: int) -> Iterator[tuple[Group, int, int]]:
        """(group, entries held, new entries) of a row that goes on by so many tokens."""
        length = self.length(row)
        for group in self._groups:
            held = group.entries(length)
            yield group, held, group.entries(length + new_tokens) - held

    def commit(self, row: int, tokens: Sequence[int]) -> None:
        """The row's tokens so far (a last one that has not been computed yet may be among them): its full pages can be shared
        from now on. Cheap to repeat: the cost is that of the pages which are new."""
        taken, size = self._row(row, "commit"), self.page_size
        blocks = min(len(tokens), self.length(row)) // size
        if taken.node is None or blocks <= taken.blocks:
            return
        begin = taken.blocks
        own = [group.offered(row, begin, blocks) for group in self._groups]
        done = self._tree.insert(taken.node, tokens[begin * size : blocks * size], own)
        self._ledger.retain(done.taken)
        for group, held in zip(self._groups, done.held, strict=True):
            group.shared(row, begin, held)
        self._move_lock(taken, done.node, blocks)

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens at and after `length` in every layer, and what was reserved ahead. Raises CacheError or
        UnsupportedError (a window or a state that cannot go back so far), and then nothing is changed."""
        taken = self._row(row, "truncate")
        for part in self._checked:
            part.check_truncate({row: length})
        for group in self._groups:
            group.cut(row, group.entries(length))
        for part in self._own:
            part.truncate({row: length})
        self._stand(row, length)
        blocks = min(taken.blocks, length // self.page_size)
        if taken.node is not None and blocks < taken.blocks:
            self._move_lock(taken, self._tree.above(taken.node, taken.blocks - blocks), blocks)

    def release(self, row: int, tokens: Sequence[int] | None, salt: str = "") -> None:
        """Give a row back. tokens (all of them, prompt and output): its full pages stay as long as there is room, for later
        sequences; None: what has not been committed before goes back to the pool. The salt is that of the admission; another
        one is an error."""
        taken = self._row(row, "release")
        if salt not in ("", taken.salt):
            raise CacheError(f"release(row={row}, salt={salt!r}): the row was admitted with another salt")
        if tokens is not None:
            self.commit(row, tokens)
        for group in self._groups:
            group.cut(row, 0)
        for part in self._own:
            part.reset([row])
        self._stand(row, 0)
        if taken.node is not None:
            self._tree.unlock(taken.node)
        del self._taken[row]
        self._free_rows.append(row)

    # ---- host memory --------------------------------------------------------------------------------------------------------

    def swap_out(self, row: int) -> SwapHandle | None:
        """Copy a row to host memory and release it; None when swap_bytes does not suffice (then nothing is changed)."""
        taken, length = self._row(row, "swap_out"), self._even_length(row, "swap_out")
        own = [row_tensors(part, row) for part in self._own]
        nbytes = sum(t.nbytes for tensors in own for t in tensors)
        nbytes += sum(group.nbytes(row, group.entries(length)) for group in self._groups)
        if not self._swap.fits(nbytes):
            return None
        groups = [group.save(row, group.entries(length)) for group in self._groups]
        held = SwappedRow(taken.salt, length, groups, [[to_host(t) for t in tensors] for tensors in own])
        handle = self._swap.add(held, nbytes)
        self.release(row, None)
        return handle

    def swap_in(self, handle: SwapHandle) -> int | None:
        """The row again, in every layer as it was, under a new number; None when no row or too few pages are free."""
        held = self._swap.get(handle)
        needed = sum(saved.pages for saved in held.groups)
        if not self._free_rows or needed > self._space.available:
            return None
        self._space.room(needed)
        row = self._free_rows.pop()
        for group, saved in zip(self._groups, held.groups, strict=True):
            group.restore(row, saved)
        for part, tensors in zip(self._own, held.own, strict=True):
            put_row(part, row, tensors, held.length)
        self._stand(row, held.length)
        node = self._tree.claim(self._tree.match(()), held.salt) if self.prefix_caching else None
        self._taken[row] = TakenRow(held.salt, node, 0)
        self._swap.remove(handle)
        return row

    def discard(self, handle: SwapHandle) -> None:
        """Forget a row in host memory (its request was aborted)."""
        self._swap.remove(handle)

    # ---- the pool as a whole ------------------------------------------------------------------------------------------------

    def resize(self, pages: int) -> None:
        """Have `pages` pages from now on; rows keep their tokens to the bit, cached pages go where they must. Raises CacheError
        when the rows hold more. Cost: the storage is allocated anew and copied, one tensor after the other."""
        self._space.resize(pages)

    def defragment(self) -> int:
        """Give the rows pages that follow each other, so that their reads become views, as far as sharing allows; returns how
        many pages moved. Rows keep their tokens to the bit. Cost: one copy of each page that moves, through as much memory."""
        return self._space.defragment()

    # ---- rows ---------------------------------------------------------------------------------------------------------------

    def _row(self, row: int, verb: str) -> TakenRow:
        if row not in self._taken:
            raise CacheError(f"{verb} row {row} of {self!r}: the row is not taken; taken are {sorted(self._taken)}")
        return self._taken[row]

    def _even_length(self, row: int, verb: str) -> int:
        lengths = {part.lengths[row] for part in self._parts}
        if len(lengths) > 1:
            raise CacheError(f"{verb} row {row} of {self!r}: its layers have seen {sorted(lengths)} tokens; truncate it first")
        return lengths.pop()

    def _stand(self, row: int, length: int) -> None:
        """All layers have now seen `length` tokens of the row (parts without pages count for themselves)."""
        for group in self._groups:
            for part in group.parts:
                part.stand(row, group.entries(length))
        for grouped in self._grouped:
            grouped.stand(row, length)

    def _move_lock(self, taken: TakenRow, node: Node, blocks: int) -> None:
        assert taken.node is not None
        self._tree.lock(node)
        self._tree.unlock(taken.node)
        taken.node, taken.blocks = node, blocks

    # ---- looking at it ------------------------------------------------------------------------------------------------------

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all stores: what one more page costs."""
        return sum(store.page_bytes for store in self._stores)

    def nbytes(self) -> int:
        """Bytes of page memory and states, whether used or not; host memory is not counted."""
        return sum(store.nbytes() for store in self._stores) + sum(part.nbytes() for part in self._own)

    def walk(self) -> Iterator[NodeView]:
        """The nodes of the prefix tree, parents before children."""
        return self._tree.walk()

    def page_map(self) -> list[int]:
        """Of each page: how many rows hold it, 0 = cached, -1 = free."""
        ledger = self._ledger
        return [ledger.holders(page) if ledger.references(page) else -1 for page in range(ledger.total)]

    def stats(self) -> CacheStats:
        ledger, swap = self._ledger, self._swap
        unused: dict[int, int] = {}
        for group in self._groups:
            unused |= group.unused(group.parts[-1].lengths)
        slots, empty = ledger.held * self.page_size, sum(unused.values())
        return CacheStats(
            total=ledger.total, used=ledger.held, cached=ledger.cached, free=ledger.free,
            tokens=slots - empty, waste=empty / slots if slots else 0.0,
            queries=self._tree.queries, hits=self._tree.hits, evictions=self._space.evictions,
            rows=self.rows, free_rows=len(self._free_rows), swapped=len(swap), swap_bytes=swap.used,
        )  # fmt: skip

    def check(self) -> None:
        """Assert that every count, table, lock and length agrees with all others. Cost: everything is counted again."""
        audit(self._ledger, self._tree, self._groups, {row: (t.salt, t.node, t.blocks) for row, t in self._taken.items()})
        assert set(self._free_rows).isdisjoint(self._taken) and len(self._free_rows) + len(self._taken) == self.rows
        assert all(len(t) == self._ledger.total for store in self._stores for t in store.tensors), "a store of another size"
        for part in self._parts:
            assert all(part.lengths[row] == 0 for row in self._free_rows), "a free row holds tokens"
            assert all(part.lengths[row] == self.length(row) for row in self._taken), "layers disagree about a length"
        stats = self.stats()
        assert stats.free + stats.used + stats.cached == stats.total and 0 <= stats.waste <= 1
