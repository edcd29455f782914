"""RWKV-4's weighted average over all earlier tokens, as averages with log weights that are joined in pairs: nothing overflows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEG_INF = float("-inf")
EMPTY = -1e30  # log weight of nothing; finite, so that joining nothing with nothing has a gradient


def wkv(
    k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, average: Tensor, log_mass: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t = weighted average of v_s, s <= t, with log weights (t - 1 - s) log_decay + k_s for s < t and bonus + k_t for s = t.

    k, v [N, T, C], log_decay (<= 0) and bonus [C]; the past is one value `average` [N, C] of log weight `log_mass` [N, C] (-inf
    = none).
    valid [N, T] False: a token at the end of its row that weighs nothing and does not decay. Returns (y, average, log_mass).
    Time and memory O(N T C).
    """
    steps = k.new_ones(1, k.shape[1], 1)
    own = bonus + k
    if valid is not None:
        here = valid[..., None]
        k, v, steps = k.masked_fill(~here, EMPTY), v.masked_fill(~here, 0), here.to(k.dtype)
    mass = torch.cat([log_mass.clamp(min=EMPTY)[:, None], k], 1)  # the past is a token that comes first
    means = torch.cat([average[:, None], v], 1)
    mass, means = _running(mass, means, F.pad(steps, (0, 0, 1, 0)), log_decay)
    y = torch.lerp(v, means[:, :-1], torch.sigmoid(mass[:, :-1] - own))
    end, last = mass[:, -1], means[:, -1]
    empty = end <= EMPTY / 2
    return y, last.masked_fill(empty, 0), end.masked_fill(empty, NEG_INF)


def _running(mass: Tensor, means: Tensor, steps: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """The averages over all tokens up to each: neighbours are joined in pairs, the averages up to every pair are found in the
    same way, and those that end inside a pair are made of the one before it. mass, means [N, T, C]; steps [1 | N, T, 1]: decays
    from the token before."""
    length = mass.shape[1]
    if length == 1:
        return mass, means
    if length % 2:
        mass, means, steps = F.pad(mass, (0, 0, 0, 1), value=EMPTY), F.pad(means, (0, 0, 0, 1)), F.pad(steps, (0, 0, 0, 1))
    (first, second), (mean, other), (step, to) = (x.unflatten(1, (-1, 2)).unbind(2) for x in (mass, means, steps))
    upto, average = _running(*_join(first, mean, second, other, to, log_decay), step + to, log_decay)
    between = _join(upto[:, :-1], average[:, :-1], first[:, 1:], mean[:, 1:], step[:, 1:], log_decay)
    parts = ((first, between[0], upto), (mean, between[1], average))
    mass, means = (torch.stack([torch.cat([x[:, :1], b], 1), p], 2).flatten(1, 2)[:, :length] for x, b, p in parts)
    return mass, means


def _join(
    mass: Tensor, mean: Tensor, later_mass: Tensor, later_mean: Tensor, steps: Tensor, log_decay: Tensor
) -> tuple[Tensor, Tensor]:
    """Two neighbouring averages as one, the earlier one decayed by `steps`."""
    mass = torch.addcmul(mass, steps, log_decay)
    return torch.logaddexp(mass, later_mass), torch.lerp(later_mean, mean, torch.sigmoid(mass - later_mass))
