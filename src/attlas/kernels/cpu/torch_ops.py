"""The core as torch custom operators, so that `torch.compile(fullgraph=True)` and autograd see through it.

attlas::cpu_attention(q, k, v, ...) -> (out, lse), differentiable in q, k, v, bias and sink (alibi slopes are constants);
attlas::cpu_attention_backward its gradient; attlas::cpu_decode(q, k, v, lengths, ...) -> (out, lse) without gradient.
A BlockMap travels as a list of tensors: (row_ptr, cols, tile_ids, tiles), then for training those of its transpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attlas.kernels.cpu import launch
from attlas.masks.block_map import BlockMap


def map_tensors(block_map: BlockMap | None, *, backward: bool) -> tuple[list[Tensor], list[int]]:
    """(tensors, shape) of a BlockMap as the operators take it; ([], []) for None."""
    if block_map is None:
        return [], []
    tensors = [block_map.row_ptr, block_map.cols, block_map.tile_ids, block_map.tiles]
    if backward:
        turned = block_map.transpose()
        tensors += [turned.row_ptr, turned.cols, turned.tile_ids]
    return tensors, [block_map.batch, block_map.heads, block_map.block_q, block_map.block_k]


def _blocks(tensors: list[Tensor], shape: list[int]) -> launch.MapTensors | None:
    if not tensors:
        return None
    a = [t.contiguous() for t in tensors]
    back = (a[4], a[5], a[6]) if len(a) > 4 else None
    return launch.MapTensors((shape[0], shape[1], shape[2], shape[3]), (a[0], a[1], a[2], a[3]), back)


def _mods(
    codes: list[int], softcap: float, alibi: Tensor | None, bias: Tensor | None, q_pos: Tensor | None, k_pos: Tensor | None
) -> launch.Mods:
    return launch.Mods(tuple(codes), softcap, alibi, None if bias is None else launch.flat(bias), q_pos, k_pos)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: list[Tensor],
    block_shape: list[int],
    scale: float,
    sink: Tensor | None,
    codes: list[int],
    softcap: float,
    alibi: Tensor | None,
    bias: Tensor | None,
    positions: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """q [B, Tq, H, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv] -> out [B, Tq, H, Dv], lse fp32 [B, Tq, H]. See `launch.forward`.

    codes: score modifications in order (launch.ALIBI, BIAS, SOFTCAP); bias fp32 [B|1, H|1, Tq, Tk]; positions int32.
    """
    q_pos, k_pos = positions if positions else (None, None)
    return launch.forward(q, k, v, _blocks(blocks, block_shape), _mods(codes, softcap, alibi, bias, q_pos, k_pos), scale, sink)


cpu_attention = torch.library.custom_op("attlas::cpu_attention", attention, mutates_args=(), device_types="cpu")


@cpu_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: list[Tensor],
    block_shape: list[int],
    scale: float,
    sink: Tensor | None,
    codes: list[int],
    softcap: float,
    alibi: Tensor | None,
    bias: Tensor | None,
    positions: list[Tensor],
    saved: list[Tensor],
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """saved = (out, lse, dout, dlse) -> dq, dk, dv, dsink [H] (empty without a sink), dbias like bias (empty when not wanted)."""
    out, lse, dout, dlse = saved
    q_pos, k_pos = positions if positions else (None, None)
    mods = _mods(codes, softcap, alibi, bias, q_pos, k_pos)
    g = launch.backward(q, k, v, _blocks(blocks, block_shape), mods, scale, (out, lse), (dout, dlse), want_bias)
    dsink = q.new_empty(0, dtype=torch.float32)
    if sink is not None:  # d lse / d sink = p = exp(sink - lse), and out shrinks by p
        dsink = -(torch.exp(sink - lse) * g.delta).sum((0, 1))
    dbias = q.new_empty(0, dtype=torch.float32)
    if g.dbias is not None:
        assert bias is not None
        dbias = g.dbias.sum_to_size(bias.shape).contiguous()
    return g.dq, g.dk, g.dv, dsink, dbias


cpu_attention_backward = torch.library.custom_op(
    "attlas::cpu_attention_backward", attention_backward, mutates_args=(), device_types="cpu"
)


@cpu_attention_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: list[Tensor],
    block_shape: list[int],
    scale: float,
    sink: Tensor | None,
    codes: list[int],
    softcap: float,
    alibi: Tensor | None,
    bias: Tensor | None,
    positions: list[Tensor],
    saved: list[Tensor],
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    empty = (0,)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(empty if sink is None else sink.shape, dtype=torch.float32),
        q.new_empty(bias.shape if want_bias and bias is not None else empty, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, blocks, block_shape, scale, sink, codes, softcap, alibi, bias, positions = inputs
    if blocks and len(blocks) != 7:
        raise AssertionError("a gradient needs the transposed BlockMap: map_tensors(block_map, backward=True)")
    ctx.save_for_backward(q, k, v, *output, sink, alibi, bias, *blocks, *positions)
    ctx.options = block_shape, scale, codes, softcap, len(blocks)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    block_shape, scale, codes, softcap, count = ctx.options
    q, k, v, out, lse, sink, alibi, bias, *rest = ctx.saved_tensors
    blocks, positions = list(rest[:count]), list(rest[count:])
    want_bias = bias is not None and ctx.needs_input_grad[10]
    dq, dk, dv, dsink, dbias = cpu_attention_backward(
        q, k, v, blocks, block_shape, scale, sink, codes, softcap, alibi, bias, positions, [out, lse, dout, dlse], want_bias
    )
    no_blocks, no_positions = [None] * len(blocks), [None] * len(positions)
    no_shape: list | None = None if block_shape else []
    no_codes: list | None = None if codes else []  # torch takes an empty list for a list of tensors
    dsink = dsink if sink is not None and ctx.needs_input_grad[6] else None
    return dq, dk, dv, no_blocks, no_shape, None, dsink, no_codes, None, None, dbias if want_bias else None, no_positions


cpu_attention.register_autograd(_backward, setup_context=_save)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    scale: float,
    causal: bool,
    left: int,
    sinks: int,
    softcap: float,
    alibi: Tensor | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """New tokens over contiguous or paged caches, see `launch.decode`; left < 0 = no window."""
    seen = launch.Visible(causal, None if left < 0 else left, sinks)
    return launch.decode(q, k, v, lengths, seen, scale, block_table=block_table, softcap=softcap, alibi=alibi, sink=sink)


cpu_decode = torch.library.custom_op("attlas::cpu_decode", decode, mutates_args=(), device_types="cpu")


@cpu_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
