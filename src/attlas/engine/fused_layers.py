"""The layers of a decoder for serving on a CPU: packed weights, joined projections, keys written where they belong.

The model's layers define what is computed; a layer that this file does not know runs as it is. What is joined: q, k, v in one
map, gate and up in one map, a residual with the norm that reads it, rotation with the write to the cache. Weights are copied when
the engine is made: changing the model's weights later does not reach them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attlas.cache.groups import LayerPart
from attlas.cache.layer import Cache
from attlas.cache.store import PageStore, QuantisedStore
from attlas.engine.pieces import Pieces
from attlas.kernels.cpu import dense, launch
from attlas.models.layers import FeedForward, Layer, Step, UnitOffsetRMSNorm
from attlas.nn.attention import Attention
from attlas.ops.decode import DecodeRule, cascade_pages, rule_for, shared_tokens
from attlas.positions.rope import Rope
from attlas.shapes import SeqInfo


@dataclass
class Shared:
    """What all layers of one step share."""

    seq: SeqInfo
    positions: Tensor
    step: Step
    pieces: Pieces
    angles: dict[Rope, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tables: dict[int, Tensor] = field(default_factory=dict)
    prefixes: dict[int, int] = field(default_factory=dict)

    def turn(self, rope: Rope | None) -> tuple[Tensor, Tensor] | None:
        if rope is None:
            return None
        if rope not in self.angles:
            cos, sin = rope.cos_sin(self.positions)
            self.angles[rope] = cos.flatten(1).contiguous(), sin.flatten(1).contiguous()
        return self.angles[rope]

    def prefix(self, part: LayerPart, rule: DecodeRule) -> int:
        """Leading tokens that lie in the same pages for all sequences, where reading them once for all pays."""
        key = id(part.group)
        if key not in self.prefixes:
            each = self.pieces.each
            self.prefixes[key] = shared_tokens(self.table(part), part.page_size, self.ends, each, rule) if each else 0
        return self.prefixes[key]

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens of each sequence, the new ones included."""
        return tuple(a + n for a, n in zip(self.seq.first, self.seq.lengths, strict=True))

    def table(self, part: LayerPart) -> Tensor:
        """The block table of each piece."""
        key = id(part.group)
        if key not in self.tables:
            rows = list(self.seq.rows)
            table = part.tables.select(rows)
            if any(part.group.gaps[row][1] for row in rows):
                # The kernel skips what lies behind the window, but not page by page: let it find the row's own numbers there.
                held = torch.tensor([part.tables.pages[row][-1] for row in rows], dtype=torch.int32)[:, None]
                table = torch.where(table < 0, held, table)
            index = self.pieces.index
            self.tables[key] = (table if index is None else table[index]).contiguous()
        return self.tables[key]


class FusedNorm:
    """RMS norm of the sum of x and what was computed last; x becomes the sum."""

    def __init__(self, norm: nn.RMSNorm | UnitOffsetRMSNorm) -> None:
        self.weight, self.unit_offset = norm.weight.detach(), isinstance(norm, UnitOffsetRMSNorm)
        # torch: the smallest number of the dtype
        self.eps = torch.finfo(self.weight.dtype).eps if norm.eps is None else norm.eps

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return dense.norm_(x, residual, self.weight, self.eps, unit_offset=self.unit_offset)


class FusedAttention:
    """A plain softmax attention layer over the pages of its part."""

    def __init__(self, mixer: Attention, part: LayerPart, rule: DecodeRule) -> None:
        self.mixer, self.part, self.rule = mixer, part, rule
        self.qkv = joined(mixer.q_proj, mixer.k_proj, mixer.v_proj)
        self.out = joined(mixer.o_proj)

    def __call__(self, y: Tensor, shared: Shared) -> Tensor:
        mixer, part, seq = self.mixer, self.part, shared.seq
        qkv = self.qkv(y)
        slots = part.group.slots_to_write(seq.rows, seq.first, seq.lengths)
        (k, v), scales = part.store.held
        interleaved = mixer.rope is not None and mixer.rope.interleaved
        dense.rotate_and_store_(qkv, mixer.num_heads, shared.turn(mixer.rope), interleaved, (k, v), slots, scales)
        for row, first, n in zip(seq.rows, seq.first, seq.lengths, strict=True):
            part.stand(row, first + n)
        q = qkv[:, : mixer.num_heads * mixer.head_dim].unflatten(1, (mixer.num_heads, mixer.head_dim))
        out = self._attend(q, shared)
        part.end_step()
        return self.out(out.reshape(len(out), -1))

    def _attend(self, q: Tensor, shared: Shared) -> Tensor:
        """q [T, H, D] -> [T, H, D]"""
        rule, part, pieces = self.rule, self.part, shared.pieces
        table, ((k, v), scales) = shared.table(part), part.store.held
        prefix = shared.prefix(part, rule) if part.cascade else 0
        if prefix:
            q = q.unflatten(0, (-1, pieces.each))
            return cascade_pages(q, (k, v, *scales), table, shared.ends, rule, prefix)[0].flatten(0, 1)
        found = []
        for run in pieces.runs:
            own = slice(run.piece, run.piece + run.count)
            out, _ = launch.decode(
                q[run.at : run.end].unflatten(0, (run.count, run.each)),
                k,
                v,
                pieces.ends[own],
                rule.visible,
                rule.scale,
                block_table=table[own],
                softcap=rule.softcap,
                alibi=rule.alibi,
                sink=rule.sink,
                scales=scales,
            )
            found.append(out.flatten(0, 1))
        return torch.cat(found)


