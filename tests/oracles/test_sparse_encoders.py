"""Longformer and BigBird against transformers' layers with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from same_weights import EXACT, Pair, inputs, lively
from torch import Tensor, nn

from attlas.catalogue.index import build
from attlas.masks import Blocks, Window
from attlas.nn.bigbird import BlockWindow
from hf_models import transformers

DIM, HEADS = 66, 6
T = 24


def without_key_bias_gradients(pair: Pair, *names: str) -> None:
    """A bias on all keys of one softmax cancels: its gradient is 0, theirs is the rounding noise of an fp32 softmax."""
    pair.links = [link for link in pair.links if link[1][0] not in names]
    for name in names:
        del pair.parameters[name]


def longformer(window: int, tokens: tuple[int, ...]) -> Any:
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = transformers().LongformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_window=[window], attention_probs_dropout_prob=0.0
    )
    theirs = lively(LongformerSelfAttention(config, layer_id=0))

    def run(x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[:2], dtype=x.dtype)
        mask[:, list(tokens)] = 10000.0
        return theirs(
            x, attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=bool(tokens)
        )[0]

    return theirs, run


@pytest.mark.parametrize("tokens", [(0,), (0, 3, 17), (5, 23)])
@pytest.mark.parametrize("window", [4, 8])
def test_longformer(window: int, tokens: tuple[int, ...]):
    theirs, run = longformer(window, tokens)
    out = lively(nn.Linear(DIM, DIM), seed=3)
    mine = build("longformer", DIM, HEADS, window=Window(window // 2, window // 2), tokens=tokens, rope=False, bias=True)
    pair = Pair(mine).linear(out, "o_proj")
    for name in ("query", "key", "value"):
        pair.linear(getattr(theirs, name), f"{name[0]}_proj").linear(getattr(theirs, f"{name}_global"), f"{name[0]}_global_proj")
    without_key_bias_gradients(pair, "k_proj.bias", "k_global_proj.bias")
    pair.must_agree(lambda x: out(run(x)), mine, inputs(2, T, DIM))


def bigbird(block: int, random_blocks: int) -> tuple[Any, Any]:
    """Their layer in train mode (in eval mode it draws no blocks at all), and a list that receives the blocks it draws."""
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = transformers().BigBirdConfig(
        hidden_size=DIM, num_attention_heads=HEADS, block_size=block, num_random_blocks=random_blocks, use_bias=True,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = lively(BigBirdBlockSparseAttention(config, seed=5)).train()

    def run(x: Tensor) -> Tensor:
        blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(
            torch.ones(x.shape[:2], dtype=x.dtype), block
        )
        return theirs(x, band_mask=band, from_mask=rows, to_mask=columns, from_blocked_mask=blocked, to_blocked_mask=blocked)[0]

    return theirs, run


def drawn_blocks(theirs: Any, run: Any, length: int, block: int, monkeypatch: pytest.MonkeyPatch) -> Blocks:
    """The blocks that they draw for a sequence of `length` tokens, as a layout per head."""
    seen: list[Any] = []
    draw = theirs._bigbird_block_rand_mask_with_head
    monkeypatch.setattr(theirs, "_bigbird_block_rand_mask_with_head", lambda **options: seen.append(draw(**options)) or seen[-1])
    run(inputs(1, length, DIM))
    layout = torch.zeros(HEADS, length // block, length // block, dtype=torch.bool)
    for head, rows in enumerate(seen[0]):
        for i, columns in enumerate(rows):
            layout[head, i + 1, columns.tolist()] = True
    return Blocks(layout, block)


@pytest.mark.parametrize(("block", "blocks", "random_blocks"), [(3, 13, 3), (5, 11, 2), (2, 9, 1)])
def test_bigbird(block: int, blocks: int, random_blocks: int, monkeypatch: pytest.MonkeyPatch):
    theirs, run = bigbird(block, random_blocks)
    random = drawn_blocks(theirs, run, block * blocks, block, monkeypatch)
    out = lively(nn.Linear(DIM, DIM), seed=3)
    mine = build("bigbird", DIM, HEADS, block=block, random_blocks=random, rope=False, bias=True)
    pair = Pair(mine).linear(out, "o_proj")
    for name in ("query", "key", "value"):
        pair.linear(getattr(theirs, name), f"{name[0]}_proj")
    without_key_bias_gradients(pair, "k_proj.bias")
    pair.must_agree(lambda x: out(run(x)), mine, inputs(2, block * blocks, DIM), atol=EXACT)


def test_bigbird_mask_is_the_set_of_its_blocks():
    """Ten blocks of 3: every row sees its neighbours, the ends, and 2 drawn blocks that differ by head; the ends see all."""
    mask = build("bigbird", DIM, HEADS, block=3, random_blocks=2, rope=False).mask_for(29)
    allowed = mask.to_bool(29, 29)[0]
    assert allowed.shape == (HEADS, 29, 29)
    cells = torch.nn.functional.pad(allowed, (0, 1, 0, 1)).unflatten(1, (10, 3)).unflatten(3, (10, 3))[:, :, 0, :, 0]
    assert cells[:, [0, 9]].all() and cells[:, :, [0, 9]].all()
    i = torch.arange(10)
    near = (i[:, None] - i).abs() <= 1
    assert cells[:, near].all()
    fixed = near.clone()
    fixed[:, [0, 9]] = True
    extra = (cells & ~fixed)[:, 1:9].sum(-1)
    assert extra.max() == 2 and (cells[0] != cells[1]).any()
    assert mask.block_map((29, 29), block_q=8, block_k=8).to_dense().equal(allowed[None])


@pytest.mark.parametrize(("left", "right"), [(1, 0), (1, 1), (2, 1)])
def test_block_window_compiles_to_its_definition(left: int, right: int):
    mask = BlockWindow(5, left, right)
    q, k = torch.arange(47)[:, None] // 5, torch.arange(47) // 5
    want = (q - k <= left) & (k - q <= right)
    assert mask.to_bool(47, 47).equal(want)
    assert mask.block_map((47, 47), block_q=8, block_k=8).to_dense()[0, 0].equal(want)
    assert mask.key_span(11, 13) == ((2 - left) * 5, (2 + right + 1) * 5 - 1)
    assert eval(repr(mask)) == mask
