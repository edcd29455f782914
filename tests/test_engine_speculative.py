"""Prompt look-up: drafts save steps and change no token."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attlas.engine.drafts import LookUp
from attlas.engine.request import SamplingParams
from engine_models import GREEDY, answers, engine, prompt, small

LOOP = [11, 12, 13, 14, 15] * 7
PROMPTS = [LOOP, prompt(9), [*prompt(21), *prompt(21)[:7]], [3]]


@pytest.mark.parametrize("name", ["full", "windows and full", "sinks", "alibi", "mla"])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=0.9, top_k=20, seed=4, max_tokens=13)])
def test_tokens_are_those_without_drafts(name: str, params: SamplingParams):
    model, params = small(name), replace(params, max_tokens=31)
    want = answers(engine(model), PROMPTS, params)
    made = engine(model, speculative=5)
    assert answers(made, PROMPTS, params) == want
    stats = made.stats()
    assert 0 < stats.accepted < stats.drafted
    assert stats.steps <= engine_steps(model, params)
    tight = engine(model, speculative=5, max_len=96, pages=made.cache.stats().total // 25)
    assert answers(tight, PROMPTS, params) == want


def engine_steps(model: object, params: SamplingParams) -> int:
    made = engine(model)  # type: ignore[arg-type]
    answers(made, PROMPTS, params)
    return made.stats().steps


def test_drafts_under_a_small_budget_and_to_the_end():
    model = small()
    want = answers(engine(model, max_len=64), [LOOP], replace(GREEDY, max_tokens=99))
    assert answers(engine(model, max_len=64, speculative=7), [LOOP], replace(GREEDY, max_tokens=99)) == want
    assert answers(engine(model, max_len=64, speculative=7, max_batched_tokens=2), [LOOP], replace(GREEDY, max_tokens=99)) == want


def test_an_answer_that_ends_inside_the_drafts():
    model, long = small(), replace(GREEDY, max_tokens=40)
    free = answers(engine(model), [LOOP], long)[0]
    for stop in dict.fromkeys(free):
        params = replace(long, stop_token_ids=(stop,))
        assert answers(engine(model, speculative=6), [LOOP], params) == [free[: free.index(stop) + 1]]


def test_rules_that_look_back_get_no_drafts():
    made = engine(small(), speculative=3)
    answers(made, [LOOP], replace(GREEDY, repetition_penalty=1.3))
    assert made.stats().drafted == 0


def test_drafts_save_steps():
    model, params = small("alibi"), replace(GREEDY, max_tokens=60)
    made, plain = engine(model, speculative=5), engine(model)
    assert answers(made, [LOOP], params) == answers(plain, [LOOP], params)
    assert made.stats().steps + made.stats().accepted == plain.stats().steps
    assert made.stats().accepted > 5


def test_look_up():
    found = LookUp()
    assert found.propose([1, 2, 3], 4) == []
    assert found.propose([1, 2, 3, 7, 1, 2], 3) == [3, 7, 1]
    assert found.propose([1, 2, 3, 7, 1, 2, 4, 9, 2], 1) == [4]  # the newest occurrence of the longest match
    assert LookUp().propose([5, 5], 3) == [5, 5, 5]
    assert LookUp().propose([8, 1, 2, 3, 9, 1, 2, 4, 8, 1, 2], 2) == [3, 9]  # three agree, before two that came later
