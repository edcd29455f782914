"""Trained layers and models with another head layout: exact where that is promised, and else as far off as is said."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attlas.catalogue.index import build
from attlas.errors import OptionError, UnsupportedError
from attlas.masks import Causal, Window
from attlas.models.config import FeedForwardConfig, MixerConfig, StackConfig, TransformerConfig, language_model
from attlas.models.convert import group_heads, to_latent_model
from attlas.models.transformer import Transformer
from attlas.nn.convert import Conversion, output_error, to_grouped, to_latent
from attlas.positions.rope import Rope
from attlas.positions.scaling import Yarn
from attlas.scores import Alibi
from attlas.testing.budget import assert_same
from attlas.testing.inputs import randn
from attlas.testing.subject import seeded

DIM, H, D = 37, 6, 4
X = randn(2, 23, DIM)


def layer(name: str = "causal", **options: Any) -> Any:
    return seeded(build(name, DIM, H, head_dim=D, **options), torch.float64)


def copy_first(mixer: Any, heads: int, *names: str) -> Any:
    """Make the `heads` key (and value) heads of every group copies of its first."""
    with torch.no_grad():
        for name in names:
            for p in getattr(mixer, name).parameters():
                grouped = p.unflatten(0, (-1, heads, D))
                grouped.copy_(grouped[:, :1].expand_as(grouped).clone())
    return mixer


def decoded(mixer: Any, x: Tensor) -> Tensor:
    cache = mixer.new_cache(rows=len(x))
    return torch.cat([mixer(part, cache=cache) for part in x.split([7, 1, 1, x.shape[1] - 9], dim=1)], dim=1)


# ---- fewer key/value heads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"qk_norm": True}, {"score_mod": Alibi.for_heads(H), "sink": True}])
@pytest.mark.parametrize("left", [1, 2, 3, 6])
def test_groups_of_equal_heads_are_kept_exactly(left: int, options: dict[str, Any]) -> None:
    mixer = copy_first(layer(**options), H // left, "k_proj", "v_proj")
    before, y = {k: v.clone() for k, v in mixer.state_dict().items()}, mixer(X)
    made = to_grouped(mixer, left, activations=X)
    assert_same(made.mixer(X), y, "grouped")
    assert_same(decoded(made.mixer, X), y, "grouped, decoded")
    assert max(made.errors.values()) < 1e-15 and made.output_error is not None and made.output_error < 1e-12
    assert made.mixer.num_kv_heads == left and made.mixer.cache_bytes(11) == mixer.cache_bytes(11) * left // H
    assert all(torch.equal(mixer.state_dict()[k], v) for k, v in before.items()), "the original was changed"


def test_heads_are_means_of_their_neighbours() -> None:
    mixer = layer(bias=True)
    made = to_grouped(mixer, 2, activations=X)
    for name in ("k_proj", "v_proj"):
        for p, q in zip(getattr(mixer, name).parameters(), getattr(made.mixer, name).parameters(), strict=True):
            old, new = p.unflatten(0, (H, D)), q.unflatten(0, (2, D))
            assert_same(new[0], (old[0] + old[1] + old[2]) / 3, name)
            assert_same(new[1], (old[3] + old[4] + old[5]) / 3, name)
    assert_same(made.mixer.q_proj.weight, mixer.q_proj.weight, "queries")
    plain = build("grouped-query", DIM, H, head_dim=D, num_kv_heads=2, bias=True).double()
    plain.load_state_dict(made.mixer.state_dict())
    assert_same(plain(X), made.mixer(X), "built from the catalogue with the converted weights")


def test_errors_are_those_of_the_matrices() -> None:
    mixer = layer()
    made = to_grouped(mixer, 1, activations=X)
    lost = []
    for name in ("k_proj", "v_proj"):
        w = getattr(mixer, name).weight.unflatten(0, (H, D))
        lost.append((w - w.mean(0)).norm())
        assert made.errors[name] == pytest.approx((lost[-1] / w.norm()).item(), rel=1e-12)
    whole = torch.cat([mixer.k_proj.weight, mixer.v_proj.weight]).norm()
    assert made.errors["kv"] == pytest.approx((torch.stack(lost).norm() / whole).item(), rel=1e-12)
    y, z = mixer(X), made.mixer(X)
    assert made.output_error == pytest.approx(((y - z).norm() / y.norm()).item(), rel=1e-12)
    assert made.output_error > 0.1 and "output" in str(made) and "causal" in str(made)


def test_pooling_in_two_steps_is_pooling_in_one() -> None:
    mixer = layer("multi-head", bias="qkv")
    half = to_grouped(mixer, 3).mixer
    assert (half.name, half.num_kv_heads) == ("grouped-query", 3)
    one, two = to_grouped(mixer, 1).mixer, to_grouped(half, 1).mixer
    assert_same(two(X), one(X), "multi-head to three to one")


@pytest.mark.parametrize(("name", "options"), [("sliding-window", {"window": 5}), ("streaming", {"window": 5, "sinks": 2})])
def test_patterns_keep_their_mask_and_their_ring(name: str, options: dict[str, Any]) -> None:
    mixer = copy_first(layer(name, **options), 3, "k_proj", "v_proj")
    made = to_grouped(mixer, 2).mixer
    assert_same(decoded(made, X), mixer(X), name)
    assert made.cache_bytes(999) == mixer.cache_bytes(999) // 3


def test_cross_attention() -> None:
    mixer = copy_first(layer("cross", memory_dim=17), 2, "k_proj", "v_proj")
    memory = randn(2, 7, 17, seed=4)
    made = to_grouped(mixer, 3, activations=X, memory=memory)
    assert made.output_error is not None and made.output_error < 1e-12
    assert_same(made.mixer(X, memory=memory), mixer(X, memory=memory), "cross")


def test_what_cannot_be_grouped() -> None:
    with pytest.raises(OptionError, match="must divide the present 6"):
        to_grouped(layer(), 4)
    with pytest.raises(UnsupportedError, match="k_global_proj"):
        to_grouped(layer("longformer", window=4), 2)
    with pytest.raises(UnsupportedError, match="only softmax attention"):
        to_grouped(layer("linear-transformer"), 2)


# ---- a latent -----------------------------------------------------------------------------------------------------------------

EXACT = {
    "no rotation": {"rope": False},
    "no rotation, bidirectional": {"causal": False, "rope": False},
    "rotation": {},
    "rotation, bidirectional, biases": {"causal": False, "bias": True},
    "biases of q, k and v": {"bias": "qkv"},
    "shared heads": {"num_kv_heads": 2},
    "one head": {"num_kv_heads": 1},
    "interleaved pairs": {"rope": Rope(D, interleaved=True), "num_kv_heads": 3},
    "half of the channels": {"rope": Rope(D, rotary_dim=2), "num_kv_heads": 2, "scale": 0.4},
    "a scaled rotation": {"rope": Rope(D, scaling=Yarn(4.0, 16)), "num_kv_heads": 2},
}


def exact(options: dict[str, Any]) -> Any:
    name = "multi-head" if "causal" in options else "causal"
    return layer(name, **options)


@pytest.mark.parametrize("case", EXACT)
def test_full_rank_is_exact(case: str) -> None:
    mixer = exact(EXACT[case])
    made = to_latent(mixer, activations=X)
    assert max(made.errors.values()) < 1e-14 and made.unrotated == 0.0
    assert made.output_error is not None and made.output_error < 1e-12
    y = mixer(X)
    assert_same(made.mixer(X), y, case)
    if made.mixer.causal:
        assert_same(decoded(made.mixer, X), y, f"{case}, decoded")
    again = build("linear-latent", DIM, H, **made.options).double()
    again.load_state_dict(made.mixer.state_dict())
    assert_same(again(X), y, f"{case}, built from the catalogue")
    width = made.options["kv_lora_rank"] + made.options["rope_keys"] * made.options.get("qk_rope_head_dim", 0)
    if made.mixer.causal:
        assert made.mixer.cache_bytes(13) == 13 * width * 8


def test_one_key_head_needs_one_rotated_key() -> None:
    made = to_latent(layer("multi-query"), rope_keys=1)
    assert made.options["kv_lora_rank"] == D and made.options["qk_nope_head_dim"] == 0, "the latent holds the values alone"


@pytest.mark.parametrize("options", [{"rope": False}, {"num_kv_heads": 3}, {"bias": True, "num_kv_heads": 2}])
@pytest.mark.parametrize("rope_keys", [None, 1])
def test_errors_fall_with_the_rank(options: dict[str, Any], rope_keys: int | None) -> None:
    mixer = layer(**options)
    rope_keys = None if mixer.rope is None else rope_keys
    full = to_latent(mixer, rope_keys=rope_keys).options["kv_lora_rank"]
    made = [to_latent(mixer, rank, rope_keys=rope_keys, activations=X) for rank in range(1, full + 1)]
    for name in ("k_proj", "v_proj", "kv"):
        errors = [m.errors[name] for m in made]
        assert all(a >= b - 1e-14 for a, b in pairwise(errors)), f"{name}: {errors}"
        assert errors[-1] < 1e-14
    assert made[0].errors["kv"] > 0.3
    assert all(m.unrotated == made[0].unrotated for m in made), "the rank has nothing to do with the rotation"
    if rope_keys is None:
        assert made[-1].output_error < 1e-12 < made[0].output_error


def test_the_truncation_is_the_best_of_its_rank() -> None:
    mixer = layer(rope=False)
    joint = torch.cat([mixer.k_proj.weight, mixer.v_proj.weight]).detach()
    sizes = torch.linalg.svdvals(joint)
    for rank in (1, 5, 17):
        made = to_latent(mixer, rank)
        assert made.errors["kv"] == pytest.approx((sizes[rank:].norm() / sizes.norm()).item(), rel=1e-10)
        up = made.mixer.kv_b_proj.weight.unflatten(0, (H, 2, D)).transpose(0, 1).flatten(0, 2)
        error = (joint - up @ made.mixer.kv_a_proj.weight).norm() / joint.norm()
        assert made.errors["kv"] == pytest.approx(error.item(), rel=1e-10)


@pytest.mark.parametrize("interleaved", [False, True])
def test_fewer_rotated_keys_lose_rotation(interleaved: bool) -> None:
    mixer = layer(rope=Rope(D, interleaved=interleaved))
    made = [to_latent(mixer, rope_keys=m, activations=X) for m in range(1, H + 1)]
    lost = [m.unrotated for m in made]
    assert all(a > b for a, b in pairwise(lost)) and lost[-1] == 0.0
    assert made[0].errors["kv"] < 1e-14, "everything is there at full rank, only not rotated"
    assert made[0].output_error > 0.01 and made[-1].output_error < 1e-12
    naive = mixer.k_proj.weight[D:].norm() / mixer.k_proj.weight.norm()  # keep the first head's rotation, drop the others'
    assert lost[0] < naive.item()


@pytest.mark.parametrize("scaling", [None, Yarn(4.0, 16)])
def test_heads_that_are_multiples_of_each_other_need_one_rotated_key(scaling: Any) -> None:
    mixer = copy_first(layer(rope=Rope(D, scaling=scaling)), H, "k_proj")
    with torch.no_grad():
        mixer.k_proj.weight.unflatten(0, (H, D)).mul_(torch.arange(1.0, H + 1)[:, None, None] * 0.3)
    made = to_latent(mixer, rope_keys=1, activations=X)
    assert made.unrotated < 1e-7 and made.output_error is not None and made.output_error < 1e-6
    assert made.mixer.cache_bytes(10) < mixer.cache_bytes(10)


def test_near_tokens_mind_the_lost_rotation_least() -> None:
    """The rest of a key is added as if at its query's place: with one token nothing is lost, and the error grows from there."""
    mixer = layer()
    converted = to_latent(mixer, rope_keys=1).mixer
    assert output_error(mixer, converted, X[:, :1]) < 1e-12
    assert 0 < output_error(mixer, converted, X[:, :2]) < output_error(mixer, converted, X)


