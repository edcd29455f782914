"""Multi-resolution attention: blocks that matter token by token, all others by their means."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from attlas.errors import OptionError, UnsupportedError
from attlas.nn.lowrank import LowRankMixer
from attlas.numerics import widened
from attlas.ops.resolution import Ranking, multi_resolution_attention, wrong_blocks
from attlas.reference import multiscale as truth


class MultiResolution(LowRankMixer):
    """y_i = o( sum_j softmax_j(s_ij) v_j ): s_ij is the score of the tokens i and j where their blocks are among the best pairs,
    else the product of the mean query and the mean key of their blocks (MRA-2), or nothing (MRA-2-s).

    block           tokens of a block; the last one of a sequence may be short
    blocks_per_row  pairs of blocks that each head computes token by token, per block of the sequence; they are spread over the
                    whole matrix of scores. A sequence of at most that many blocks gets softmax attention
    coarse          True: MRA-2; False: MRA-2-s, where a block that has no pair among the best gives o(0)
    ranking         "absolute": pairs with the largest product of means in the matrix (the paper); "relative": with the smallest
                    difference to the largest product of their row, which leaves no row empty (the authors' code)
    diagonal        so many diagonals of blocks are among the best whatever their scores, an odd number; 0 = none
    first           the first blocks, which all attend to and which attend to all
    causal          refused: means look at later tokens

    Nothing in it looks at positions. 16-bit inputs are computed in fp32. Cost: 4 T block blocks_per_row inner flops, and
    4 (T / block)^2 inner for the means. Source: Zeng et al. 2022, arXiv 2207.10284.
    """

    name = "multi-resolution"
    uses_positions = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block: int = 32,
        blocks_per_row: int = 4,
        coarse: bool = True,
        ranking: Ranking = "absolute",
        diagonal: int = 0,
        first: int = 0,
        head_dim: int | None = None,
        bias: bool = False,
        causal: Literal[False] = False,
    ) -> None:
        chosen = f"block={block}, blocks_per_row={blocks_per_row}, ranking={ranking!r}, diagonal={diagonal}, first={first}"
        call = f"multi-resolution(dim={dim}, num_heads={num_heads}, {chosen})"
        if causal:
            raise UnsupportedError(
                f"{call}: a mean query looks at later tokens, and so does the choice of blocks: no causal form"
            )
        super().__init__(dim, num_heads, head_dim, bias, call)
        if wrong := wrong_blocks(block, blocks_per_row, ranking, diagonal, first):
            raise OptionError(f"{call}: {wrong}")
        self.block, self.blocks_per_row, self.coarse = block, blocks_per_row, coarse
        self.ranking, self.diagonal, self.first = ranking, diagonal, first

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        if self.impl == "reference":
            rules = (self.block, self.blocks_per_row, self.coarse, self.ranking, self.diagonal, self.first)
            return truth.multi_resolution(q, k, v, *rules)
        out = multi_resolution_attention(
            *widened(q, k, v),
            block=self.block,
            blocks_per_row=self.blocks_per_row,
            coarse=self.coarse,
            ranking=self.ranking,
            diagonal=self.diagonal,
            first=self.first,
            impl=self.impl,
        )
        return out.to(q.dtype)

    def flops(self, seq_len: int) -> int:
        inner, blocks = self.num_heads * self.head_dim, -(-seq_len // self.block)
        total = self._projection_flops(seq_len)
        if self.blocks_per_row >= blocks:
            return total + 4 * seq_len**2 * inner
        pairs = min(blocks * self.blocks_per_row * self.block**2, seq_len**2)  # less, where the last block is short
        return total + (4 * pairs + (4 if self.coarse else 2) * blocks**2) * inner

    def extra_repr(self) -> str:
        shown = f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, block={self.block}"
        chosen = f"blocks_per_row={self.blocks_per_row}, coarse={self.coarse}, ranking={self.ranking}"
        return f"{shown}, {chosen}, diagonal={self.diagonal}, first={self.first}, impl={self.impl}"
