"""Reading the fields of a transformers configuration, in the spellings of today's and of older releases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attlas.errors import DataError, UnsupportedError
from attlas.positions.rope import Rope
from attlas.positions.scaling import DynamicNTK, Each, Linear, Llama3, RopeScaling, Yarn

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class Fields:
    """The fields of one configuration. `max_len` and `tensors` are what the caller of `config_from_hf` gave."""

    def __init__(self, values: Mapping[str, Any], max_len: int | None = None, tensors: int | None = None) -> None:
        self.values, self.max_len, self.tensors = values, max_len, tensors

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of the named fields that is there and not null."""
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        return default

    def need(self, *names: str) -> Any:
        value = self.get(*names)
        if value is None:
            raise DataError(f"{self.values.get('model_type', 'model')} configuration: field {' or '.join(names)} is missing")
        return value

    def depth(self, *names: str) -> int:
        """A number of layers. Refused where it cannot be that of the checkpoint, before anything is made for each of them."""
        found = self.need(*names)
        if type(found) is not int:
            raise DataError(f"{self.need('model_type')} configuration: {names[0]}={found!r} must be a whole number")
        if self.tensors is not None and found > self.tensors:
            raise DataError(
                f"{self.need('model_type')} configuration: {names[0]}={found}, but the checkpoint holds {self.tensors} tensors, "
                "and every layer needs one of its own at least"
            )
        return found

    def refuse(self, **unknown: tuple[Any, ...]) -> None:
        """Raise UnsupportedError when a field has one of the values that no preset covers."""
        for name, values in unknown.items():
            if self.get(name) in values and self.get(name) is not None:
                raise UnsupportedError(f"{self.need('model_type')}: {name}={self.get(name)!r} is not supported")

    def layer_types(self, depth: int) -> list[str]:
        """full_attention or sliding_attention for each layer, from `layer_types` or the fields that came before it."""
        kinds = self.get("layer_types")
        model = self.need("model_type")
        if kinds is None:
            kinds = ["sliding_attention" if self._slides(model, i) else "full_attention" for i in range(depth)]
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != depth:
            raise UnsupportedError(
                f"{model}: layer_types {sorted(set(kinds))} for {len(kinds)} of {depth} layers is not supported"
            )
        return list(kinds)

    def _slides(self, model: str, layer: int) -> bool:
        if self.get("sliding_window") is None:
            return False
        if model == "gemma2":
            return layer % 2 == 0
        if model == "gemma3_text":
            return (layer + 1) % self.get("sliding_window_pattern", "_sliding_window_pattern", default=6) != 0
        if model in ("qwen2", "qwen3"):
            return bool(self.get("use_sliding_window", default=False)) and layer >= self.get("max_window_layers", default=28)
        return model in ("mistral", "mixtral")


def activation(fields: Fields, name: str, default: str) -> str:
    """Our name of the activation in field `name`."""
    value = fields.get(name, default=default)
    if value not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{fields.need('model_type')}: {name}={value!r} is not supported; known: {', '.join(sorted(_ACTIVATIONS))}"
        )
    return _ACTIVATIONS[value]


def rope(
    fields: Fields,
    head_dim: int,
    *,
    layer_type: str = "full_attention",
    rotary_dim: int | None = None,
    partial: float = 1.0,
    interleaved: bool = False,
) -> Rope:
    """The rotary code of a layer. `partial` is the architecture's default share of the head that turns."""
    params = _rope_parameters(fields, layer_type)
    base = float(params.get("rope_theta") or fields.get("rope_theta", "rotary_emb_base", default=10000.0))
    share = params.get("partial_rotary_factor") or fields.get("partial_rotary_factor", "rotary_pct", default=partial)
    turned = rotary_dim if rotary_dim is not None else int(head_dim * share)
    kind = params.get("rope_type") or params.get("type") or "default"
    scaling = None if kind == "default" else _scaling(kind, params, fields)
    return Rope(head_dim, base, rotary_dim=None if turned == head_dim else turned, interleaved=interleaved, scaling=scaling)


def longest(fields: Fields, rope: Rope) -> int | None:
    """The longest sequence that a model with this rotary code is for, None = its configuration does not say."""
    trained = fields.get("max_position_embeddings", "n_positions")
    scaling = rope.scaling
    if trained is None or scaling is None:
        return trained
    if isinstance(scaling, Linear) and not fields.need("model_type").startswith("gemma3"):  # there the field counts it already
        return int(trained * scaling.factor)
    if isinstance(scaling, Yarn):
        return max(trained, int(scaling.original_max_position * scaling.factor))
    return max(trained, scaling.seq_len) if isinstance(scaling, DynamicNTK) else trained


def _rope_parameters(fields: Fields, layer_type: str) -> dict[str, Any]:
    params = fields.get("rope_parameters")
    if params is not None:
        return dict(params.get(layer_type) or {}) if any(isinstance(v, Mapping) for v in params.values()) else dict(params)
    local = fields.get("rope_local_base_freq")
    if layer_type == "sliding_attention" and local is not None:  # Gemma 3 before rope_parameters: windows are never scaled
        return {"rope_theta": local}
    return dict(fields.get("rope_scaling", default={}))


def _scaling(kind: str, params: dict[str, Any], fields: Fields) -> RopeScaling:
    def original() -> int:
        return params.get("original_max_position_embeddings") or fields.need(
            "original_max_position_embeddings", "max_position_embeddings"
        )

    if kind == "linear":
        return Linear(params["factor"])
    if kind == "each":  # from GGUF files; transformers has no such type
        return Each(params["factors"])
    if kind == "dynamic":
        trained = fields.need("max_position_embeddings")
        return DynamicNTK(params["factor"], trained, fields.max_len or trained)
    if kind == "llama3":
        return Llama3(params["factor"], params["low_freq_factor"], params["high_freq_factor"], original())
    if kind == "yarn":
        return Yarn(
            params.get("factor") or fields.need("max_position_embeddings") / original(),
            original(),
            beta_fast=params.get("beta_fast") or 32.0,
            beta_slow=params.get("beta_slow") or 1.0,
            mscale=params.get("mscale"),
            mscale_all_dim=params.get("mscale_all_dim"),
            attention_factor=params.get("attention_factor"),
            truncate=params.get("truncate", True),
        )
    raise UnsupportedError(
        f"{fields.need('model_type')}: rope_type={kind!r} is not supported; known: default, linear, dynamic, llama3, yarn"
    )
