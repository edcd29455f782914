"""Caches, ragged batches and generation of whole models: every way to feed tokens gives the same logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attlas.catalogue.index import cards
from attlas.errors import AttlasError, OptionError, ShapeError, UnsupportedError
from attlas.models.config import (
    FeedForwardConfig,
    HeadConfig,
    MixerConfig,
    NormConfig,
    RelativeBiasConfig,
    StackConfig,
    TransformerConfig,
    language_model,
)
from attlas.models.generate import generate
from attlas.models.sampling import filtered_probabilities, sample
from attlas.models.transformer import Transformer
from attlas.shapes import SeqInfo
from engine_models import VOCAB, lively

CLOSE = {"atol": 2e-5, "rtol": 1e-4}

HYBRIDS: dict[str, tuple[Any, ...]] = {
    "two windows, then full": (("sliding-window", {"window": 5}), ("sliding-window", {"window": 7}), "causal"),
    "streaming": (("streaming", {"window": 5, "sinks": 2}), "causal"),
    "alibi and grouped": ("alibi", ("grouped-query", {"num_kv_heads": 1}), ("local", {"block": 4})),
    "relative bias": (
        ("causal", {"rope": False, "score_mod": RelativeBiasConfig(13, 11, False)}),
        ("multi-query", {"bias": True}),
    ),
}


def hybrid(name: str) -> Transformer:
    mixers = HYBRIDS[name]
    return lively(Transformer(language_model(VOCAB, 30, len(mixers), 3, mixers=mixers, hidden=37)))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_decode_equals_the_full_forward(name: str, layout: str):
    model = hybrid(name)
    x = tokens(2, 23)
    with torch.no_grad():
        want = model(x)
        cache = model.new_cache(2, 23, layout=layout, page_size=8)
        # A prefill, a chunk longer than a window, then token by token past every window.
        steps = [x[:, :6], x[:, 6:15], *x[:, 15:].split(1, dim=1)]
        got = torch.cat([model(part, cache=cache) for part in steps], dim=1)
    torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("name", HYBRIDS)
def test_packed_and_padded_equal_one_by_one(name: str):
    model = hybrid(name)
    lengths = (11, 1, 17)
    rows = [tokens(n, seed=n) for n in lengths]
    with torch.no_grad():
        want = torch.cat([model(r[None])[0] for r in rows])
        torch.testing.assert_close(model(torch.cat(rows), seq=SeqInfo(lengths)), want, **CLOSE)
        for left in (True, False):
            mask = torch.zeros(3, 19)
            x = torch.full((3, 19), VOCAB - 1)
            for b, r in enumerate(rows):
                at = slice(19 - len(r), 19) if left else slice(0, len(r))
                mask[b, at], x[b, at] = 1, r
            got = model(x, attention_mask=mask)
            torch.testing.assert_close(got[mask.bool()], want, **CLOSE)
            assert not got[~mask.bool()].any()


@pytest.mark.parametrize("name", HYBRIDS)
def test_ragged_cached_steps_equal_one_by_one(name: str):
    """Rows of different lengths, prefilled and decoded together, in another order than the cache's rows."""
    model = hybrid(name)
    rows = {0: tokens(9, seed=1), 1: tokens(4, seed=2), 2: tokens(13, seed=3)}
    cache = model.new_cache(3, 19)
    got: dict[int, list[torch.Tensor]] = {b: [] for b in rows}
    with torch.no_grad():
        for cuts in ({2: (0, 11), 0: (0, 2)}, {0: (2, 7), 1: (0, 1), 2: (11, 13)}, {1: (1, 4), 0: (7, 9)}):
            seq = SeqInfo(tuple(b - a for a, b in cuts.values()), ids=tuple(cuts))
            out = model(torch.cat([rows[b][i:j] for b, (i, j) in cuts.items()]), seq=seq, cache=cache)
            for b, piece in zip(cuts, out.split(seq.lengths), strict=True):
                got[b].append(piece)
        for b, row in rows.items():
            torch.testing.assert_close(torch.cat(got[b]), model(row[None])[0], **CLOSE)


