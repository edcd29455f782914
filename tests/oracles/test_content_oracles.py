"""Reformer's LSH and local attention against transformers with the same weights and the same hashes, in fp64; its reversible
layers against transformers' encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from same_weights import EXACT, Pair, inputs, lively
from torch import nn

from attlas.masks import Blocks, Causal, Mask
from attlas.nn.attention import Attention
from attlas.nn.bigbird import BlockWindow
from attlas.nn.reformer import Reformer
from attlas.nn.reversible import Reversible
from hf_models import transformers

DIM, HEADS, CHUNK, SEED = 66, 6, 5, 3


def config(kind: str = "lsh", **changes: Any) -> Any:
    return transformers().ReformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_head_size=11, attn_layers=[kind], hash_seed=SEED,
        lsh_attn_chunk_length=CHUNK, local_attn_chunk_length=CHUNK, lsh_attention_probs_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, **changes,
    )  # fmt: skip


def reformer(**options: Any) -> Reformer:
    """With rotations in fp64, as transformers draws them for fp64 inputs."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return Reformer(DIM, HEADS, chunk=CHUNK, rule="trax", seed=SEED, **options)
    finally:
        torch.set_default_dtype(default)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("rounds", "buckets"), [(1, 8), (3, 4), (2, [4, 2])])
@pytest.mark.parametrize(("before", "after", "length"), [(1, 0, 55), (1, 1, 35), (2, 0, 25), (1, 0, CHUNK)])
def test_lsh_self_attention(
    decoder: bool, rounds: int, buckets: int | Sequence[int], before: int, after: int, length: int
) -> None:
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    settings = config(
        is_decoder=decoder, num_hashes=rounds, num_buckets=buckets, lsh_num_chunks_before=before, lsh_num_chunks_after=after
    )
    theirs, out = lively(LSHSelfAttention(settings, layer_idx=0)), lively(nn.Linear(DIM, DIM, bias=False), seed=3)
    mine = reformer(before=before, after=after, rounds=rounds, buckets=buckets, causal="content-leaks" if decoder else False)
    pair = Pair(mine).linear(theirs.query_key, "q_proj").linear(theirs.value, "v_proj").linear(out, "o_proj")
    # What a token that sees no other gets, they weigh with exp(-1e5): the same number, less exactly rounded.
    pair.must_agree(lambda x: out(theirs(x).hidden_states), mine, inputs(2, length, DIM), atol=1e-10)


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 0), (2, 0), (1, 1)])
def test_local_self_attention_is_a_mask(decoder: bool, before: int, after: int) -> None:
    """Their chunks form a ring, which a causal mask hides where they look back only."""
    from transformers.models.reformer.modeling_reformer import LocalSelfAttention

    length, chunks = 35, 7
    settings = config("local", is_decoder=decoder, local_num_chunks_before=before, local_num_chunks_after=after)
    theirs, out = lively(LocalSelfAttention(settings, layer_idx=0)), lively(nn.Linear(DIM, DIM, bias=False), seed=3)
    row, column = torch.arange(chunks)[:, None], torch.arange(chunks)
    ring = [(row + o) % chunks == column for o in range(-before, after + 1)]
    mask: Mask = BlockWindow(CHUNK, before, after)
    if after or not decoder:
        mask = mask | Blocks(torch.stack(ring).any(0), CHUNK)
    if decoder:
        mask = mask & Causal()
    pair = Pair(Attention(DIM, HEADS, mask=mask, rope=False))
    for name in ("query", "key", "value"):
        pair.linear(getattr(theirs, name), f"{name[0]}_proj")
    pair.linear(out, "o_proj")
    pair.must_agree(lambda x: out(theirs(x).hidden_states), pair.mine, inputs(2, length, DIM), atol=EXACT * 10)


def test_reversible_layers() -> None:
    """Outputs and gradients of transformers' encoder, which is reversible too: two layers, each with its own norms."""
    from transformers.models.reformer.modeling_reformer import ReformerEncoder

    settings = config(num_hashes=2, num_buckets=4, feed_forward_size=29, is_decoder=True)
    settings.attn_layers, settings.num_hidden_layers = ["lsh", "lsh"], 2
    theirs = lively(ReformerEncoder(settings)).train()
    layers = []
    for layer in theirs.layers:
        mixer = reformer(rounds=2, buckets=4, causal="content-leaks").double()
        linears = (layer.attention.self_attention.query_key, layer.attention.self_attention.value, layer.attention.output.dense)
        for projection, their_linear in zip((mixer.q_proj, mixer.v_proj, mixer.o_proj), linears, strict=True):
            projection.weight = nn.Parameter(their_linear.weight.detach().clone())
        layers.append((nn.Sequential(layer.attention.layer_norm, mixer), layer.feed_forward))
    mine = Reversible(layers)
    shared = [*theirs.layers[0].feed_forward.parameters(), theirs.layers[1].attention.layer_norm.weight]
    found = []
    probe = inputs(2, 25, DIM, seed=4)
    for run in (lambda x: theirs(x).hidden_states, lambda x: theirs.layer_norm(torch.cat(mine(x, x), -1))):
        x = inputs(2, 25, DIM).requires_grad_()
        theirs.zero_grad(set_to_none=True)
        y = run(x)
        (y[..., :DIM] * probe + y[..., DIM:].square()).sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in shared)])
        if len(found) == 1:
            first = theirs.layers[0].attention.self_attention.query_key.weight.grad
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-8, rtol=0)
    torch.testing.assert_close(layers[0][0][1].q_proj.weight.grad, first, atol=1e-8, rtol=0)
