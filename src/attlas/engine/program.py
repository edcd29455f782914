"""A whole forward of a fused decoder as one list of calls into the compiled core: nothing of Python between the layers.

With few tokens in a step a layer takes some hundred microseconds, and making its tensors and calls one by one about as long.
"""

from __future__ import annotations

from ctypes import Structure
from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.engine.fused_layers import FusedAttention, FusedFeedForward, FusedLayer, FusedNorm, Shared
from attlas.kernels.cpu import dense
from attlas.kernels.cpu.attention import FEW_QUERIES
from attlas.kernels.cpu.launch import CODES, DTYPES, SPLIT, set_scales
from attlas.kernels.cpu.library import DecodeArgs, Stride

WIDE_SPLIT = 2048  # keys of one split where a piece has many queries: there are tasks enough, and joining splits costs more


@dataclass
class AttentionCalls:
    """The calls of one layer whose arguments change with the step; `reads`: one for each run of pieces."""

    attention: FusedAttention
    rotate: dense.RotateArgs
    reads: list[DecodeArgs]


class Program:
    """norm, q k v, rotation and write, attention, output, norm, gate and up, gate, down; for each layer, and a last norm."""

    def __init__(self, layers: list[FusedLayer], norm: FusedNorm, like: Tensor) -> None:
        self.dtype, self.code = like.dtype, DTYPES[like.dtype]
        self.calls: list[Structure | AttentionCalls] = []  # the reads of a layer stand where its AttentionCalls stands
        self.attentions: list[AttentionCalls] = []
        self.places: list[tuple[Structure, str, str]] = []  # (call, field, buffer that it points to)
        self.widths = {"x": like.shape[1], "residual": like.shape[1], "y": like.shape[1]}
        self.buffers: dict[str, Tensor] = {}
        self.capacity = 0
        self.steps: dict[int, dense.Steps] = {}  # by the number of runs
        for i, layer in enumerate(layers):
            assert layer.norm_mixer is not None and layer.attention is not None
            self._norm(layer.norm_mixer, residual=i > 0)
            self._attention(layer.attention)
            if layer.ffn is not None:
                assert layer.norm_ffn is not None
                self._norm(layer.norm_ffn)
                self._feed_forward(layer.ffn)
        self._norm(norm)

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
        mixer = attention.mixer
        heads, kv_heads, dim = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
        self._linear(attention.qkv, "y", "qkv")
        rotate = dense.RotateArgs(heads=heads, kv_heads=kv_heads, dim=dim)
        if mixer.rope is not None:
            rotate.turned, rotate.interleaved = mixer.rope.turned, int(mixer.rope.interleaved)
        self._add(rotate, x="qkv")
        self.widths["attended"] = max(self.widths.get("attended", 0), heads * dim)
        self.widths["lse"] = max(self.widths.get("lse", 0), heads * 4 // self.dtype.itemsize)
        self.attentions.append(AttentionCalls(attention, rotate, []))
        self.calls.append(self.attentions[-1])
        self._linear(attention.out, "attended", "residual")

    def _read(self, attention: FusedAttention) -> DecodeArgs:
        """A call of the decode kernel, without what changes with the step."""
        mixer, rule, see = attention.mixer, attention.rule, attention.rule.visible
        heads, dim, wide = mixer.num_heads, mixer.head_dim, attention.qkv.outputs
        a = DecodeArgs(dtype=self.code, heads=heads, kv_heads=mixer.num_kv_heads, dim=dim, dim_v=dim)
        a.scale, a.softcap = rule.scale, rule.softcap
        a.causal, a.window_left, a.num_sinks = int(see.causal), -1 if see.left is None else see.left, see.sinks
        a.alibi = None if rule.alibi is None else rule.alibi.data_ptr()
        a.sink = None if rule.sink is None else rule.sink.data_ptr()
        (k, v), scales = attention.part.store.held
        a.page_size, a.sk, a.sv = k.shape[1], Stride(*k.stride()[:3]), Stride(*v.stride()[:3])
        set_scales(a, k, scales)
        a.sq, a.so = Stride(0, wide, dim), Stride(0, heads * dim, dim)
        return a

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
        self._scratch(len(shared.pieces.runs))
        self._steps(len(shared.pieces.runs)).run()
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
            for place, name, buffer in self.places:
                setattr(place, name, self.buffers[buffer].data_ptr())
        threads = torch.get_num_threads()
        for call in self.calls:
            if not isinstance(call, AttentionCalls):
                call.threads, call.rows = threads, tokens

    def _steps(self, runs: int) -> dense.Steps:
        if runs not in self.steps:
            flat = [call.reads[:runs] if isinstance(call, AttentionCalls) else [call] for call in self.calls]
            self.steps[runs] = dense.Steps([call for part in flat for call in part])
        return self.steps[runs]

    def _place(self, calls: AttentionCalls, shared: Shared) -> None:
        """Where this step's tokens go, and what they look at."""
        attention, rotate = calls.attention, calls.rotate
        part, seq, pieces = attention.part, shared.seq, shared.pieces
        rotate.slots = part.group.slots_to_write(seq.rows, seq.first, seq.lengths).data_ptr()
        angles = shared.turn(attention.mixer.rope)
        if angles is not None:
            rotate.cos, rotate.sin = angles[0].data_ptr(), angles[1].data_ptr()
        stored, scales = part.store.held
        k, v = (t.data_ptr() for t in stored)
        rotate.k, rotate.v = k, v
        if scales:
            rotate.kv_dtype, rotate.k_scale, rotate.v_scale = CODES[stored[0].dtype], *(t.data_ptr() for t in scales)
        table = shared.table(part)
        blocks, entries, ends = table.shape[1], table.data_ptr(), pieces.ends.data_ptr()
        q, out, lse = (self.buffers[name].data_ptr() for name in ("qkv", "attended", "lse"))
        heads, threads = attention.mixer.num_heads, torch.get_num_threads()
        wide, narrow = attention.qkv.outputs, heads * attention.mixer.head_dim
        while len(calls.reads) < len(pieces.runs):
            calls.reads.append(self._read(attention))
        for run, read in zip(pieces.runs, calls.reads, strict=False):
            read.batch, read.q_len, read.threads = run.count, run.each, threads
            read.split = SPLIT if run.each <= FEW_QUERIES else WIDE_SPLIT
            first = run.at * self.dtype.itemsize
            read.q, read.out, read.lse = q + first * wide, out + first * narrow, lse + 4 * run.at * heads
            read.sq.batch, read.so.batch = run.each * wide, run.each * narrow
            read.k, read.v, read.max_blocks = k, v, blocks
            read.k_scale, read.v_scale = rotate.k_scale, rotate.v_scale
            read.block_table, read.lengths = entries + 4 * run.piece * blocks, ends + 8 * run.piece

    def _scratch(self, runs: int) -> None:
        """Memory for partial results, shared by the layers."""
        shapes = {(read.heads, read.dim, read.kv_heads): calls for calls in self.attentions for read in calls.reads[:1]}
        needed = max((dense.workspace(read) for calls in shapes.values() for read in calls.reads[:runs]), default=0)
        held = self.buffers.get("partial")
        if held is None or held.numel() < needed:
            with torch.inference_mode(False):
                held = self.buffers["partial"] = torch.empty(needed + needed // 2)
        partial = held.data_ptr()
        for calls in self.attentions:
            for read in calls.reads[:runs]:
                read.partial = partial
