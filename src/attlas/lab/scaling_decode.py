"""Multi-head latent attention, token by token: reading the latent as it lies, against making keys and values of it at every
step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attlas.lab.gate import TOLERANCE
from attlas.lab.measure import Thunk, time_interleaved
from attlas.nn.latent import MultiHeadLatent
from attlas.shapes import SeqInfo

DIM, HEADS = 1024, 16
SIZES = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
BAR = 5.0
CHECKED = 67


class Expanding(MultiHeadLatent):
    """The same layer, which makes the keys and values of all cached tokens at every step."""

    def absorbs(self, new: int, held: int) -> bool:
        return False


def pair() -> tuple[MultiHeadLatent, MultiHeadLatent]:
    """Both with the same weights; 16 heads of the widths of DeepSeek-V2."""
    torch.manual_seed(0)
    absorbed, expanding = MultiHeadLatent(DIM, HEADS, **SIZES), Expanding(DIM, HEADS, **SIZES)  # type: ignore[arg-type]
    expanding.load_state_dict(absorbed.state_dict())
    return absorbed, expanding


@torch.no_grad()
def check() -> str | None:
    """What is wrong, None = nothing: both against one prefill, and the bytes of the cache against rank + rope per token."""
    x = torch.randn(1, CHECKED, DIM)
    for mixer in pair():
        want, cache = mixer(x), mixer.new_cache(1, CHECKED)
        got = torch.cat([mixer(piece, cache=cache) for piece in x.split([CHECKED - 3, 1, 1, 1], 1)], 1)
        error = float((got - want).abs().max() / want.abs().max())
        if not error <= TOLERANCE:
            return f"{type(mixer).__name__}: decoding differs from one prefill by {error:.1e} of the largest output"
        if cache.nbytes() != CHECKED * token_bytes(mixer):
            return f"the cache holds {cache.nbytes()} bytes for {CHECKED} tokens, not {token_bytes(mixer)} for each"
    return None


def token_bytes(mixer: MultiHeadLatent) -> int:
    """(kv_lora_rank + qk_rope_head_dim) elements."""
    return (mixer.kv_rank + mixer.rotary) * next(mixer.parameters()).element_size()


def measure(tokens: int, repeats: int, max_seconds: float) -> dict[str, Any]:
    """One token behind `tokens` cached ones."""
    calls, caches = {}, []
    samples = 4 * repeats + 2
    for name, mixer in zip(("absorbed", "expanded"), pair(), strict=True):
        cache = mixer.new_cache(1, tokens + samples)
        cache.parts[0].write((torch.randn(tokens, 1, mixer.kv_rank + mixer.rotary),), SeqInfo((tokens,), starts=(0,), ids=(0,)))
        cache.end_step()
        caches.append(cache.parts[0].lengths[0] * token_bytes(mixer))
        calls[name] = _step(mixer, cache)
    times = time_interleaved(calls, 4 * repeats, min_sample=0, max_seconds=max_seconds)
    ratio = times["expanded"].median / times["absorbed"].median
    keys_and_values = 4 * HEADS * (SIZES["qk_nope_head_dim"] + SIZES["qk_rope_head_dim"] + SIZES["v_head_dim"])
    return {
        "tokens": tokens, "seconds": {k: t.to_dict() for k, t in times.items()}, "ratio": ratio, "bar": BAR,
        "cache_bytes": caches[0], "bytes_per_token": caches[0] // tokens, "expanded_bytes_per_token": keys_and_values,
    }  # fmt: skip


def _step(mixer: MultiHeadLatent, cache: Any) -> Thunk:
    token: Tensor = torch.randn(1, 1, DIM)

    def call() -> object:
        with torch.no_grad():
            return mixer(token, cache=cache)

    return call
