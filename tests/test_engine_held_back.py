"""A beginning that several requests share is computed by one of them, however they arrive; nobody waits for it without end."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attlas.engine import scheduler
from attlas.engine.engine import Engine
from attlas.models.generate import generate
from engine_models import GREEDY, engine, prompt, run, small, tokens_of

PREFIX = prompt(83)  # ten pages of 8, and 3 tokens
SHARERS = [[*PREFIX, *prompt(3 + 2 * i, seed=i)] for i in range(5)]


def shared(made: Engine, prompts: list[list[int]] = SHARERS) -> list[list[int]]:
    for i, p in enumerate(prompts):
        made.add(str(i), p, GREEDY)
    found = run(made)
    return [tokens_of(found[str(i), 0]) for i in range(len(prompts))]


@pytest.mark.parametrize("batched", [1024, 61, 19, 3])
@pytest.mark.parametrize("name", ["full", "windows and full", "sinks"])
def test_a_beginning_is_computed_once(name: str, batched: int):
    model = small(name)
    made = engine(model, max_batched_tokens=batched)
    assert shared(made) == generate(model, SHARERS, GREEDY.max_tokens)
    assert made.stats().cached_tokens == 4 * 80


def test_each_longer_beginning_is_waited_for():
    """The second shares all of the first's pages, the third all of the second's, and so on."""
    made = engine(small(), max_batched_tokens=1024)
    text = prompt(101)
    shared(made, [text[:n] for n in (17, 41, 67, 97)])
    assert made.stats().cached_tokens == 16 + 40 + 64
    assert made.stats().prompt_tokens == 17 + 41 + 67 + 97


def test_the_others_do_not_wait():
    made = engine(small(), max_batched_tokens=64)
    for name, tokens, salt in (
        ("a", SHARERS[0], ""),
        ("b", SHARERS[1], ""),
        ("else", prompt(7), ""),
        ("salted", SHARERS[2], "x"),
    ):
        made.add(name, tokens, GREEDY, salt=salt)
    made.step()
    assert [s.request_id for s in made.scheduler.running] == ["a"]  # it alone fills the step
    made.step()
    assert [s.request_id for s in made.scheduler.running] == ["a", "else", "salted"]
    made.step()
    assert "b" in {s.request_id for s in made.scheduler.running}


@pytest.mark.parametrize("bound", [0, 1, 2, 8])
def test_the_wait_is_bounded(monkeypatch: pytest.MonkeyPatch, bound: int):
    """Each of these would wait for all those before it."""
    monkeypatch.setattr(scheduler, "HELD_BACK", bound)
    made, text = engine(small(), max_batched_tokens=1024), prompt(101)
    for i in range(7):
        made.add(str(i), text[: 11 * (i + 1)], replace(GREEDY, max_tokens=1))
    sequences = list(made.scheduler.waiting)
    for _ in range(min(bound, 6) + 1):
        assert made.scheduler.waiting
        made.step()
    assert not made.scheduler.waiting
    assert [s.held_back for s in sequences] == [min(bound, i) for i in range(7)]


def test_when_the_one_that_computes_is_aborted_another_does():
    model = small()
    made = engine(model, max_batched_tokens=16)
    for i, tokens in enumerate(SHARERS):
        made.add(str(i), tokens, GREEDY)
    for _ in range(3):
        made.step()
    assert made.abort("0")
    found = run(made)
    assert [tokens_of(found[str(i), 0]) for i in range(1, 5)] == generate(model, SHARERS[1:], GREEDY.max_tokens)
    assert made.stats().cached_tokens == 48 + 3 * 80  # the pages of the aborted one are used, too


def test_without_prefix_caching_nobody_waits():
    made = engine(small(), max_batched_tokens=1024, prefix_caching=False)
    for i, tokens in enumerate(SHARERS):
        made.add(str(i), tokens, GREEDY)
    made.step()
    assert made.stats().running == 5
