"""From logits to the next token: greedy, temperature, top-k, top-p, min-p, penalties. Pure functions; the random numbers come
from the caller."""

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


def filtered_probabilities(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Probabilities [..., V] in fp32 after dividing logits by the temperature, then keeping the `top_k` largest, then the
    smallest set of largest probabilities whose sum reaches `top_p` (at least one token), then those of at least `min_p` times the
    largest. The rest is 0; each row sums to 1."""
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_k is None and top_p is None and min_p is None:
        return probabilities
    flat = probabilities.view(-1, probabilities.shape[-1])
    rules = (torch.full((len(flat),), rule, device=flat.device) for rule in (top_k or 0, top_p or 1.0, min_p or 0.0))
    kept = most_likely(flat, *rules)
    return (kept / kept.sum(-1, keepdim=True)).view_as(probabilities)


FIRST_LOOK = 256  # candidates that are sorted before anybody looks at the others


def most_likely(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Probabilities [N, V] with 0 for what the rules of each row leave out: top_k int [N] (0 = off), top_p [N] (1 = off; of the
    mass that top_k left), min_p [N] (0 = off; relative to the largest). Of equal probabilities the first come first. What a row
    keeps does not depend on the rows beside it. Cost: a partial sort of as many candidates as the rules let through."""
    size, kept = probabilities.shape[-1], probabilities
    rows = ((top_k > 0) & (top_k < size) | (top_p < 1)).nonzero().flatten()
    if len(rows):
        part = _largest(probabilities[rows], top_k[rows], top_p[rows])
        kept = part if len(rows) == len(kept) else kept.index_copy(0, rows, part)
    if bool((min_p > 0).any()):
        floor = min_p.to(kept.dtype)[:, None] * probabilities.amax(-1, keepdim=True)
        kept = torch.where(probabilities >= floor, kept, 0.0)
    return kept


def _largest(probabilities: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    size = probabilities.shape[-1]
    top_k = torch.where(top_k > 0, top_k, size).clamp(max=size)
    width = min(size, max(FIRST_LOOK, int(torch.where(top_k < size, top_k, 0).max())))
    while True:
        values = probabilities.topk(width).values.double()  # in descending order, whatever the order of equals
        reached = values.cumsum(-1)
        total = torch.where(top_k < size, reached.gather(-1, top_k.clamp(max=width)[:, None] - 1)[:, 0], 1.0)
        wanted = torch.where(top_p < 1, top_p.double() * total, torch.inf)[:, None]
        inside = (reached - values < wanted) & (torch.arange(width, device=values.device) < top_k[:, None])
        if width == size or not bool((inside[:, -1] & (top_k > width)).any()):
            break
        width = min(size, 8 * width)
    count = inside.sum(-1, keepdim=True)
    last = values.gather(-1, count - 1)
    equals = ((values == last) & inside).sum(-1, keepdim=True)
    at = probabilities == last
    if bool((at.sum(-1, keepdim=True) > equals).any()):
        at &= at.cumsum(-1) <= equals
    return torch.where((probabilities > last) | at, probabilities, 0.0)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens int64 [N] of weights [N, V] (they need not sum to 1) by inversion: the first token whose running sum exceeds
    uniform [N], in [0, 1), times the sum of all. A row's token depends on its own weights and number only."""
    reached = probabilities.double().cumsum(-1)
    return torch.searchsorted(reached, uniform.double()[:, None] * reached[:, -1:], right=True)[:, 0].clamp(
        max=probabilities.shape[-1] - 1
    )


def penalised(logits: Tensor, seen: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Logits [N, V] after the penalties [N] of each row: of tokens that `seen` [N, V] marks, positive logits are divided and
    negative ones multiplied by `repetition`; `presence` is taken off those that the answer holds (counts [N, V] above 0), and
    `frequency` as often as it holds them."""
    repetition = repetition[:, None]
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - presence[:, None] * (counts > 0) - frequency[:, None] * counts


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
