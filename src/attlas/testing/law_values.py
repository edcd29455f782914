"""Laws about values: the mixer computes its definition, with every gradient, in every dtype."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from attlas.testing.budget import assert_budget, assert_same
from attlas.testing.inputs import BATCH, LONG, SHORT, longest, randn
from attlas.testing.subject import Subject


def _gradients(mixer: Any, x: Tensor, memory: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, and the gradient of a random functional of it for the inputs and every parameter."""
    leaves = {"x": x.clone().requires_grad_(), **{k: v.clone().requires_grad_() for k, v in memory.items()}}
    y = mixer(leaves["x"], **{k: leaves[k] for k in memory})
    names = dict(mixer.named_parameters())
    wanted = [*leaves.values(), *names.values()]
    found = torch.autograd.grad(y, wanted, randn(*y.shape, seed=11, dtype=y.dtype), allow_unused=True)
    for name, grad in zip([*leaves, *names], found, strict=True):
        assert grad is not None, f"no gradient reaches {name}"
    return {"output": y.detach()} | {f"gradient of {n}": g for n, g in zip([*leaves, *names], found, strict=True)}


def reference(s: Subject) -> None:
    """In fp64, output and every gradient equal those of the literal computation, for the example and every claim's options."""
    for label, mixer in s.faces().items():
        for rows, length in ((BATCH, LONG), (1, longest(mixer))):
            x, memory = randn(rows, length, s.dim), s.memory(mixer, rows)
            before = x.clone()
            got, want = _gradients(mixer, x, memory), _gradients(s.twin(mixer), x, memory)
            for what in want:
                assert_same(got[what], want[what], f"{s.name} ({label}), {length} tokens: {what}")
            assert torch.equal(x, before), f"{s.name}: the input was changed in place"


def gradcheck(s: Subject) -> None:
    """In fp64, gradients agree with finite differences."""
    mixer = s.make()
    memory = s.memory(mixer, 1, 3)
    names = [n for n, _ in mixer.named_parameters()]

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        extra = dict(zip(memory, rest[: len(memory)], strict=True))
        return torch.func.functional_call(mixer, dict(zip(names, rest[len(memory) :], strict=True)), (x,), extra)

    inputs = [randn(1, 7, s.dim), *memory.values(), *(p.detach().clone() for _, p in mixer.named_parameters())]
    try:
        torch.autograd.gradcheck(run, [t.requires_grad_() for t in inputs], fast_mode=True, atol=1e-6)
    except GradcheckError as error:
        raise AssertionError(f"{s.name}: {error}") from error


def dtypes(s: Subject) -> None:
    """Output dtype = input dtype; in fp32 and bf16, output and gradients stay within the error budget."""
    for dtype in (torch.float32, torch.bfloat16):
        mixer = s.make(dtype=dtype)
        x, memory = randn(BATCH, SHORT, s.dim, dtype=dtype), s.memory(mixer, BATCH, dtype=dtype)
        got, naive = _gradients(mixer, x, memory), _gradients(s.twin(mixer), x, memory)
        exact = s.twin(mixer).double()
        truth = _gradients(exact, x.double(), {k: v.double() for k, v in memory.items()})
        assert got["output"].dtype == dtype, f"{s.name}: {dtype} in, {got['output'].dtype} out"
        for what in truth:
            assert_budget(got[what], naive[what], truth[what], f"{s.name}, {dtype}: {what}")


