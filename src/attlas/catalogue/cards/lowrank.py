"""Low rank and compression: Linformer, Nystromformer, memory-compressed attention, Synthesizer, lambda layers."""

from __future__ import annotations

from typing import Any

from attlas.catalogue.card import Card, Degenerate

_SMALL: dict[str, Any] = {"dim": 23, "num_heads": 3, "head_dim": 6}
_CLAIMS = frozenset({"bidirectional", "packed", "backward", "compile"})
_NO_CACHE = "none: every projected key mixes all tokens, so it cannot decode"

CARDS = (
    Card(
        name="linformer",
        family="low-rank",
        summary="Learned matrices shorten the sequence of keys and values to a fixed number of them.",
        formula="y = softmax(Q (E K)^T / sqrt(d_h)) (F V),  E and F of r x n",
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
        "1 / sqrt(d_h)",
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
            "heads, so that its outputs depend on the other rows of the batch (start='batch')",
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
        variants={"start": "batch"},
        degenerate=Degenerate({"landmarks": 307, "conv_kernel": None}, equals="full", equals_options={"rope": False}),
    ),
    Card(
        name="memory-compressed",
        family="low-rank",
        summary="Convolutions with stride shorten the keys and values; every query attends to the short sequence.",
        formula="y = softmax(Q K'^T / sqrt(d_h)) V',  K'_m = sum_i W_i k_{m f + i} + b, V' likewise;  causal: entry m from token "
        "(m + 1) f - 1 on",
        paper="Liu et al., Generating Wikipedia by Summarizing Long Sequences, arXiv:1801.10198",
        year=2018,
        used_by=("T-DMCA (WikiSum): local, compressed, local, compressed, local layers, f = 3",),
        time="O(n^2 d / f) for f tokens per entry",
        memory="O(n d)",
        cache="2 h d_h per f tokens, and f uncompressed tokens; none when bidirectional",
        supports=frozenset({"causal", "bidirectional", "packed", "decode", "backward", "compile"}),
        caveats=(
            "a causal layer sees no token of its own unfinished group, and the first f - 1 tokens see nothing (start='none'): "
            "put "
            "local layers beside it, as the paper does",
            "tensor2tensor, by the same authors, convolves the hidden states, prepends the first token (start='first') and shows "
            "an "
            "entry one token later (strict=True); the memory-compressed-attention package pads on the left, prepends a learned "
            "key "
            "(start='null'), convolves head by head (per_head=True) and scales by the model's width instead of the head's",
            "no position code: add positions to the input",
            "sequences of different lengths in a packed batch are convolved one by one",
            "tested against a loop over entries in fp64",
        ),
        reference="attlas.reference.multiscale:memory_compressed",
        op="attlas.ops.attention:attention",
        mixer="attlas.nn.compressed:MemoryCompressedAttention",
        level=4,
        example={**_SMALL, "factor": 3, "start": "first"},
        options_for={
            "bidirectional": {"causal": False, "start": "null"},
            "decode": {"start": "null", "per_head": True},
            "packed": {"start": "none", "strict": True, "factor": 2},
        },
        variants={"start": "null", "factor": 2},
    ),
    Card(
        name="synthesizer",
        family="low-rank",
        summary="Attention weights that are predicted from the query token alone, or learned outright; may be mixed with dot "
        "products.",
        formula="y = softmax(sum_p alpha_p S_p) V;  dense S_ij = W2_j . relu(W1 x_i + b1) + b2_j, random S = R, factorised "
        "random "
        "S = R1 R2^T, factorised dense S_ij = A_i[j // b] B_i[j % b]",
        paper="Tay et al., Synthesizer: Rethinking Self-Attention in Transformer Models, arXiv:2005.00743",
        year=2020,
        used_by=(),
        time="O(n^2 d), without the products of queries and keys for all kinds but dot-product",
        memory="O(n d) with n_max d weights; random: n_max^2 weights and O(n^2) scores, factorised dense O(n^2) scores",
        cache="h d_h per token (v), twice that with dot-product; none when bidirectional",
        supports=frozenset({"causal", "bidirectional", "packed", "decode", "backward"}),
        caveats=(
            "made for at most max_len positions: weights are learned for absolute positions",
            "the shares of a mixture are softmax(mix), of two kinds Mesh TensorFlow's sigmoid (plus_alpha); combine='sum' adds "
            "the scores up (its plus)",
            "dense layers have a hidden layer of their own per head; factorised dense fills max_len with the outer product of a "
            "and b "
            "= ceil(sqrt(max_len)) outputs, cut at the end, where the paper wants a b = max_len",
            "dot products are scaled by 1 / sqrt(d_h); T5 and Mesh TensorFlow do not scale (scale=1.0)",
            "sequences of different lengths in a packed batch run one by one",
            "tested against a loop over tokens in fp64; there is no other implementation in torch",
        ),
        reference="attlas.reference.multiscale:synthesizer",
        op="attlas.ops.attention:attention",
        mixer="attlas.nn.synthesizer:Synthesizer",
        level=4,
        example={**_SMALL, "max_len": 43, "kinds": ("dense", "factorised-random"), "hidden": 5, "rank": 3},
        options_for={
            "causal": {"causal": True, "kinds": ("factorised-dense", "factorised-random", "dot-product")},
            "decode": {"causal": True},
            "bidirectional": {"kinds": ("random", "factorised-random", "dense")},
        },
        variants={"kinds": ("dense", "factorised-random", "fixed-random"), "max_len": 31, "combine": "sum", "scale": 1.0},
    ),
    Card(
        name="lambda",
        aliases=("lambda-networks", "lambda-layer"),
        family="low-rank",
        summary="The context becomes a linear map, and the neighbourhood of every position another; queries are put through "
        "their sum.",
        formula="y_n = (sum_m softmax_m(K)_m v_m^T + sum_m E_{m-n} v_m^T)^T q_n",
        paper="Bello, LambdaNetworks: Modeling Long-Range Interactions Without Attention, arXiv:2102.08602",
        year=2021,
        used_by=("LambdaResNet",),
        time="O(n d_k d (r / h + 1)) for a scope of r and h heads",
        memory="O(n d_k d / h): a map per position",
        cache="causal: (d_k + r) d / h numbers, whatever the length; none when bidirectional",
        supports=frozenset({"causal", "bidirectional", "packed", "decode", "bounded-cache", "backward"}),
        caveats=(
            "for sequences: the scope is one-dimensional, and E a function of the distance alone",
            "the causal form is not in the paper: a running softmax over the keys and a scope that looks back",
            "batch norm on queries and values as in the paper, unless causal: while it trains, rows of a batch influence each "
            "other",
            "no softmax over the tokens for each query: not an average of values",
            "no output projection, as in the paper; no bias in the position lambdas, which the lambda-networks package has",
            "tested against the lambdas written out token by token in fp64",
        ),
        reference="attlas.reference.multiscale:lambda_layer",
        op="attlas.ops.scan:scan",
        mixer="attlas.nn.lambda_layer:LambdaLayer",
        level=4,
        example={"dim": 21, "num_heads": 3, "dim_k": 5, "dim_u": 2, "scope": 7},
        options_for={
            "causal": {"causal": True, "scope": 4},
            "decode": {"causal": True},
            "bounded-cache": {"causal": True},
        },
        variants={"norm": False, "scope": 5},
    ),
)
