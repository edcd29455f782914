"""What a mechanism must show before it is trained or timed: a wrong result has no speed and no quality worth reporting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.nn.mixer import Mixer

TOLERANCE = 2e-4  # of the largest output, float32


@dataclass(frozen=True)
class Gate:
    """problems: what was wrong, empty = green. length: tokens it was tried on. decode_error: largest difference, relative."""

    problems: tuple[str, ...]
    length: int
    decode_error: float | None

    def to_dict(self) -> dict[str, object]:
        return {"problems": list(self.problems), "length": self.length, "decode_error": self.decode_error}


def check(mixer: Mixer, length: int, *, seed: int = 0) -> Gate:
    """Finite outputs and gradients; no output depends on a later token; token-by-token decoding equals one prefill.

    `length` should exceed the mechanism's window or block, so that their edges are crossed. float32, one sequence; the first
    third of the tokens is a prefill, the others come one at a time.
    """
    like = next(mixer.parameters())
    x = torch.randn(1, length, mixer.dim, generator=torch.Generator().manual_seed(seed)).to(like)
    try:
        whole, problems = _whole(mixer, x)
        problems += _later_tokens(mixer, x, whole)
        error = _decode_error(mixer, x, whole)
    except Exception as exception:  # a mechanism that raises has not passed
        return Gate((f"raised {type(exception).__name__}: {exception}",), length, None)
    if not error <= TOLERANCE:
        problems.append(f"decoding differs from one prefill by {error:.1e} of the largest output")
    return Gate(tuple(problems), length, error)


def _whole(mixer: Mixer, x: Tensor) -> tuple[Tensor, list[str]]:
    leaf = x.clone().requires_grad_(True)
    out = mixer(leaf)
    out.square().sum().backward()
    grads = [leaf.grad, *(p.grad for p in mixer.parameters() if p.requires_grad)]
    mixer.zero_grad(set_to_none=True)
    problems = []
    if out.shape != x.shape or not bool(out.isfinite().all()):
        problems.append("the output is not finite, or not of the input's shape")
    if not all(g is not None and bool(g.isfinite().all()) for g in grads):
        problems.append("a gradient is missing or not finite")
    return out.detach(), problems


@torch.no_grad()
def _later_tokens(mixer: Mixer, x: Tensor, whole: Tensor) -> list[str]:
    cut = x.shape[1] // 2
    changed = x.clone()
    changed[:, cut:] = changed[:, cut:].flip(1) + 1
    leak = float((mixer(changed)[:, :cut] - whole[:, :cut]).abs().max())
    return [f"outputs change by {leak:.1e} when later tokens change"] if leak > TOLERANCE * float(whole.abs().max()) else []


@torch.no_grad()
def _decode_error(mixer: Mixer, x: Tensor, whole: Tensor) -> float:
    length = x.shape[1]
    first = max(1, length // 3)
    cache = mixer.new_cache(1, length)
    parts = [mixer(x[:, :first], cache=cache)]
    parts += [mixer(x[:, t : t + 1], cache=cache) for t in range(first, length)]
    return float((torch.cat(parts, 1) - whole).abs().max() / whole.abs().max().clamp_min(1e-30))
