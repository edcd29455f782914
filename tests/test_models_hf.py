"""The same weights give the same logits as in transformers: whole models, tiny and random."""

from __future__ import annotations

import copy

import pytest
import torch

from attlas.models.generate import generate
from hf_models import DECODERS, ENCODER_DECODERS, MODELS, ours, theirs, tokens

# fp32 on both sides; their rotary tables and softmaxes are fp32 too.
CLOSE = {"atol": 3e-5, "rtol": 1e-4}


def lengths_mask(lengths: list[int], width: int, side: str) -> torch.Tensor:
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in zip(mask, lengths, strict=True):
        if side == "left":
            row[width - n :] = 1
        else:
            row[:n] = 1
    return mask


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str):
    x = tokens(3, 23)
    with torch.no_grad():
        want, got = theirs(name)(x).logits, ours(name)(x)
    torch.testing.assert_close(got, want, **CLOSE)
    assert want.std() > 0.3  # not a comparison of zeros


@pytest.mark.parametrize("name", ["gpt2", "bert", "falcon alibi"])
def test_logits_fp64_are_tight(name: str):
    # Only models whose transformers code stays in fp64 throughout (no fp32 norms, no fp32 rotary tables).
    model = copy.deepcopy(theirs(name)).double()
    x = tokens(2, 31)
    with torch.no_grad():
        want, got = model(x).logits, ours(name, torch.float64)(x)
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", ["llama yarn", "mistral", "gemma2", "gpt_neox", "mixtral"])
def test_logits_fp64_agree_to_their_fp32_parts(name: str):
    model = copy.deepcopy(theirs(name)).double()
    x = tokens(2, 31)
    with torch.no_grad():
        want, got = model(x).logits, ours(name, torch.float64)(x)
    torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gptj", "gemma3", "falcon groups", "bert"])
def test_padding_on_either_side(name: str, side: str):
    lengths, width = [19, 7, 1], 19
    mask = lengths_mask(lengths, width, side)
    x = tokens(3, width) * mask
    # Positions that do not count padding: what generate() of transformers passes for decoders.
    options = {} if name == "falcon groups" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        want = theirs(name)(x, attention_mask=mask, **options).logits
        got = ours(name)(x, attention_mask=mask)
    valid = mask.bool()
    torch.testing.assert_close(got[valid], want[valid], **CLOSE)
    assert not got[~valid].any()


def test_roberta_counts_positions_from_two():
    mask = lengths_mask([13, 5], 13, "right")
    x = torch.where(mask.bool(), tokens(2, 13), 1)  # 1 is its padding token
    with torch.no_grad():
        want, got = theirs("roberta")(x, attention_mask=mask).logits, ours("roberta")(x, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)


def test_bert_token_types():
    x, types = tokens(2, 17), torch.randint(0, 2, (2, 17))
    mask = lengths_mask([17, 11], 17, "right")
    with torch.no_grad():
        want = theirs("bert")(x, token_type_ids=types, attention_mask=mask).logits
        got = ours("bert")(x, token_types=types, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_explicit_positions(name: str):
    # Two documents in one row, positions starting again; their causal mask still joins the documents.
    positions = torch.cat([torch.arange(7), torch.arange(12)])
    x = tokens(1, 19)
    model = theirs(name)
    if name == "gpt2":  # the table takes the positions, the mask goes by array order: only equal where the mask sees order alone
        positions = torch.arange(19) + 5
    elif name == "mistral":
        positions = torch.arange(19) + 31
    else:
        positions = torch.arange(19) * 3 + 2
    with torch.no_grad():
        want = model(x, position_ids=positions[None]).logits
        got = ours(name)(x, positions=positions)
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama llama3", "mixtral", "falcon multi-query"])
def test_gradients(name: str):
    model, mine = copy.deepcopy(theirs(name)), ours(name)
    x = tokens(2, 13)
    weights = torch.randn(2, 13, 97)
    (model(x).logits * weights).sum().backward()
    (mine(x) * weights).sum().backward()
    table = model.get_input_embeddings().weight.grad
    torch.testing.assert_close(mine.embed.tokens.weight.grad, table, atol=1e-4 * table.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation(name: str):
    x = tokens(2, 11)
    with torch.no_grad():
        want = theirs(name).generate(x, max_new_tokens=13, do_sample=False, pad_token_id=0)[:, 11:]
    assert generate(ours(name), x, 13) == want.tolist()


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder(name: str):
    model, mine = theirs(name), ours(name)
    source, mask, target = tokens(2, 29), lengths_mask([29, 13], 29, "right"), tokens(2, 11, seed=1)
    with torch.no_grad():
        want = model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
        torch.testing.assert_close(mine(target, source=source, source_mask=mask), want, **CLOSE)
        want = model(input_ids=source, decoder_input_ids=target).logits
        torch.testing.assert_close(mine(target, source=source), want, **CLOSE)
        torch.testing.assert_close(mine(target, memory=mine.encode(source)), want, **CLOSE)
    assert want.std() > 0.1


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoder_generation(name: str):
    model, mine = theirs(name), ours(name)
    source, mask = tokens(2, 29), lengths_mask([13, 29], 29, "right")
    with torch.no_grad():
        # Its cache counts encoder layers, so it cannot decode a model with more decoder layers with one.
        options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": False}
        want = model.generate(source, attention_mask=mask, **options)
        memory = mine.encode(source, attention_mask=mask)
    got = generate(mine, [[0], [0]], 9, memory=memory)
    assert got == want[:, 1:].tolist()
    assert got == generate(mine, [[0], [0]], 9, memory=memory, use_cache=False)
