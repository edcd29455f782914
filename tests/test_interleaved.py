"""What is peculiar to interleaved heads: virtual tokens, their two orders, windows, and when it is plain attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from attlas.catalogue.index import build, card
from attlas.errors import OptionError
from attlas.shapes import SeqInfo
from attlas.testing.budget import assert_same
from attlas.testing.inputs import randn
from attlas.testing.laws import LAWS
from attlas.testing.subject import Subject, seeded

SMALL: dict[str, Any] = {"dim": 23, "num_heads": 3, "head_dim": 4, "pseudo_heads": 2}
FACES: dict[str, Mapping[str, Any]] = {
    "flat-window": {"window": 5},
    "token": {"causal": "token", "collapse": "per-head"},
    "token-window": {"causal": "token", "window": 3, "rope": False},
    "as-many-as-heads": {"pseudo_heads": None, "bias": True},
}


def subject(face: str) -> Subject:
    entry = card("interleaved-head")
    return Subject(
        name=entry.name, factory=entry.factory, options={**SMALL, **FACES[face]}, supports=entry.supports - {"bidirectional"}
    )


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("law", ["reference", "causal", "packed", "positions", "decode", "ragged-paged", "cache-bytes", "flops"])
def test_law(face: str, law: str) -> None:
    if law == "cache-bytes" and "window" in face:
        wanted = min(29, FACES[face]["window"] + (face == "flat-window"))
        assert subject(face).make().cache_bytes(29) == wanted * 2 * 3 * 4 * 8
        return
    LAWS[law].check(subject(face))


def plain(mixer: Any, name: str, **options: Any) -> Any:
    """The plain mixer with the projections of an interleaved one."""
    other = build(name, 23, 3, head_dim=4, **options).double()
    other.load_state_dict({k: v for k, v in mixer.state_dict().items() if k.endswith("proj.weight")})
    return other


def identity(mixer: Any, pick: list[float]) -> Any:
    """Mixing = identity; a head's output is the sum of its own pseudo-heads weighted by `pick`."""
    eye = torch.eye(3, dtype=torch.float64)[:, :, None]
    with torch.no_grad():
        for alpha in (mixer.alpha_q, mixer.alpha_k, mixer.alpha_v):
            alpha.copy_(eye.expand_as(alpha))
        weights = torch.tensor(pick, dtype=torch.float64)
        mixer.R.copy_(eye * weights if mixer.R.dim() == 3 else weights.expand_as(mixer.R))
    return mixer


X = randn(2, 29, 23)
LAST, FIRST, MEAN = [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1 / 3] * 3


@pytest.mark.parametrize("collapse", ["global", "per-head"])
def test_one_pseudo_head_is_multi_head_attention(collapse: Any) -> None:
    for options in ({}, {"window": 7}):
        mixer = seeded(build("interleaved-head", 23, 3, head_dim=4, pseudo_heads=1, collapse=collapse, **options), torch.float64)
        other = plain(mixer, "sliding-window" if options else "causal", **options)
        assert_same(identity(mixer, [1.0])(X), other(X), f"one pseudo-head, {options}")


def test_the_flat_order_keeps_plain_attention_only_in_the_last_pseudo_head() -> None:
    mixer = seeded(build("interleaved-head", 23, 3, head_dim=4, rope=False), torch.float64)
    other = plain(mixer, "causal", rope=False)(X)
    assert_same(identity(mixer, LAST)(X), other, "the last pseudo-head")
    for pick in (FIRST, MEAN):
        assert (identity(mixer, pick)(X) - other).abs().max() > 0.01


@pytest.mark.parametrize("pick", [FIRST, MEAN, LAST], ids=["first", "mean", "last"])
def test_the_token_order_keeps_plain_attention_in_every_pseudo_head(pick: list[float]) -> None:
    for options in ({}, {"window": 7}):
        mixer = build("interleaved-head", 23, 3, head_dim=4, rope=False, causal="token", **options)
        mixer = identity(seeded(mixer, torch.float64), pick)
        assert_same(mixer(X), plain(mixer, "sliding-window" if options else "causal", rope=False, **options)(X), str(options))


def test_a_pseudo_head_of_zeros_still_takes_its_share() -> None:
    mixer = identity(seeded(build("interleaved-head", 23, 3, head_dim=4, rope=False, causal="token"), torch.float64), LAST)
    want = mixer(X)
    with torch.no_grad():
        for alpha in (mixer.alpha_k, mixer.alpha_v):
            alpha[:, :, :2] = 0.0
    assert (mixer(X) - want).abs().max() > 0.01


def test_a_window_bounds_the_cache() -> None:
    mixer = seeded(build("interleaved-head", window=5, **SMALL), torch.float64)
    x = randn(1, 101, 23)
    for layout in ("contiguous", "paged"):
        cache = mixer.new_cache(rows=1, layout=layout, page_size=8)
        got = torch.cat([mixer(part, cache=cache) for part in x.split([3, 1, 40, 1, 1, 55], dim=1)], dim=1)
        assert_same(got, mixer(x), f"{layout} cache")
        first = cache.parts[0].missing(0)[1]
        assert 80 < first <= 96, f"of 101 tokens the {layout} cache dropped {first}"


def test_starts_near_multi_head_attention_of_the_mean() -> None:
    torch.manual_seed(0)
    mixer = build("interleaved-head", 23, 3, head_dim=4)
    assert (mixer.alpha_q[..., 1] - torch.eye(3)).abs().max() < 0.1
    assert mixer.R.sum((1, 2)).tolist() == pytest.approx([1.0] * 3)
    assert not torch.equal(mixer.alpha_q[..., 0], mixer.alpha_q[..., 1]), "pseudo-heads start as copies"


def test_bad_options() -> None:
    for options in ({"pseudo_heads": 0}, {"causal": "flat"}, {"collapse": "none"}, {"window": 0}, {"window": 4, "causal": False}):
        with pytest.raises(OptionError, match=r"interleaved-head\(dim=23"):
            build("interleaved-head", 23, 3, head_dim=4, **options)


def test_packed_without_tokens() -> None:
    mixer = seeded(build("interleaved-head", **SMALL), torch.float64)
    assert mixer(X[0, :0], seq=SeqInfo((0, 0))).shape == (0, 23)
