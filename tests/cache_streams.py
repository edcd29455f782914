"""What the tests of cached attention share: inputs, the truth, and a stream of chunks through a part."""

from __future__ import annotations

import torch

from attlas.cache import PagedPart, PartSpec
from attlas.ops.cached import attention_cached
from attlas.reference.softmax import attention as reference
from attlas.shapes import AuxRequest, SeqInfo

T, H, HKV, D, DV = 61, 6, 2, 5, 3
WINDOW, SINKS = 11, 3
LSE = AuxRequest(lse=True)


def spec(window: int | None = None, sinks: int = 0) -> PartSpec:
    return PartSpec("kv", (("k", (HKV, D)), ("v", (HKV, DV))), window, sinks)


def inputs(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, h, d, generator=g, dtype=dtype) for h, d in ((H, D), (HKV, D), (HKV, DV)))


def truth(q, k, v, mask, **options) -> tuple[torch.Tensor, torch.Tensor]:
    allowed = None if mask is None else mask.to_bool(len(q), len(k))
    where = torch.arange(len(k))
    out, lse = reference(
        q[None],
        k[None],
        v[None],
        mask_bool=allowed,
        score_mod=options.get("score_mod"),
        q_pos=where[len(k) - len(q) :],
        k_pos=where,
        scale=options.get("scale", D**-0.5),
        sink=options.get("sink"),
    )
    return out[0], lse[0]


def poison(part) -> None:
    for t in part.pool.tensors if isinstance(part, PagedPart) else part._storage:
        t.fill_(float("nan"))


def stream(part, q, k, v, chunks, row=0, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Write and read in chunks, from where the row stands."""
    outs, lses, at = [], [], part.lengths[row]
    for n in chunks:
        seq = SeqInfo((n,), starts=(at,), ids=(row,))
        part.write((k[at : at + n], v[at : at + n]), seq)
        out, aux = attention_cached(q[at : at + n], part, seq=seq, return_aux=LSE, **options)
        part.end_step()
        outs.append(out)
        lses.append(aux.lse)
        at += n
    return torch.cat(outs), torch.cat(lses)
