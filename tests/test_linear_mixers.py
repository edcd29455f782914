"""Mixers whose cache is a state: whatever form of the recurrence they run, they compute the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from attlas.catalogue.index import cards
from attlas.nn.recurrent import RecurrentMixer
from attlas.shapes import SeqInfo
from attlas.testing.inputs import randn

T = 73  # more than a chunk
EQUAL = {"rtol": 1e-10, "atol": 1e-10}
FAMILY = [card for card in cards(family="linear") if card.level >= 2]


def _results(mixer: Any, x: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    y = mixer(x)
    named = [p for p in mixer.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *named], randn(*y.shape, seed=5))]


@pytest.mark.parametrize("card", FAMILY, ids=lambda c: c.name)
def test_three_forms_agree_for_every_mixer(card: Any) -> None:
    """Chunks (one call), the quadratic form with every gradient, and the recurrence token by token through the cache."""
    mixer = card.subject().make()
    assert isinstance(mixer, RecurrentMixer)
    x = randn(2, T, mixer.dim, seed=4)
    chunked = _results(mixer, x)
    for got, want in zip(_results(copy.deepcopy(mixer).use("reference"), x), chunked, strict=True):
        torch.testing.assert_close(got, want, **EQUAL)
    cache = mixer.new_cache(2)
    with torch.no_grad():
        steps = [mixer(x[:, t : t + 1], cache=cache) for t in range(T)]
    torch.testing.assert_close(torch.cat(steps, 1), chunked[0], **EQUAL)


@pytest.mark.parametrize("card", FAMILY, ids=lambda c: c.name)
def test_segments_make_the_whole(card: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences go through in segments, with every gradient; so do the padded rows of a ragged prefill."""
    mixer = card.subject().make()
    x, lengths = randn(2, 41, mixer.dim, seed=7), (41, 5)
    packed, seq = torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]), SeqInfo(lengths)

    def prefill() -> Tensor:
        cache = mixer.new_cache(2)
        with torch.no_grad():
            return torch.cat([mixer(packed, seq=seq, cache=cache), mixer(x[:, :1], cache=cache).flatten(0, 1)])

    whole = [*_results(mixer, x), prefill()]
    monkeypatch.setattr("attlas.nn.recurrent.SEGMENT", 1)
    monkeypatch.setattr("attlas.nn.recurrent.LEAST", 13)
    for got, want in zip([*_results(mixer, x), prefill()], whole, strict=True):
        torch.testing.assert_close(got, want, **EQUAL)


def test_the_whole_family_is_held_to_it() -> None:
    names = {card.name for card in FAMILY}
    assert {"linear-transformer", "performer", "retnet", "gla", "deltanet", "gated-deltanet", "mamba2", "rwkv4", "rwkv7"} <= names


@pytest.mark.parametrize("name", ["linear-transformer", "performer"])
def test_bidirectional_is_the_quotient_of_two_sums(name: str) -> None:
    """Every query reads the sums over all keys of its own sequence, padding left out."""
    card = next(c for c in FAMILY if c.name == name)
    mixer = card.subject().make(claim="bidirectional")
    x = randn(1, 11, mixer.dim, seed=6)
    split = [p(x).unflatten(-1, (mixer.num_heads, mixer.head_dim)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    q, k, v = mixer.features(split[0], query=True)[0], mixer.features(split[1], query=False)[0], split[2][0]
    out = torch.zeros_like(v)
    for h in range(mixer.num_heads):
        for t in range(11):
            weights = torch.stack([q[t, h] @ k[s, h] for s in range(11)])
            out[t, h] = (weights[:, None] * v[:, h]).sum(0) / (weights.sum() + mixer.eps)
    torch.testing.assert_close(mixer(x)[0], mixer.o_proj(out.flatten(-2)), **EQUAL)
