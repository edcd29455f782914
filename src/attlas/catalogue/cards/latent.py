"""Latent attention: keys and values made from one small vector per token."""

from __future__ import annotations

from attlas.catalogue.card import Card
from attlas.masks import Causal

CARDS = (
    Card(
        name="multi-head-latent",
        aliases=("mla", "latent", "multi-head-latent-attention"),
        family="heads",
        summary="All keys and values are linear maps of one small latent per token, and only the latent is cached.",
        formula="c_t = norm(x_t W_a); k_t,h = [c_t W_k,h ; rope(x_t W_r)]; v_t,h = c_t W_v,h; y_t = o(softmax_j(q_t,h . k_j,h / "
        "sqrt(d_n + d_r)) v_j,h)",
        paper="DeepSeek-AI, DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model, arXiv:2405.04434",
        year=2024,
        used_by=("DeepSeek-V2", "DeepSeek-V3 and R1 (latent 512, rope 64)", "Kimi K2"),
        time="O(n^2 h (d_n + d_r + d_v) / 2) expanded; O(h (2 r + d_r)) per cached token when decoding, for a latent of r",
        memory="O(n h (d_n + d_r + d_v)) for the expanded keys and values",
        cache="r + d_r per token: the normed latent and the rotated key that all heads share",
        supports=frozenset({"causal", "bidirectional", "packed", "decode", "backward", "compile"}),
        caveats=(
            "the scale is that of the expanded width (192 in DeepSeek-V3), in the absorbed form too",
            "rotary pairs are interleaved, as in the released checkpoints; a Rope with interleaved=False is for permuted ones",
            "decoding multiplies queries and outputs by W_k and W_v instead of expanding the cache: the same function, other "
            "rounding; prompts and long chunks, for which it is cheaper, expand it for the time of the step",
            "the norms' eps is 1e-6, whatever the rest of the model uses",
        ),
        reference="attlas.reference.softmax:attention",
        op="attlas.ops.attention:attention",
        mixer="attlas.nn.latent:MultiHeadLatent",
        level=4,
        pattern=Causal(),
        example={
            "dim": 23, "num_heads": 3, "kv_lora_rank": 11, "q_lora_rank": 13, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4,
            "v_head_dim": 7,
        },
        options_for={"bidirectional": {"causal": False, "q_lora_rank": None}},
    ),
)  # fmt: skip