def autocast(s: Subject) -> None:
    """Under torch.autocast an fp32 mixer trains, and decodes if it can: its output and the gradient of x are off from those in
    fp32 by at most 5 and 10 % of their norm or, where a choice hangs on the last bits, as of a hash, twice what all in bf16
    is."""
    for label, made in s.faces().items():
        mixer, half = made.float(), copy.deepcopy(made).bfloat16()
        x, memory = randn(BATCH, SHORT, s.dim, dtype=torch.float32), s.memory(mixer, BATCH, dtype=torch.float32)
        want = _gradients(mixer, x, memory)
        rough = _gradients(half, x.bfloat16(), {k: v.bfloat16() for k, v in memory.items()})
        with torch.autocast("cpu", torch.bfloat16):
            got = _gradients(mixer, x, memory)
            decodes = "decode" in s.claims and label == ("decode" if "decode" in s.options_for else "example")
            decoded = {"output": _decoded(mixer, x, memory)} if decodes else got
        for what, found, bound in (("output", got, 0.05), ("output", decoded, 0.05), ("gradient of x", got, 0.1)):
            error = _distance(found[what], want[what])
            assert error <= max(bound, 2 * _distance(rough[what], want[what])), (
                f"{s.name} ({label}) under autocast: the {what} is off by {error:.3f} of its norm"
            )


def _distance(found: Tensor, want: Tensor) -> float:
    return float((found.float() - want).norm() / want.norm())


def _decoded(mixer: Any, x: Tensor, memory: dict[str, Tensor]) -> Tensor:
    """The outputs of x through a cache: all but the last three tokens, and those one by one."""
    cache, first = mixer.new_cache(rows=len(x)), x.shape[1] - 3
    with torch.no_grad():
        steps = [mixer(x[:, :first], cache=cache, **memory)]
        steps += [mixer(x[:, t : t + 1], cache=cache, **memory) for t in range(first, x.shape[1])]
    return torch.cat(steps, 1)


def degenerate(s: Subject) -> None:
    """Under the card's degenerate options it computes what the simpler mechanism computes with the same weights."""
    assert s.degenerate is not None
    options, factory, plain_options = s.degenerate
    mixer = s.make(**options)
    shared = {k: s.options[k] for k in ("dim", "num_heads", "head_dim") if k in s.options}
    plain = factory(**{**shared, **plain_options}).double().eval()
    weights = mixer.state_dict()
    missing = plain.state_dict().keys() - weights.keys()
    assert not missing, f"{s.name}: the simpler mixer has weights that this one lacks: {sorted(missing)}"
    plain.load_state_dict({k: weights[k] for k in plain.state_dict()})
    x = randn(BATCH, LONG, s.dim)
    memory = s.memory(mixer, BATCH)
    assert_same(mixer(x, **memory), plain(x, **memory), f"{s.name} with {dict(options)}, against the simpler mechanism")


def noncontiguous(s: Subject) -> None:
    """Strided and expanded inputs give what their contiguous copies give."""
    mixer = s.make()
    memory = s.memory(mixer, BATCH)
    strided = {k: v.transpose(1, 2).contiguous().transpose(1, 2) for k, v in memory.items()}
    x = randn(SHORT, BATCH, s.dim).transpose(0, 1)
    want = mixer(x.contiguous(), **memory)
    assert_same(mixer(x, **strided), want, f"{s.name}: transposed input")
    wide = randn(BATCH, SHORT, 2 * s.dim, seed=2)[..., ::2]
    assert_same(mixer(wide, **memory), mixer(wide.contiguous(), **memory), f"{s.name}: input with gaps")
    one = randn(1, SHORT, s.dim)
    assert_same(
        mixer(one.expand(BATCH, -1, -1), **memory)[:1], mixer(one, **{k: v[:1] for k, v in memory.items()}), f"{s.name}: expanded"
    )


def compiles(s: Subject) -> None:
    """torch.compile(fullgraph=True) captures forward and backward and computes the same."""
    torch._dynamo.reset()
    mixer = s.make()
    x, memory = randn(BATCH, SHORT, s.dim), s.memory(mixer, BATCH)
    want = _gradients(mixer, x, memory)
    mixer.compile(fullgraph=True, backend="aot_eager")
    try:
        got = _gradients(mixer, x, memory)
    except RuntimeError as error:
        raise AssertionError(f"{s.name} does not compile in one graph: {str(error)[:1000]}") from error
    for what in want:
        assert_same(got[what], want[what], f"{s.name}, compiled: {what}")
    torch._dynamo.reset()
