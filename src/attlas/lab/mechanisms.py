"""From what the user typed to mechanisms that can be built, with the options that they need filled in."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attlas.catalogue.card import Card
from attlas.catalogue.index import card, cards
from attlas.errors import OptionError, UnsupportedError
from attlas.lab.options import REFERENCE, CompareOptions
from attlas.nn.mixer import Mixer

# In this order, as far as the catalogue has them and they can be a causal language model.
SELECTION = (
    "causal", "multi-query", "grouped-query", "alibi", "sliding-window", "local", "global", "streaming", "linear-transformer",
    "gla",
)  # fmt: skip
NEEDED = {"causal": "it sees later tokens", "decode": "it cannot decode token by token", "backward": "it has no gradients"}
# Options whose defaults are made for models of thousands of channels -> what fits a model of width dim with that many heads.
SIZED: dict[str, Callable[[int, int], int]] = {
    "kv_lora_rank": lambda dim, heads: dim // 2,
    "qk_nope_head_dim": lambda dim, heads: dim // heads,
    "qk_rope_head_dim": lambda dim, heads: max(2, dim // heads // 4 * 2),
    "v_head_dim": lambda dim, heads: dim // heads,
    "mix_rank": lambda dim, heads: max(4, dim // 8),
    "decay_rank": lambda dim, heads: max(4, dim // 8),
    "rate_rank": lambda dim, heads: max(4, dim // 8),
    "gate_rank": lambda dim, heads: max(4, dim // 8),
    "state_dim": lambda dim, heads: dim // heads,
    "filter_width": lambda dim, heads: dim,
}


@dataclass(frozen=True)
class Mechanism:
    """label: what it is called in this comparison; name, options: what `attlas.build` gets; told: the card as plain data."""

    label: str
    name: str
    options: tuple[tuple[str, Any], ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    def options_at(self, dim: int, num_heads: int) -> dict[str, Any]:
        """All options for a layer of this width: those chosen, num_heads where it has heads, ranks and widths that fit."""
        known = card(self.name).options
        fitting = {k: size(dim, num_heads) for k, size in SIZED.items() if _is_int(known.get(k))}
        heads = {"num_heads": num_heads} if "num_heads" in known else {}
        return {**heads, **{k: min(v, known[k].default) for k, v in fitting.items()}, **dict(self.options)}

    def build(self, dim: int, num_heads: int) -> Mixer:
        return card(self.name).build(dim, **self.options_at(dim, num_heads))

    def settings_at(self, dim: int, num_heads: int) -> dict[str, Any]:
        """Name and options as plain data: what decides about results."""
        return {"name": self.name, "options": {k: _plain(v) for k, v in self.options_at(dim, num_heads).items()}}

    def call(self, dim: int, num_heads: int) -> str:
        """The line of Python that builds it."""
        options = "".join(f", {k}={v!r}" for k, v in self.options_at(dim, num_heads).items())
        return f'attlas.build("{self.name}", dim={dim}{options})'


def _is_int(parameter: inspect.Parameter | None) -> bool:
    return parameter is not None and isinstance(parameter.default, int) and not isinstance(parameter.default, bool)


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else repr(value)


def parse_name(text: str) -> tuple[str, dict[str, Any]]:
    """`sliding-window:window=64` -> ("sliding-window", {"window": 64}). Values are Python literals; other words are strings."""
    name, *pairs = text.split(":")
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key.strip() or not equals:
            raise OptionError(f"{text!r}: write options as NAME:OPTION=VALUE:OPTION=VALUE, e.g. sliding-window:window=64")
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed = value
        options[key.strip().replace("-", "_")] = tuple(parsed) if isinstance(parsed, list) else parsed
    return name.strip(), options


def choose(options: CompareOptions) -> tuple[Mechanism, ...]:
    """The mechanisms of a comparison; none named = the selection. Raises UnknownNameError, OptionError or UnsupportedError."""
    if not options.names:
        able = {c.name for c in cards(supports=NEEDED)}
        names: Sequence[str] = [n for n in SELECTION if n in able]
        if not names:
            raise UnsupportedError("the catalogue holds no mechanism that can be a causal language model")
    else:
        names = options.names
    found = [mechanism(text, options) for text in names]
    labels = [m.label for m in found]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise OptionError(f"compare {' '.join(names)}: named twice: {', '.join(twice)}")
    return tuple(found)


def mechanism(text: str, options: CompareOptions) -> Mechanism:
    """One mechanism, with required options that the user left open filled in, and built once to see that it can be."""
    name, given = parse_name(text)
    entry = card(name)
    for claim, reason in NEEDED.items():
        if claim not in entry.supports:
            raise UnsupportedError(f"{text!r} cannot be a causal language model: {reason} ({entry.summary})")
    chosen = {**_defaults(entry, options), **given}
    label = entry.name + "".join(f":{k}={_spell(v)}" for k, v in given.items())
    made = Mechanism(label, entry.name, tuple(sorted(chosen.items())), entry.to_dict())
    for dim in {options.dim, options.layer_width}:
        if not made.build(dim, options.heads).causal:
            hint = f"; try {text}:causal=True" if "causal" in entry.options and "causal" not in given else ""
            raise UnsupportedError(f"{text!r} cannot be a causal language model: with these options it sees later tokens{hint}")
    return made


def _spell(value: Any) -> str:
    return str(value).replace(" ", "")


def _defaults(entry: Card, options: CompareOptions) -> dict[str, Any]:
    """Options that make the mechanism causal, and values for those without a default: sized to the context of this comparison,
    else those of the card's example."""
    span = options.span
    sized = {
        "window": max(2, span // 2) if "dilation" in entry.options else span,
        "block": span,
        "block_size": span,
        "chunk": span,
        "stride": span,
        "dilation": 2,
        "num_kv_heads": max(1, options.heads // 2),
    }
    out: dict[str, Any] = {}
    for claim in NEEDED:
        out |= entry.options_for.get(claim, {})
    for name, parameter in entry.options.items():
        default = parameter.default
        if name in ("dim", "num_heads") or name in out:
            continue
        if default is inspect.Parameter.empty:
            if name in sized or name in entry.example:
                out[name] = sized.get(name, entry.example.get(name))
        elif name in ("window", "block", "block_size", "chunk") and isinstance(default, int) and default > options.context // 2:
            out[name] = sized[name]  # as wide as the whole context it would be another name for full attention
    return out


def reference_of(mechanisms: Sequence[Mechanism], options: CompareOptions) -> Mechanism:
    """`causal`, whether it was asked for or not: times are given as ratios to it and its size is the size of all models."""
    for m in mechanisms:
        if m.label == REFERENCE:
            return m
    return mechanism(REFERENCE, options)