@pytest.mark.parametrize("name", HYBRIDS)
def test_generation_is_the_same_however_it_is_run(name: str):
    model = hybrid(name)
    prompts = [tokens(n, seed=n).tolist() for n in (7, 1, 12)]
    want = [generate(model, [p], 11, use_cache=False)[0] for p in prompts]
    assert len({tuple(w) for w in want}) == 3
    assert generate(model, prompts, 11) == model.generate(prompts, 11) == want
    assert generate(model, prompts, 11, layout="paged", page_size=8) == want
    assert generate(model, prompts, 11, use_cache=False) == want


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_padded_prefill_fills_the_cache(name: str):
    model = hybrid(name)
    x, mask = tokens(3, 11), torch.ones(3, 11)
    mask[0, :4] = mask[2, :] = 0  # left padding, none, nothing but padding
    more = tokens(3, 2, seed=1)
    with torch.no_grad():
        cache = model.new_cache(3, 13)
        first = model(x, attention_mask=mask, cache=cache)
        assert cache[0].lengths == (7, 11, 0)
        second = model(more, cache=cache)
        for b, row in enumerate(x):
            want = model(torch.cat([row[mask[b].bool()], more[b]])[None])[0]
            got = torch.cat([first[b][mask[b].bool()], second[b]])
            torch.testing.assert_close(got, want, **CLOSE)
        assert not first[2].any()


@pytest.mark.parametrize("name", HYBRIDS)
def test_half_precision_stays_near(name: str):
    x = tokens(2, 19)
    with torch.no_grad():
        want, half = hybrid(name)(x), hybrid(name).to(torch.bfloat16)
        cache = half.new_cache(2, 19)
        got = torch.cat([half(part, cache=cache) for part in x.split((11, 1, 7), dim=1)], dim=1)
    assert {t.dtype for p in cache[0].parts for t in p.read(0).tensors} == {torch.bfloat16} == {got.dtype}
    assert (got.float() - want).abs().mean() < 0.03 * want.std()


def test_sampled_rows_do_not_depend_on_the_batch():
    model = hybrid("alibi and grouped")
    prompts = [tokens(n, seed=n).tolist() for n in (3, 8)]
    options = {"temperature": 1.3, "top_k": 23, "top_p": 0.9}
    both = generate(model, prompts, 9, seed=5, **options)
    assert both == [generate(model, [p], 9, seed=5 + b, **options)[0] for b, p in enumerate(prompts)]
    assert both != generate(model, prompts, 9, seed=6, **options)


def test_generation_ends_at_eos_and_at_zero():
    model = hybrid("streaming")
    prompts = [tokens(5).tolist(), tokens(2, seed=1).tolist()]
    free = generate(model, prompts, 9)
    stop = free[0][3]
    cut = generate(model, prompts, 9, eos=[stop, VOCAB + 1])
    assert cut[0] == free[0][: free[0].index(stop) + 1]
    assert cut[1] == (free[1][: free[1].index(stop) + 1] if stop in free[1] else free[1])
    assert generate(model, prompts, 0) == [[], []]
    assert generate(model, [], 5) == []
    with pytest.raises(OptionError, match=r"prompts \[1\] are empty"):
        generate(model, [[1], []], 5)
    with pytest.raises(OptionError, match="max_new_tokens=-1"):
        generate(model, prompts, -1)


def test_generate_leaves_no_gradients_and_no_random_state():
    model = hybrid("streaming")
    state = torch.random.get_rng_state()
    generate(model, [[1, 2]], 3, temperature=1.0)
    assert torch.equal(state, torch.random.get_rng_state())


def cross_model() -> Transformer:
    norm, ffn = NormConfig("layer", 1e-5), FeedForwardConfig(31, "gelu", gated=False, bias=True)
    decoder = StackConfig(2, (MixerConfig("causal"),), ffn, norm, norm_position="post", cross=MixerConfig("cross"))
    encoder = StackConfig(2, (MixerConfig("full"),), ffn, norm, norm_position="sandwich")
    return lively(Transformer(TransformerConfig("encoder-decoder", VOCAB, 30, 3, decoder, encoder, head=HeadConfig(False))))


