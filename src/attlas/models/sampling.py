"""From logits to the next token: greedy, temperature, top-k, top-p. Pure functions; the random numbers come from the caller."""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.errors import OptionError


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise OptionError for values outside their range: temperature >= 0, top_k >= 1, 0 < top_p <= 1."""
    if not temperature >= 0:
        raise OptionError(f"temperature={temperature}; it must be 0 (greedy) or larger")
    if top_k is not None and top_k < 1:
        raise OptionError(f"top_k={top_k}; it must be at least 1, or None for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise OptionError(f"top_p={top_p}; it must be in (0, 1], or None for no limit")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise OptionError(f"top_k={top_k}, top_p={top_p} have no effect with temperature=0 (greedy); set a temperature")


def filtered_probabilities(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Probabilities [..., V] in fp32 after dividing logits by the temperature, then keeping the `top_k` largest, then the
    smallest set of largest probabilities whose sum reaches `top_p` (at least one token). The rest is 0; each row sums to 1."""
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_k is None and top_p is None:
        return probabilities
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        keep[..., top_k:] = False
        ordered = ordered * keep
        ordered = ordered / ordered.sum(-1, keepdim=True)
    if top_p is not None:
        keep &= ordered.cumsum(-1) - ordered < top_p
    kept = torch.zeros_like(probabilities).scatter(-1, index, ordered * keep)
    return kept / kept.sum(-1, keepdim=True)


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generators: list[torch.Generator] | None = None,
) -> Tensor:
    """Next tokens, int64 [N], from logits [N, V]; temperature 0 takes the largest logit (the first of equals).

    `generators` holds one CPU generator per row, so that what a row draws does not depend on the rows beside it."""
    if temperature == 0:
        return logits.argmax(-1)
    assert generators is not None and len(generators) == logits.shape[0], "sampling needs one generator per row"
    probabilities = filtered_probabilities(logits, temperature, top_k, top_p).cpu()
    drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn).to(logits.device)
