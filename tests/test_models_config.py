"""What configurations accept, what they build, how weights start, and what a model says it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attlas.errors import DataError, OptionError, ShapeError, UnknownNameError, UnsupportedError
from attlas.models.config import (
    AlibiConfig,
    EmbeddingConfig,
    FeedForwardConfig,
    HeadConfig,
    MixerConfig,
    NormConfig,
    RelativeBiasConfig,
    RouterConfig,
    StackConfig,
    TransformerConfig,
    language_model,
    with_mixers,
)
from attlas.models.presets import config_from_hf, preset
from attlas.models.transformer import Transformer
from attlas.positions.scaling import DynamicNTK, Linear, Llama3, Yarn
from attlas.scores import RelativeBias

VOCAB = 83
SMALL = language_model(VOCAB, 28, 3, 2, hidden=29)


def test_configurations_are_values():
    assert language_model(VOCAB, 28, 3, 2, hidden=29) == SMALL
    assert hash(SMALL) == hash(language_model(VOCAB, 28, 3, 2, hidden=29))
    assert MixerConfig("a", {"y": 1, "x": 2}) == MixerConfig("a", (("x", 2), ("y", 1))) == MixerConfig.of(("a", {"x": 2, "y": 1}))
    assert MixerConfig("a", {"x": 2}).with_defaults(x=1, z=3) == MixerConfig("a", {"x": 2, "z": 3})
    assert SMALL.to_dict()["decoder"]["feed_forward"]["hidden"] == 29


def test_the_pattern_of_mixers_repeats():
    config = language_model(VOCAB, 28, 5, 2, mixers=("alibi", ("sliding-window", {"window": 3})))
    names = [m.name for m in (layer.mixer for layer in Transformer(config).decoder.layers)]
    assert names == ["alibi", "sliding-window", "alibi", "sliding-window", "alibi"]
    other = with_mixers(config, "causal")
    assert {layer.mixer.name for layer in Transformer(other).decoder.layers} == {"causal"}
    encoder = TransformerConfig("encoder", VOCAB, 28, 2, encoder=StackConfig(1, ("full",), FeedForwardConfig(7)))
    assert with_mixers(encoder, ("sliding-window", {"window": 3})).encoder.mixers[0].name == "sliding-window"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormConfig("batch"), "kind='batch'"),
        (lambda: FeedForwardConfig(7, "gleu"), "did you mean 'gelu'"),
        (lambda: FeedForwardConfig(7, experts=2, experts_per_token=3), "experts_per_token=3"),
        (lambda: FeedForwardConfig(7, experts=2, bias=True), "no biases"),
        (lambda: FeedForwardConfig(7, shared=3), "there are none"),
        (lambda: FeedForwardConfig(7, experts=7, router=RouterConfig(groups=2)), "groups=2.* with experts=7"),
        (
            lambda: FeedForwardConfig(7, experts=6, experts_per_token=3, router=RouterConfig(groups=3)),
            "groups_per_token=1.* experts_per_token=3",
        ),
        (lambda: RouterConfig("sigmoyd"), "did you mean 'sigmoid'"),
        (lambda: RouterConfig(groups=2, groups_per_token=3), "groups_per_token=3"),
        (lambda: StackConfig(1, ("causal",), None, first_feed_forwards=(FeedForwardConfig(7),)), "1 first_feed_forwards"),
        (lambda: HeadConfig(transform="nothing"), "transform='nothing'"),
        (lambda: StackConfig(0, ("causal",), None), "num_layers=0"),
        (lambda: StackConfig(1, (), None), "0 mixers"),
        (lambda: StackConfig(1, ("causal",), None, norm_position="middle"), "norm_position='middle'"),
        (lambda: StackConfig(1, ("causal",), None, parallel=True), "parallel=True needs"),
        (lambda: StackConfig(1, ("causal",), FeedForwardConfig(7), parallel=True, parallel_norms=3), "parallel_norms=3"),
        (lambda: TransformerConfig("decoder", VOCAB, 28, 2), "kind='decoder' needs"),
        (lambda: replace(SMALL, kind="encodr"), "did you mean"),
        (lambda: TransformerConfig("encoder-decoder", VOCAB, 28, 2, SMALL.decoder, SMALL.decoder), "needs cross="),
    ],
)
def test_wrong_configurations(make: Any, message: str):
    with pytest.raises(OptionError, match=message):
        make()


def test_wrong_mixers_say_so():
    with pytest.raises(UnknownNameError, match="sliding-window"):
        Transformer(with_mixers(SMALL, ("slidng-window", {"window": 3})))
    with pytest.raises(OptionError, match="windw"):
        Transformer(with_mixers(SMALL, ("sliding-window", {"windw": 3})))


def test_initial_weights():
    config = language_model(VOCAB, 68, 4, 2, hidden=101, tied=False, positions=31)
    state = torch.random.get_rng_state()
    model = Transformer(config, seed=5)
    assert torch.equal(state, torch.random.get_rng_state())
    again, other = Transformer(config, seed=5), Transformer(config, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.embed.tokens.weight, other.embed.tokens.weight)
    spread = {name: p.std().item() for name, p in model.named_parameters() if p.ndim > 1}
    assert len(spread) == 3 + 4 * 7
    for name, std in spread.items():
        residual = name.endswith(("o_proj.weight", "down.weight"))
        assert std == pytest.approx(0.02 / (8**0.5 if residual else 1), rel=0.1), name
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm" in name)
    x = torch.arange(29)[None]
    loss = torch.nn.functional.cross_entropy(model(x)[0], x[0])
    assert loss.item() == pytest.approx(torch.tensor(float(VOCAB)).log().item(), abs=0.1)


def test_a_small_model_learns():
    model = Transformer(language_model(VOCAB, 28, 2, 2, hidden=29, mixers=("causal", ("sliding-window", {"window": 3}))))
    x = torch.randint(0, VOCAB, (3, 17))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 < 4 < losses[0]


def test_learned_positions_and_their_end():
    model = Transformer(language_model(VOCAB, 28, 1, 2, mixers=(("causal", {"rope": False}),), positions=13))
    x = torch.randint(0, VOCAB, (2, 13))
    assert model(x).shape == (2, 13, VOCAB)
    assert not torch.allclose(model(x[:, :3]), model(x[:, :3], positions=torch.tensor([1, 2, 3])))
    for wrong in ({"tokens": torch.zeros(1, 14, dtype=torch.long)}, {"tokens": x[:, :1], "positions": torch.tensor([13])}):
        with pytest.raises(ShapeError, match="position 13 is beyond the 13"):
            model(**wrong)


def test_score_mods_of_one_configuration_are_learned_apart():
    config = language_model(VOCAB, 28, 2, 2, mixers=(("causal", {"score_mod": RelativeBiasConfig(8), "rope": False}),))
    one, two = Transformer(config), Transformer(config)
    tables = [layer.mixer.score_params[0] for m in (one, two) for layer in m.decoder.layers]
    assert len({t.data_ptr() for t in tables}) == 4
    given = RelativeBias(torch.ones(8, 2, requires_grad=True))
    model = Transformer(with_mixers(config, ("causal", {"score_mod": given})))
    assert [layer.mixer.score_params[0].data_ptr() == given.table.data_ptr() for layer in model.decoder.layers] == [False] * 2
    shared = replace(config, decoder=replace(config.decoder, shared_parameters=("score_params.0",)))
    model = Transformer(shared)
    assert model.decoder.layers[0].mixer.score_params[0] is model.decoder.layers[1].mixer.score_params[0]
    assert one.num_parameters() - model.num_parameters() == 8 * 2


def test_alibi_config_scales_the_slopes():
    mixers = (("causal", {"rope": False, "score_mod": AlibiConfig(0.5)}),)
    (slopes,) = Transformer(language_model(VOCAB, 28, 1, 2, mixers=mixers)).decoder.layers[0].mixer._score_mod.tensors()
    torch.testing.assert_close(slopes, torch.tensor([2.0**-5, 2.0**-9]))


def test_headless_and_feedforwardless():
    stack = StackConfig(2, ("causal",), None)
    model = Transformer(TransformerConfig("decoder", VOCAB, 28, 2, stack, head=None))
    assert model(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 28)
    assert model.decoder.layers[0].ffn is None and model.decoder.layers[0].norm_ffn is None
    with pytest.raises(UnsupportedError, match="without a head"):
        model.logits(torch.zeros(28))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "relu2", "silu"])
@pytest.mark.parametrize("gated", [True, False])
def test_experts_that_are_all_used_and_equal_are_one_network(activation: str, gated: bool):
    dense = Transformer(language_model(VOCAB, 28, 1, 2, hidden=29, activation=activation, gated=gated))
    ffn = FeedForwardConfig(29, activation, gated, experts=3, experts_per_token=2)
    config = replace(dense.config, decoder=replace(dense.config.decoder, feed_forward=ffn))
    moe = Transformer(config)
    mine, theirs = moe.decoder.layers[0].ffn, dense.decoder.layers[0].ffn
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            linear = getattr(theirs, name)
            if linear is not None:
                linear.weight.mul_(10)
                getattr(mine, name).copy_(linear.weight)
    x = torch.randn(2, 5, 28)
    torch.testing.assert_close(mine(x), theirs(x))
    weights, chosen = mine.router(x.flatten(0, 1))
    torch.testing.assert_close(weights.sum(-1), torch.ones(10))
    assert (chosen.sort(-1).values.diff() > 0).all()


def measured_flops(model: Transformer, length: int) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, length, dtype=torch.long))
    return counter.get_total_flops()


def test_flops_are_those_of_the_matrix_products():
    # Bidirectional full attention, so that no pair is saved by a mask that a dense product would compute.
    for ffn in (FeedForwardConfig(29, gated=False), FeedForwardConfig(31, gated=True)):
        stack = StackConfig(2, (("full", {"num_kv_heads": 1}),), ffn)
        model = Transformer(TransformerConfig("encoder", VOCAB, 28, 2, encoder=stack)).use("reference")
        assert model.flops(19) == measured_flops(model, 19)
    moe = replace(model.config, encoder=replace(stack, feed_forward=FeedForwardConfig(31, experts=5, experts_per_token=3)))
    assert Transformer(moe).flops(19) == model.flops(19) + 2 * 19 * 2 * (5 * 28 + 2 * 3 * 28 * 31)


def test_parameters_and_cache_bytes():
    config = language_model(VOCAB, 28, 3, 2, hidden=29, positions=31, mixers=("causal", ("sliding-window", {"window": 5})))
    model = Transformer(config)
    layer = 4 * 28 * 28 + 3 * 28 * 29 + 2 * 28
    assert model.num_parameters() == 3 * layer + 28 + (VOCAB + 31) * 28
    assert model.num_parameters(embedding=False) == 3 * layer + 28
    cache = model.new_cache(1, 23)
    model(torch.zeros(1, 23, dtype=torch.long), cache=cache)
    assert model.cache_bytes(23) == sum(c.nbytes() for c in cache) == (2 * 23 + 5) * 2 * 28 * 4
    assert model.to(torch.bfloat16).cache_bytes(23) == (2 * 23 + 5) * 2 * 28 * 2


def test_use_pins_the_implementation():
    model = Transformer(SMALL).use("reference")
    assert {layer.mixer.impl for layer in model.decoder.layers} == {"reference"}
    model.use("no such implementation")
    with pytest.raises((UnknownNameError, UnsupportedError, OptionError)):
        model(torch.zeros(1, 3, dtype=torch.long))


# ---- presets ----------------------------------------------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 29,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, None),
        ({"rope_scaling": None, "rope_theta": 5e5}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, Linear(2.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, Linear(2.0)),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, DynamicNTK(2.0, 64, 64)),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}}, Yarn(2.0, 32)),
        ({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16}}, Yarn(4.0, 16)),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
            Llama3(8.0, 1.0, 4.0, 64),
        ),
    ],
)
def test_rotary_fields_old_and_new(fields: dict[str, Any], want: Any):
    (mixer,) = config_from_hf({**LLAMA, **fields}).decoder.mixers
    turned = mixer.given["rope"]
    assert turned.scaling == want
    assert turned.base == (5e5 if "rope_theta" in fields else 1e4)


def test_dynamic_scaling_needs_to_know_the_length():
    fields = {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    (mixer,) = config_from_hf(fields, max_len=200).decoder.mixers
    assert mixer.given["rope"].scaling == DynamicNTK(2.0, 64, 200)


def test_layers_with_windows_from_older_fields():
    def kinds(fields: dict[str, Any]) -> list[str]:
        stack = config_from_hf({**LLAMA, "num_hidden_layers": 6, "sliding_window": 7, **fields}).decoder
        return [stack.mixer(i).name for i in range(6)]

    full, slide = "causal", "sliding-window"
    assert kinds({"model_type": "mistral"}) == [slide] * 6
    assert kinds({"model_type": "llama"}) == [full] * 6
    assert kinds({"model_type": "gemma2"}) == [slide, full] * 3
    assert kinds({"model_type": "gemma3_text", "rope_local_base_freq": 1e4}) == [slide] * 5 + [full]
    assert kinds({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 4}) == [full] * 4 + [slide] * 2
    assert kinds({"model_type": "qwen3", "max_window_layers": 4}) == [full] * 6


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model_type": "lama"}, UnsupportedError, "did you mean 'llama'"),
        ({"hidden_size": None}, DataError, "hidden_size is missing"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, UnsupportedError, "longrope"),
        ({"hidden_act": "mish"}, UnsupportedError, "hidden_act='mish'"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, UnsupportedError, "chunked_attention"),
        ({"model_type": "qwen3", "rms_norm_eps": 1e-5}, UnsupportedError, "rms_norm_eps=1e-05"),
        ({"model_type": "bert", "is_decoder": True}, UnsupportedError, "is_decoder=True"),
    ],
)
def test_fields_that_no_preset_covers(fields: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        config_from_hf({**LLAMA, **fields})


def test_preset_by_name():
    assert preset("mistral").model_type == "mistral"
    with pytest.raises(UnsupportedError, match="mixtral"):
        preset("mixtrl")


def test_embedding_config_is_used():
    stack = StackConfig(1, (("full", {"rope": False}),), FeedForwardConfig(7))
    config = TransformerConfig("encoder", VOCAB, 28, 2, encoder=stack, embedding=EmbeddingConfig(17, 3, 2, True, 4.0))
    model = Transformer(config)
    with pytest.raises(ShapeError, match="beyond the 14"):
        model(torch.zeros(1, 15, dtype=torch.long))
    x = torch.randint(0, VOCAB, (1, 14))
    assert not torch.allclose(model(x), model(x, token_types=torch.ones_like(x)))
    assert model.embed.norm is not None
