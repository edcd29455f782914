"""A cache manager beside a plain model of it: rows are lists of tokens, and what a token stores is a number made from all tokens
up to it, so that a page in the wrong place shows."""

from __future__ import annotations

import random

import torch

from attlas.cache import CacheError, CacheManager, PartSpec, StatePart
from attlas.cache.lookahead import LookaheadPart
from attlas.errors import UnsupportedError
from attlas.shapes import SeqInfo

PAGE = 8
KV = (("k", (2, 3)), ("v", (5,)))
FULL, WINDOW, SINKS = PartSpec("kv", KV), PartSpec("kv", KV, 11), PartSpec("kv", KV, 19, 3)
NARROW = PartSpec("kv", KV, 1)
LATENT, STATE = PartSpec("latent", (("c", (1, 7)),)), PartSpec("state", (("s", (2, 3)),), dtype=torch.float64)
TRIPLES = PartSpec("kv", KV, group=3)
LOOKAHEAD = PartSpec("lookahead", (("z", (3,)),))

MODELS: dict[str, list[tuple[PartSpec, ...]]] = {
    "full": [(FULL,), (FULL,)],
    "latent": [(LATENT,)] * 3,
    "mixed": [(WINDOW,), (FULL,), (SINKS,), (WINDOW,), (FULL,)],
    "lanes": [(WINDOW,), (FULL,), (WINDOW,), (FULL,), (WINDOW,)],
    "windows": [(WINDOW,), (SINKS,)],
    "two parts": [(FULL, NARROW), (LATENT, WINDOW)],
    "state": [(FULL,), (STATE,), (STATE, LATENT)],
    "grouped": [(TRIPLES,), (FULL,)],
    "lookahead": [(LOOKAHEAD, WINDOW), (FULL,)],
}


def digests(tokens: list[int], salt: str) -> list[int]:
    """A number below 2 ** 20 for each token, made from the salt, it and all before it."""
    out, at = [], 1 + len(salt)
    for t in tokens:
        at = (at * 31 + t + 7) % 1_048_573
        out.append(at)
    return out


