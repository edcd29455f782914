"""What the CPU core makes of an attention call: masks become BlockMaps or decode windows, score modifications become op codes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attlas.kernels.cpu import launch, torch_ops
from attlas.kernels.cpu.library import MAX_DIM, MAX_MODS, load, status
from attlas.masks.expr import All, And, Mask, Or
from attlas.masks.geometry import Grid
from attlas.masks.leaves import Causal, Sinks, Window
from attlas.scores import Alibi, Chain, DenseBias, RelativeBias, ScoreMod, Softcap

BLOCK = 128
FEW_QUERIES = 16  # up to here the split-KV decode kernel reads the cache instead of packing it
_MAX_BIAS_BYTES = 1 << 30  # a bias made from a table is written out up to this size


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | None, grid: Grid, score_mod: ScoreMod | None, needs_grad: bool
) -> str | None:
    """Why the core cannot run the call, None = it can."""
    if q.device.type != "cpu":
        return f"it runs on the cpu, not on {q.device.type}"
    missing = _missing()
    if missing is not None:
        return missing
    if q.dtype not in launch.DTYPES:
        return f"it has no {q.dtype} kernels"
    if max(q.shape[-1], v.shape[-1]) > MAX_DIM:
        return f"it has head dims up to {MAX_DIM}"
    return None if score_mod is None else _refused(score_mod, q, k, grid)


def _missing() -> str | None:
    return status() if load() is None else None


def _links(mod: ScoreMod | None) -> tuple[ScoreMod, ...]:
    if mod is None:
        return ()
    return mod.mods if isinstance(mod, Chain) else (mod,)


def _as_bias(mod: ScoreMod) -> bool:
    """Additive modifications that are handed over element by element."""
    return isinstance(mod, (DenseBias, RelativeBias)) or (isinstance(mod, Alibi) and mod.slopes.requires_grad)


def _refused(mod: ScoreMod, q: Tensor, k: Tensor, grid: Grid) -> str | None:
    links = _links(mod)
    for link in links:
        if not isinstance(link, (Alibi, Softcap, DenseBias, RelativeBias)):
            return f"it does not know the score modification {type(link).__name__}"
    kinds = ["bias" if _as_bias(link) else type(link).__name__ for link in links]
    if len(links) > MAX_MODS or len(set(kinds)) != len(kinds):
        return f"it takes each kind of score modification once, not {' >> '.join(kinds)}"
    tq, tk = grid.shape
    for link in links:
        written_out = isinstance(link, (RelativeBias, Alibi)) and _as_bias(link)
        if written_out and 4 * q.shape[-2] * tq * tk > _MAX_BIAS_BYTES:
            return f"the bias of {type(link).__name__} would take {4 * q.shape[-2] * tq * tk} bytes written out"
    return None


@lru_cache(maxsize=64)
def _positions(grid: Grid) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # what is kept may be used in training later
        return grid.q.positions().to(torch.int32), grid.k.positions().to(torch.int32)


def _bias(mod: ScoreMod, q: Tensor, grid: Grid) -> Tensor:
    """fp32 [B|1, H|1, Tq, Tk], differentiable in the mod's tensors."""
    tq, tk = grid.shape
    if isinstance(mod, DenseBias) and mod.bias.shape[-2:] == (tq, tk) and grid == _dense_grid(tq, tk):
        bias = mod.bias.float()
    else:
        bias = mod(torch.zeros(q.shape[-2], tq, tk), grid.q.positions(), grid.k.positions())
    return bias if bias.ndim == 4 else bias[None]


@lru_cache(maxsize=256)
def _dense_grid(tq: int, tk: int) -> Grid:
    return Grid.dense(tq, tk)


@dataclass(frozen=True)
class _OpArgs:
    codes: list[int]
    softcap: float
    alibi: Tensor | None
    bias: Tensor | None
    positions: list[Tensor]


def _op_args(mod: ScoreMod | None, q: Tensor, grid: Grid) -> _OpArgs:
    codes, softcap, alibi, bias, positions = [], 0.0, None, None, []
    for link in _links(mod):
        if isinstance(link, Softcap):
            codes.append(launch.SOFTCAP)
            softcap = float(link.cap)
        elif isinstance(link, Alibi) and not _as_bias(link):
            codes.append(launch.ALIBI)
            alibi, positions = link.slopes.float().contiguous(), list(_positions(grid))
        else:
            codes.append(launch.BIAS)
            bias = _bias(link, q, grid)
    return _OpArgs(codes, softcap, alibi, bias, positions)


