"""What an engine is told when it is made: how much may run at once, how much memory it may take, and how exact it must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from attlas.errors import OptionError
from attlas.registry import suggest

Preemption = Literal["recompute", "swap"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of an `Engine`.

    max_running         sequences that run at once (cache rows)
    max_batched_tokens  tokens of one forward: one for each running sequence, the rest goes to chunks of prompts
    pages               pages of the cache; None = from cache_bytes, or enough for max_running sequences of max_len tokens
    cache_bytes         memory for pages, when `pages` is None
    page_size           tokens of a page
    max_len             longest prompt + answer; None = as long as the model takes, or 4096 when it does not say; without
                        pages and cache_bytes, what is longer than 4096 has to fit into 1 GiB
    prefix_caching      keep the pages of finished sequences and share them with prompts that begin alike
    preemption          what happens to a running sequence when pages run out: its pages are given up and computed again later
                        ("recompute"), or copied aside ("swap")
    swap_bytes          memory for what is copied aside
    batch_invariant     fp32 logits of a sequence are bitwise the same in any company, in any chunks, from cached pages or not
    speculative         tokens drafted per step by looking the last tokens up in the text so far; 0 = off
    cascade             read a prefix that running sequences share once for all of them
    kv_dtype            dtype in which keys and values are held; None = as the model computes
    """

    max_running: int = 32
    max_batched_tokens: int = 1024
    pages: int | None = None
    cache_bytes: int | None = None
    page_size: int = 16
    max_len: int | None = None
    prefix_caching: bool = True
    preemption: Preemption = "recompute"
    swap_bytes: int = 0
    batch_invariant: bool = False
    speculative: int = 0
    cascade: bool = False
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_running", "max_batched_tokens", "page_size"):
            self._at_least(name, 1)
        for name in ("swap_bytes", "speculative"):
            self._at_least(name, 0)
        for name in ("pages", "cache_bytes", "max_len"):
            if getattr(self, name) is not None:
                self._at_least(name, 1)
        if self.preemption not in get_args(Preemption):
            raise OptionError(
                f"EngineOptions: preemption={self.preemption!r}; {suggest(str(self.preemption), get_args(Preemption))}"
            )
        if self.pages is not None and self.cache_bytes is not None:
            raise OptionError(f"EngineOptions: pages={self.pages} and cache_bytes={self.cache_bytes} say the same; give one")
        if self.cascade and self.batch_invariant:
            raise OptionError(
                "EngineOptions: cascade=True makes a sequence's bits depend on who shares its prefix; not with batch_invariant"
            )

    def _at_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"EngineOptions: {name}={value!r}; it must be an integer of at least {least}")
