"""A literal way to compute what an attention op computes: one sequence at a time, the mask written out pair by pair, brute force.

It shares no selection, packing, block map or kernel with `attlas.ops`; a mixer whose `attend` is replaced by it is the mixer's
truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attlas.masks.expr import Mask
from attlas.masks.geometry import Grid
from attlas.scores import ScoreMod
from attlas.shapes import Aux, AuxRequest, SeqInfo

Truth = Callable[..., tuple[Tensor, Tensor]]


def literal_attend(truth: Truth, override: Callable[[Mask | None], Mask | None] = lambda m: m) -> Callable[..., Any]:
    """A function with the signature of `ops.attention` that calls `truth` (attlas.reference.softmax:attention) once per sequence.

    override  replaces the mask, e.g. by Causal() to see whether a pattern has become full attention
    """

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | None = None,
        score_mod: ScoreMod | None = None,
        scale: float | None = None,
        sink: Tensor | None = None,
        seq: SeqInfo | None = None,
        impl: str = "auto",
        return_aux: AuxRequest | None = None,
    ) -> Any:
        del impl  # there is only one way here
        mask = override(mask)
        options = {"score_mod": score_mod, "scale": scale, "sink": sink}

        def one(q: Tensor, k: Tensor, v: Tensor, first: int) -> tuple[Tensor, Tensor]:
            q_pos, k_pos = torch.arange(first, first + q.shape[-3]), torch.arange(k.shape[-3])
            allowed = None
            if mask is not None:
                batch = q.shape[0] if mask.batch is not None else None
                allowed = mask.dense(Grid.at(q_pos, k_pos), batch=batch, heads=q.shape[-2])
            return truth(q, k, v, mask_bool=allowed, q_pos=q_pos, k_pos=k_pos, **options)

        if seq is None:
            out, lse = one(q, k, v, k.shape[1] - q.shape[1])
        else:
            rows = zip(q.split(seq.lengths), k.split(seq.keys), v.split(seq.keys), seq.first, strict=True)
            done = [one(a[None], b[None], c[None], first) for a, b, c, first in rows]
            out = torch.cat([o[0] for o, _ in done]) if done else q.new_zeros(0, q.shape[1], v.shape[2])
            lse = torch.cat([x[0] for _, x in done]) if done else q.new_zeros(0, q.shape[1])
        return out if return_aux is None else (out, Aux(lse=lse if return_aux.lse else None))

    return attend
