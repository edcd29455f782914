"""Every mechanism that decodes can be served: the engine's tokens are those that `generate` gives each request alone, in chunks,
in company, from cached prefixes and after having given way. What cannot be served is refused when the engine is made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from attlas.cache import CacheManager, PartSpec
from attlas.catalogue.card import Card
from attlas.catalogue.index import cards
from attlas.engine.memory import mixers_of
from attlas.engine.request import SamplingParams
from attlas.errors import UnsupportedError
from attlas.models.config import FeedForwardConfig, MixerConfig, StackConfig, TransformerConfig, language_model
from attlas.models.generate import generate
from attlas.models.transformer import Transformer
from attlas.shapes import SeqInfo
from engine_models import VOCAB, engine, lively, prompt, run, tokens_of

PAGE, LONGEST, MARGIN = 8, 43, 1e-3
PARAMS = SamplingParams(max_tokens=11, temperature=0)
PROMPTS = [prompt(n, seed=n) for n in (29, 1, 19, 7, 13)]
AGAIN = [*PROMPTS[0][:27], 3, 5, 7]  # begins like the first prompt: three pages of it

HYBRIDS: dict[str, tuple[Any, ...]] = {
    "window and full": (("sliding-window", {"window": 5}), ("sliding-window", {"window": 11}), ("causal", {"num_kv_heads": 1})),
    "state and full": (("mamba2", {"num_heads": 4, "state_dim": 5, "num_groups": 2}), "causal"),
    "latent and window": (
        ("multi-head-latent", {"kv_lora_rank": 11, "qk_nope_head_dim": 5, "qk_rope_head_dim": 4, "v_head_dim": 7}),
        ("sliding-window", {"window": 7}),
    ),
    "lookahead, window and state": ("castle", ("streaming", {"window": 7, "sinks": 2}), "gated-deltanet"),
    "groups and delta": (("memory-compressed", {"factor": 3}), "deltanet", ("alibi", {"num_kv_heads": 1})),
}


def faces(card: Card) -> Iterator[tuple[str, int, int, tuple[Any, ...]]]:
    """(name, dim, heads, pattern of mixers) of each way in which the card's examples decode."""
    seen = []
    for claim in ("decode", "causal"):
        options = {**card.example, **card.options_for.get(claim, {})}
        if options not in seen:
            seen.append(options)
            rest = {name: value for name, value in options.items() if name not in ("dim", "num_heads")}
            yield f"{card.name} {claim}", options["dim"], options.get("num_heads", 1), ((card.name, rest),)


SERVED = [face for card in cards(supports=("decode", "causal")) for face in faces(card)]
SERVED += [(name, 30, 3, mixers) for name, mixers in HYBRIDS.items()]


def build(dim: int, heads: int, mixers: tuple[Any, ...], seed: int = 0) -> Transformer:
    layers = max(len(mixers), 2)
    config = language_model(VOCAB, dim, layers, heads, mixers=tuple(map(MixerConfig.of, mixers)), hidden=37)
    return lively(Transformer(config), seed)


def specs(model: Transformer) -> list[PartSpec]:
    return [spec for mixer in mixers_of(model) for spec in mixer.cache_specs()]


def decided(dim: int, heads: int, mixers: tuple[Any, ...]) -> tuple[Transformer, list[list[int]]]:
    """A model, and the answers to PROMPTS and AGAIN, none of whose tokens another order of sums would change."""
    for seed in range(9):
        model = build(dim, heads, mixers, seed)
        want = [generate(model, [p], PARAMS.max_tokens)[0] for p in (*PROMPTS, AGAIN)]
        best = [
            model(torch.tensor([*p, *w[:-1]])[None])[0, len(p) - 1 :].topk(2).values
            for p, w in zip((*PROMPTS, AGAIN), want, strict=True)
        ]
        if torch.cat(best).diff(dim=1).abs().min() > MARGIN and len({tuple(w) for w in want}) > 2:
            return model, want
    raise AssertionError("rounding decides in every model")


def test_what_is_fast_and_served_says_so():
    served = {card.name for card in cards(supports=("decode", "causal"), min_level=3)}
    assert served == {card.name for card in cards(min_level=4)}


