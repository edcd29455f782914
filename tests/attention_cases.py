"""Calls of `attention` that between them touch every feature, and what it takes to compare implementations on them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attlas.masks import (
    All,
    Causal,
    Dense,
    Dilated,
    Documents,
    Global,
    Grid,
    Local,
    Mask,
    Nothing,
    Padding,
    PerHead,
    Prefix,
    Random,
    Sinks,
    Strided,
    Window,
)
from attlas.ops import attention
from attlas.scores import Alibi, RelativeBias, ScoreMod, Softcap
from attlas.shapes import AuxRequest, SeqInfo


@dataclass(frozen=True)
class Case:
    """Shapes and options of a call. batch 0 is allowed; seq makes it packed."""

    batch: int = 2
    tq: int = 67
    tk: int = 67
    heads: int = 6
    kv_heads: int = 3
    dim: int = 7
    dim_v: int = 5
    mask: Mask | None = None
    score_mod: ScoreMod | None = None
    scale: float | None = None
    sink: bool = False
    seq: SeqInfo | None = None
    seed: int = 0

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Leaves that require grad: q, k, v, sink and the tensors of the score mod."""
        g = torch.Generator().manual_seed(self.seed)
        lead = () if self.seq is not None else (self.batch,)
        tq, tk = (self.tq, self.tk) if self.seq is None else (self.seq.total, self.seq.total_k)
        shapes = {
            "q": (*lead, tq, self.heads, self.dim),
            "k": (*lead, tk, self.kv_heads, self.dim),
            "v": (*lead, tk, self.kv_heads, self.dim_v),
        }
        if self.sink:
            shapes["sink"] = (self.heads,)
        found = {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
        for i, t in enumerate(() if self.score_mod is None else self.score_mod.tensors()):
            found[f"mod{i}"] = t.detach().clone().to(torch.float64 if dtype == torch.float64 else torch.float32)
        return {name: t.requires_grad_() for name, t in found.items()}


@dataclass
class Result:
    out: Tensor
    lse: Tensor
    grads: dict[str, Tensor] = field(default_factory=dict)


def run(case: Case, tensors: dict[str, Tensor], impl: str, *, lse: bool = True) -> tuple[Tensor, Tensor | None]:
    mod = case.score_mod
    if mod is not None:
        mod = mod.replace_tensors([t for name, t in tensors.items() if name.startswith("mod")])
    options: dict[str, Any] = {"mask": case.mask, "score_mod": mod, "scale": case.scale, "seq": case.seq, "impl": impl}
    found = attention(
        *(tensors[n] for n in "qkv"), sink=tensors.get("sink"), return_aux=AuxRequest(lse=True) if lse else None, **options
    )
    return (found[0], found[1].lse) if lse else (found, None)


def naive(case: Case, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The formula written down in the tensors' own dtype, every intermediate result rounded to it."""
    q, k, v = (tensors[n].movedim(-2, -3) for n in "qkv")
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, dim=-3) for x in (k, v))
    grid = Grid.dense(q.shape[-2], k.shape[-2]) if case.seq is None else Grid.packed(case.seq)
    seen = (All() if case.mask is None else case.mask).dense(grid)
    scores = q @ k.transpose(-1, -2) * (case.dim**-0.5 if case.scale is None else case.scale)
    if case.score_mod is not None:
        mod = case.score_mod.replace_tensors([t.to(q.dtype) for n, t in tensors.items() if n.startswith("mod")])
        scores = mod(scores, grid.q.positions(), grid.k.positions())
    empty = ~seen.any(-1) & ("sink" not in tensors)
    scores = scores.masked_fill(~(seen | empty[..., None]), -torch.inf)
    if "sink" in tensors:
        sink = tensors["sink"][:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : k.shape[-2]]
    lse = scores.float().logsumexp(-1).masked_fill(empty, -torch.inf)
    out = (weights @ v).masked_fill(empty[..., None], 0.0)
    return out.movedim(-3, -2), lse.transpose(-1, -2)


def evaluate(case: Case, impl: str, dtype: torch.dtype, *, like: dict[str, Tensor] | None = None, lse: bool = True) -> Result:
    """Forward and every gradient of a loss that reads out and, where it is finite, lse. impl "naive": see `naive`."""
    tensors = case.tensors(dtype)
    if like is not None:
        tensors = {n: like[n].detach().to(t.dtype).requires_grad_() for n, t in tensors.items()}
    out, log = naive(case, tensors) if impl == "naive" else run(case, tensors, impl, lse=lse)
    log = log if lse else None
    g = torch.Generator().manual_seed(99)
    loss = (out * torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)).sum()
    if log is not None:
        weight = torch.randn(log.shape, generator=g, dtype=torch.float64).to(log.dtype)
        loss = loss + (torch.where(log.isfinite(), log, 0.0) * weight).sum()
    grads = torch.autograd.grad(loss, list(tensors.values()))
    return Result(out.detach(), torch.empty(0) if log is None else log.detach(), dict(zip(tensors, grads, strict=True)))


