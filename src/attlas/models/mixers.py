"""From a layer's configuration to its mixer."""

from __future__ import annotations

from typing import Any

import torch

from attlas.catalogue.index import card
from attlas.models.config import AlibiConfig, MixerConfig, RelativeBiasConfig
from attlas.nn.mixer import Mixer
from attlas.scores import Alibi, RelativeBias, ScoreMod


def build_mixer(config: MixerConfig, dim: int, num_heads: int) -> Mixer:
    """The mixer of `config`, for a residual stream of width `dim`; `num_heads` holds unless the options say otherwise."""
    options = config.given
    known = card(config.name)
    if "num_heads" in known.options:  # some mechanisms have no heads
        options = {"num_heads": num_heads, **options}
    heads = options.get("num_heads", num_heads)
    return known.build(dim, **{name: _value(value, heads) for name, value in options.items()})


def _value(value: Any, num_heads: int) -> Any:
    if isinstance(value, AlibiConfig):
        return Alibi(Alibi.for_heads(num_heads, device="cpu").slopes * value.factor)
    if isinstance(value, RelativeBiasConfig):
        table = torch.zeros(value.buckets, num_heads, requires_grad=True)
        return RelativeBias(table, bidirectional=value.bidirectional, max_distance=value.max_distance)
    if isinstance(value, ScoreMod) and value.tensors():
        # A configuration may build many models; each learns its own copy.
        return value.replace_tensors(tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in value.tensors()))
    return value
