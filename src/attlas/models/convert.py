"""Whole trained models rewritten with another head layout. What a conversion is and what it loses: attlas.nn.convert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attlas.catalogue.index import card
from attlas.errors import OptionError, UnsupportedError
from attlas.models.config import MixerConfig
from attlas.models.transformer import Transformer
from attlas.nn.attention import Attention
from attlas.nn.convert import Conversion, to_grouped, to_latent
from attlas.nn.mixer import Mixer

Convert = Callable[..., Conversion]
Seen = dict[Mixer, dict[str, Tensor]]


@dataclass(frozen=True)
class ModelConversion:
    """model: a new Transformer whose configuration says what it is, so that it can be saved and loaded as any other. layers: name
    of a mixer in the model -> its conversion. logits_error: |z - z'| / |z| of the logits for the given tokens, None without."""

    model: Transformer
    layers: dict[str, Conversion]
    logits_error: float | None = None

    def __str__(self) -> str:
        lines = [f"{name}: {conversion}" for name, conversion in self.layers.items()]
        return "\n".join(lines if self.logits_error is None else [*lines, f"logits {self.logits_error:.3g}"])


def group_heads(
    model: Transformer, num_kv_heads: int, *, tokens: Tensor | None = None, source: Tensor | None = None
) -> ModelConversion:
    """Every attention layer of the main stack, cross-attention included, gets `num_kv_heads` key/value heads, means of its own
    (`attlas.nn.convert.to_grouped`). The encoder of an encoder-decoder stays as it is, as in the paper.

    tokens, source  int64 [B, T]: a batch on which each layer (on what the original layer reads) and the logits are compared
    """
    return _convert(model, partial(to_grouped, num_kv_heads=num_kv_heads), _grouped_config, cross=True, batch=(tokens, source))


def to_latent_model(
    model: Transformer,
    rank: int | None = None,
    *,
    rope_keys: int | None = None,
    tokens: Tensor | None = None,
    source: Tensor | None = None,
) -> ModelConversion:
    """Every self-attention layer of the main stack becomes latent (`attlas.nn.convert.to_latent`); cross-attention stays.

    rank, rope_keys  as there; tokens, source: as in `group_heads`
    """
    convert = partial(to_latent, rank=rank, rope_keys=rope_keys)
    return _convert(model, convert, _latent_config, cross=False, batch=(tokens, source))


def _grouped_config(config: MixerConfig, made: Conversion) -> MixerConfig:
    name = "grouped-query" if config.name in ("multi-head", "multi-query") else config.name
    if "num_kv_heads" not in card(name).options:
        raise UnsupportedError(f"group_heads: a {config.name} layer has no option num_kv_heads, so no configuration could say it")
    return MixerConfig(name, {**config.given, **made.options})


def _latent_config(config: MixerConfig, made: Conversion) -> MixerConfig:
    given: dict[str, Any] = {name: config.given[name] for name in ("num_heads", "attend") if name in config.given}
    return MixerConfig("linear-latent", {**given, **made.options})


def _convert(
    model: Transformer, convert: Convert, describe: Callable[..., MixerConfig], *, cross: bool, batch: tuple[Tensor | None, ...]
) -> ModelConversion:
    stack = "encoder" if model.config.kind == "encoder" else "decoder"
    tokens, source = batch
    seen, logits = _watch(model, tokens, source)
    made: dict[str, Conversion] = {}
    for name, mixer in model.named_modules():
        if name.startswith(f"{stack}.layers.") and (name.endswith(".mixer") or (cross and name.endswith(".cross"))):
            if not isinstance(mixer, Attention):
                raise UnsupportedError(
                    f"{name}: {mixer} is not softmax attention with projections of its own; it has no head layout to change"
                )
            made[name] = convert(mixer, **seen.get(mixer, {}))
    if not made:
        raise OptionError("convert: this model has no mixers")
    new = _rebuild(model, made, stack, describe)
    error = None
    if logits is not None:
        _, others = _watch(new, tokens, source)
        assert others is not None
        error = ((logits - others).norm() / logits.norm()).item()
    return ModelConversion(new, made, error)


def _rebuild(model: Transformer, made: dict[str, Conversion], stack: str, describe: Callable[..., MixerConfig]) -> Transformer:
    """A Transformer of the new configuration, with the weights of the old one and of the converted mixers."""
    config = model.config.main
    changes: dict[str, Any] = {
        "mixers": tuple(describe(m, made[f"{stack}.layers.{i}.mixer"]) for i, m in enumerate(config.mixers[: config.num_layers]))
    }
    if config.cross is not None and f"{stack}.layers.0.cross" in made:
        changes["cross"] = describe(config.cross, made[f"{stack}.layers.0.cross"])
    like = next(model.parameters())
    new_stack = replace(config, **changes)
    whole = replace(model.config, encoder=new_stack) if stack == "encoder" else replace(model.config, decoder=new_stack)
    new = Transformer(whole, dtype=like.dtype, device=like.device)
    state = {key: t for key, t in model.state_dict().items() if not any(key.startswith(f"{name}.") for name in made)}
    for name, conversion in made.items():
        state |= {f"{name}.{key}": t for key, t in conversion.mixer.state_dict().items()}
    new.load_state_dict(state)
    for name, conversion in made.items():
        new.get_submodule(name).use(conversion.mixer.impl)  # type: ignore[operator]
    return new.train(model.training)


def _watch(model: Transformer, tokens: Tensor | None, source: Tensor | None) -> tuple[Seen, Tensor | None]:
    """What each mixer reads while `model` runs on the batch, as keywords of a conversion, and the logits in fp64."""
    if tokens is None:
        return {}, None
    seen: Seen = {}

    def note(mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[mixer] = {"activations": args[0]} | ({} if kwargs.get("memory") is None else {"memory": kwargs["memory"]})

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules() if isinstance(m, Attention)]
    try:
        with torch.no_grad():
            return seen, model(tokens, **({} if source is None else {"source": source})).double()
    finally:
        for hook in hooks:
            hook.remove()
