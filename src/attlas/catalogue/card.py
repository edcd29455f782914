"""A Card: one mechanism of the catalogue, as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from attlas.catalogue.kinds import fits, kinds
from attlas.errors import OptionError, UnsupportedError
from attlas.masks.expr import Mask
from attlas.registry import load_attr, suggest
from attlas.testing.subject import Subject

# What a card may claim. Each claim is run by a law of the same meaning (attlas.testing.laws).
FEATURES = MappingProxyType(
    {
        "causal": "no output depends on a later token",
        "bidirectional": "outputs depend on later tokens",
        "cross": "keys and values come from a memory",
        "packed": "sequences of different lengths in one call, without padding",
        "decode": "token by token through a cache, equal to one prefill",
        "bounded-cache": "the cache stops growing",
        "backward": "gradients of inputs and parameters",
        "gqa": "query heads may share key/value heads (num_kv_heads)",
        "compile": "torch.compile(fullgraph=True)",
    }
)
LEVELS = ("described", "reference", "trainable mixer", "fast", "served")
FAMILIES = (
    "core", "heads", "positions", "exact", "fixed patterns", "content-based", "multi-scale", "multi-dimensional", "low-rank",
    "linear", "convolution", "memory", "retrieval", "long context", "routing", "multimodal",
)  # fmt: skip


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is parameter.empty:
        return ""
    return f" = {getattr(value, '__name__', None) or repr(value)}"


@dataclass(frozen=True)
class Degenerate:
    """`options` under which the mechanism must equal card `equals` built with `equals_options` and the same weights."""

    options: Mapping[str, Any]
    equals: str = "causal"
    equals_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One mechanism.

    name, aliases     how it is asked for; lower case with hyphens
    family            one of FAMILIES
    summary           what it does, one sentence
    formula           its mathematics, plain text
    paper, year       authors, title and arXiv id of the source; year of first publication
    used_by           models that use it
    time, memory      O() of one forward over n tokens and of what it keeps for the backward pass, with what the letters mean
    cache             elements that decoding keeps per layer
    supports          claims, a subset of FEATURES
    caveats           what goes wrong, or differs from the paper or from other implementations
    reference         "module:function" of the brute-force truth
    op                "module:function" of the op it runs
    mixer             "module:function" of the factory that `attlas.build` calls
    level             index into LEVELS
    pattern           a small mask to draw, None when the mechanism is not a fixed mask
    example           options (beside dim and num_heads, which it may set too) of a small instance, for drawings and laws
    options_for       claim -> options that turn it on, where the example itself does not show it
    variants          option -> another value for which the output must differ, where it cannot be guessed
    degenerate        the setting that makes it another, simpler card
    """

    name: str
    aliases: tuple[str, ...] = ()
    family: str
    summary: str
    formula: str
    paper: str
    year: int
    used_by: tuple[str, ...]
    time: str
    memory: str
    cache: str
    supports: frozenset[str]
    caveats: tuple[str, ...] = ()
    reference: str
    op: str
    mixer: str
    level: int
    pattern: Mask | None = None
    example: Mapping[str, Any]
    options_for: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    variants: Mapping[str, Any] = field(default_factory=dict)
    degenerate: Degenerate | None = None

    def __post_init__(self) -> None:
        unknown = self.supports - FEATURES.keys()
        assert not unknown, f"card {self.name}: unknown claims {sorted(unknown)}"
        assert self.family in FAMILIES, f"card {self.name}: unknown family {self.family!r}"
        assert 0 <= self.level < len(LEVELS), f"card {self.name}: level {self.level}"

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def factory(self) -> Callable[..., Any]:
        return load_attr(self.mixer)

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The options of the mixer, in the order of its signature."""
        return dict(inspect.signature(self.factory).parameters)

    def signature(self) -> str:
        """`sliding-window(dim, num_heads, *, window, ...)`, with types and defaults."""
        shown = {name: f"{name}: {p.annotation}" + _default(p) for name, p in self.options.items()}
        named = [name for name, p in self.options.items() if p.kind is p.KEYWORD_ONLY]
        if named:
            shown[named[0]] = "*, " + shown[named[0]]
        return f"{self.name}({', '.join(shown.values())})"

    def build(self, dim: int, num_heads: int | None = None, **options: Any) -> Any:
        """Make the mixer; an option that it does not have, or lacks, or that is of the wrong kind, is an OptionError that shows
        the signature. causal=True asked of a mechanism without a causal form is an UnsupportedError with the reason."""
        options = options if num_heads is None else {"num_heads": num_heads, **options}
        given = ", ".join(f"{k}={v!r}" for k, v in {"dim": dim, **options}.items())
        known = self.options
        if options.get("causal") and "causal" not in known and "causal" not in self.supports:
            raise UnsupportedError(f"{self.name}({given}): it has no causal form. Its cache: {self.cache}")
        for name in options:
            if name not in known:
                raise OptionError(f"{self.name}({given}): no option {name!r}; {suggest(name, known)}\n  {self.signature()}")
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in ("dim", *options):
                raise OptionError(f"{self.name}({given}): option {name!r} is missing\n  {self.signature()}")
        for name, value in {"dim": dim, **options}.items():
            if not fits(value, kinds(self.factory).get(name, Any)):
                wanted = known[name].annotation
                raise OptionError(f"{self.name}({given}): option {name!r} is {value!r}, not {wanted}\n  {self.signature()}")
        return self.factory(dim, **options)

    def subject(self) -> Subject:
        """What the laws of attlas.testing look at."""
        simpler = None
        if self.degenerate is not None:
            other = load_attr("attlas.catalogue.index:card")(self.degenerate.equals)
            simpler = (self.degenerate.options, other.factory, self.degenerate.equals_options)
        return Subject(
            name=self.name,
            factory=self.factory,
            options=self.example,
            supports=self.supports,
            reference=load_attr(self.reference) if self.reference.endswith("softmax:attention") else None,
            options_for=self.options_for,
            variants=self.variants,
            degenerate=simpler,
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for tables and JSON."""
        out = {f.name: getattr(self, f.name) for f in fields(self)}
        out["supports"] = sorted(self.supports)
        out["pattern"] = None if self.pattern is None else repr(self.pattern)
        out["example"] = {k: v if isinstance(v, int | float | str | bool) else repr(v) for k, v in self.example.items()}
        for internal in ("options_for", "variants", "degenerate"):
            del out[internal]
        out["level_name"] = LEVELS[self.level]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}
