"""Approximations of low rank: Linformer and Nystromformer."""

from __future__ import annotations

from typing import Any

from attlas.catalogue.card import Card, Degenerate

_SMALL: dict[str, Any] = {"dim": 23, "num_heads": 3, "head_dim": 6}
_CLAIMS = frozenset({"bidirectional", "packed", "backward"})
_NO_CACHE = "none: every projected key mixes all tokens, so it cannot decode"

CARDS = (
    Card(
        name="linformer",
        family="low-rank",
        summary="Learned matrices shorten the sequence of keys and values to a fixed number of them.",
        formula="y = softmax(Q (E K)^T / sqrt(d)) (F V),  E and F of r x n",
        paper="Wang et al., Linformer: Self-Attention with Linear Complexity, arXiv:2006.04768",
        year=2020,
        used_by=(),
        time="O(n r d) for r projected keys",
        memory="O(n d + r n)",
        cache=_NO_CACHE,
        supports=_CLAIMS,
        caveats=(
            "made for at most max_len positions; a shorter sequence uses the first columns of E and F",
            "the rows of E and F do not sum to 1: not an average of values, and not equal to attention for any learned setting "
            "except proj_len = n with E = F = identity",
            "the paper's layer-wise sharing (one E for all layers) is a matter of the model: assign the same parameter",
            "sequences of different lengths in a packed batch are projected one by one",
        ),
        reference="attlas.reference.lowrank:linformer",
        op="attlas.ops.attention:attention",
        mixer="attlas.nn.lowrank:Linformer",
        level=2,
        example={**_SMALL, "max_len": 43, "proj_len": 5},
        options_for={"packed": {"share": "none"}, "bidirectional": {"share": "key-value"}},
        variants={"share": "key-value"},
    ),
    Card(
        name="nystromformer",
        aliases=("nystrom",),
        family="low-rank",
        summary="Averages of segments stand for all queries and keys; the attention matrix is rebuilt from them.",
        formula="y = softmax(Q K~^T) Z softmax(Q~ K^T) V + conv(V);  Q~, K~ segment means, Z ~ pinv(softmax(Q~ K~^T)), scaled by "
        "1 / sqrt(d)",
        paper="Xiong et al., Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention, arXiv:2102.03902",
        year=2021,
        used_by=("Nystromformer (64 landmarks)",),
        time="O(n m d + m^3) for m landmarks",
        memory="O((n + m) d + m^2)",
        cache="none: landmarks average over later tokens, so it cannot decode",
        supports=_CLAIMS,
        caveats=(
            "weights may be negative and rows do not sum to 1 where the iteration has not converged",
            "the start of the iteration is scaled per sequence and head; transformers' default takes one maximum over batch and "
            "heads, so that its outputs depend on the other rows of the batch",
            "padding is left out of the landmarks; transformers averages over it",
            "segments differ by one token when the length is no multiple of the landmarks; transformers needs a multiple",
            "sequences of different lengths in a packed batch run one by one",
        ),
        reference="attlas.reference.lowrank:nystromformer",
        op="attlas.ops.attention:attention",
        mixer="attlas.nn.lowrank:Nystromformer",
        level=2,
        example={**_SMALL, "landmarks": 5, "conv_kernel": 3},
        options_for={"packed": {"conv_kernel": None}},
        degenerate=Degenerate({"landmarks": 307, "conv_kernel": None}, equals="full", equals_options={"rope": False}),
    ),
)
