"""Laws about decoding: whatever way the tokens arrive, through whatever cache, the outputs are those of one prefill."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attlas.errors import UnsupportedError
from attlas.shapes import SeqInfo
from attlas.testing.budget import assert_budget, assert_same
from attlas.testing.inputs import BATCH, LONG, chunks, longest, randn
from attlas.testing.subject import Subject

LENGTHS = (LONG, 3, 17, 11)


def _decoding(s: Subject) -> Iterator[tuple[str, Any]]:
    for label, mixer in s.faces().items():
        if mixer.causal:
            yield label, mixer


def poison(cache: Any) -> Any:
    """Fill every floating-point tensor that the cache's parts hold with NaN: what was never written must never be read."""
    seen: set[int] = set()
    todo = list(cache.parts)
    while todo:
        holder = todo.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, Tensor):
            if holder.is_floating_point():
                holder.fill_(math.nan)
        elif isinstance(holder, list | tuple | set):
            todo.extend(holder)
        elif isinstance(holder, dict):
            todo.extend(holder.values())
        elif type(holder).__module__.startswith("attlas."):
            todo.extend(vars(holder).values())
    return cache


def _feed(mixer: Any, x: Tensor, memory: dict[str, Tensor], cache: Any, sizes: list[int]) -> Tensor:
    """Dense chunks through a cache; memory comes with the first chunk only."""
    out = []
    for i, part in enumerate(x.split(sizes, dim=1)):
        out.append(mixer(part, cache=cache, **(memory if i == 0 else {})))
    return torch.cat(out, dim=1)


