"""A whole forward of a fused decoder as one list of calls into the compiled core: nothing of Python between the layers.

With few tokens in a step a layer takes some hundred microseconds, and making its tensors and calls one by one about as long.
"""

from __future__ import annotations

from ctypes import Structure
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attlas.kernels.cpu import dense
from attlas.kernels.cpu.launch import DTYPES, SPLIT
from attlas.kernels.cpu.library import DecodeArgs, Stride

if TYPE_CHECKING:
    from attlas.engine.fused import FusedAttention, FusedFeedForward, FusedLayer, FusedNorm, Shared


@dataclass
class AttentionCalls:
    """The calls of one layer whose arguments change with the step."""

    attention: FusedAttention
    rotate: dense.RotateArgs
    decode: DecodeArgs


class Program:
    """norm, q k v, rotation and write, attention, output, norm, gate and up, gate, down; for each layer, and a last norm."""

    def __init__(self, layers: list[FusedLayer], norm: FusedNorm, like: Tensor) -> None:
        self.dtype, self.code = like.dtype, DTYPES[like.dtype]
        self.calls: list[Structure] = []
        self.attentions: list[AttentionCalls] = []
        self.places: list[tuple[Structure, str, str]] = []  # (call, field, buffer that it points to)
        self.widths = {"x": like.shape[1], "residual": like.shape[1], "y": like.shape[1]}
        self.buffers: dict[str, Tensor] = {}
        self.capacity = self.threads = self.batch = 0
        for i, layer in enumerate(layers):
            assert layer.norm_mixer is not None and layer.attention is not None
            self._norm(layer.norm_mixer, residual=i > 0)
            self._attention(layer.attention)
            if layer.ffn is not None:
                assert layer.norm_ffn is not None
                self._norm(layer.norm_ffn)
                self._feed_forward(layer.ffn)
        self._norm(norm)
        self.steps = dense.Steps(self.calls)

    # ---- the list -----------------------------------------------------------------------------------------------------------

    def _add(self, call: Structure, **places: str) -> None:
        call.dtype = self.code
        self.calls.append(call)
        self.places += [(call, name, buffer) for name, buffer in places.items()]

    def _norm(self, norm: FusedNorm, *, residual: bool = True) -> None:
        call = dense.NormArgs(dim=norm.weight.shape[0], eps=norm.eps, offset=float(norm.unit_offset))
        call.weight = norm.weight.data_ptr()
        places = {"x": "x", "y": "y"} | ({"residual": "residual"} if residual else {})
        self._add(call, **places)

    def _linear(self, packed: dense.PackedLinear, source: str, target: str) -> None:
        call = packed.arguments()
        call.x_row, call.y_row = packed.inputs, packed.outputs
        self.widths[target] = max(self.widths.get(target, 0), packed.outputs)
        self._add(call, x=source, y=target)

    def _attention(self, attention: FusedAttention) -> None:
        mixer, rule = attention.mixer, attention.rule
        heads, kv_heads, dim = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
        self._linear(attention.qkv, "y", "qkv")
        rotate = dense.RotateArgs(heads=heads, kv_heads=kv_heads, dim=dim)
        if mixer.rope is not None:
            rotate.turned, rotate.interleaved = mixer.rope.turned, int(mixer.rope.interleaved)
        self._add(rotate, x="qkv")
        see = rule.visible
        decode = DecodeArgs(
            heads=heads, kv_heads=kv_heads, dim=dim, dim_v=dim, scale=rule.scale, softcap=rule.softcap, split=SPLIT
        )
        decode.causal, decode.window_left, decode.num_sinks = int(see.causal), -1 if see.left is None else see.left, see.sinks
        decode.alibi = None if rule.alibi is None else rule.alibi.data_ptr()
        decode.sink = None if rule.sink is None else rule.sink.data_ptr()
        self.widths["attended"] = max(self.widths.get("attended", 0), heads * dim)
        self.widths["lse"] = max(self.widths.get("lse", 0), heads * 4 // self.dtype.itemsize)
        self._add(decode, q="qkv", out="attended", lse="lse")
        self._linear(attention.out, "attended", "residual")
        self.attentions.append(AttentionCalls(attention, rotate, decode))

    def _feed_forward(self, ffn: FusedFeedForward) -> None:
        self._linear(ffn.up, "y", "up")
        hidden = ffn.down.inputs
        self.widths["gated"] = max(self.widths.get("gated", 0), hidden)
        self._add(dense.GateArgs(dim=hidden), x="up", y="gated")
        self._linear(ffn.down, "gated", "residual")

    # ---- a step -------------------------------------------------------------------------------------------------------------

    def run(self, x: Tensor, shared: Shared) -> Tensor:
        """Hidden states [T, dim] after the last norm, for embedded tokens x [T, dim]; valid until the next run."""
        tokens = len(x)
        self._resize(tokens)
        self.buffers["x"].view(-1)[: x.numel()] = x.view(-1)
        for calls in self.attentions:
            self._place(calls, shared)
        self._scratch()
        self.steps.run()
        ends = list(zip(shared.seq.rows, shared.ends, strict=True))
        for calls in self.attentions:
            for row, end in ends:
                calls.attention.part.stand(row, end)
        for calls in self.attentions:
            calls.attention.part.end_step()
        return self.buffers["y"].view(-1)[: x.numel()].view(tokens, -1)

    def _resize(self, tokens: int) -> None:
        if tokens > self.capacity:
            self.capacity = max(tokens, 2 * self.capacity)
            with torch.inference_mode(False):
                self.buffers = {name: torch.empty(self.capacity, w, dtype=self.dtype) for name, w in self.widths.items()}
            for call, name, buffer in self.places:
                setattr(call, name, self.buffers[buffer].data_ptr())
        threads = torch.get_num_threads()
        for call in self.calls:
            call.threads = threads
            if not isinstance(call, DecodeArgs):
                call.rows = tokens

    def _place(self, calls: AttentionCalls, shared: Shared) -> None:
        """Where this step's tokens go, and what they look at."""
        attention, rotate, decode = calls.attention, calls.rotate, calls.decode
        part, seq, each = attention.part, shared.seq, shared.each
        rotate.slots = part.group.slots_to_write(seq.rows, seq.first, seq.lengths).data_ptr()
        angles = shared.turn(attention.mixer.rope)
        if angles is not None:
            rotate.cos, rotate.sin = angles[0].data_ptr(), angles[1].data_ptr()
        k, v = part.store.tensors
        rotate.k = decode.k = k.data_ptr()
        rotate.v = decode.v = v.data_ptr()
        table, lengths = shared.table(part)
        wide, head = attention.qkv.outputs, decode.dim
        out = decode.heads * head
        decode.batch, decode.q_len, decode.page_size = rotate.rows // each, each, k.shape[1]
        decode.sq, decode.so = Stride(each * wide, wide, head), Stride(each * out, out, head)
        decode.sk, decode.sv = Stride(*k.stride()[:3]), Stride(*v.stride()[:3])
        decode.block_table, decode.max_blocks, decode.lengths = table.data_ptr(), table.shape[1], lengths.data_ptr()

    def _scratch(self) -> None:
        """Memory for partial results, shared by the layers."""
        sizes = {(d.heads, d.dim, d.kv_heads, d.lengths): d for d in (calls.decode for calls in self.attentions)}
        needed = max(dense.workspace(d) for d in sizes.values())
        held = self.buffers.get("partial")
        if held is None or held.numel() < needed:
            with torch.inference_mode(False):
                held = self.buffers["partial"] = torch.empty(needed + needed // 2)
        for calls in self.attentions:
            calls.decode.partial = held.data_ptr()
