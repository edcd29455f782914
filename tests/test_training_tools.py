"""What a training script does around a mixer: modules made on the meta device, activation checkpoints."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from attlas.catalogue.index import build, card
from attlas.testing.inputs import randn


def example(name: str, claim: str) -> dict[str, Any]:
    subject = card(name).subject()
    return {**subject.options, **subject.options_for.get(claim, {})}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("name", "claim"), [("alibi", ""), ("hyena", ""), ("reformer", ""), ("reformer", "causal"), ("clustered", "")]
)
def test_a_mixer_made_on_the_meta_device_is_whole_after_load_state_dict(name: str, claim: str, assign: bool) -> None:
    options = example(name, claim)
    made = build(name, **options)
    with torch.device("meta"):
        other = build(name, **options)
    assert {t.device.type for t in (*other.parameters(), *other.buffers())} == {"meta"}
    if not assign:
        other.to_empty(device="cpu")
        for buffer in other.buffers():
            buffer.fill_(torch.nan)
    other.load_state_dict(made.state_dict(), assign=assign)
    x = randn(2, 29, options["dim"], dtype=torch.float32)
    assert torch.equal(other(x), made(x))


def test_derived_buffers_keep_dtype_and_survive_copies() -> None:
    mixer = build("reformer", **example("reformer", "")).double()
    before = mixer.rotations
    mixer.load_state_dict(mixer.state_dict())
    assert mixer.rotations.dtype == torch.float64 and torch.equal(mixer.rotations, before)
    x = randn(1, 31, mixer.dim)
    for other in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        other.load_state_dict(mixer.state_dict())
        assert torch.equal(other(x), mixer(x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("causal", [False, True, "content-leaks"])
def test_routing_learns_once_a_step_under_checkpoints(causal: bool | str, reentrant: bool) -> None:
    """Gradients and means are those without a checkpoint, though the means move between the forward and its repetition."""
    plain = build("routing", 26, 13, clusters=3, window=7, decay=0.1, causal=causal).double().train()
    saved = copy.deepcopy(plain)
    for step in range(3):
        x, other = (randn(2, 31, 26, seed=step).requires_grad_() for _ in range(2))
        weight = randn(2, 31, 26, seed=17)
        (plain(x) * weight).sum().backward()
        (checkpoint(saved, other, use_reentrant=reentrant) * weight).sum().backward()
        assert torch.equal(plain.means, saved.means)
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-12)
    for p, q in zip(plain.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["hierarchical"])
def test_mixers_that_make_masks_run_compiled(name: str) -> None:
    """Not in one graph, so without the claim of the card; the masks that a graph names live as long as the mixer."""
    torch.compiler.reset()
    mixer = build(name, **example(name, "")).eval()
    compiled = torch.compile(mixer, backend="eager")
    x = randn(2, 29, mixer.dim, dtype=torch.float32)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), mixer(x))