class FusedFeedForward:
    """down(silu(gate(y)) * up(y))"""

    def __init__(self, ffn: FeedForward) -> None:
        assert ffn.gate is not None
        self.up, self.down = joined(ffn.gate, ffn.up), joined(ffn.down)

    def __call__(self, y: Tensor) -> Tensor:
        return self.down(dense.gate(self.up(y)))


class FusedLayer:
    """x + mixer(norm(x)), then + ffn(norm(x)), with each sum made by the norm that reads it."""

    def __init__(self, layer: Layer, caches: list[Cache]) -> None:
        self.layer, self.caches = layer, caches
        self.norm_mixer = fused_norm(layer.norm_mixer)
        self.norm_ffn = fused_norm(layer.norm_ffn)
        self.attention = fused_attention(layer, caches)
        self.ffn = fused_feed_forward(layer.ffn)
        usual = layer.position == "pre" and not layer.parallel and layer.cross is None and len(caches) == 1
        # Whether the residual arrangement is the one below, and whether every piece is one of this file's.
        self.plain = usual and self.norm_mixer is not None and (layer.ffn is None or self.norm_ffn is not None)
        self.known = self.plain and self.attention is not None and (layer.ffn is None or self.ffn is not None)

    def __call__(self, x: Tensor, residual: Tensor | None, shared: Shared) -> tuple[Tensor, Tensor | None]:
        if not self.plain:
            return self.layer(x if residual is None else x + residual, shared.step, self.caches), None
        assert self.norm_mixer is not None
        y = self.norm_mixer(x, residual)
        residual = self.attention(y, shared) if self.attention is not None else self._mix(y, shared)
        if self.layer.ffn is None:
            return x, residual
        assert self.norm_ffn is not None
        y = self.norm_ffn(x, residual)
        return x, self.ffn(y) if self.ffn is not None else self.layer.ffn(y)

    def _mix(self, y: Tensor, shared: Shared) -> Tensor:
        return self.layer.mixer(y, seq=shared.seq, cache=self.caches[0]).contiguous()


def joined(*maps: nn.Linear) -> dense.PackedLinear:
    """Maps of one input as one."""
    weight = torch.cat([m.weight.detach() for m in maps])
    if all(m.bias is None for m in maps):
        return dense.PackedLinear(weight)
    parts = [weight.new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in maps]
    return dense.PackedLinear(weight, torch.cat(parts))


def fused_norm(norm: nn.Module | None) -> FusedNorm | None:
    return FusedNorm(norm) if isinstance(norm, UnitOffsetRMSNorm) or type(norm) is nn.RMSNorm else None


def fused_attention(layer: Layer, caches: list[Cache]) -> FusedAttention | None:
    """None when the mixer is not plain attention over pages, by the kernel's rules."""
    mixer, part = layer.mixer, caches[0].parts[0]
    if type(mixer) is not Attention or mixer.q_norm is not None or mixer.impl not in ("auto", "cpu"):
        return None
    if not isinstance(part, LayerPart) or type(part.store) not in (PageStore, QuantisedStore):
        return None
    if part.dtype != mixer.q_proj.weight.dtype:
        return None
    with torch.inference_mode():
        q = mixer.q_proj.weight.new_empty(0, mixer.num_heads, mixer.head_dim)
        score_mod = mixer.score_mod(q.device)
        rule = rule_for(q, mask=mixer.mask, score_mod=score_mod, scale=mixer.scale, sink=mixer.sink, impl=mixer.impl)
    return None if rule is None or not rule.visible.causal else FusedAttention(mixer, part, rule)


def fused_feed_forward(ffn: nn.Module | None) -> FusedFeedForward | None:
    return FusedFeedForward(ffn) if type(ffn) is FeedForward and ffn.gate is not None and ffn.act is F.silu else None