@pytest.mark.parametrize(("dim", "heads", "mixers"), [face[1:] for face in SERVED], ids=[face[0] for face in SERVED])
@torch.inference_mode()
def test_every_mechanism_that_decodes_is_served(dim: int, heads: int, mixers: tuple[Any, ...]):
    model, want = decided(dim, heads, mixers)
    whole = engine(model, max_len=LONGEST, page_size=PAGE, max_running=1).cache.stats().total
    made = engine(model, max_len=LONGEST, page_size=PAGE, pages=whole + 1, max_running=4, max_batched_tokens=11)
    for i, p in enumerate(PROMPTS):
        made.add(str(i), p, PARAMS)
    got, steps = {str(i): [] for i in range(len(PROMPTS))}, 0
    while made.has_work():
        for output in made.step():
            got[output.request_id] += output.token_ids
        made.cache.check()
        steps += 1
        if steps in (2, 9):  # inside of a prompt, and in the middle of an answer
            made.scheduler.preempt(max(made.scheduler.running, key=lambda s: s.rank))
            made.cache.check()
    assert list(got.values()) == want[:-1]
    assert made.stats().preemptions >= 2
    for name, p in (("first", PROMPTS[0]), ("again", AGAIN)):
        made.add(name, p, PARAMS)
        outputs = run(made)[name, 0]
    assert tokens_of(outputs) == want[-1]
    assert outputs[0].cached_tokens == (24 if shares(model) else 0)
    assert made.cache.stats().used == 0


# These read what a step has computed before it is rounded, and what earlier steps have computed as the cache holds it.
ROUND_BETWEEN_STEPS = ("hyena decode", "axial causal")
EIGHT_BITS = [face for face in SERVED if any(spec.dtype is None and spec.kind != "state" for spec in specs(build(*face[1:])))]


@pytest.mark.parametrize(("name", "dim", "heads", "mixers"), EIGHT_BITS, ids=[face[0] for face in EIGHT_BITS])
@torch.inference_mode()
def test_answers_from_an_eight_bit_cache_do_not_depend_on_chunks(name: str, dim: int, heads: int, mixers: tuple[Any, ...]):
    model = build(dim, heads, mixers).double()
    whole, pieces, ones, exact = (logits(model, *way) for way in ((29, "int8"), (4, "int8"), (1, "int8"), (29, None)))
    off = max(float((t - whole).abs().max()) for t in (pieces, ones))
    assert (off < 1e-9) == (name not in ROUND_BETWEEN_STEPS)
    assert float((ones - exact).abs().max()) > 1e-6  # these are 8 bits


def logits(model: Transformer, chunk: int, kv_dtype: Any) -> torch.Tensor:
    """Of the first prompt, read in chunks."""
    kept = [mixer.cache_specs() for mixer in mixers_of(model)]
    manager = CacheManager(kept, rows=1, pages=150, page_size=PAGE, dtype=torch.float64, kv_dtype=kv_dtype)
    row, found = manager.admit([0]).row, []
    for piece in torch.tensor(PROMPTS[0]).split(chunk):
        assert manager.reserve(row, len(piece))
        found.append(model(piece, seq=SeqInfo((len(piece),), ids=(row,)), cache=manager.caches))
    return torch.cat(found)


def shares(model: Transformer) -> bool:
    """Whether everything that the layers keep can be cut at a page of tokens."""
    return all(spec.kind not in ("state", "lookahead") and spec.group == 1 for spec in specs(model))


# ---- refusals ---------------------------------------------------------------------------------------------------------------


UNSERVED = [card for card in cards() if not {"decode", "causal"} <= card.supports]


@pytest.mark.parametrize("card", UNSERVED, ids=[card.name for card in UNSERVED])
def test_what_cannot_go_on_from_a_cache_is_refused_by_its_layer(card: Card):
    options = {name: value for name, value in card.example.items() if name not in ("dim", "num_heads")}
    model = build(card.example["dim"], card.example.get("num_heads", 1), ((card.name, options),))
    reason = "reads a memory, which a request does not bring" if "cross" in card.supports else "cannot decode"
    with pytest.raises(UnsupportedError, match=f"Engine: layer 0: {card.name}.*{reason}"):
        engine(model)


def test_layers_that_read_both_ways_are_refused():
    with pytest.raises(UnsupportedError, match=r"layer 1: multi-head.*cannot decode"):
        engine(build(30, 3, ("causal", ("multi-head", {"causal": False}))))


def test_models_of_two_stacks_are_refused():
    encoder, decoder = (StackConfig(1, (name,), FeedForwardConfig(37), cross=cross) for name, cross in PAIR)
    with pytest.raises(UnsupportedError, match="'encoder-decoder'"):
        engine(Transformer(TransformerConfig("encoder-decoder", VOCAB, 30, 3, encoder=encoder, decoder=decoder)))


PAIR = (("full", None), ("causal", MixerConfig("cross")))


@pytest.mark.parametrize("name", ["state and full", "lookahead, window and state", "groups and delta"])
def test_speculation_is_refused_where_tokens_cannot_be_taken_back(name: str):
    with pytest.raises(UnsupportedError, match=r"speculative=3 takes rejected tokens back .* layer \d"):
        engine(build(30, 3, HYBRIDS[name]), speculative=3)