def test_encoder_decoder_with_ragged_sources():
    model = cross_model()
    sources, targets = [tokens(n, seed=n) for n in (13, 5)], [tokens(n, seed=n) for n in (3, 7)]
    with torch.no_grad():
        want = torch.cat([model(t[None], source=s[None])[0] for s, t in zip(sources, targets, strict=True)])
        memory = model.encode(torch.cat(sources), seq=SeqInfo((13, 5)))
        got = model(torch.cat(targets), seq=SeqInfo((3, 7)), memory=memory)
        torch.testing.assert_close(got, want, **CLOSE)
        cache = model.new_cache(2, 7, memory_len=13)
        first = model(torch.stack([t[:2] for t in targets]), cache=cache, memory=memory)
        rest = model(targets[1][2:], cache=cache, seq=SeqInfo((5,), ids=(1,)))
    torch.testing.assert_close(torch.cat([first[1], rest]), want[3:], **CLOSE)
    torch.testing.assert_close(first[0], want[:2], **CLOSE)
    prompts = [t.tolist() for t in targets]
    assert generate(model, prompts, 6, memory=memory) == generate(model, prompts, 6, memory=memory, use_cache=False)
    dense = model.encode(torch.stack([tokens(9, seed=1), tokens(9, seed=2)]))
    assert generate(model, prompts, 6, memory=dense) == generate(model, prompts, 6, memory=dense.hidden)


LANGUAGE_CARDS = sorted(c.name for c in cards(supports="causal", min_level=2) if "cross" not in c.supports)


@pytest.mark.parametrize("name", LANGUAGE_CARDS)
def test_every_causal_card_can_be_a_layer(name: str):
    """Beside a full layer, as a hybrid: forward and backward, and decoding where the card claims it."""
    (card,) = (c for c in cards() if c.name == name)
    options = {**card.example, **card.options_for.get("causal", {})}
    dim, heads = options.pop("dim", 36), options.pop("num_heads", 3)
    model = lively(
        Transformer(language_model(VOCAB, dim, 2, heads, mixers=((name, options), ("causal", {"head_dim": 6})), hidden=29))
    )
    x = tokens(2, 32)
    logits = model(x)
    logits.square().mean().backward()
    # A parameter may be dead for a reason of the mechanism (an undifferentiated selection), but not a whole layer.
    alive = [p.grad is not None and bool(p.grad.any()) for p in model.decoder.layers[0].mixer.parameters()]
    assert not alive or any(alive)
    if "decode" in card.supports:
        with torch.no_grad():
            cache = model.new_cache(2, 32)
            got = torch.cat([model(part, cache=cache) for part in (x[:, :8], *x[:, 8:].split(1, dim=1))], dim=1)
        torch.testing.assert_close(got, logits.detach(), atol=1e-4, rtol=1e-3)
    else:
        with pytest.raises(UnsupportedError, match="layer 0"):
            model.new_cache(2, 32)


BIDIRECTIONAL_CARDS = sorted(c.name for c in cards(supports="bidirectional", min_level=2) if "cross" not in c.supports)


@pytest.mark.parametrize("name", BIDIRECTIONAL_CARDS)
def test_every_bidirectional_card_can_be_an_encoder_layer(name: str):
    (card,) = (c for c in cards() if c.name == name)
    options = {**card.example, **card.options_for.get("bidirectional", {})}
    dim, heads = options.pop("dim", 36), options.pop("num_heads", 3)
    stack = StackConfig(2, (MixerConfig(name, tuple(options.items())),), FeedForwardConfig(29))
    model = lively(Transformer(TransformerConfig("encoder", VOCAB, dim, heads, encoder=stack)))
    x = tokens(2, 32)
    y = x.clone()
    y[:, -1] = (y[:, -1] + 1) % VOCAB
    with torch.no_grad():
        assert not torch.equal(model(x)[:, :-1], model(y)[:, :-1])


CROSS_CARDS = sorted(c.name for c in cards(supports="cross", min_level=2))


@pytest.mark.parametrize("name", CROSS_CARDS)
def test_every_cross_card_can_join_encoder_and_decoder(name: str):
    (card,) = (c for c in cards() if c.name == name)
    options = {**card.example, **card.options_for.get("cross", {})}
    dim, heads = options.pop("dim", 36), options.pop("num_heads", 3)
    options.pop("memory_dim", None)  # the encoder is as wide as the decoder
    shape = {"head_dim": 6}
    encoder = StackConfig(1, (MixerConfig("full", shape),), FeedForwardConfig(29))
    decoder = replace(encoder, num_layers=2, mixers=(MixerConfig("causal", shape),), cross=MixerConfig(name, options))
    model = lively(Transformer(TransformerConfig("encoder-decoder", VOCAB, dim, heads, decoder, encoder)))
    x, source = tokens(2, 11), tokens(2, 13, seed=1)
    logits = model(x, source=source)
    other = source.clone()
    other[1, 5] = (other[1, 5] + 1) % VOCAB
    changed = (model(x, source=other) - logits).abs().amax((1, 2))
    assert changed[0] == 0 < changed[1]
    prompts = x[:, :3].tolist()
    memory = model.encode(source)
    assert generate(model, prompts, 5, memory=memory) == generate(model, prompts, 5, memory=memory, use_cache=False)


