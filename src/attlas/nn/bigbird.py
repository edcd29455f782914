"""BigBird: window, global and random blocks in one softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attlas.cache.layer import Cache
from attlas.errors import OptionError, UnsupportedError
from attlas.masks.cell_patterns import Blocks, BlockWindow, Random
from attlas.masks.explicit import Dense, PerHead
from attlas.masks.expr import All, Mask
from attlas.masks.geometry import Grid
from attlas.masks.leaves import Causal
from attlas.masks.options import integer
from attlas.masks.position_sets import Global
from attlas.nn.attention import Attend, Attention
from attlas.ops.attention import attention
from attlas.ops.merge import merge
from attlas.positions.rope import Rope
from attlas.shapes import AuxRequest, SeqInfo

_LSE = AuxRequest(lse=True)


def bigbird_mask(
    block: int, global_blocks: Sequence[int], random: Mask | None, *, window: int = 1, causal: bool, length: int | None = None
) -> Mask:
    """Window | global | random blocks of `block` tokens, & Causal(). `length` resolves negative global blocks, which count from
    the end of the sequence."""
    found = {g if g >= 0 else g + -(-(length or 0) // block) for g in global_blocks}
    tokens = tuple(g * block + i for g in sorted(found) if g >= 0 for i in range(block))
    mask: Mask = BlockWindow(block, window, 0 if causal else window) | Global(tokens)
    if random is not None:
        mask = mask | random
    return Causal() & mask if causal else mask


@dataclass(frozen=True)
class Undrawn:
    """What transformers makes of `count` random blocks when it evaluates: none is drawn, the first block counts 1 + count times
    in the softmax of the blocks between the first and the last, and sequences of up to 5 + 2 count blocks see every key."""

    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", integer(f"Undrawn({self.count!r})", "count", self.count, 0))


class BigBirdAttention(Attention):
    """One softmax over the keys of the query's own and `window` neighbouring blocks on each side, of the global blocks, and of
    `random_blocks` blocks drawn for each block of queries and each head. Queries in global blocks see every key.

    block          tokens per block
    window         neighbouring blocks on each side (only before, when causal)
    global_blocks  their indices; -1 is the last block of the sequence. None = (0, -1), when causal (0,)
    random_blocks  drawn per query block and head, from all blocks of the sequence (causal: from those up to its own); one
                   that the window or the global blocks hold already counts once. Or the Blocks themselves, a layout per head or
                   one for all; or Undrawn(count), bidirectional only
    causal         also & Causal(); the draw then does not depend on the length, so the mixer decodes

    In a packed batch "the last block" is each sequence's own. Bidirectional sequences of different lengths have
    different masks and run one after the other. Cost: 4 dim flops per pair, about
    T block (2 window + 1 + random_blocks + 2 len(global_blocks)) of them; cache (causal) grows.
    Source: Zaheer et al. 2020, arXiv 2007.14062.
    """

    name = "bigbird"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block: int = 64,
        window: int = 1,
        global_blocks: Sequence[int] | None = None,
        random_blocks: int | Blocks | Undrawn = 3,
        seed: int = 0,
        causal: bool = False,
        head_dim: int | None = None,
        rope: bool | float | Rope = True,
        bias: bool | Literal["qkv"] = False,
        attend: Attend = attention,
    ) -> None:
        chosen = tuple(((0,) if causal else (0, -1)) if global_blocks is None else global_blocks)
        call = (
            f"bigbird(dim={dim}, num_heads={num_heads}, block={block}, window={window}, global_blocks={chosen}, causal={causal})"
        )
        if num_heads < 1 or block < 1 or window < 0 or (isinstance(random_blocks, int) and random_blocks < 0):
            raise OptionError(f"{call}: num_heads and block must be at least 1, window and random_blocks at least 0")
        if causal and any(g < 0 for g in chosen):
            raise OptionError(f"{call}: a causal mixer cannot know the end of the sequence, so no global block may be negative")
        self.first_times, self.full_up_to = 1, 0
        if isinstance(random_blocks, Undrawn):
            if causal:
                raise OptionError(f"{call}: {random_blocks} is for bidirectional mixers")
            self.first_times, self.full_up_to = 1 + random_blocks.count, (5 + 2 * random_blocks.count) * block
            random_blocks = 0
        self._pattern = {"block": block, "global_blocks": chosen, "window": window, "causal": causal}
        self._random = random_blocks if isinstance(random_blocks, Blocks) else _Draw(num_heads, block, random_blocks, seed)
        fixed = _mask(self._pattern, self._random, None) if causal else None
        super().__init__(dim, num_heads, head_dim=head_dim, mask=fixed, rope=rope, bias=bias, attend=attend)
        self.block, self.causal, self.uses_positions = block, causal, True

    def mask_for(self, length: int) -> Mask:
        """The mask of a sequence of `length` tokens."""
        if self.mask is not None:
            return self.mask
        return All() if length <= self.full_up_to else _mask(self._pattern, self._random, length)

    def describe_mask(self) -> Mask:
        """The mask; that of a bidirectional sequence of 8 blocks, or of more that are not seen as a whole, as it depends on the
        length."""
        return self.mask_for(max(8 * self.block, self.full_up_to + 1))

    def mix(self, x: Tensor, *, memory: Tensor | None, positions: Tensor, seq: SeqInfo | None, cache: Cache | None) -> Tensor:
        if self.causal:
            return super().mix(x, memory=memory, positions=positions, seq=seq, cache=cache)
        if seq is None:
            return self._mix_rows(x, positions, self.mask_for(x.shape[1]))
        if len(set(seq.lengths)) == 1 and not any(seq.first):
            n = seq.lengths[0]
            return self._mix_rows(x.unflatten(0, (-1, n)), positions[:n], self.mask_for(n)).flatten(0, 1) if n else x
        return self.mix_irregular(x, memory=memory, positions=positions, seq=seq)

    def _mix_at(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.causal or not len(positions):
            return super()._mix_at(x, positions)
        mask, end = self.mask_for(int(positions.max()) + 1), len(positions)
        if not torch.equal(positions, torch.arange(end, device=positions.device)):
            if self.first_times > 1:
                raise UnsupportedError(f"{self}: without a draw, positions must be 0, 1, 2, ...")
            mask = Dense(mask.dense(Grid.at(positions, positions), heads=self.num_heads, device=x.device))
        return self._mix_rows(x[None], positions, mask)[0]

    def _mix_rows(self, x: Tensor, positions: Tensor, mask: Mask) -> Tensor:
        q, (k, v) = self._queries(x), self._keys_values(x)
        angles = self._angles(positions, q)
        q, k = self._rotate(q, angles), self._rotate(k, angles)
        options: dict[str, Any] = {"scale": self.scale, "impl": self.impl}
        end = (q.shape[1] - 1) // self.block * self.block  # where the last block begins
        if self.first_times == 1 or q.shape[1] <= self.full_up_to or end <= self.block:
            return self.o_proj(self.attend(q, k, v, mask=mask, **options).flatten(-2))
        out, aux = self.attend(q, k, v, mask=mask, return_aux=_LSE, **options)
        first = slice(0, self.block)
        more, more_aux = self.attend(q[:, self.block : end], k[:, first], v[:, first], return_aux=_LSE, **options)
        between = (out[:, self.block : end], aux.lse[:, self.block : end])
        joined, _ = merge([between, (more, more_aux.lse + math.log(self.first_times - 1))])
        return self.o_proj(torch.cat([out[:, first], joined, out[:, end:]], 1).flatten(-2))

    def flops(self, seq_len: int) -> int:
        """The projections, and every pair of the mask in every head."""
        mask = self.mask_for(seq_len)
        pairs = mask.count(Grid.dense(seq_len, seq_len)) * (1 if mask.heads else self.num_heads)
        if self.first_times > 1 and seq_len > self.full_up_to:
            between = (seq_len - 1) // self.block * self.block - self.block
            pairs += self.num_heads * self.block * max(0, between)
        return self._projection_flops(seq_len, seq_len) + 4 * self.head_dim * pairs


@dataclass(frozen=True)
class _Draw:
    """Random blocks for every head, each head with a seed of its own."""

    heads: int
    block: int
    count: int
    seed: int

    def mask(self, length: int | None) -> Mask | None:
        span = None if length is None else -(-length // self.block)
        count = self.count if span is None else min(self.count, span)
        if not count:
            return None
        draw = Random(count, self.block, seed=self.seed * self.heads, span=span)
        return PerHead(tuple(replace(draw, seed=draw.seed + h) for h in range(self.heads)))


def _mask(pattern: dict[str, Any], random: _Draw | Blocks, length: int | None) -> Mask:
    drawn = random.mask(length) if isinstance(random, _Draw) else random
    return bigbird_mask(
        pattern["block"], pattern["global_blocks"], drawn, window=pattern["window"], causal=pattern["causal"], length=length
    )
