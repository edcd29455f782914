"""attlas, the attention atlas: every attention mechanism behind one contract, on any machine.

    import attlas
    mixer = attlas.build("sliding-window", dim=512, num_heads=8, window=256)
    y = mixer(x)                                   # train: x [B, T, 512]
    cache = mixer.new_cache(rows=1)
    y = mixer(x, cache=cache)                      # prefill, then decode with the same call
    out = attlas.attention(q, k, v, mask=attlas.Causal() & attlas.Window.last(256))

Names are imported when they are first used, so `import attlas` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attlas._version import __version__

if TYPE_CHECKING:
    from attlas.catalogue.card import Card
    from attlas.catalogue.index import build, card, cards
    from attlas.errors import AttlasError
    from attlas.masks import Causal, Documents, Global, Mask, Padding, Prefix, Sinks, Window
    from attlas.nn.mixer import Mixer
    from attlas.ops.attention import attention
    from attlas.ops.cached import attention_cached
    from attlas.ops.explain import explain
    from attlas.ops.merge import merge
    from attlas.shapes import AuxRequest, SeqInfo

__all__ = [
    "AttlasError", "AuxRequest", "Card", "Causal", "Documents", "Global", "Mask", "Mixer", "Padding", "Prefix", "SeqInfo",
    "Sinks", "Window", "__version__", "attention", "attention_cached", "build", "card", "cards", "explain", "merge",
]  # fmt: skip

_WHERE = {
    "AttlasError": "attlas.errors",
    "AuxRequest": "attlas.shapes",
    "Card": "attlas.catalogue.card",
    "Causal": "attlas.masks",
    "Documents": "attlas.masks",
    "Global": "attlas.masks",
    "Mask": "attlas.masks",
    "Mixer": "attlas.nn.mixer",
    "Padding": "attlas.masks",
    "Prefix": "attlas.masks",
    "SeqInfo": "attlas.shapes",
    "Sinks": "attlas.masks",
    "Window": "attlas.masks",
    "attention": "attlas.ops.attention",
    "attention_cached": "attlas.ops.cached",
    "build": "attlas.catalogue.index",
    "card": "attlas.catalogue.index",
    "cards": "attlas.catalogue.index",
    "explain": "attlas.ops.explain",
    "merge": "attlas.ops.merge",
}
_SUBPACKAGES = frozenset({"cache", "catalogue", "compat", "masks", "nn", "ops", "positions", "reference", "scores", "testing"})


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return import_module(f"attlas.{name}")
    raise AttributeError(f"module 'attlas' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])
