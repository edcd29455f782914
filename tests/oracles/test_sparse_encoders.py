"""Longformer, LED, LongT5 and BigBird against transformers' layers with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from same_weights import EXACT, FP32_INSIDE, Pair, causal_bias, close, inputs, lively
from torch import Tensor, nn

from attlas.catalogue.index import build
from attlas.masks import Blocks, Window
from attlas.masks.cell_patterns import BlockWindow
from attlas.nn.attention import Attention
from attlas.ops.attention import attention
from attlas.ops.merge import merge
from attlas.scores import RelativeBias
from attlas.shapes import AuxRequest
from hf_models import transformers

DIM, HEADS = 66, 6
T = 24


def without_key_bias_gradients(pair: Pair, *names: str) -> None:
    """A bias on all keys of one softmax cancels: its gradient is 0, theirs is the rounding noise of an fp32 softmax."""
    pair.links = [link for link in pair.links if link[1][0] not in names]
    for name in names:
        del pair.parameters[name]


def encoder(model: str, window: int, tokens: tuple[int, ...]) -> tuple[Any, nn.Module, Any]:
    """Their attention, its output map, and a call with the given global tokens."""
    if model == "led":
        from transformers.models.led.modeling_led import LEDEncoderAttention

        config = transformers().LEDConfig(
            d_model=DIM, encoder_attention_heads=HEADS, attention_window=[window], attention_dropout=0
        )
        layer = lively(LEDEncoderAttention(config, layer_id=0))
        theirs, out, call = layer.longformer_self_attn, layer.output, layer
    else:
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        config = transformers().LongformerConfig(
            hidden_size=DIM, num_attention_heads=HEADS, attention_window=[window], attention_probs_dropout_prob=0.0
        )
        theirs, out = lively(LongformerSelfAttention(config, layer_id=0)), lively(nn.Linear(DIM, DIM), seed=3)
        call = lambda *args, **options: (out(theirs(*args, **options)[0]),)  # noqa: E731

    def run(x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[:2], dtype=x.dtype)
        mask[:, list(tokens)] = 10000.0
        return call(x, attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=bool(tokens))[
            0
        ]

    return theirs, out, run


@pytest.mark.parametrize("tokens", [(0,), (0, 3, 17), (5, 23)])
@pytest.mark.parametrize("window", [4, 8])
@pytest.mark.parametrize("model", ["longformer", "led"])
def test_longformer(model: str, window: int, tokens: tuple[int, ...]):
    theirs, out, run = encoder(model, window, tokens)
    mine = build("longformer", DIM, HEADS, window=Window(window // 2, window // 2), tokens=tokens, rope=False, bias=True)
    pair = Pair(mine).linear(out, "o_proj")
    for name in ("query", "key", "value"):
        pair.linear(getattr(theirs, name), f"{name[0]}_proj").linear(getattr(theirs, f"{name}_global"), f"{name[0]}_global_proj")
    without_key_bias_gradients(pair, "k_proj.bias", "k_global_proj.bias")
    pair.must_agree(run, mine, inputs(2, T, DIM))


@pytest.mark.parametrize("cross", [False, True])
def test_led_decoder(cross: bool):
    """Causal attention to itself, and full attention to every token of the encoder."""
    from transformers.models.led.modeling_led import LEDDecoderAttention

    theirs = lively(LEDDecoderAttention(DIM, HEADS, is_decoder=True))
    mine = build("cross", DIM, HEADS, bias=True) if cross else build("causal", DIM, HEADS, rope=False, bias=True)
    pair = Pair(mine).linear(theirs.out_proj, "o_proj").without_effect("k_proj.bias")
    for name in ("q_proj", "k_proj", "v_proj"):
        pair.linear(getattr(theirs, name), name)
    x, memory = inputs(2, T, DIM), inputs(2, 13, DIM, seed=5)
    if cross:
        pair.must_agree(lambda x, m: theirs(x, key_value_states=m)[0], lambda x, m: mine(x, memory=m), x, memory, atol=EXACT)
    else:
        mask = causal_bias(T).expand(2, -1, -1, -1)
        pair.must_agree(lambda x: theirs(x, attention_mask=mask)[0], mine, x, atol=EXACT)


# ---- LongT5 -----------------------------------------------------------------------------------------------------------------

RADIUS, LENGTH = 3, 23


def longt5(kind: str) -> Any:
    from transformers.models.longt5 import modeling_longt5 as module

    config = transformers().LongT5Config(
        d_model=DIM, d_kv=10, num_heads=HEADS, local_radius=RADIUS, global_block_size=5, relative_attention_num_buckets=14,
        relative_attention_max_distance=17, dropout_rate=0.0,
    )  # fmt: skip
    return lively(getattr(module, kind)(config, has_relative_attention_bias=True))


def bucket_bias(table: Tensor) -> RelativeBias:
    return RelativeBias(table, bidirectional=True, max_distance=17)


def test_longt5_local():
    """A window of `local_radius` tokens on each side, unscaled, with T5's bias."""
    from transformers.models.longt5.modeling_longt5 import _get_local_attention_mask

    theirs = longt5("LongT5LocalAttention")
    bias = bucket_bias(torch.zeros(14, HEADS, requires_grad=True))
    mine = Attention(DIM, HEADS, head_dim=10, mask=Window(RADIUS, RADIUS), rope=False, scale=1.0, score_mod=bias)
    pair = Pair(mine).copy(theirs.relative_attention_bias.weight, "score_params.0")
    for name in "qkvo":
        pair.linear(getattr(theirs, name), f"{name}_proj")

    def run(x: Tensor) -> Tensor:
        return theirs(x, mask=_get_local_attention_mask(torch.ones(x.shape[:2]), RADIUS + 1, x.device))[0]

    pair.must_agree(run, mine, inputs(2, LENGTH, DIM) * 0.5)


def test_longt5_transient_global_through_the_ops():
    """One softmax over the window and over the normalised sums of blocks, which are no tokens of the sequence: two reads, merged.
    Tokens after the last whole block belong to it."""
    theirs = longt5("LongT5TransientGlobalAttention")
    x, lse = inputs(2, LENGTH, DIM) * 0.5, AuxRequest(lse=True)
    with torch.no_grad():
        block = (torch.arange(LENGTH) // 5).clamp(max=LENGTH // 5 - 1)
        sums = x.new_zeros(2, LENGTH // 5, DIM).index_add(1, block, x)
        side = theirs.global_input_layer_norm(sums)
        q, k, v = (p(x).unflatten(-1, (HEADS, 10)) for p in (theirs.q, theirs.k, theirs.v))
        side_k, side_v = (p(side).unflatten(-1, (HEADS, 10)) for p in (theirs.k, theirs.v))
        side_bias = bucket_bias(theirs.global_relative_attention_bias.weight)
        table = side_bias(x.new_zeros(HEADS, LENGTH, len(sums[0])), block, torch.arange(len(sums[0])))
        near = bucket_bias(theirs.relative_attention_bias.weight)
        parts = [
            attention(q, k, v, mask=Window(RADIUS, RADIUS), scale=1.0, score_mod=near, return_aux=lse),
            attention(q, side_k, side_v, scale=1.0, score_mod=RelativeBias.dense(table), return_aux=lse),
        ]
        got = theirs.o(merge([(out, aux.lse) for out, aux in parts])[0].flatten(-2))
        close(got, theirs(x, mask=torch.ones(2, LENGTH))[0], FP32_INSIDE)


# ---- BigBird ----------------------------------------------------------------------------------------------------------------


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
