"""Laws about who may influence whom: time, batch rows, packed sequences, padding, positions."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from attlas.errors import AttlasError
from attlas.shapes import SeqInfo
from attlas.testing.budget import assert_same
from attlas.testing.inputs import BATCH, LONG, RAGGED, RAGGED_MEMORY, SHORT, randn
from attlas.testing.subject import Subject


def causal(s: Subject) -> None:
    """Changing the tokens after t changes nothing at or before t."""
    mixer = s.make(claim="causal")
    assert mixer.causal, f"{s.name}: the card claims causal, the mixer does not"
    x, memory = randn(BATCH, LONG, s.dim), s.memory(mixer, BATCH)
    y = mixer(x, **memory)
    for t in (0, 1, 6, 17, LONG - 2):
        other = torch.cat([x[:, : t + 1], 30 * randn(BATCH, LONG - t - 1, s.dim, seed=5)], dim=1)
        assert_same(mixer(other, **memory)[:, : t + 1], y[:, : t + 1], f"{s.name}: tokens after {t} changed earlier outputs")
    if s.reference is not None:  # softmax: garbage behind a mask stays there
        x[:, 18:] = math.nan
        assert_same(mixer(x, **memory)[:, :18], y[:, :18], f"{s.name}: NaN in later tokens leaked")


def bidirectional(s: Subject) -> None:
    """Some output depends on a later token."""
    mixer = s.make(claim="bidirectional")
    assert not mixer.causal, f"{s.name}: the card claims bidirectional, the mixer is causal"
    x = randn(BATCH, LONG, s.dim)
    other = torch.cat([x[:, :-1], randn(BATCH, 1, s.dim, seed=5)], dim=1)
    assert not torch.allclose(mixer(x)[:, :-1], mixer(other)[:, :-1]), f"{s.name}: no output depends on the last token"


def cross(s: Subject) -> None:
    """Outputs depend on the memory, and a token of x on no other token of x."""
    mixer = s.make(claim="cross")
    x, memory = randn(BATCH, SHORT, s.dim), s.memory(mixer, BATCH)["memory"]
    y = mixer(x, memory=memory)
    for j in range(memory.shape[1]):
        other = memory.clone()
        other[:, j] += 1
        assert not torch.allclose(y, mixer(x, memory=other)), f"{s.name}: memory token {j} has no influence"
    other = x.clone()
    other[:, 4] += 1
    changed = (mixer(other, memory=memory) - y).abs().amax(-1) > 1e-9
    assert changed[:, 4].all() and changed.sum() == BATCH, f"{s.name}: a query reads another query"


def batch_rows(s: Subject) -> None:
    """A row's result does not depend on the other rows, nor on their number; garbage in one row stays there."""
    mixer = s.make()
    x, memory = randn(BATCH + 1, SHORT, s.dim), s.memory(mixer, BATCH + 1)
    y = mixer(x, **memory)
    for b in range(BATCH + 1):
        assert_same(y[b : b + 1], mixer(x[b : b + 1], **{k: v[b : b + 1] for k, v in memory.items()}), f"{s.name}: row {b} alone")
    x[1] = math.nan
    if memory:
        memory["memory"][1] = math.inf
    poisoned = mixer(x, **memory)
    assert_same(poisoned[[0, 2]], y[[0, 2]], f"{s.name}: rows beside a row of NaN")


def _ragged(s: Subject, mixer: Any) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    xs = [randn(n, s.dim, seed=20 + i) for i, n in enumerate(RAGGED)]
    if mixer.memory_use == "none":
        return xs, [{} for _ in RAGGED]
    return xs, [{"memory": randn(n, mixer.memory_dim, seed=40 + i)} for i, n in enumerate(RAGGED_MEMORY)]


def _alone(mixer: Any, x: Tensor, memory: dict[str, Tensor]) -> Tensor:
    return mixer(x[None], **{k: v[None] for k, v in memory.items()})[0]


