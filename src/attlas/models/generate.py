"""Text continuation with one model in one process: prefill, then one token per step for all sequences that are not done."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from attlas.cache.layer import Cache
from attlas.errors import OptionError
from attlas.models.layers import Memory
from attlas.models.sampling import check_sampling, sample
from attlas.shapes import SeqInfo

if TYPE_CHECKING:
    from attlas.models.transformer import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | Collection[int] | None = None,
    memory: Memory | Tensor | None = None,
    layout: Literal["contiguous", "paged"] = "contiguous",
    page_size: int = 16,
    use_cache: bool = True,
) -> list[list[int]]:
    """The new tokens of each prompt, without the prompt.

    prompts       token ids, ragged; or a tensor [B, T]. No padding: sequences are packed, so none changes another
    temperature   0 takes the most likely token; above 0 samples from softmax(logits / temperature), of the `top_k` most likely
                  tokens and of the smallest set of most likely ones that holds probability `top_p`
    seed          prompt b draws from a random stream of its own, `seed + b`
    eos           token id or ids that end a sequence; the one that did is the last of its list
    memory        for an encoder-decoder, from `model.encode`; prompts are then the decoder's first tokens
    layout        of the caches (page_size: tokens per page)
    use_cache     False recomputes everything at every step: slow, and right for mixers that have no cache

    Cost: one forward over all prompt tokens, then one over at most B tokens per step; logits of the last tokens only.
    """
    rows = [list(map(int, p)) for p in (prompts.tolist() if isinstance(prompts, Tensor) else prompts)]
    _check(rows, max_new_tokens)
    check_sampling(temperature, top_k, top_p)
    ends = {eos} if isinstance(eos, int) else set(eos or ())
    out: list[list[int]] = [[] for _ in rows]
    active = list(range(len(rows))) if max_new_tokens else []
    generators = [torch.Generator().manual_seed(seed + b) for b in active]
    longest = max((len(r) for r in rows), default=0) + max_new_tokens
    cache = model.new_cache(len(rows), longest, layout=layout, page_size=page_size) if use_cache and active else None
    while active:
        first = cache is None or not out[active[0]]  # what the cache does not hold yet: prompt and memory
        fed = [(rows[b] if first else []) + (out[b] if cache is None else out[b][-1:]) for b in active]
        logits = _last_logits(model, fed, active, cache, _rows_of(memory, active) if first else None)
        chosen = sample(logits, temperature, top_k, top_p, [generators[b] for b in active] if temperature else None).tolist()
        for b, token in zip(active, chosen, strict=True):
            out[b].append(token)
        active = [b for b in active if out[b][-1] not in ends and len(out[b]) < max_new_tokens]
    return out


def _last_logits(
    model: Transformer, fed: list[list[int]], rows: list[int], cache: list[Cache] | None, memory: Memory | None
) -> Tensor:
    """Logits [N, vocab] after the last of the tokens `fed` to each of the cache rows `rows`."""
    lengths = tuple(map(len, fed))
    tokens = torch.tensor([t for row in fed for t in row], device=model.embed.tokens.weight.device)
    seq = SeqInfo(lengths, ids=None if cache is None else tuple(rows))
    hidden = model.hidden(tokens, seq=seq, cache=cache, memory=memory)
    last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
    return model.logits(hidden[last])


def _rows_of(memory: Memory | Tensor | None, rows: list[int]) -> Memory | None:
    """The memory of some rows, packed where it came packed."""
    if memory is None:
        return None
    if isinstance(memory, Tensor):
        memory = Memory(memory)
    if memory.lengths is None:
        return Memory(memory.hidden[rows])
    parts = memory.hidden.split(memory.lengths)
    return Memory(torch.cat([parts[b] for b in rows]), tuple(memory.lengths[b] for b in rows))


def _check(rows: list[list[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise OptionError(f"generate: max_new_tokens={max_new_tokens}; it must not be negative")
    if empty := [b for b, r in enumerate(rows) if not r]:
        raise OptionError(f"generate: prompts {empty} are empty; give at least one token (a beginning-of-sequence token)")
