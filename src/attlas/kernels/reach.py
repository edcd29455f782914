"""Which keys a range of queries can reach: scalar arithmetic on a mask and a grid, for calls too small to compile a mask."""

from __future__ import annotations

from typing import NamedTuple

from attlas.masks.expr import And, Mask, Or
from attlas.masks.geometry import Axis, Grid, Segment
from attlas.masks.leaves import Sinks, Window


class Rectangle(NamedTuple):
    """Queries q0..q1-1 against keys k0..k1-1 of one sequence; mask None = all pairs are allowed."""

    q0: int
    q1: int
    k0: int
    k1: int
    grid: Grid
    mask: Mask | None


def rectangles(mask: Mask | None, grid: Grid) -> list[Rectangle] | None:
    """One rectangle per sequence, its keys cut to those within reach; None where a sequence is not one run of the array."""
    if grid.num_sequences == 1:
        return [_cut(mask, (0, len(grid.q), grid.q), (0, len(grid.k), grid.k), grid)]
    q_runs, k_runs = _sequence_runs(grid.q), _sequence_runs(grid.k)
    if q_runs is None or k_runs is None:
        return None
    nothing = (0, 0, Axis(()))
    return [_cut(mask, run, k_runs.get(sequence, nothing)) for sequence, run in q_runs.items()]


Run = tuple[int, int, Axis]  # first, end, and the axis of one sequence in the array


def _sequence_runs(axis: Axis) -> dict[int, Run] | None:
    """sequence id -> its run; None where a sequence is scattered."""
    runs: dict[int, tuple[int, int, list[Segment]]] = {}
    at, last = 0, None
    for s in axis.segments:
        if s.sequence in runs:
            if s.sequence != last:
                return None
            first, _, segments = runs[s.sequence]
            runs[s.sequence] = (first, at + s.length, [*segments, s])
        else:
            runs[s.sequence] = (at, at + s.length, [s])
        at += s.length
        last = s.sequence
    return {i: (a, b, Axis(tuple(segments))) for i, (a, b, segments) in runs.items()}


def _cut(mask: Mask | None, queries: Run, keys: Run, grid: Grid | None = None) -> Rectangle:
    """The rectangle without the keys that the mask's hull excludes; mask dropped where it allows everything that is left.

    grid: that of the two runs, when it exists already.
    """
    (q0, q1, q), (k0, k1, k) = queries, keys
    if mask is not None and q.span is not None and k.span is not None:
        hull = mask.key_span(*q.span)
        if hull is None:
            return Rectangle(q0, q1, k0, k0, Grid(q, Axis(())), None)
        if len(k.segments) == 1:
            s = k.segments[0]
            skip = 0 if hull[0] is None else max(0, min(s.length, hull[0] - s.position))
            end = s.length if hull[1] is None else max(skip, min(s.length, hull[1] + 1 - s.position))
            if end - skip < s.length:
                k, grid = Axis((Segment(end - skip, s.position + skip, s.sequence, s.index + skip),)), None
                k0, k1 = k0 + skip, k0 + end
        if k.span is None or allows_all(mask, q.span, k.span):
            mask = None
    else:
        mask = None
    return Rectangle(q0, q1, k0, k1, Grid(q, k) if grid is None else grid, mask)


def allows_all(mask: Mask, q_span: tuple[int, int], k_span: tuple[int, int]) -> bool:
    """Whether the mask certainly allows every pair of two inclusive ranges of positions. Scalar arithmetic only."""
    if isinstance(mask, And):
        return all(allows_all(m, q_span, k_span) for m in mask.operands)
    if isinstance(mask, Or):
        return any(allows_all(m, q_span, k_span) for m in mask.operands)
    if isinstance(mask, Window) and mask.left is not None and mask.right is not None:  # what it forbids lies on both sides
        return q_span[1] - k_span[0] <= mask.left and k_span[1] - q_span[0] <= mask.right
    if isinstance(mask, Sinks):
        return k_span[1] < min(mask.n, q_span[0] + 1)
    forbidden = (~mask).key_span(*q_span)
    if forbidden is None:
        return True
    low, high = forbidden
    return (low is not None and low > k_span[1]) or (high is not None and high < k_span[0])
