"""The patterns of the Sparse Transformer, and block-sparse attention with a given layout."""

from __future__ import annotations

from typing import Any

from attlas.catalogue.card import Card, Degenerate
from attlas.masks import Blocks, Causal, Fixed, Strided, Window

_SMALL: dict[str, Any] = {"dim": 23, "num_heads": 3, "head_dim": 6}
_SHARED: dict[str, Any] = {
    "reference": "attlas.reference.softmax:attention",
    "op": "attlas.ops.attention:attention",
    "family": "fixed patterns",
    "supports": frozenset({"causal", "bidirectional", "packed", "decode", "backward", "gqa"}),
    "options_for": {"bidirectional": {"causal": False}, "gqa": {"num_kv_heads": 1}},
}
_TRACED = _SHARED | {"supports": _SHARED["supports"] | {"compile"}}
_CHILD = "Child et al., Generating Long Sequences with Sparse Transformers, arXiv:1904.10509"
_WIDE = 307  # wider than any sequence in the laws
_LAYOUT = ("1000000", "1100000", "0110000", "1001000", "0100100", "0010110", "1000011")

CARDS = (
    Card(
        name="strided",
        aliases=("sparse-strided",),
        summary="The last l keys, and every l-th key before them: two layers connect any two tokens.",
        formula="j allowed for i: i - l < j <= i, or (i - j) mod l = 0 and j <= i",
        paper=_CHILD,
        year=2019,
        used_by=("Sparse Transformer",),
        time="O(n (l + n / l) d), O(n^1.5 d) for a stride l near sqrt(n)",
        memory="O(n d)",
        cache="2 h d_h per token: every key is in some later query's column",
        caveats=(
            "one softmax over the union; per_head=True gives each head one of the two sets, as the paper also tries",
            "the cost holds for dense causal sequences, which are regrouped by residue; packed, bidirectional and per_head "
            "calls go through the mask, where a stride below the tile size saves nothing",
        ),
        mixer="attlas.nn.sparse_transformer:strided",
        level=4,
        pattern=Causal() & (Window.last(4) | Strided(4)),
        example={**_SMALL, "stride": 5},
        degenerate=Degenerate({"stride": 1}),
        **_TRACED,
    ),
    Card(
        name="fixed",
        aliases=("sparse-fixed",),
        summary="The token's own block, and the last c tokens of every block, which have to summarise it.",
        formula="j allowed for i: floor(j / l) = floor(i / l), or j mod l >= l - c; and j <= i",
        paper=_CHILD,
        year=2019,
        used_by=("Sparse Transformer",),
        time="O(n (l + c n / l) d), O(n^1.5 d) for blocks of l near sqrt(n)",
        memory="O(n d)",
        cache="2 h d_h per token; c / l of that would be enough beyond the current block",
        caveats=(
            "all heads use the same summary tokens, as in the paper; summary=(tokens, columns) gives each head its own, as the "
            "released code does, and goes through the mask",
            "the cost holds for dense causal sequences, whose summaries are gathered; packed and bidirectional calls go through "
            "the mask, where blocks below the tile size save nothing",
        ),
        mixer="attlas.nn.sparse_transformer:fixed",
        level=4,
        pattern=Causal() & Fixed(4, 1),
        example={**_SMALL, "block": 5, "summary": 2},
        degenerate=Degenerate({"block": _WIDE}),
        **_SHARED,
    ),
    Card(
        name="block-sparse",
        aliases=("blockwise-sparse",),
        summary="A given layout says which blocks of keys each block of queries sees.",
        formula="j allowed for i: layout[floor(i / b), floor(j / b)] (and j <= i)",
        paper="Qiu et al., Blockwise Self-Attention for Long Document Understanding, arXiv:1911.02972",
        year=2019,
        used_by=("BlockBERT", "Sparse Transformer"),
        time="O(m b^2 d), m marked blocks of b tokens",
        memory="O(n d)",
        cache="2 h d_h per token",
        caveats=("tokens past the layout see nothing and give zero",),
        mixer="attlas.nn.sparse_transformer:block_sparse",
        level=4,
        pattern=Causal() & Blocks(_LAYOUT, 2),
        example={**_SMALL, "layout": _LAYOUT, "block_size": 5},
        variants={"layout": ("1111111",) * 7},
        degenerate=Degenerate({"layout": ("1",), "block_size": _WIDE}),
        **_TRACED,
    ),
)
