"""Convolutions: instead of attention (Hyena) and beside it."""

from __future__ import annotations

from attlas.catalogue.card import Card

CARDS = (
    Card(
        name="hyena",
        aliases=("long-convolution",),
        family="convolution",
        summary="Gates and long convolutions in turn; the filters are small networks of time.",
        formula="v <- h_i * (v x_i) + D_i v x_i for i = N-1 ... 1,  y = v x_0",
        paper="Poli et al., Hyena Hierarchy, arXiv:2302.10866",
        year=2023,
        used_by=("HyenaDNA", "StripedHyena"),
        time="O(N n log n d), order N; decoding O(n d) per token",
        memory="O(N n d)",
        cache="(N - 1) d per token: there is no state of fixed size",
        supports=frozenset({"causal", "packed", "decode", "backward", "compile"}),
        caveats=(
            "causal only: the filters have no taps on later tokens",
            "sequences up to max_len only",
            "a state cannot be truncated; fork it before speculative tokens",
        ),
        reference="attlas.nn.hyena:direct_conv",
        op="attlas.ops.long_conv:long_conv",
        mixer="attlas.nn.hyena:Hyena",
        level=2,
        example={"dim": 23, "max_len": 61, "filter_width": 7},
        variants={"order": 3, "max_len": 67},
    ),
    Card(
        name="conv-hybrid",
        aliases=("convformer", "conformer", "conv-attention"),
        family="convolution",
        summary="Attention and a short convolution in one block, added or one after the other: the filter sees the neighbours.",
        formula="y = a(x) + c(x), or c + a(x + c), or a + c(x + a);  c(x) = W_2 (w * g(W_1 x)), a = softmax attention",
        paper="Gulati et al., Conformer, arXiv:2005.08100; Yu et al., MetaFormer Baselines (ConvFormer), arXiv:2210.13452",
        year=2020,
        used_by=("Conformer", "CAFormer", "SeamlessM4T"),
        time="O(n^2 d + n d^2 e), e = expansion",
        memory="O(n d e)",
        cache="2 h_kv d_h n, and (kernel - 1) e d in fp32",
        supports=frozenset({"causal", "bidirectional", "packed", "decode", "backward", "gqa", "compile"}),
        caveats=(
            "neither paper is about text: `order` and `conv` choose ConvFormer's or Conformer's parts",
            "conv='gated' has a layer norm where the Conformer paper has a batch norm, which mixes the rows of a batch",
            "the papers' filters are centred; causal=True shifts them to the past",
            "checked against SeamlessM4T's convolution module; the separable module against a loop from the paper's equations",
            "a state cannot be truncated; fork it before speculative tokens",
        ),
        reference="attlas.reference.convolution:depthwise",
        op="attlas.ops.long_conv:short_conv",
        mixer="attlas.nn.conv_hybrid:ConvHybrid",
        level=2,
        example={"dim": 22, "num_heads": 2, "head_dim": 6, "kernel": 3},
        options_for={
            "bidirectional": {"causal": False, "kernel": 5},
            "gqa": {"num_heads": 4, "num_kv_heads": 2, "conv": "gated", "order": "attention-first"},
            "decode": {"order": "conv-first"},
        },
        variants={"conv": "gated", "order": "conv-first", "causal": False, "kernel": 5},
    ),
)