def test_dtype_device_and_mode_stay() -> None:
    mixer = layer().to(torch.bfloat16).train().use("reference")
    for made in (to_grouped(mixer, 2), to_latent(mixer, 9)):
        assert {p.dtype for p in made.mixer.parameters()} == {torch.bfloat16}
        assert made.mixer.training and made.mixer.impl == "reference"


REFUSED = {
    "its mask": {"name": "sliding-window", "window": 5},
    "a StreamingAttention": {"name": "streaming", "window": 5},
    "a CrossAttention": {"name": "cross"},
    "it changes scores": {"score_mod": Alibi.for_heads(H)},
    "it has a sink": {"sink": True},
    "it norms q and k": {"qk_norm": True},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_become_latent(why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        to_latent(layer(**REFUSED[why]))


def test_ranks_out_of_range() -> None:
    for rank in (0, DIM + 1):
        with pytest.raises(OptionError, match=f"between 1 and {DIM}"):
            to_latent(layer(rope=False), rank)
    for keys in (0, H + 1):
        with pytest.raises(OptionError, match="rope_keys must be between 1 and 6"):
            to_latent(layer(), rope_keys=keys)
    with pytest.raises(OptionError, match="between 0 and 0"):
        to_latent(layer(rope=False), rope_keys=1)
    for options in (
        {"rope_keys": -1},
        {"qk_rope_head_dim": 3},
        {"rope": Rope(8)},
        {"bias": "o"},
        {"qk_nope_head_dim": 0, "rope_keys": 0},
    ):
        with pytest.raises(OptionError, match="linear-latent"):
            build("linear-latent", DIM, H, kv_lora_rank=5, **options)


# ---- whole models -------------------------------------------------------------------------------------------------------------

TOKENS = torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(1))


def model(*mixers: Any) -> Any:
    made = Transformer(language_model(61, 40, 3, 4, mixers=mixers or ("causal",), hidden=31), dtype=torch.float64)
    with torch.no_grad():  # larger than the initial weights, so that attention matters
        for p in made.parameters():
            p.mul_(8.0 if p.dim() > 1 else 1.0)
    return made.eval()


def logits_error(one: nn.Module, other: nn.Module) -> float:
    y, z = one(TOKENS), other(TOKENS)
    return ((y - z).norm() / y.norm()).item()


def test_a_model_gets_fewer_heads() -> None:
    before = model()
    logits = before(TOKENS)
    made = group_heads(before, 2, tokens=TOKENS)
    assert [m.num_kv_heads for m in made.model.decoder.mixers()] == [2, 2, 2]
    assert made.model.config.main.mixers == (MixerConfig("causal", {"num_kv_heads": 2}),)
    assert list(made.layers) == [f"decoder.layers.{i}.mixer" for i in range(3)]
    assert made.logits_error == pytest.approx(logits_error(before, made.model), rel=1e-12)
    assert made.logits_error > 0.01
    assert made.model.cache_bytes(11) * 2 == before.cache_bytes(11)
    assert torch.equal(before(TOKENS), logits), "the original was changed"
    first = made.layers["decoder.layers.0.mixer"]
    x = before.decoder.layers[0].norm_mixer(before.embed.tokens(TOKENS))
    assert first.output_error == pytest.approx(output_error(before.decoder.layers[0].mixer, first.mixer, x), rel=1e-12)
    again = Transformer(made.model.config, dtype=torch.float64)
    again.load_state_dict(made.model.state_dict())
    assert_same(again(TOKENS), made.model(TOKENS), "saved and loaded")
    assert str(made).count("\n") == 3 and "logits" in str(made)


def test_a_model_becomes_latent_exactly() -> None:
    before = model("multi-query", ("grouped-query", {"num_kv_heads": 2, "bias": "qkv"}), ("causal", {"rope": False}))
    made = to_latent_model(before, tokens=TOKENS)
    assert made.logits_error is not None and made.logits_error < 1e-12
    assert {m.name for m in made.model.decoder.mixers()} == {"linear-latent"}
    cache = made.model.new_cache(rows=2)
    got = torch.cat([made.model(part, cache=cache) for part in TOKENS.split([11, 1, 1, 6], dim=1)], dim=1)
    assert_same(got, before(TOKENS), "decoded through latent caches")
    again = Transformer(made.model.config, dtype=torch.float64)
    again.load_state_dict(made.model.state_dict())
    assert_same(again(TOKENS), before(TOKENS), "saved and loaded")


def test_a_model_of_low_rank_is_near() -> None:
    before = model(("causal", {"rope": False}))
    made = [to_latent_model(before, rank, tokens=TOKENS) for rank in (3, 13, 40)]
    errors = [m.logits_error for m in made]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-12 < errors[1]
    assert all(m.layers["decoder.layers.2.mixer"].errors["kv"] < 1 for m in made)
    one = to_latent_model(model(), 9, rope_keys=1)
    assert one.logits_error is None and one.layers["decoder.layers.0.mixer"].unrotated > 0.1


def test_hybrid_patterns() -> None:
    before = model(("sliding-window", {"window": 5}), "multi-head")
    made = group_heads(before, 1)
    assert [m.name for m in made.model.config.main.mixers] == ["sliding-window", "grouped-query"]
    assert [m.describe_mask() for m in made.model.decoder.mixers()] == [
        Causal() & Window.last(5),
        Causal(),
        Causal() & Window.last(5),
    ]
    with pytest.raises(UnsupportedError, match="its mask"):
        to_latent_model(before)
    with pytest.raises(UnsupportedError, match=r"decoder\.layers\.1\.mixer"):
        group_heads(model("causal", "retnet"), 1)


def test_the_decoder_of_an_encoder_decoder() -> None:
    stacks = [
        StackConfig(2, (MixerConfig(name),), FeedForwardConfig(31), cross=cross)
        for name, cross in (("full", None), ("causal", "cross"))
    ]
    config = TransformerConfig("encoder-decoder", 61, 40, 4, encoder=stacks[0], decoder=stacks[1])
    before = Transformer(config, dtype=torch.float64)
    source = TOKENS[:, :7]
    made = group_heads(before, 2, tokens=TOKENS, source=source)
    assert [m.num_kv_heads for m in made.model.decoder.mixers()] == [2] * 4
    assert [m.num_kv_heads for m in made.model.encoder.mixers()] == [4] * 2
    assert all(c.output_error is not None and c.output_error > 0 for c in made.layers.values()) and len(made.layers) == 4
    latent = to_latent_model(before, tokens=TOKENS, source=source)
    assert [m.name for m in latent.model.decoder.mixers()] == ["linear-latent", "cross"] * 2
    assert latent.logits_error is not None and latent.logits_error < 1e-12


def test_a_conversion_without_activations_says_so() -> None:
    made = to_latent(layer(), 5)
    assert isinstance(made, Conversion) and made.output_error is None and "output" not in str(made)