def packed(s: Subject) -> None:
    """A packed batch (an empty sequence among them) equals its sequences one by one, in value and gradient."""
    for label, mixer in s.faces().items():
        xs, memories = _ragged(s, mixer)
        lengths_k = RAGGED_MEMORY if memories[0] else None
        memory = {k: torch.cat([m[k] for m in memories]) for k in memories[0]}
        x = torch.cat(xs).requires_grad_()
        y = mixer(x, seq=SeqInfo(RAGGED, lengths_k), **memory)
        want = torch.cat([_alone(mixer, a, m) for a, m in zip(x.split(RAGGED), memories, strict=True)])
        assert_same(y, want, f"{s.name} ({label}): packed against one by one")
        weight = randn(*y.shape, seed=12)
        grads = [torch.autograd.grad((out * weight).sum(), x, retain_graph=True)[0] for out in (y, want)]
        assert_same(grads[0], grads[1], f"{s.name} ({label}): gradient, packed against one by one")


def padding(s: Subject) -> None:
    """Padded rows with their lengths equal the rows alone; padding may hold NaN, gives 0 and gets gradient 0."""
    mixer = s.make()
    xs, memories = _ragged(s, mixer)
    width = max(RAGGED) + 3
    x = torch.full((len(RAGGED), width, s.dim), math.nan, dtype=torch.float64)
    for row, a in zip(x, xs, strict=True):
        row[: len(a)] = a
    memory = {}
    if memories[0]:
        wide = torch.full((len(RAGGED), max(RAGGED_MEMORY) + 2, mixer.memory_dim), math.nan, dtype=torch.float64)
        for row, m in zip(wide, memories, strict=True):
            row[: len(m["memory"])] = m["memory"]
        memory = {"memory": wide}
    x.requires_grad_()
    y = mixer(x, seq=SeqInfo(RAGGED, RAGGED_MEMORY if memory else None), **memory)
    (grad,) = torch.autograd.grad(y.sum(), x)
    for b, n in enumerate(RAGGED):
        assert_same(y[b, :n], _alone(mixer, xs[b], memories[b]), f"{s.name}: row {b} of a padded batch")
        assert not y[b, n:].any() and not grad[b, n:].any(), f"{s.name}: padding of row {b} is not invisible"
    assert grad.isfinite().all(), f"{s.name}: padding leaks into gradients"


def positions(s: Subject) -> None:
    """Explicit positions 0, 1, ... change nothing; others change the output or raise; packed starts mean the same as
    positions."""
    mixer = s.make()
    x, memory = randn(BATCH, LONG, s.dim), s.memory(mixer, BATCH)
    if not mixer.uses_positions:
        _raises(lambda: mixer(x, positions=torch.arange(LONG), **memory), f"{s.name}: positions are ignored")
        return
    y = mixer(x, **memory)
    assert_same(mixer(x, positions=torch.arange(LONG), **memory), y, f"{s.name}: positions 0, 1, ... given")
    gaps = torch.arange(LONG) * 3 + (torch.arange(LONG) > 7) * 5
    with suppress(AttlasError):
        assert not torch.allclose(mixer(x, positions=gaps, **memory), y), f"{s.name}: positions have no influence"
    shifted = mixer(x, positions=torch.arange(LONG) + 11, **memory)
    seq = SeqInfo((LONG,) * BATCH, starts=(11,) * BATCH)
    assert_same(mixer(x, seq=seq, **memory), shifted, f"{s.name}: seq.starts against positions")


def empty(s: Subject) -> None:
    """Zero tokens, zero rows, zero sequences and a single token are ordinary inputs."""
    mixer = s.make()
    for rows, length in ((BATCH, 0), (0, 5), (BATCH, 1)):
        y = mixer(randn(rows, length, s.dim), **s.memory(mixer, rows))
        assert y.shape == (rows, length, s.dim) and y.isfinite().all(), f"{s.name}: x [{rows}, {length}, {s.dim}]"
    nothing = {k: v.flatten(0, 1) for k, v in s.memory(mixer, 0).items()}
    y = mixer(randn(0, s.dim), seq=SeqInfo((), () if nothing else None), **nothing)
    assert y.shape == (0, s.dim), f"{s.name}: zero sequences"
    if mixer.memory_use != "none":
        x = randn(BATCH, 5, s.dim)
        y = mixer(x, memory=randn(BATCH, 0, mixer.memory_dim))
        assert y.isfinite().all(), f"{s.name}: memory of zero tokens"


def _raises(call: Any, otherwise: str) -> str:
    try:
        call()
    except AttlasError as error:
        return str(error)
    raise AssertionError(otherwise)
