"""Sparse patterns of long-document encoders: Longformer and BigBird."""

from __future__ import annotations

from typing import Any

from attlas.catalogue.card import Card, Degenerate
from attlas.masks import Blocks, Global, Random, Window
from attlas.nn.bigbird import bigbird_mask

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
            "global positions are the same in every sequence of a batch; one past the end of a sequence is nothing there",
            "rotary positions by default; the paper adds learned positions to the input instead (rope=False)",
        ),
        mixer="attlas.nn.longformer:longformer",
        level=4,
        pattern=Window(2, 2) | Global((0, 9)),
        example={**_SMALL, "window": 5, "tokens": (0, 1)},
        options_for={
            "bidirectional": {"window": Window(3, 2), "tokens": (0, 11)},
            "gqa": {"num_kv_heads": 1, "tokens": (2, 7), "dilation": 2},
        },
        variants={"tokens": (0, 2), "window": 3},
        **_WHERE,
    ),
    Card(
        name="bigbird",
        aliases=("big-bird",),
        family="fixed patterns",
        summary="Neighbouring blocks, global blocks at both ends and a few random blocks, in one softmax.",
        formula="j allowed for i: |b(i) - b(j)| <= w, or b(i) or b(j) global, or b(j) in R_h(b(i)); b(i) = floor(i / block)",
        paper="Zaheer et al., Big Bird: Transformers for Longer Sequences, arXiv:2007.14062",
        year=2020,
        used_by=("BigBird-RoBERTa", "BigBird-Pegasus encoder"),
        time="O(n b (2 w + 1 + r + g) d) for blocks of b, r random and g global ones",
        memory="O(n d)",
        cache="none when bidirectional, as in the paper; the causal form keeps 2 h d_h per token",
        supports=frozenset({"causal", "bidirectional", "packed", "decode", "backward"}),
        caveats=(
            "a key that is in several of the sets counts once; transformers in eval mode draws no random blocks and counts the "
            "first block 1 + r times instead: random_blocks=Undrawn(r) here, as the preset of checkpoints has it",
            "random blocks are drawn per head by a hash of seed and position, from all blocks; transformers draws from those "
            "that neither the window nor the ends cover, and from the global numpy generator",
            "a sequence with fewer blocks than random_blocks draws all it has; a global block past its end is nothing there",
            "the last block is that of the sequence, ragged where the length is no multiple of the block; no padding is needed",
            "bidirectional sequences of different lengths in one packed batch run one by one: their masks differ",
            "the causal form (no block from the end is global, blocks are drawn from the past) is not in the paper",
            "short sequences keep the pattern; transformers falls back to full attention up to 5 + 2 r blocks, as "
            "Undrawn(r) does",
            "rotary positions by default; the paper adds learned positions to the input instead (rope=False)",
        ),
        mixer="attlas.nn.bigbird:BigBirdAttention",
        level=4,
        pattern=bigbird_mask(2, (0, -1), Random(1, 2, seed=3, span=8), causal=False, length=16),
        example={**_SMALL, "block": 3, "random_blocks": 2},
        options_for={"causal": {"causal": True}, "decode": {"causal": True}},
        variants={"global_blocks": (0, 4), "random_blocks": Blocks(("1" * 40,) * 40, 3)},
        degenerate=Degenerate({"block": 307}, equals="full"),
        **_WHERE,
    ),
)