@lru_cache(maxsize=1024)
def visible(mask: Mask | None) -> launch.Visible | None:
    """The mask as a decode window (causal, left, sinks), None where it is something else."""
    if mask is None or isinstance(mask, All):
        return launch.Visible(causal=False)
    if isinstance(mask, Causal):
        return launch.Visible() if mask.align == "end" else None
    if isinstance(mask, Window):
        if mask.right not in (None, 0):
            return None
        return launch.Visible(causal=mask.right == 0, left=mask.left)
    if isinstance(mask, Or):
        sinks = [m for m in mask.operands if isinstance(m, Sinks)]
        rest = [visible(m) for m in mask.operands if not isinstance(m, Sinks)]
        if len(sinks) != 1 or len(rest) != 1 or rest[0] is None or not rest[0].causal or rest[0].sinks:
            return None
        return launch.Visible(True, rest[0].left, sinks[0].n)
    if isinstance(mask, And):
        return _both(mask)
    return None


def _both(mask: And) -> launch.Visible | None:
    # `causal & (window with unlimited right | sinks)`: Or above asks for a causal side, so the causal operand goes in first
    causal = any(isinstance(m, Causal) and m.align == "end" for m in mask.operands)
    parts = []
    for m in mask.operands:
        if causal and isinstance(m, Or):
            sides = [Window(s.left, 0) if isinstance(s, Window) else s for s in m.operands]
            if len(sides) != 2:
                return None
            m = sides[0] | sides[1]
        if causal and isinstance(m, Window):
            m = Window(m.left, 0)
        parts.append(visible(m))
    if any(p is None for p in parts):
        return None
    limited = [p for p in parts if p is not None and (p.left is not None or p.sinks)]
    if len(limited) > 1:
        return None
    one = limited[0] if limited else launch.Visible()
    return launch.Visible(any(p.causal for p in parts if p is not None), one.left, one.sinks)


def _as_decode(q: Tensor, mask: Mask | None, grid: Grid, mod: ScoreMod | None) -> launch.Visible | None:
    """The decode window of a call whose queries are the last tokens of one run of keys, else None."""
    links = _links(mod)
    if q.shape[1] > FEW_QUERIES or len(grid.q.segments) != 1 or len(grid.k.segments) != 1:
        return None
    if any(not isinstance(m, (Alibi, Softcap)) for m in links) or (len(links) == 2 and isinstance(links[0], Alibi)):
        return None
    queries, keys = grid.q.segments[0], grid.k.segments[0]
    if queries.sequence != keys.sequence or queries.position + queries.length != keys.position + keys.length:
        return None
    seen = visible(mask)
    if seen is None or seen.sinks == 0 or keys.position == 0:
        return seen
    return launch.Visible(seen.causal, seen.left, max(0, seen.sinks - keys.position))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None,
    grid: Grid,
    score_mod: ScoreMod | None,
    scale: float,
    sink: Tensor | None,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """q [B, Tq, H, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv] -> out [B, Tq, H, Dv], lse fp32 [B, Tq, H] (natural log).

    Empty rows: 0, lse -inf. `unsupported` must have returned None.
    """
    sink = None if sink is None else sink.float()
    seen = None if needs_grad else _as_decode(q, mask, grid, score_mod)
    if seen is not None:
        args = _op_args(score_mod, q, grid)
        lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int64)
        left = -1 if seen.left is None else seen.left
        return torch_ops.decode(q, k, v, lengths, None, scale, seen.causal, left, seen.sinks, args.softcap, args.alibi, sink)
    blocks, shape = _blocks(mask, grid, needs_grad)
    a = _op_args(score_mod, q, grid)
    run = torch_ops.cpu_attention if needs_grad else torch_ops.attention
    return run(q, k, v, blocks, shape, scale, sink, a.codes, a.softcap, a.alibi, a.bias, a.positions)


def _blocks(mask: Mask | None, grid: Grid, backward: bool) -> tuple[list[Tensor], list[int]]:
    """The mask's BlockMap as the operators take it."""
    several = len(grid.q.ids | grid.k.ids) > 1
    if mask is None and several:
        mask = All()
    whole = mask is None or (isinstance(mask, All) and not several)
    block_map = None if whole or mask is None else mask.block_map(grid, block_q=BLOCK, block_k=BLOCK, device="cpu")
    return torch_ops.map_tensors(block_map, backward=backward)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None,
    grid: Grid,
    score_mod: ScoreMod | None,
    scale: float,
    sink: Tensor | None,
    saved: list[Tensor],
) -> list[Tensor]:
    """Gradients of q, k, v and (if there is one) sink, from saved = (out, lse, dout, dlse); score_mod must hold no tensors."""
    assert score_mod is None or not score_mod.tensors()
    a = _op_args(score_mod, q, grid)
    wide = None if sink is None else sink.float()
    blocks, shape = _blocks(mask, grid, True)
    dq, dk, dv, dsink, _ = torch_ops.attention_backward(
        q, k, v, blocks, shape, scale, wide, a.codes, a.softcap, a.alibi, a.bias, a.positions, saved, False
    )
    return [dq, dk, dv] if sink is None else [dq, dk, dv, dsink.to(sink.dtype)]
