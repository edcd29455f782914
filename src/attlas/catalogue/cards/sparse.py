"""Sparse patterns of long-document encoders: Longformer and BigBird."""

from __future__ import annotations

from typing import Any

from attlas.catalogue.card import Card
from attlas.masks import Global, Window

_SMALL: dict[str, Any] = {"dim": 23, "num_heads": 3, "head_dim": 6}
_WHERE: dict[str, Any] = {"reference": "attlas.reference.softmax:attention", "op": "attlas.ops.attention:attention"}

CARDS = (
    Card(
        name="longformer",
        aliases=("led-encoder",),
        family="fixed patterns",
        summary="A window around every token, and a few global tokens that see all through projections of their own.",
        formula="i local: y_i = softmax_j(q_i . k_j) v_j over |i - j| <= w or j in G; i in G: y_i = softmax_j(q'_i . k'_j) v'_j "
        "over all j",
        paper="Beltagy et al., Longformer: The Long-Document Transformer, arXiv:2004.05150",
        year=2020,
        used_by=("Longformer", "LED encoder", "Legal-Longformer"),
        time="O(n (w + g) d) for g global tokens",
        memory="O(n d)",
        cache="when causal: 2 h d_h (w + 2 g), bounded, when the first tokens are the global ones; else 4 h d_h per token",
        supports=frozenset({"causal", "bidirectional", "packed", "decode", "bounded-cache", "backward", "gqa"}),
        caveats=(
            "local tokens read the global ones through the local keys and values; the global projections serve only what the "
            "global tokens read",
            "a global token inside the window counts once",
            "transformers' attention_window=w is Window(w / 2, w / 2) here; the released code's is one side, Window(w, w)",
            "the causal form (an int window) is the paper's language model: global tokens then see only what precedes them",
            "global positions are the same in every sequence of a batch",
            "rotary positions by default; the paper adds learned positions to the input instead (rope=False)",
        ),
        mixer="attlas.nn.longformer:longformer",
        level=3,
        pattern=Window(2, 2) | Global((0, 9)),
        example={**_SMALL, "window": 5, "tokens": (0, 1)},
        options_for={
            "bidirectional": {"window": Window(3, 2), "tokens": (0, 11)},
            "gqa": {"num_kv_heads": 1, "tokens": (2, 7), "dilation": 2},
        },
        variants={"tokens": (0, 2), "window": 3},
        **_WHERE,
    ),
)
