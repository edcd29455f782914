"""Groups that grow with the distance, and grids read one axis at a time."""

from __future__ import annotations

from typing import Any

from attlas.catalogue.card import Card, Degenerate
from attlas.masks import Causal, Local, Strided

_SMALL: dict[str, Any] = {"dim": 23, "num_heads": 3, "head_dim": 6}

CARDS = (
    Card(
        name="hierarchical",
        aliases=("h-transformer", "h-transformer-1d"),
        family="multi-scale",
        summary="Near tokens one by one, far ones in groups that double in size with the distance; one softmax over all.",
        formula="y_i = sum_g |g| exp(q_i . k_g / sqrt(d_h)) v_g / sum_g |g| exp(q_i . k_g / sqrt(d_h)),  k_g, v_g means over "
        "group g; the groups of i at level l have 2^l tokens and fill the blocks of r 2^l tokens next to that of i, which no "
        "lower level fills",
        paper="Zhu & Soricut, H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences, arXiv:2107.11906",
        year=2021,
        used_by=("H-Transformer-1D",),
        time="O(n r d) with mean queries, O(n r log(n / r) d) with own ones, for blocks of r",
        memory="O(n log(n / r) d)",
        cache="2 r (1 + log2(n / r)) 2 h d_h when causal: 2 r groups of every level; none when bidirectional",
        supports=frozenset({"causal", "bidirectional", "packed", "decode", "backward"}),
        caveats=(
            "the causal form of the paper leaks: a group's mean query, which asks for all its tokens, is made of later tokens "
            "too; "
            "here every token of a causal layer asks with its own query (coarse_queries=False), and True is refused",
            "values are means with the number of tokens as a weight, the paper's sums over sums of ones; h-transformer-1d from "
            "the "
            "package index joins its levels without weights and with a maximum of each level's own: a constant v does not stay "
            "constant there",
            "no length need be a power of two: the last group of a level is short and weighs what it holds",
            "tested against explicit sums over groups, pair by pair in fp64: no independent implementation gives the right "
            "numbers",
            "rotary positions by default, before the means are taken; the paper adds positions to the input (rope=False)",
            "sequences of different lengths in a packed batch run one by one",
        ),
        reference="attlas.reference.multiscale:hierarchical",
        op="attlas.ops.attention:attention",
        mixer="attlas.nn.hierarchical:HierarchicalAttention",
        level=4,
        example={**_SMALL, "block": 4},
        options_for={"causal": {"causal": True}, "decode": {"causal": True, "block": 2}, "packed": {"coarse_queries": False}},
        variants={"block": 2, "coarse_queries": False},
        degenerate=Degenerate({"block": 16}, equals="full"),
    ),
    Card(
        name="multi-resolution",
        aliases=("mra", "mra-2"),
        family="multi-scale",
        summary="The pairs of blocks that matter most are computed token by token, the others by the means of their blocks.",
        formula="y_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij),  s_ij = q_i . k_j / sqrt(d_h) where the pair (x, y) of the blocks "
        "of i and j is among the m n / b largest of S_xy = q_x . k_y / sqrt(d_h), else S_xy;  q_x, k_y means over blocks of b "
        "tokens",
        paper="Zeng et al., Multi Resolution Analysis (MRA) for Approximate Self-Attention, arXiv:2207.10284",
        year=2022,
        used_by=("MRA (RoBERTa with MRA-2)",),
        time="O(n b m d + (n / b)^2 d) for blocks of b, of which m per row are computed token by token",
        memory="O(n m d + (n / b)^2)",
        cache="none: a block's mean looks at later tokens, so it cannot decode",
        supports=frozenset({"bidirectional", "packed", "backward", "compile"}),
        caveats=(
            "bidirectional only: mean queries, mean keys and the choice of blocks look at later tokens; causal=True is refused",
            "the two levels b and 1 of the paper's experiments (MRA-2; coarse=False: MRA-2-s); its general form has more",
            "the scores of all pairs of blocks are computed, (n / b)^2 of them: quadratic in the end, with a small factor",
            "the best pairs are those of the whole matrix of scores, as in the paper: some rows may have none, and are 0 without "
            "the coarse part; the authors' code ranks by the distance to the best of the row (ranking='relative')",
            "transformers' MRA returns zeros without its CUDA kernels; its Python part, with plain products in place of the "
            "kernels, is what this is tested against (ranking='relative'), beside a loop over pairs from the paper's equations",
            "transformers counts m per row of the longest sequence a model takes, adds 1e-6 to every denominator, and leaves the "
            "pairs that tie with the last chosen one out of the coarse part too",
            "no length need be a multiple of the block: the last block is short and its means are over what it holds",
            "sequences of different lengths in a packed batch run one by one",
        ),
        reference="attlas.reference.multiscale:multi_resolution",
        op="attlas.ops.resolution:multi_resolution_attention",
        mixer="attlas.nn.resolution:MultiResolution",
        level=3,
        example={**_SMALL, "block": 5, "blocks_per_row": 2},
        options_for={"packed": {"block": 3, "coarse": False, "ranking": "relative"}, "backward": {"diagonal": 1}},
        variants={"ranking": "relative", "diagonal": 1, "first": 1},
        degenerate=Degenerate({"blocks_per_row": 307}, equals="full", equals_options={"rope": False}),
    ),
    Card(
        name="axial",
        family="multi-dimensional",
        summary="Tokens are the cells of a grid and attend along one axis of it after the other.",
        formula="y = A_1(... A_k(x)),  A_a(x)_i = softmax over the cells j in line with i along axis a (q_i . k_j / sqrt(d_h)) "
        "v_j;  or "
        "the sum of A_a(x)",
        paper="Ho et al., Axial Attention in Multidimensional Transformers, arXiv:1912.12180",
        year=2019,
        used_by=("Axial Transformer", "MSA Transformer and AlphaFold 2 (rows and columns)"),
        time="O(n (n_1 + ... + n_k) d) for a grid of n_1 x ... x n_k cells, n^(1 + 1/k) when it is a cube",
        memory="O(k n d)",
        cache="causal: 2 h d_h per token and axis, the lines still read: all of the first axis, one row of the last; none "
        "otherwise",
        supports=frozenset({"causal", "bidirectional", "packed", "decode", "backward"}),
        caveats=(
            "the grid is an option of the layer, not of the call; a sequence may end before the grid is full",
            "the axes follow each other without a residual between them; the axial-attention package adds them up by default "
            "(combine='sum')",
            "causal: masking every axis never reaches the cells above and to the right; combine='shifted' reaches every earlier "
            "cell by whole rows, causal columns and a shift down by one row, the paper's two decoders in one layer; without the "
            "shift "
            "it would leak",
            "rotary positions are the coordinate along the axis; the paper adds positions to the input (rope=False)",
            "packed batches of different lengths go through the mask, which costs more tiles than the rearranged dense form",
        ),
        reference="attlas.reference.softmax:attention",
        op="attlas.ops.attention:attention",
        mixer="attlas.nn.axial:AxialAttention",
        level=4,
        pattern=Causal() & (Local(4) | Strided(4)),
        example={**_SMALL, "shape": (61, 5)},
        options_for={
            "causal": {"causal": True, "combine": "shifted"},
            "decode": {"causal": True, "shape": (13, 4, 6)},
            "packed": {"combine": "sum"},
        },
        variants={"shape": (51, 6), "combine": "sum"},
    ),
)