def decode(s: Subject) -> None:
    """Token by token, in random chunks, or all at once through a cache = without a cache; also past every eviction."""
    for label, mixer in _decoding(s):
        x, memory = randn(BATCH, LONG, s.dim), s.memory(mixer, BATCH)
        want = mixer(x, **memory)
        plans = {"token by token": [1] * LONG, "at once": [LONG], **{f"chunks {i}": chunks(LONG, i) for i in range(3)}}
        for plan, sizes in plans.items():
            for max_len in (LONG, None):
                got = _feed(mixer, x, memory, mixer.new_cache(rows=BATCH, max_len=max_len), sizes)
                assert_same(got, want, f"{s.name} ({label}): {plan} through a cache (max_len={max_len})")
        n = longest(mixer)
        x, memory = randn(1, n, s.dim), s.memory(mixer, 1)
        got = _feed(mixer, x, memory, mixer.new_cache(rows=1), [n // 2, 1, 1, n - n // 2 - 2])
        assert_same(got, mixer(x, **memory), f"{s.name} ({label}): {n} tokens in long chunks")


def decode_dtypes(s: Subject) -> None:
    """Decoding in fp32 and bf16, whose kernels are others than those of fp64, stays within the error budget of a prefill."""
    for dtype in (torch.float32, torch.bfloat16):
        mixer = s.make(dtype=dtype, claim="decode")
        n = longest(mixer)
        x, memory = randn(BATCH, n, s.dim, dtype=dtype), s.memory(mixer, BATCH, dtype=dtype)
        naive, exact = s.twin(mixer)(x, **memory), s.twin(mixer).double()
        truth = exact(x.double(), **{k: v.double() for k, v in memory.items()})
        for layout in ("contiguous", "paged"):
            with torch.no_grad():
                cache = mixer.new_cache(rows=BATCH, max_len=n, layout=layout, page_size=8)
                got = _feed(mixer, x, memory, cache, [n // 2, 1, 1, 1, 3, n - n // 2 - 10, 1, 1, 1, 1])
            assert got.dtype == dtype, f"{s.name}: {dtype} in, {got.dtype} out"
            assert_budget(got, naive, truth, f"{s.name}, {dtype}: decoding through a {layout} cache")


def unwritten_slots(s: Subject) -> None:
    """Cache memory that was never written may hold NaN."""
    for label, mixer in _decoding(s):
        x, memory = randn(BATCH, LONG, s.dim), s.memory(mixer, BATCH)
        want = mixer(x, **memory)
        for layout in ("contiguous", "paged"):
            cache = poison(mixer.new_cache(rows=BATCH, max_len=LONG + 13, layout=layout, page_size=8))
            got = _feed(mixer, x, memory, cache, [7, 1, 1, 4] + [1] * (LONG - 13))
            assert_same(got, want, f"{s.name} ({label}): {layout} cache whose unused slots hold NaN")


def _steps(seed: int) -> Iterator[list[tuple[int, int]]]:
    """A ragged schedule: at each step some sequences (in any order) bring 0 ... 5 tokens; ends when all LENGTHS are used up."""
    rng, left = random.Random(seed), list(LENGTHS)
    while any(left):
        rows = [b for b in range(len(left)) if left[b] and rng.random() < 0.7] or [max(range(len(left)), key=lambda b: left[b])]
        rng.shuffle(rows)
        step = [(b, min(left[b], rng.choice((0, 1, 1, 1, 2, 5)))) for b in rows]
        for b, n in step:
            left[b] -= n
        yield step


def ragged_paged(s: Subject) -> None:
    """A ragged packed batch over paged parts, sequences joining at random = each sequence alone over contiguous parts."""
    for label, mixer in _decoding(s):
        xs = [randn(n, s.dim, seed=60 + b) for b, n in enumerate(LENGTHS)]
        memories: list[dict[str, Tensor]] = [s.memory(mixer, 1, 3 + 2 * b) for b in range(len(LENGTHS))]
        want = []
        for x, memory in zip(xs, memories, strict=True):
            alone = mixer.new_cache(rows=1, max_len=LONG)
            want.append(_feed(mixer, x[None], memory, alone, [1] * len(x))[0])
        for layout in ("paged", "contiguous"):
            cache = mixer.new_cache(rows=len(LENGTHS), max_len=max(LENGTHS), layout=layout, page_size=8)
            got: list[list[Tensor]] = [[] for _ in LENGTHS]
            if memories[0]:
                _write_memory(mixer, cache, memories, s.dim)
            for step in _steps(seed=1):
                pieces = [xs[b][sum(map(len, got[b])) :][:n] for b, n in step]
                seq = SeqInfo(tuple(n for _, n in step), ids=tuple(b for b, _ in step))
                y = mixer(torch.cat(pieces), seq=seq, cache=cache)
                for (b, _), out in zip(step, y.split(seq.lengths), strict=True):
                    got[b].append(out)
            for b, outs in enumerate(got):
                assert_same(torch.cat(outs), want[b], f"{s.name} ({label}): sequence {b} of a ragged batch over {layout} parts")


def _write_memory(mixer: Any, cache: Any, memories: list[dict[str, Tensor]], dim: int) -> None:
    """Bring every row its memory, in a call without tokens."""
    rows = [m["memory"][0] for m in memories]
    seq = SeqInfo((0,) * len(rows), lengths_k=tuple(map(len, rows)), ids=tuple(range(len(rows))))
    mixer(rows[0].new_zeros(0, dim), memory=torch.cat(rows), seq=seq, cache=cache)


def rollback(s: Subject) -> None:
    """Truncating the cache and going on equals never having taken the wrong tokens. A bounded part may refuse, with
    UnsupportedError."""
    mixer = s.make(claim="decode")
    x = randn(BATCH, LONG, s.dim)
    want = mixer(x)
    for layout in ("contiguous", "paged"):
        cache = mixer.new_cache(rows=BATCH, max_len=LONG, layout=layout, page_size=8, rollback=3)
        mixer(x[:, :11], cache=cache)
        mixer(randn(BATCH, 4, s.dim, seed=9), cache=cache)
        try:
            cache.truncate(dict.fromkeys(range(BATCH), 11))
        except UnsupportedError:
            bounded = any(spec.window is not None or spec.kind in ("state", "lookahead") for spec in mixer.cache_specs())
            assert bounded, f"{s.name}: a cache that keeps all keys and values can always be rolled back"
            continue
        got = torch.cat([mixer(x[:, 11:18], cache=cache), mixer(x[:, 18:], cache=cache)], dim=1)
        assert_same(got, want[:, 11:], f"{s.name}: after a rollback of a {layout} cache")


def cache_bytes(s: Subject) -> None:
    """`cache_bytes(n)` = the measured bytes of a cache that took n tokens; a bounded cache stops growing."""
    for dtype in (torch.float32, torch.float64):
        mixer = s.make(dtype=dtype, claim="decode")
        for n in (1, 5, 11, LONG):
            cache = mixer.new_cache(rows=1, max_len=n)
            mixer(randn(1, n, s.dim, dtype=dtype), cache=cache, **s.memory(mixer, 1, n, dtype=dtype))
            assert cache.nbytes() == mixer.cache_bytes(n), (
                f"{s.name}: cache_bytes({n}) says {mixer.cache_bytes(n)}, a cache of {n} tokens holds {cache.nbytes()} bytes"
            )
    grows = mixer.cache_bytes(2_000_003) > mixer.cache_bytes(1_000_003)
    assert grows != ("bounded-cache" in s.supports), (
        f"{s.name}: the cache {'grows' if grows else 'is bounded'}, the card says otherwise"
    )
