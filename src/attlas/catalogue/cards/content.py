"""Tokens that are alike attend to each other: hashing (Reformer), clustered queries, routing."""

from __future__ import annotations

from typing import Any

from attlas.catalogue.card import Card, Degenerate

_SMALL: dict[str, Any] = {"dim": 23, "num_heads": 3, "head_dim": 6}
_HASHED = frozenset({"causal", "bidirectional", "packed", "decode", "backward", "compile"})
_CLUSTERED = frozenset({"bidirectional", "packed", "backward", "compile"})
_NO_CACHE = "none: clusters are made from all queries, so it cannot decode"
_LEAK = (
    "causal='content-leaks' is the paper's language model: masked by position, but later tokens change which earlier ones meet, "
    "so it is not causal and cannot decode"
)

CARDS = (
    Card(
        name="reformer",
        aliases=("lsh", "lsh-attention"),
        family="content-based",
        summary="Tokens whose queries hash alike attend to each other, in chunks of a list sorted by hash.",
        formula="y_i = sum_j softmax_j(q_i . k_j) v_j over j in P_i;  k_j = q_j / |q_j|;  P_i = union over rounds r of {j : "
        "h_r(j) = h_r(i), chunk_r(i) - 1 <= chunk_r(j) <= chunk_r(i)};  h_r(q) = argmax([q R_r; -q R_r])",
        paper="Kitaev et al., Reformer: The Efficient Transformer, arXiv:2001.04451",
        year=2020,
        used_by=("Reformer (enwik8, Crime and Punishment)",),
        time="O(r n m d) for r rounds of hashing and chunks of m, and r sorts",
        memory="O(r n (m + d)); attlas.nn.reversible keeps no activations between layers",
        cache="when causal=True: 2 h d_h and r h hashes per token; else none",
        supports=_HASHED,
        caveats=(
            _LEAK,
            "causal=True sees the chunk nearest earlier tokens of the bucket in each round, which no later token changes; it is "
            "not in the paper, costs the same, and a decode step still compares the hashes, and reads the keys, of all tokens "
            "held; a prefill through a cache takes that way too",
            "keys that a token may not see are masked by a bias: NaN or inf in one token reaches the others of its chunk",
            "the paper omits the scale of the scores; keys here have length 1 and no further scale, as in trax and transformers; "
            "reformer-pytorch multiplies by head_dim ** -0.5 (scale=); rule='paper' is its attend_across_buckets=False, "
            "allow_duplicate_attention=False",
            "rule='trax' (trax, transformers): keys of other buckets in the chunks count too, a key found in several rounds "
            "counts as often, and the first chunk of a round looks at the last one of the round before",
            "transformers needs a length that the chunks divide; here the last chunk is short, and no padding is hashed",
            "the number of buckets is fixed when the mixer is built; transformers sets it from the first length it sees",
            "shared queries and keys: a token sees itself only where it sees no other",
            "Reformer's local layers are Attention with the mask BlockWindow(chunk, before, after) & Causal() and rope=False",
            "no position code: the paper adds axial positions to the input",
            "hashes of reversible layers are taken again in the backward pass, where rounding may tip one",
        ),
        reference="attlas.reference.content:reformer",
        op="attlas.ops.lsh:lsh_attention",
        mixer="attlas.nn.reformer:Reformer",
        level=4,
        example={**_SMALL, "chunk": 5, "rounds": 2, "buckets": 4},
        options_for={
            "causal": {"causal": True},
            "decode": {"causal": True},
            "bidirectional": {"after": 1, "buckets": (4, 2)},
            "packed": {"rule": "trax"},
            "backward": {"causal": "content-leaks"},
        },
        variants={"rule": "trax"},
    ),
    Card(
        name="clustered",
        aliases=("clustered-attention",),
        family="content-based",
        summary="Queries are clustered, and all of a cluster get the attention of their mean.",
        formula="y_i = softmax(Q^c K^T / sqrt(d_h)) V for i in cluster c,  Q^c = mean of the cluster's queries; clusters by "
        "K-means of sign(A q) in Hamming distance",
        paper="Vyas et al., Fast Transformers with Clustered Attention, arXiv:2007.04825",
        year=2020,
        used_by=("fast-transformers",),
        time="O(n c d + n c b t) for c clusters, b bits and t steps of K-means",
        memory="O(n d + c d)",
        cache=_NO_CACHE,
        supports=_CLUSTERED,
        caveats=(
            "bidirectional only: clusters depend on all queries; the authors' causal code masks by position and leaks through it",
            "planes and first centres are functions of seed and length; the authors' code draws both anew at every call",
            "a tied bit becomes 0, a tied query goes to the first of its centres, a centre without members stays; the authors' "
            "code draws it anew",
            "the authors' code is a compiled extension: the op is tested against a literal loop of the paper's equations, and "
            "was compared with their code by hand (fast-transformers 0.4.0, the same planes and first centres: equal up to fp32 "
            "rounding)",
            "hash_bias=True adds offsets to the planes, as the authors' code does by default",
            "sequences of different lengths in a packed batch run one by one",
        ),
        reference="attlas.reference.content:clustered",
        op="attlas.ops.cluster:clustered_attention",
        mixer="attlas.nn.clustered:clustered",
        level=2,
        example={**_SMALL, "clusters": 5, "bits": 7, "iterations": 2},
        options_for={"packed": {"clusters": 3, "hash_bias": True}},
        variants={"iterations": 0},  # K-means of the example stands still after two
        degenerate=Degenerate({"clusters": 307}, equals="full", equals_options={"rope": False}),
    ),
    Card(
        name="improved-clustered",
        aliases=("i-clustered",),
        family="content-based",
        summary="Clustered attention, with exact weights for the keys that matter most to each cluster.",
        formula="y_i = m_c softmax(q_i K_T^T / sqrt(d_h)) V_T + sum_(j not in T) A^c_j v_j;  A^c = softmax(Q^c K^T / sqrt(d_h)), "
        " T = top-k of A^c,  m_c = sum_(j in T) A^c_j",
        paper="Vyas et al., Fast Transformers with Clustered Attention, arXiv:2007.04825",
        year=2020,
        used_by=("fast-transformers",),
        time="O(n (c + k) d + n c b t) for c clusters, top k, b bits and t steps of K-means",
        memory="O(n (c + d) + c k d)",
        cache=_NO_CACHE,
        supports=_CLUSTERED,
        caveats=(
            "bidirectional only; the authors' causal form drops all keys outside of the top k and leaks through the clusters",
            "the authors' code lets no gradient through m_c, the mass of the top k; here it is the full one",
            "the rest of the caveats of clustered holds too",
        ),
        reference="attlas.reference.content:clustered",
        op="attlas.ops.cluster:clustered_attention",
        mixer="attlas.nn.clustered:improved_clustered",
        level=2,
        example={**_SMALL, "clusters": 5, "topk": 7, "bits": 7, "iterations": 2},
        options_for={"packed": {"clusters": 3, "topk": 2, "hash_bias": True}},
        variants={"iterations": 0},
        degenerate=Degenerate({"topk": 307}, equals="full", equals_options={"rope": False}),
    ),
    Card(
        name="routing",
        aliases=("routing-transformer",),
        family="content-based",
        summary="Clusters with learned means take the queries and keys nearest to them, which attend to each other.",
        formula="y_i = mean over clusters c with i in I_c of softmax_(j in J_c)(q_i . k_j / sqrt(d_h)) v_j;  I_c, J_c = top-w of "
        "mu_c . q, mu_c . k",
        paper="Roy et al., Efficient Content-Based Sparse Attention with Routing Transformers, arXiv:2003.05997",
        year=2020,
        used_by=("Routing Transformer (PG-19)",),
        time="O(n c d + c w^2 d) for c clusters that take w tokens; O(n^1.5 d) with c = sqrt(n), w = n / c",
        memory="O(n c + c w (w + d))",
        cache="when causal=True: 2 h d_h and h hashes per token; else none",
        supports=_HASHED,
        caveats=(
            _LEAK,
            "causal=True (each token sees the last w tokens of its own cluster) is not in the paper; there a token has one "
            "cluster and nobody is left out",
            "a token that no cluster takes gets 0; one that several take gets the mean of their results",
            "means move in training mode only, by an average of the unit queries and keys nearest to them, kept at length 1; the "
            "paper adds sums; in 16 bits they would stand still, so keep them in fp32",
            "the first means are random; routing-transformer runs K-means on the first batch, and adds memory tokens",
            "the paper gives half of the heads local windows instead: put layers of both kinds into a model",
            "tested against a literal loop of the paper's algorithm, and compared with routing-transformer 1.6.1 by hand: the "
            "same with the same means, which move alike, but for the 1e-5 that it adds to the number of results it averages",
        ),
        reference="attlas.reference.content:routing",
        op="attlas.ops.cluster:routed_attention",
        mixer="attlas.nn.routing:Routing",
        level=2,
        example={**_SMALL, "clusters": 3, "window": 11},
        options_for={
            "causal": {"causal": True, "window": 5},
            "decode": {"causal": True, "window": 5},
            "backward": {"causal": "content-leaks"},
            "packed": {"clusters": 5, "window": None},  # a function of the length
        },
        variants={"decay": 1.5},  # it matters in training only; this one is refused
    ),
)
