"""Other head layouts: heads that are mixed with each other, and keys that change as the sequence goes on."""

from __future__ import annotations

from typing import Any

from attlas.catalogue.card import Card, Degenerate
from attlas.masks import Causal

_CASTLE: dict[str, Any] = {
    "family": "heads",
    "paper": "Song et al., Causal Attention with Lookahead Keys, arXiv:2509.07301",
    "year": 2025,
    "used_by": (),
    "memory": "O(n h d_h): inputs, output and one lookahead key per token; the backward pass undoes the sweep block by block",
    "cache": "4 h d_h per token: q^U, k, v, and u in fp32; every step rewrites u",
    "supports": frozenset({"causal", "packed", "decode", "backward", "compile"}),
    "reference": "attlas.reference.lookahead:castle_parallel",
    "op": "attlas.ops.lookahead:lookahead_attention",
    "level": 2,
    "pattern": Causal(),
}
_CASTLE_READ = "y_t = softmax_(s<=t)(q_t . k_s / sqrt(d_h) - silu(q_t . u_s^t / sqrt(d_h))) v_s"
_CASTLE_CAVEATS = (
    "seven projections where multi-head attention has four: for as many parameters take 4/7 of the heads, as the paper does",
    "no kernel of its own: blocks of 64 queries in torch, so slower than causal attention by more than its flops say",
    "the cache cannot be truncated nor lie in shared pages, as a later token changes every key that its reach covers; fork it "
    "before speculative tokens",
    "which tensors the paper rotates is not said: here all but v, since a lookahead key is a sum of v^U and meets q",
    "first-order gradients only",
    "NaN or inf in a later token reaches earlier queries of the same block of 64",
)

