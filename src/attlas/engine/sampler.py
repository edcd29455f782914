"""The next tokens of many answers at once, each by its own rules and from its own random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.engine.request import SamplingParams, TokenLogprobs
from attlas.engine.sequence import Sequence
from attlas.models.sampling import draw, most_likely, penalised

MASK64 = (1 << 64) - 1


def mixed(x: int) -> int:
    """A 64-bit finaliser with good avalanche (splitmix64)."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def uniform(seed: int, index: int, position: int) -> float:
    """The random number in [0, 1) for the token at `position` of answer `index`: a function of these three only, so that neither
    the company, nor the order of work, nor a preemption changes a request's tokens."""
    return (mixed(mixed(mixed(seed & MASK64) ^ index) ^ position) >> 11) / (1 << 53)


@dataclass(frozen=True)
class Slot:
    """A token to choose: the one at `position` of `sequence`, from logits row `row`."""

    sequence: Sequence
    position: int
    row: int


@dataclass(frozen=True)
class Chosen:
    token: int
    logprobs: TokenLogprobs | None = None


def choose(logits: Tensor, slots: list[Slot]) -> list[Chosen]:
    """One token for each slot, from raw logits [rows, V]. Cost: vector operations over [len(slots), V]."""
    if not slots:
        return []
    index = [s.row for s in slots]
    raw = logits if index == list(range(len(logits))) else logits[torch.tensor(index, device=logits.device)]
    raw = raw.cpu()
    tokens = _tokens(_ruled(raw, slots), slots).tolist()
    reports = _reports(raw, tokens, [s.sequence.params.logprobs for s in slots])
    return [Chosen(token, report) for token, report in zip(tokens, reports, strict=True)]


def _tokens(logits: Tensor, slots: list[Slot]) -> Tensor:
    params = [s.sequence.params for s in slots]
    random = [i for i, p in enumerate(params) if not p.greedy]
    if not random:
        return logits.float().argmax(-1)  # several times faster than in half precision
    rows = torch.tensor(random)
    chosen = [params[i] for i in random]
    part = logits if len(random) == len(slots) else logits[rows]
    temperature = torch.tensor([p.temperature for p in chosen])
    part = part.float()
    part = part - part.amax(-1, keepdim=True)  # so that a tiny temperature does not overflow
    kept = most_likely(
        (part / temperature[:, None]).softmax(-1),
        torch.tensor([p.top_k for p in chosen]),
        torch.tensor([p.top_p for p in chosen], dtype=torch.float64),
        torch.tensor([p.min_p for p in chosen]),
    )
    numbers = [uniform(s.sequence.seed, s.sequence.index, s.position) for s in (slots[i] for i in random)]
    drawn = draw(kept, torch.tensor(numbers, dtype=torch.float64))
    return drawn if len(random) == len(slots) else logits.float().argmax(-1).index_copy(0, rows, drawn)


def _ruled(logits: Tensor, slots: list[Slot]) -> Tensor:
    """Logits after biases, penalties and grammars."""
    params = [s.sequence.params for s in slots]
    biased = [(i, token, value) for i, p in enumerate(params) for token, value in p.logit_bias]
    ruled = [i for i, p in enumerate(params) if p.penalised]
    masks = [(i, s.sequence.grammar) for i, s in enumerate(slots) if s.sequence.grammar is not None]
    if not (biased or ruled or masks):
        return logits
    logits = logits.float().clone()
    if biased:
        rows, tokens, values = (torch.tensor(x) for x in zip(*biased, strict=True))
        logits.index_put_((rows, tokens), values, accumulate=True)
    if ruled:
        rows = torch.tensor(ruled)
        logits[rows] = _penalise(logits[rows], [slots[i].sequence for i in ruled])
    for i, grammar in masks:
        assert grammar is not None
        logits[i].masked_fill_(~grammar.allowed(), -torch.inf)
    return logits


def _penalise(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    params: list[SamplingParams] = [s.params for s in sequences]
    answered, written = (_counts(logits, texts) for texts in ([s.answer for s in sequences], [s.tokens for s in sequences]))
    strength = [torch.tensor([getattr(p, f"{name}_penalty") for p in params]) for name in ("repetition", "presence", "frequency")]
    return penalised(logits, written > 0, answered, *strength)


def _counts(like: Tensor, texts: list[list[int]]) -> Tensor:
    """How often each text holds each token, in the shape of `like`."""
    rows = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(t) for t in texts]))
    tokens = torch.tensor([token for t in texts for token in t], dtype=torch.int64)
    return torch.zeros_like(like).index_put_((rows, tokens), torch.ones(()), accumulate=True)


def _reports(raw: Tensor, tokens: list[int], wanted: list[int | None]) -> list[TokenLogprobs | None]:
    """Log probabilities of tokens[i] in row i, where wanted[i] says how many others to name."""
    rows = [i for i, n in enumerate(wanted) if n is not None]
    reports: list[TokenLogprobs | None] = [None] * len(tokens)
    if not rows:
        return reports
    logs = raw[torch.tensor(rows)].float().log_softmax(-1)
    count = max(wanted[i] or 0 for i in rows)
    values, names = logs.topk(count) if count else (logs[:, :0], torch.empty(len(rows), 0, dtype=torch.int64))
    for j, i in enumerate(rows):
        n = wanted[i] or 0
        top = tuple(zip(names[j, :n].tolist(), values[j, :n].tolist(), strict=True))
        reports[i] = TokenLogprobs(tokens[i], float(logs[j, tokens[i]]), top)
    return reports


def prompt_reports(raw: Tensor, tokens: list[int], count: int) -> list[TokenLogprobs]:
    """Log probabilities of given tokens [n] under logits [n, V]."""
    found = _reports(raw.cpu(), tokens, [count] * len(tokens))
    return [report for report in found if report is not None]
