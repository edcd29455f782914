"""Whole models over a cache manager: logits do not depend on where the pages of a sequence lie or with whom it shares them."""

from __future__ import annotations

import random

import pytest
import torch

from attlas.cache import CacheManager
from attlas.models.config import language_model
from attlas.models.transformer import Transformer
from attlas.shapes import SeqInfo

VOCAB = 89
LATENT = {"kv_lora_rank": 7, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
MODELS = {
    "full": ("causal", "causal"),
    "windows and full": (("sliding-window", {"window": 11}), "causal", ("sliding-window", {"window": 11})),
    "sinks": (("streaming", {"window": 9, "sinks": 3}), ("grouped-query", {"num_kv_heads": 1})),
    "latent": (("multi-head-latent", LATENT),),
    "recurrent": ("linear", "causal"),
}


def build(name: str) -> Transformer:
    model = Transformer(language_model(VOCAB, 30, len(MODELS[name]), 3, mixers=MODELS[name], hidden=37))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.15 if p.ndim > 1 else 0.1))
    return model


def managed(model: Transformer, **options) -> CacheManager:
    assert model.decoder is not None
    specs = [mixer.cache_specs() for mixer in model.decoder.mixers()]
    return CacheManager(specs, **({"rows": 4, "pages": 50, "page_size": 8, "swap_bytes": 10**6} | options))


class Served:
    """Sequences over a manager, and the logits of each of their tokens."""

    def __init__(self, model: Transformer, manager: CacheManager) -> None:
        self.model, self.manager, self.tokens, self.logits = model, manager, {}, {}

    def step(self, new: dict[int, list[int]]) -> None:
        for row, more in new.items():
            assert self.manager.reserve(row, len(more))
        seq = SeqInfo(tuple(map(len, new.values())), ids=tuple(new))
        flat = torch.tensor([t for more in new.values() for t in more])
        with torch.inference_mode():
            logits = self.model(flat, seq=seq, cache=self.manager.caches).split(seq.lengths)
        for (row, more), out in zip(new.items(), logits, strict=True):
            self.tokens[row] = self.tokens[row] + more
            self.logits[row] = torch.cat([self.logits[row], out])
            self.manager.commit(row, self.tokens[row])

    def admit(self, tokens: list[int]) -> int:
        admission = self.manager.admit(tokens)
        row, n = admission.row, admission.cached_tokens
        self.tokens[row], self.logits[row] = tokens[:n], torch.empty(0, VOCAB)
        rest = tokens[n:]
        for at in range(0, len(rest), 13):  # a prompt in chunks
            self.step({row: rest[at : at + 13]})
        return row

    def check(self, row: int, bound: float = 2e-4) -> None:
        with torch.inference_mode():
            want = self.model(torch.tensor(self.tokens[row])[None])[0][-len(self.logits[row]) :]
        assert (self.logits[row] - want).abs().max() < bound * want.abs().max()
        self.manager.check()


@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_depend_on_pages(name):
    draw = random.Random(0)
    text = [draw.randrange(VOCAB) for _ in range(60)]
    served = Served(build(name), managed(build(name)))
    first = served.admit(text[:45])
    second = served.admit([*text[:33], 5, 6, 7])
    third = served.manager.fork(first)
    served.tokens[third], served.logits[third] = list(served.tokens[first]), served.logits[first]
    for t in range(5):
        served.step({first: [t], third: [t + 50], second: [t + 20]})
    handle, tokens, logits = served.manager.swap_out(second), served.tokens.pop(second), served.logits.pop(second)
    served.manager.resize(70)
    served.manager.release(first, served.tokens[first])
    served.manager.defragment()
    back = served.manager.swap_in(handle)
    served.tokens[back], served.logits[back] = tokens, logits
    served.manager.resize(40)
    last = served.admit([*text[:45], 0, 1, 2, 60])
    for t in range(4):
        served.step({third: [t], back: [t], last: [t + 3]})
    for row in (third, back, last):
        served.check(row)
    sharing = name != "recurrent"
    assert served.manager.stats().hits >= (32 if sharing else 0) and (served.manager.stats().hits > 0) == sharing


@pytest.mark.parametrize(("kv_dtype", "bound"), [("int8", 0.05), ("fp8", 0.25)])
@pytest.mark.parametrize("name", ["full", "windows and full", "latent"])
def test_eight_bit_pages_change_logits_a_little(name, kv_dtype, bound):
    served = Served(build(name), managed(build(name), kv_dtype=kv_dtype))
    row = served.admit([(7 * i) % VOCAB for i in range(29)])
    for t in range(4):
        served.step({row: [t]})
    served.check(row, bound)