class World:
    def __init__(self, specs: list[tuple[PartSpec, ...]], seed: int, *, rows: int = 4, pages: int = 40, **options) -> None:
        self.random = random.Random(seed)
        options = {"rollback": 3, "swap_bytes": 20_000} | options
        self.rollback = options["rollback"]
        self.manager = CacheManager(specs, rows=rows, pages=pages, page_size=PAGE, **options)
        self.exact = self.manager._stores[0].tensors[0].dtype == torch.float32 if self.manager._stores else True
        for store in self.manager._stores:
            for t in store.tensors:
                t.fill_(float("nan") if t.is_floating_point() else 93)
        self.rows: dict[int, list[int]] = {}
        self.salts: dict[int, str] = {}
        self.swapped: list[tuple[object, list[int], str]] = []
        self.past: list[list[int]] = [[]]
        self.has_state = any(spec.kind in ("state", "lookahead") for parts in specs for spec in parts)

    # ---- what is stored ---------------------------------------------------------------------------------------------------

    def write(self, counts: dict[int, list[int]]) -> None:
        """One step of the model: rows -> their new tokens."""
        starts = tuple(len(self.rows[row]) for row in counts)
        seq = SeqInfo(tuple(map(len, counts.values())), starts=starts, ids=tuple(counts))
        numbers = []
        for row, new in counts.items():
            self.rows[row] = self.rows[row] + new
            numbers.append(digests(self.rows[row], self.salts[row]))
        for layer, cache in enumerate(self.manager.caches):
            for part in cache.parts:
                self._write_part(part, layer, numbers, starts, seq)
            cache.end_step()

    def _write_part(self, part, layer: int, numbers: list[list[int]], starts: tuple[int, ...], seq: SeqInfo) -> None:
        if isinstance(part, StatePart):
            last = torch.tensor([n[-1] + layer for n in numbers], dtype=torch.float64)
            part.put((last[:, None, None].expand(-1, 2, 3),), seq)
            return
        if isinstance(part, LookaheadPart):
            for row, n, count in zip(seq.rows, numbers, seq.lengths, strict=True):
                part.put([row], 0, (torch.tensor(n).float()[None, :, None].expand(-1, -1, 3) + layer,), count)
            return
        size = part.spec.group
        entries = [
            [n[i * size + size - 1] for i in range(s // size, len(n) // size)] for n, s in zip(numbers, starts, strict=True)
        ]
        flat = torch.tensor([x + layer for n in entries for x in n], dtype=torch.float32)
        part.write(tuple(flat.view(-1, *[1] * len(shape)).expand(-1, *shape) for _, shape in part.spec.tensors), seq)
        for row, n, start in zip(seq.rows, numbers, starts, strict=True):
            self._compare(part, layer, row, n, start)

    def _compare(self, part, layer: int, row: int, numbers: list[int], first: int) -> None:
        """The row holds what queries at `first` and later may ask for, and every token that it holds is right."""
        size = part.spec.group
        held = part.read(row)
        where = held.axis.positions().tolist()
        needed, window = set(range(len(numbers) // size)), part.spec.window
        if window is not None:
            needed = {p for p in needed if p < part.spec.sinks or p > first - window}
        assert needed <= set(where), (row, needed - set(where))
        want = torch.tensor([numbers[p * size + size - 1] + layer for p in where], dtype=torch.float32)
        for t in held.tensors:
            for column in (t.flatten(1)[:, 0], t.flatten(1)[:, -1]):
                assert torch.equal(column, want) if self.exact else torch.allclose(column, want, rtol=1e-6)

    def compare(self) -> None:
        self.manager.check()
        for row, tokens in self.rows.items():
            numbers = digests(tokens, self.salts[row])
            for layer, cache in enumerate(self.manager.caches):
                for part in cache.parts:
                    assert part.lengths[row] == len(tokens)
                    if isinstance(part, StatePart):
                        want = numbers[-1] + layer if tokens else 0
                        assert bool((part.states([row])[0] == want).all())
                    else:
                        self._compare(part, layer, row, numbers, len(tokens))

    # ---- what may happen --------------------------------------------------------------------------------------------------

    def some_row(self) -> int | None:
        return self.random.choice(list(self.rows)) if self.rows else None

    def new_tokens(self, n: int) -> list[int]:
        """Few different ones, in few different orders: beginnings are sometimes shared."""
        return [self.random.choice((2, 3)) if i % 5 == 4 else i % 3 for i in range(n)]

    def admit(self) -> None:
        salt, before = self.random.choice(("", "", "b")), self.random.choice(self.past)
        prompt = before[: self.random.randrange(60)] + self.new_tokens(self.random.randrange(1, 40))
        self.past = [*self.past[-5:], prompt]
        matched, free = self.manager.match(prompt, salt), len(self.manager._free_rows)
        admission = self.manager.admit(prompt, salt)
        assert (admission is None) == (free == 0)
        if admission is None:
            return
        assert admission.cached_tokens == matched and matched % PAGE == 0 and matched < len(prompt)
        self.rows[admission.row], self.salts[admission.row] = prompt[:matched], salt
        self.step({admission.row: prompt[matched:]})

    def step(self, counts: dict[int, list[int]]) -> None:
        """Write to those rows that can reserve the pages; the others are left as they are."""
        fits = {}
        for row, new in counts.items():
            needed, free = self.manager.pages_needed(row, len(new)), self.manager.free_pages()
            assert self.manager.reserve(row, len(new)) == (needed <= free)
            assert (needed <= free) == (self.manager.pages_needed(row, len(new)) == 0)
            if needed <= free:
                fits[row] = new
        if fits:
            self.write(fits)

    def go_on(self) -> None:
        chosen = [row for row in self.rows if self.random.random() < 0.7]
        self.step({row: self.new_tokens(self.random.choice((1, 1, 1, 2, 13))) for row in chosen})

    def commit(self) -> None:
        for row, tokens in self.rows.items():
            self.manager.commit(row, tokens + [5] * self.random.randrange(2))

    def reserve(self) -> None:
        """More than will be written."""
        if (row := self.some_row()) is not None:
            self.manager.reserve(row, self.random.randrange(30))

    def release(self) -> None:
        if (row := self.some_row()) is not None:
            tokens = self.rows.pop(row)
            self.manager.release(row, tokens if self.random.random() < 0.6 else None, self.salts[row])

    def fork(self) -> None:
        if (row := self.some_row()) is not None and (into := self.manager.fork(row)) is not None:
            self.rows[into], self.salts[into] = list(self.rows[row]), self.salts[row]

    def truncate(self) -> None:
        if (row := self.some_row()) is None:
            return
        tokens = self.rows[row]
        length = self.random.choice((len(tokens) - self.random.randrange(4), self.random.randrange(len(tokens) + 1)))
        try:
            self.manager.truncate(row, max(length, 0))
        except UnsupportedError:
            assert self.has_state or length < len(tokens) - self.rollback
        else:
            self.rows[row] = tokens[: max(length, 0)]

    def swap(self) -> None:
        if self.swapped and self.random.random() < 0.6:
            handle, tokens, salt = self.swapped.pop()
            if self.random.random() < 0.2:
                self.manager.discard(handle)
            elif (row := self.manager.swap_in(handle)) is not None:
                self.rows[row], self.salts[row] = tokens, salt
            else:
                self.swapped.append((handle, tokens, salt))
        elif (row := self.some_row()) is not None and (handle := self.manager.swap_out(row)) is not None:
            self.swapped.append((handle, self.rows.pop(row), self.salts[row]))

    def resize(self) -> None:
        pages = self.random.randrange(20, 60)
        held = self.manager.stats().used
        try:
            self.manager.resize(pages)
        except CacheError:
            assert pages < held
        else:
            assert self.manager.stats().total == pages

    def defragment(self) -> None:
        self.manager.defragment()
        assert self.manager.defragment() == 0

    ACTIONS = (admit, admit, go_on, go_on, go_on, commit, reserve, release, fork, truncate, swap, resize, defragment)

    def run(self, steps: int) -> None:
        """A random schedule; everything is checked after every step. At its end no page is lost."""
        for _ in range(steps):
            self.random.choice(self.ACTIONS)(self)
            self.compare()
        self.finish()

    def finish(self) -> None:
        for row, tokens in list(self.rows.items()):
            self.manager.release(row, tokens)
        for handle, _, _ in self.swapped:
            self.manager.discard(handle)
        stats = self.manager.stats()
        assert (stats.used, stats.free + stats.cached, stats.swapped, stats.swap_bytes) == (0, stats.total, 0, 0)
        assert stats.free_rows == stats.rows and self.manager.free_pages() == stats.total
        self.manager.check()
        self.manager.resize(0)
        assert not list(self.manager.walk()) and self.manager.stats().total == 0
        self.manager.check()