def test_errors_restate_the_call():
    model = hybrid("streaming")
    x = tokens(2, 7)
    with pytest.raises(ShapeError, match=r"float32.*tokens must be integers"):
        model(torch.randn(2, 7))
    with pytest.raises(ShapeError, match="vocabulary has 89"):
        model(x + VOCAB)
    gap = torch.tensor([[1, 1, 0, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]])
    with pytest.raises(UnsupportedError, match=r"rows \[0\]"):
        model(x, attention_mask=gap)
    model(x[1:], attention_mask=gap[1:])  # one run in the middle is fine
    with pytest.raises(ShapeError, match="of its own shape"):
        model(x, attention_mask=torch.ones(2, 5))
    with pytest.raises(UnsupportedError, match="reads no memory"):
        model(x, memory=torch.randn(2, 3, 30))
    with pytest.raises(UnsupportedError, match="encode needs"):
        model.encode(x)
    with pytest.raises(ShapeError, match="no token types"):
        model(x, token_types=torch.zeros_like(x))
    with pytest.raises(ShapeError, match="the model needs 2"):
        model(x, cache=model.new_cache(2)[:1])
    with pytest.raises(ShapeError, match="3 rows"):
        model(x[0], seq=SeqInfo((7,), ids=(3,)), cache=model.new_cache(3))
    with pytest.raises(AttlasError):
        model(x, seq=SeqInfo((7, 8)))
    blind = language_model(VOCAB, 30, 1, 3, mixers=(("full", {"rope": False}),))
    with pytest.raises(UnsupportedError, match="would be ignored"):
        Transformer(blind)(x, positions=torch.arange(7))
    full = cross_model()
    with pytest.raises(ShapeError, match="needs memory= or source="):
        full(x)
    with pytest.raises(ShapeError, match="not both"):
        full(x, source=x, memory=torch.randn(2, 3, 30))


# ---- sampling ---------------------------------------------------------------------------------------------------------------


def test_filtered_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 5.0]])
    full = torch.softmax(logits / 2.0, -1)
    torch.testing.assert_close(filtered_probabilities(logits, 2.0), full)
    top = filtered_probabilities(logits, 2.0, top_k=2)
    torch.testing.assert_close(top, torch.tensor([[full[0, 0], 0, 0, 0, full[0, 4]]]) / (full[0, 0] + full[0, 4]))
    # The largest holds about 0.7, the two largest 0.85 of the mass.
    assert filtered_probabilities(logits, 2.0, top_p=0.6).count_nonzero() == 1
    assert filtered_probabilities(logits, 2.0, top_p=0.8).count_nonzero() == 2
    assert filtered_probabilities(logits, 2.0, top_p=1.0).count_nonzero() == 5
    assert filtered_probabilities(logits, 2.0, top_k=3, top_p=1e-6).argmax() == 4


def test_top_p_counts_the_mass_that_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the three kept, 4/9 + 3/9 reaches 0.7; of all four, 0.4 + 0.3 reaches it too, but 0.75 tells them apart.
    assert filtered_probabilities(logits, 1.0, top_k=3, top_p=0.75).count_nonzero() == 2
    assert filtered_probabilities(logits, 1.0, top_p=0.75).count_nonzero() == 3


def test_samples_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(5000, 3)
    one = torch.Generator().manual_seed(3)
    drawn = sample(logits, 1.0, generators=[one] * 5000).bincount(minlength=3) / 5000
    torch.testing.assert_close(drawn, torch.tensor([0.5, 0.3, 0.2]), atol=0.03, rtol=0)
    assert sample(torch.tensor([[1.0, 3.0, 3.0]])).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 5}, "no effect with temperature=0"),
    ],
)
def test_sampling_options_are_checked(options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        generate(hybrid("streaming"), [[1]], 1, **options)
