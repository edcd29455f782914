"""Small random models and helpers for the tests of the engine."""

from __future__ import annotations

from typing import Any

import torch

from attlas.engine.engine import Engine
from attlas.engine.options import EngineOptions
from attlas.engine.request import Output, SamplingParams
from attlas.models.config import MixerConfig, language_model
from attlas.models.transformer import Transformer

VOCAB = 89

# Name -> the pattern of mixers. Head sizes fit dim 30 and 3 heads where nothing else is said.
PATTERNS: dict[str, tuple[Any, ...]] = {
    "full": ("causal", ("grouped-query", {"num_kv_heads": 1})),
    "windows and full": (("sliding-window", {"window": 11}), ("sliding-window", {"window": 5}), "causal"),
    "sinks": (("streaming", {"window": 7, "sinks": 2}), "causal"),
    "alibi": ("alibi",),
    "mla": (
        ("multi-head-latent", {"kv_lora_rank": 11, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 7}),
        "causal",
    ),
    "mamba": (("mamba2", {"num_heads": 4, "state_dim": 5, "num_groups": 2}), "causal"),
    "rwkv": (("rwkv6", {"mix_rank": 2, "decay_rank": 3}),),
}


def lively(model: Transformer, seed: int = 0) -> Transformer:
    """Weights large enough that attention is not uniform and every token counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.2 if p.ndim > 1 else 0.1))
    return model


def small(name: str = "full", seed: int = 0) -> Transformer:
    mixers = tuple(MixerConfig.of(m) for m in PATTERNS[name])
    return lively(Transformer(language_model(VOCAB, 30, len(mixers), 3, mixers=mixers, hidden=37)), seed)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


class Letters:
    """A tokenizer of one character per token; token 0 ends a text."""

    ends = frozenset({0})

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(33 + i) for i in ids if i)

    def to_json(self) -> str:
        raise AssertionError("not asked for here")


def engine(model: Transformer, tokenizer: Any = None, **options: Any) -> Engine:
    return Engine(model, tokenizer, options=EngineOptions(**{"max_len": 128, "page_size": 8, **options}))


def run(made: Engine, *, check: bool = True) -> dict[tuple[str, int], list[Output]]:
    """Step until nothing is left to do; the outputs of each answer."""
    found: dict[tuple[str, int], list[Output]] = {}
    while made.has_work():
        for output in made.step():
            found.setdefault((output.request_id, output.index), []).append(output)
        if check:
            made.cache.check()
    return found


def tokens_of(outputs: list[Output]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


def answers(made: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """The answers to several prompts that arrive together."""
    for i, p in enumerate(prompts):
        made.add(str(i), p, params)
    found = run(made)
    return [tokens_of(found[str(i), 0]) for i in range(len(prompts))]


GREEDY = SamplingParams(max_tokens=13, temperature=0)