def _cases() -> dict[str, Case]:
    g = torch.Generator().manual_seed(5)
    rand = lambda *s: torch.randn(s, generator=g, dtype=torch.float64)  # noqa: E731
    ragged = SeqInfo((71, 1, 0, 67, 37), (89, 5, 3, 67, 0))
    started = SeqInfo((71, 1, 11), (89, 5, 13), starts=(3, 4, 1))
    few = SeqInfo((3, 1, 0, 5), (89, 5, 3, 7))
    base = Case()
    long = Case(batch=1, tq=311, tk=311)
    return {
        "all": base,
        "more keys": replace(base, tk=83),
        "fewer keys": replace(base, tk=41, mask=Causal()),
        "no keys": replace(base, tk=0),
        "no keys, sink": replace(base, tk=0, sink=True),
        "no queries": replace(base, tq=0),
        "empty batch": replace(base, batch=0),
        "one head": replace(base, heads=1, kv_heads=1, mask=Causal()),
        "one key head": replace(base, heads=5, kv_heads=1, mask=Causal()),
        "causal": replace(base, mask=Causal()),
        "causal more keys": replace(base, tk=83, mask=Causal()),
        "causal start": replace(base, tk=83, mask=Causal(align="start")),
        "causal start fewer keys": replace(base, tk=41, mask=Causal(align="start")),
        "scale": replace(base, mask=Causal(), scale=0.7),
        "negative scale": replace(base, scale=-0.3),
        "sink": replace(base, mask=Causal(), sink=True),
        "sink on empty rows": replace(base, mask=Window(5, -0) & ~Prefix(13), sink=True),
        "nothing": replace(base, mask=Nothing()),
        "window": replace(long, mask=Causal() & Window.last(23)),
        "window and first": replace(long, mask=Causal() & (Window.last(23) | Global((0, 150))), sink=True),
        "sinks": replace(long, mask=Causal() & (Window.last(31) | Sinks(3))),
        "two sided window": replace(long, mask=Window(17, 11)),
        "dilated": replace(long, mask=Dilated(7, 5, 3)),
        "strided": replace(long, mask=Causal() & (Strided(13) | Window(11, 0))),
        "prefix": replace(long, mask=Causal() | Prefix(29)),
        "prefix by row": replace(base, mask=Causal() | Prefix((29, 3))),
        "documents": replace(long, mask=Causal() & Documents((101, 7, 150))),
        "local": replace(long, mask=Local(37)),
        "random": replace(long, mask=Random(2, 16, seed=3) | Local(16)),
        "padding": replace(base, batch=3, mask=Padding((67, 0, 19))),
        "padding causal": replace(base, batch=3, tk=83, mask=Causal() & Padding((83, 0, 19))),
        "by head": replace(base, mask=PerHead((Causal(), Nothing(), All(), Window(3, 3), Causal(), Prefix(5)))),
        "dense mask": replace(base, mask=Dense(torch.rand(67, 67, generator=g) < 0.2)),
        "dense mask by row": replace(base, mask=Dense(torch.rand(2, 6, 67, 67, generator=g) < 0.3)),
        "alibi": replace(base, mask=Causal(), score_mod=Alibi(rand(6).abs())),
        "alibi two sided": replace(base, tk=83, score_mod=Alibi(rand(6).abs())),
        "t5": replace(base, score_mod=RelativeBias(rand(32, 6)), scale=1.0),
        "t5 decoder": replace(base, mask=Causal(), score_mod=RelativeBias(rand(32, 6), False, 31)),
        "softcap": replace(base, mask=Causal(), score_mod=Softcap(1.3)),
        "dense bias": replace(base, score_mod=RelativeBias.dense(rand(6, 67, 67))),
        "dense bias by row": replace(base, mask=Causal(), score_mod=RelativeBias.dense(rand(2, 1, 67, 67))),
        "dense bias, mask by head": replace(
            base, mask=PerHead((Causal(),) * 3 + (All(),) * 3), score_mod=RelativeBias.dense(rand(2, 6, 67, 67))
        ),
        "chain": replace(
            base, mask=Causal(), score_mod=Softcap(2.0) >> Alibi(rand(6).abs()) >> RelativeBias(rand(8, 6)), sink=True
        ),
        "prefix only, chain": replace(base, mask=Prefix(31), score_mod=Alibi(rand(6).abs()) >> Softcap(2.0)),
        "random with bias": replace(long, mask=Random(2, 16, seed=3) | Local(16), score_mod=RelativeBias(rand(16, 6))),
        "packed": Case(seq=ragged),
        "packed causal": Case(seq=ragged, mask=Causal(), score_mod=Alibi(rand(6).abs()), sink=True),
        "packed window": Case(seq=ragged, mask=Causal() & Window.last(13)),
        "packed started": Case(seq=started, mask=Causal(), score_mod=RelativeBias(rand(32, 6), False)),
        "packed start": Case(seq=started, mask=Causal(align="start")),
        "packed alike": Case(seq=SeqInfo((29, 29, 29), (41, 41, 41)), mask=Causal(), score_mod=Softcap(3.0)),
        "packed alike but for positions": Case(seq=SeqInfo((29, 29), (41, 41), starts=(12, 3)), mask=Causal()),
        "packed few": Case(seq=few, mask=Causal() & Window.last(17), score_mod=Alibi(rand(6).abs()), sink=True),
        "packed nobody": Case(seq=SeqInfo(())),
        "few": replace(base, tq=3, tk=83, mask=Causal()),
        "few, window": replace(base, tq=5, tk=331, mask=Causal() & Window.last(19), score_mod=Alibi(rand(6).abs())),
        "few, window and first": replace(base, tq=5, tk=331, mask=Causal() & (Window.last(19) | Sinks(3)), sink=True),
        "few, padding": replace(base, batch=3, tq=1, tk=83, mask=Padding((83, 0, 19))),
        "few, by head": replace(base, tq=2, tk=83, mask=PerHead((Causal(), Nothing(), All(), Window(3, 3), Causal(), Prefix(5)))),
        "few, t5": replace(base, tq=2, tk=83, mask=Causal(), score_mod=RelativeBias(rand(32, 6), False) >> Softcap(2.0)),
        "few, start": replace(base, tq=7, tk=83, mask=Causal(align="start")),
        "few of many": replace(base, tq=2, tk=2503, mask=Causal()),
    }


CASES = _cases()
