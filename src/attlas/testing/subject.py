"""What a law looks at: a way to make one mixer, with the options of a small example and the claims that are made for it."""

from __future__ import annotations

import copy
import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attlas.testing.inputs import MEMORY, randn
from attlas.testing.literal import literal_attend

Factory = Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """One mechanism under test.

    factory       factory(**options) -> mixer; its signature names every option
    options       options of the small example, dim and num_heads among them
    supports      claims; a law that needs a claim which is not made does not apply
    reference     brute-force function with the signature of attlas.reference.softmax.attention, None when the op has a truth
                  of its own
    options_for   claim -> options that turn it on
    variants      option -> another value for which the output must differ
    degenerate    (options, factory of the simpler mixer, its options): with these, both must compute the same
    """

    name: str
    factory: Factory
    options: Mapping[str, Any]
    supports: frozenset[str]
    reference: Callable[..., tuple[Tensor, Tensor]] | None = None
    options_for: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    variants: Mapping[str, Any] = field(default_factory=dict)
    degenerate: tuple[Mapping[str, Any], Factory, Mapping[str, Any]] | None = None

    @property
    def dim(self) -> int:
        return self.options["dim"]

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.factory).parameters

    @property
    def claims(self) -> frozenset[str]:
        """What the laws ask for: `supports`, and what follows from the mixer itself: "degenerate" (a degenerate setting is
        given), "stores-tokens" (decodes with a cache of per-token tensors), "extends-itself" (decodes, and its cache holds its
        own tokens)."""
        found = set(self.supports)
        if self.degenerate is not None:
            found.add("degenerate")
        if "decode" in self.supports:
            decoder = self.make(claim="decode")
            if all(spec.kind != "state" for spec in decoder.cache_specs()):
                found.add("stores-tokens")
            if decoder.memory_use == "none":
                found.add("extends-itself")
        return frozenset(found)

    def make(self, *, dtype: torch.dtype = torch.float64, seed: int = 7, claim: str = "", **changes: Any) -> Any:
        """A mixer in eval mode with seeded weights. `claim` adds the options that turn a claim on."""
        options = {**self.options, **self.options_for.get(claim, {}), **changes}
        return seeded(self.factory(**options), dtype, seed)

    def faces(self) -> dict[str, Any]:
        """The example itself and one mixer for each claim that needs other options: label -> mixer (fp64)."""
        return {"example": self.make()} | {claim: self.make(claim=claim) for claim in self.options_for}

    def twin(self, mixer: Any) -> Any:
        """The same mixer with the same weights, computed the literal way."""
        twin = copy.deepcopy(mixer).use("reference")
        if self.reference is not None:
            for module in twin.modules():
                if hasattr(module, "attend"):
                    module.attend = literal_attend(self.reference)
        return twin

    def memory(self, mixer: Any, rows: int = 2, length: int = MEMORY, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """{"memory": ...} for a mixer that reads one, else {}."""
        if mixer.memory_use == "none":
            return {}
        return {"memory": randn(rows, length, mixer.memory_dim, seed=3, dtype=dtype)}


def seeded(mixer: Any, dtype: torch.dtype, seed: int = 7) -> Any:
    """Give every parameter a seeded normal value at the scale 1/sqrt(fan in) (vectors: plus small noise). The
    values depend on the parameter's name and shape only, so two mixers that share a parameter share its value."""
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            noise = randn(*p.shape, seed=seed + zlib.crc32(name.encode()))
            p.copy_(noise / max(p.shape[-1], 1) ** 0.5 if p.dim() > 1 else p + 0.3 * noise)
    return mixer.to(dtype).eval()