CARDS = (
    Card(
        name="interleaved-head",
        aliases=("iha", "interleaved-head-attention"),
        family="heads",
        summary="Every head attends over P mixtures of all heads, laid out as a sequence that is P times as long.",
        formula="q'_(n,h,p) = sum_m a^Q[m,h,p] q_(n,m), also k', v'; A_h = softmax(Q'_h K'_h^T / sqrt(d_h)) V'_h over n P "
        "virtual tokens; o_(n,h) = sum_(g,p) R[h,g,p] A_(g,(n,p))",
        paper="Duvvuri et al., Interleaved Head Attention, arXiv:2602.21371",
        year=2026,
        used_by=(),
        time="O(P^2 n^2 h d_h / 2) for P pseudo-heads, P^2 times multi-head attention; the paper pays for it with windows of "
        "n / (2 P^2) tokens in four layers of five",
        memory="O(n P h d_h) for the virtual tokens",
        cache="2 h d_h per token, as in multi-head attention: keys and values before mixing; a window + 1 tokens with a window",
        supports=frozenset({"causal", "bidirectional", "packed", "decode", "backward", "compile"}),
        caveats=(
            "the paper leaves open whether a pseudo-query sees all pseudo-keys of its own token: causal=True is the flat order "
            "of its text (only those up to its own), causal='token' lets it see all",
            "the paper writes the collapse both for all heads at once and per head: collapse='global' or 'per-head'",
            "equal pseudo-keys count P times in the softmax, and a pseudo-head whose mixing is 0 still takes a share of it",
            "under the flat order it is multi-head attention only with P = 1, or without rotary positions and with R picking the "
            "last pseudo-head",
            "rotary positions are those of the virtual tokens, n P + p",
            "a decode step mixes every cached token anew instead of keeping P times as much: 4 h^2 P d flops per cached token",
            "no code of the authors is known: checked against a literal loop over the paper's equations",
            "the start (mixing near the identity, collapse to the mean) is this library's; the paper's text gives none",
        ),
        reference="attlas.reference.interleaved:interleaved_head",
        op="attlas.ops.attention:attention",
        mixer="attlas.nn.interleaved:InterleavedHead",
        level=2,
        pattern=Causal(),
        example={"dim": 23, "num_heads": 3, "head_dim": 4, "pseudo_heads": 2},
        options_for={"bidirectional": {"causal": False, "collapse": "per-head"}},
        variants={"pseudo_heads": 5, "window": 5, "causal": "token", "collapse": "per-head"},
    ),
    Card(
        name="castle",
        aliases=("lookahead-keys", "causal-attention-with-lookahead-keys"),
        summary="Causal attention whose keys go on gathering from the tokens that come after them, as far as the query may see.",
        formula="u_s^t = sum_(s<j<=t) sigmoid(q^U_s . k^U_j / sqrt(d_h)) v^U_j; " + _CASTLE_READ,
        time="O(n^2 h d_h): about 2.5 times the flops per pair of causal attention; O(n h d_h) per decoded token, which rewrites "
        "all n lookahead keys",
        caveats=_CASTLE_CAVEATS,
        mixer="attlas.nn.castle:castle",
        example={"dim": 23, "num_heads": 3, "head_dim": 4},
        **_CASTLE,
    ),
    Card(
        name="castle-swl",
        aliases=("sliding-window-lookahead", "castle-sliding"),
        summary="Causal attention whose keys go on gathering from the next `window` tokens, as far as the query may see.",
        formula="u_s^t = sum_(s<j<=min(t,s+w)) sigmoid(q^U_s . k^U_j / sqrt(d_h)) v^U_j; " + _CASTLE_READ,
        time="O(n^2 h d_h + n w h d_h): about 1.5 times the flops per pair of causal attention; O(n h d_h) per decoded token, "
        "which rewrites w lookahead keys",
        caveats=("the window limits what a key gathers, not how far back a query sees: the cache grows", *_CASTLE_CAVEATS),
        mixer="attlas.nn.castle:castle_swl",
        example={"dim": 23, "num_heads": 3, "head_dim": 4, "window": 5},
        degenerate=Degenerate({"window": 1000}, equals="castle"),
        **_CASTLE,
    ),
    Card(
        name="linear-latent",
        aliases=("transmla",),
        family="heads",
        summary="Latent attention of linear maps alone, with shared rotary keys: what a trained layer can be rewritten as.",
        formula="c_t = x_t W_a; r_(t,i) = rope(x_t W_(r,i)); k_(t,h) = [c_t W_(k,h); r_(t,1); ...]; v_(t,h) = c_t W_(v,h); "
        "y_t = softmax(scale q k^T) v",
        paper="Meng et al., TransMLA: MLA Is All You Need, arXiv:2502.07864",
        year=2025,
        used_by=(),
        time="O(n^2 h (d_n + m d_r + d_v) / 2) for m rotary keys; O(h (2 r + m d_r)) per cached token when decoding, "
        "for a latent of r",
        memory="O(n h (d_n + m d_r + d_v)) for the expanded keys and values",
        cache="r + m d_r per token: the latent and the rotated keys that all heads share",
        supports=frozenset({"causal", "bidirectional", "packed", "decode", "backward", "compile"}),
        caveats=(
            "made by attlas.nn.convert.to_latent from multi-head or grouped-query layers (whole models: "
            "attlas.models.convert.to_latent_model): exact at full rank where as many rotary keys are "
            "kept as the layer has key heads (or where it has no rotary positions)",
            "with fewer rotary keys the rest of every key loses its rotation, an approximation that further training must mend",
            "not the form of DeepSeek's checkpoints, whose norms on the latents no trained layer can be rewritten with",
            "of the paper's steps: the rotation across heads that gathers rotary energy, from the weights; not the folding of "
            "frequencies, nor the balancing of keys and values by activations",
        ),
        reference="attlas.reference.softmax:attention",
        op="attlas.ops.attention:attention",
        mixer="attlas.nn.linear_latent:LinearLatent",
        level=2,
        pattern=Causal(),
        example={
            "dim": 23,
            "num_heads": 3,
            "kv_lora_rank": 11,
            "qk_nope_head_dim": 5,
            "qk_rope_head_dim": 4,
            "v_head_dim": 7,
            "rope_keys": 2,
        },
        options_for={"bidirectional": {"causal": False, "rope_keys": 0, "bias": "qkv"}},
    ),
)
