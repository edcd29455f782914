"""RWKV-4's weighted average over all earlier tokens, in chunks of a few tokens, as a softmax over log weights: nothing
overflows."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 16
NEG_INF = float("-inf")


def wkv(
    k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, average: Tensor, log_mass: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t = weighted average of v_s, s <= t, with log weights (t - 1 - s) log_decay + k_s for s < t and bonus + k_t for s = t.

    k, v [N, T, C], log_decay (<= 0) and bonus [C]; the past is one value `average` [N, C] of log weight `log_mass` [N, C] (-inf
    = none).
    valid [N, T] False: a token at the end of its row that weighs nothing and does not decay. Returns (y, average, log_mass).
    """
    outs = []
    keys, values = k.split(CHUNK, 1), v.split(CHUNK, 1)  # one split has one gradient; slices would each have one as long as k
    marks = [None] * len(keys) if valid is None else valid.split(CHUNK, 1)
    for key, value, here in zip(keys, values, marks, strict=True):
        y, average, log_mass = _chunk(key, value, log_decay, bonus, average, log_mass, here)
        outs.append(y)
    return torch.cat(outs, 1), average, log_mass


def _chunk(
    k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor, average: Tensor, log_mass: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    length = k.shape[1]
    steps = torch.arange(length, device=k.device)
    age = (steps[:, None] - 1 - steps[None, :])[None, :, :, None]  # decays that key s has met when query t reads it
    weight = age.clamp(min=0) * log_decay + k[:, None]
    own = torch.eye(length, dtype=torch.bool, device=k.device)[None, :, :, None]
    weight = torch.where(own, (bonus + k)[:, None], weight).masked_fill((age < -1), NEG_INF)
    past = steps[:, None] * log_decay + log_mass[:, None]
    share = torch.cat([past[:, :, None], weight], 2).softmax(2)
    y = share[:, :, 0] * average[:, None] + (share[:, :, 1:] * v[:, None]).sum(2)
    if valid is None:
        left, key = log_decay * (length - 1 - steps)[:, None], k
        end = log_mass + length * log_decay
    else:
        count = valid.sum(1)
        left = log_decay * (count[:, None, None] - 1 - steps[:, None]).clamp(min=0)
        key = k.masked_fill(~valid[..., None], NEG_INF)
        end = log_mass + count[:, None] * log_decay
    logs = torch.cat([end[:, None], left + key], 1)
    mass = logs.logsumexp(1)
    empty = mass == NEG_INF
    share = (logs - mass.masked_fill(empty, 0)[:, None]).exp()
    return y, share[:, 0] * average + (share[:, 1:] * v).sum(1), mass
