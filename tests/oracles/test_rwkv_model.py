"""RWKV-4 language models against transformers' RwkvForCausalLM with the same random weights."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

from attlas.errors import UnsupportedError
from attlas.models.generate import generate
from attlas.models.presets import config_from_hf
from attlas.models.transformer import Transformer
from attlas.models.weights import load_hf_state_dict
from attlas.nn.rwkv import ChannelMix
from attlas.testing.inputs import randn
from attlas.testing.subject import seeded

VOCAB, DIM, LAYERS, HIDDEN = 97, 46, 5, 61
CLOSE = {"rtol": 1e-4, "atol": 3e-5}  # their recurrence is fp32 whatever the inputs


@cache
def _pair(rescale: int = 0, tied: bool = False) -> tuple[Any, Transformer]:
    """Theirs and ours. The weights are read before theirs is evaluated: that would rescale them."""
    from transformers import RwkvConfig, RwkvForCausalLM

    config = RwkvConfig(
        vocab_size=VOCAB, hidden_size=DIM, num_hidden_layers=LAYERS, intermediate_size=HIDDEN, rescale_every=rescale,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    theirs = RwkvForCausalLM(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "time_mix" in name:
                p.copy_(noise.sigmoid())
            else:
                p.copy_(0.15 * noise if p.ndim > 1 else (1.0 if "weight" in name else 0.0) + 0.3 * noise)
    weights = copy.deepcopy(theirs.state_dict())
    ours = load_hf_state_dict(Transformer(config_from_hf(config)), weights, "rwkv")
    return theirs.eval(), ours.eval()


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(5, VOCAB, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_gradients(tied: bool) -> None:
    theirs, ours = _pair(tied=tied)
    x = _tokens(3, 37)
    want, got = theirs(x, use_cache=False).logits, ours(x)
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, **CLOSE)
    towards = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    mine = dict(ours.named_parameters())
    other = dict(theirs.named_parameters())
    names = {
        "decoder.layers.1.ffn.mix_k": "rwkv.blocks.1.feed_forward.time_mix_key",
        "decoder.layers.1.ffn.down.weight": "rwkv.blocks.1.feed_forward.value.weight",
        "decoder.layers.2.mixer.decay": "rwkv.blocks.2.attention.time_decay",
        "embed.norm.weight": "rwkv.blocks.0.pre_ln.weight",
        "embed.tokens.weight": "rwkv.embeddings.weight",
    }
    a = torch.autograd.grad(got, [mine[n] for n in names], towards)
    b = torch.autograd.grad(want, [other[n] for n in names.values()], towards)
    for name, g, w in zip(names, a, b, strict=True):
        torch.testing.assert_close(
            g, w.reshape(g.shape), rtol=1e-3, atol=1e-4 * w.abs().max().item(), msg=lambda m, n=name: n + m
        )


def test_rescaling_for_evaluation_changes_nothing_but_rounding() -> None:
    theirs, ours = _pair(rescale=2)
    x = _tokens(2, 23)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=1e-3, atol=1e-3)  # eps of the norms is not halved


def test_greedy_decode_through_the_cache() -> None:
    """One row: for more, transformers mixes the shifted tokens of different rows in a decode step."""
    theirs, ours = _pair()
    x = _tokens(1, 11)
    with torch.no_grad():
        want = theirs.generate(x, max_new_tokens=17, do_sample=False, pad_token_id=0)[:, 11:]
    assert generate(ours, x, 17) == want.tolist()
    assert generate(ours, x, 17, use_cache=False) == want.tolist()


def test_a_chunked_prefill_and_ragged_rows_give_the_same_logits() -> None:
    _, ours = _pair()
    model = copy.deepcopy(ours).double()
    lengths, x = [13, 1, 7], _tokens(3, 13)
    mask = (torch.arange(13) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        ragged = model(x, attention_mask=mask)
        for row, n in enumerate(lengths):
            cache = model.new_cache(1)
            parts = [model(x[row : row + 1, lo : min(lo + 3, n)], cache=cache) for lo in range(0, n, 3)]
            alone = torch.cat(parts, 1)[0]
            torch.testing.assert_close(alone, model(x[row : row + 1, :n])[0], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(ragged[row, :n], alone, rtol=1e-11, atol=1e-11)
        assert sum(c.nbytes() for c in cache) == model.cache_bytes(1)


def test_channel_mix_is_its_formula() -> None:
    mix = seeded(ChannelMix(7, 13), torch.float64)
    x = randn(1, 5, 7)
    for t in range(5):
        before = x[0, t - 1] if t else torch.zeros(7, dtype=torch.float64)
        k, r = (m * x[0, t] + (1 - m) * before for m in (mix.mix_k, mix.mix_r))
        want = torch.sigmoid(mix.r_proj.weight @ r) * (mix.down.weight @ torch.relu(mix.up.weight @ k) ** 2)
        torch.testing.assert_close(mix(x)[0, t], want)


def test_what_the_preset_refuses() -> None:
    fields = {"model_type": "rwkv", "vocab_size": VOCAB, "hidden_size": DIM, "num_hidden_layers": 2}
    for wrong in ({"attention_hidden_size": 31}, {"layer_norm_epsilon": 1e-3}):
        with pytest.raises(UnsupportedError, match="rwkv: attention_hidden_size"):
            config_from_hf(fields | wrong)
    assert config_from_hf(fields).main.feed_forward.hidden == 4 * DIM
