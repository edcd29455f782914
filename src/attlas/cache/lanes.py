"""Which layers share a block table, which share memory, and what a pool must have for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from attlas.cache.groups import Group, GroupedLayerPart, LayerPart
from attlas.cache.layer import Cache, make_cache
from attlas.cache.part import Part, PartSpec
from attlas.cache.store import PageStore

PAGED_KINDS = ("kv", "latent", "tokens")

Place = tuple[int, int]  # (layer, number of the part in it)
Specs = Sequence[tuple[PartSpec, ...]]


@dataclass(frozen=True)
class Deal:
    """The parts of one group; member i lies in lane i. window and sinks count entries of `tokens_per_entry` tokens."""

    window: int | None
    sinks: int
    tokens_per_entry: int
    members: tuple[Place, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """`caches`: one per layer; `groups`: the block tables behind them; `stores`: the page memory, each once; `own`: parts that
    have no pages, such as recurrent states."""

    caches: list[Cache]
    groups: list[Group]
    stores: list[PageStore]
    own: list[Part]


def deal(specs: Specs) -> list[Deal]:
    """Parts that keep the same tokens (equal window and sinks) are dealt into groups of equally many members, as many as the
    smallest such class has; member i of every group lies in lane i. A page belongs to one group at a time, so the members of a
    lane that have equal tensors share one store: a model with three full and fifteen window layers has six block tables over
    the memory of three layers, and a page that a window has left serves any of them. Where the classes do not divide, the last
    group of a class leaves some lanes of its pages unused.
    """
    classes: dict[tuple[int | None, int, int], list[Place]] = {}
    for layer, parts in enumerate(specs):
        for number, spec in enumerate(parts):
            if spec.kind in PAGED_KINDS:
                sinks = 0 if spec.window is None else spec.sinks
                classes.setdefault((spec.window, sinks, spec.group), []).append((layer, number))
    width = min(map(len, classes.values()), default=0)
    out = []
    for rule, places in classes.items():
        places.sort(key=lambda place: str(_form(specs[place[0]][place[1]])))  # stable: layers of a form stay in order
        out += [Deal(*rule, tuple(places[i : i + width])) for i in range(0, len(places), width)]
    return out


def _form(spec: PartSpec) -> tuple[object, torch.dtype | None]:
    """Parts of equal form can lie in one store."""
    return tuple(shape for _, shape in spec.tensors), spec.dtype


def lay_out(
    specs: Specs,
    rows: int,
    dtype: torch.dtype | None,
    device: torch.device,
    make_group: Callable[[Deal], Group],
    make: Callable[[PartSpec], PageStore],
) -> Layout:
    """The caches of all layers; parts of other kinds than PAGED_KINDS are what `make_cache` makes of them."""
    stores: dict[tuple[int, object], PageStore] = {}
    made: dict[Place, Part] = {}
    groups = []
    for dealt in deal(specs):
        group = make_group(dealt)
        for lane, (layer, number) in enumerate(dealt.members):
            spec = specs[layer][number]
            key = lane, _form(spec)
            if key not in stores:
                stores[key] = make(spec)
            part = LayerPart(replace(spec, group=1), group, stores[key], rows)
            made[layer, number] = GroupedLayerPart(spec, part) if spec.group > 1 else part
            group.parts.append(part)
            if (layer, number) == max(dealt.members):
                group.last = part
        groups.append(group)
    own = []
    for layer, parts in enumerate(specs):
        for number, spec in enumerate(parts):
            if (layer, number) not in made:
                made[layer, number] = make_cache([spec], rows, dtype=dtype, device=device).parts[0]
                own.append(made[layer, number])
    caches = [Cache([made[layer, number] for number in range(len(parts))]) for layer, parts in enumerate(specs)]
    return Layout(caches, groups, list(stores.values()), own)


def pages_for(specs: Specs, tokens: int, page_size: int, chunk: int | None = None) -> int:
    """Pages that a row of `tokens` tokens takes at most, in all groups, when no step writes more than `chunk` of them (None = all
    at once): a window holds what the first query of a step asks for, and the step."""
    total = 0
    for dealt in deal(specs):
        entries = tokens // dealt.tokens_per_entry
        if dealt.window is not None and chunk is not None:
            # both ends of the window, and the sinks, may lie inside of a page; prefix sharing keeps one more
            bound = dealt.window + chunk + dealt.sinks + 3 * page_size
            entries = min(entries, bound)
        total += -(-entries // page_size)
    return total
