"""Batch-invariant mode: the logits of a sequence are the same to the bit, whatever else the engine does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attlas.engine.engine import Engine
from attlas.engine.fused import FusedRunner
from attlas.engine.runner import OneByOne, Ran, Runner
from attlas.engine.scheduler import Task
from engine_models import GREEDY, PATTERNS, engine, prompt, run, small

Logits = dict[tuple[str, int, tuple[int, ...]], torch.Tensor]
FAST = ("full", "windows and full", "alibi")
LONG = replace(GREEDY, max_tokens=21)


def recorded(made: Engine) -> Logits:
    """What the engine will compute: (request, answer, text so far) -> the logits that the next token is chosen from."""
    logits: Logits = {}
    original = made.runner.run

    def record(tasks: list[Task]) -> Ran:
        ran = original(tasks)
        for task, row in zip(tasks, ran.first, strict=True):
            for j in range(len(task.drafts) + 1 if row >= 0 else 0):
                key = (task.sequence.request_id, task.sequence.index, (*task.sequence.tokens, *task.drafts[:j]))
                assert key not in logits or torch.equal(logits[key], ran.logits[row + j])
                logits[key] = ran.logits[row + j].clone()
        return ran

    made.runner.run = record  # type: ignore[method-assign]
    return logits


def logits_of(made: Engine, prompts: dict[str, list[int]], params: Any = LONG) -> Logits:
    logits = recorded(made)
    for name, tokens in prompts.items():
        made.add(name, tokens, params)
    run(made)
    return logits


def assert_same(got: Logits, want: Logits) -> None:
    """Every row that one sequence alone needs is there, bit for bit."""
    assert want
    for key, row in want.items():
        assert torch.equal(got[key], row), key


@pytest.mark.parametrize("name", FAST)
def test_any_company_and_any_chunks(name: str):
    model = small(name)
    prompts = {str(i): prompt(3 + i % 37, seed=i) for i in range(64)}
    want = {k: logits_of(engine(model, batch_invariant=True), {k: prompts[k]}) for k in ("0", "31", "36")}
    for options in (
        {"max_running": 64},
        {"max_running": 7, "max_batched_tokens": 19},
        {"max_batched_tokens": 3, "max_running": 3},
    ):
        made = engine(model, batch_invariant=True, **options)
        assert isinstance(made.runner, FusedRunner) and made.runner.invariant
        got = logits_of(made, prompts)
        for alone in want.values():
            assert_same(got, alone)


@pytest.mark.parametrize("name", FAST)
def test_hit_or_miss_preempted_or_not(name: str):
    model = small(name)
    prompts = {str(i): [*prompt(40), *prompt(3 + i, seed=i)] for i in range(5)}
    want = {k: logits_of(engine(model, batch_invariant=True), {k: p}) for k, p in prompts.items()}
    hits = engine(model, batch_invariant=True)
    logits_of(hits, {"first": [*prompt(40), 1]})
    got = logits_of(hits, prompts)
    assert hits.stats().cached_tokens >= 5 * 40
    of_one = engine(model, max_running=1, max_len=128).cache.stats().total
    options: dict[str, Any] = {"batch_invariant": True, "pages": of_one + 1, "prefix_caching": False}
    again = engine(model, **options)
    swapped = engine(model, preemption="swap", swap_bytes=1 << 24, **options)
    results = [got, logits_of(again, prompts), logits_of(swapped, prompts)]
    assert again.stats().preemptions and swapped.stats().preemptions
    for result in results:
        for alone in want.values():
            assert_same(result, alone)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("name", FAST)
def test_eight_bit_pages_in_any_company(name: str, kv_dtype: str):
    model = small(name)
    prompts = {str(i): [*prompt(17), *prompt(3 + i % 37, seed=i)] for i in range(11)}
    want = {k: logits_of(engine(model, batch_invariant=True, kv_dtype=kv_dtype), {k: prompts[k]}) for k in ("0", "5", "10")}
    for options in ({"max_running": 11}, {"max_running": 3, "max_batched_tokens": 19}):
        made = engine(model, batch_invariant=True, kv_dtype=kv_dtype, **options)
        assert isinstance(made.runner, FusedRunner) and made.runner.invariant
        got = logits_of(made, prompts)
        for alone in want.values():
            assert_same(got, alone)


def test_forks_and_drafts():
    model = small("windows and full")
    params = replace(LONG, n=3, temperature=1.0, seed=3)
    loop = [5, 6, 7, 8] * 6
    want = logits_of(engine(model, batch_invariant=True), {"a": loop}, params)
    made = engine(model, batch_invariant=True, speculative=4)
    got = logits_of(made, {"a": loop, "b": prompt(17)}, params)
    assert made.stats().drafted > 0
    assert_same(got, want)


@pytest.mark.parametrize("name", ["mla", "mamba", "rwkv", "sinks"])
def test_other_mechanisms_go_token_by_token(name: str):
    model = small(name)
    prompts = {str(i): prompt(5 + 3 * i, seed=i) for i in range(3)}
    want = {k: logits_of(engine(model, batch_invariant=True), {k: p}) for k, p in prompts.items()}
    made = engine(model, batch_invariant=True, max_batched_tokens=4)
    assert isinstance(made.runner, OneByOne)
    got = logits_of(made, prompts)
    for alone in want.values():
        assert_same(got, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_fused_forward_is_the_models(name: str, alone: bool, dtype: torch.dtype):
    check_fused_forward(name, alone, dtype, None, 2e-5 if dtype == torch.float32 else 0.08)


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
@pytest.mark.parametrize("name", FAST)
def test_the_fused_forward_over_eight_bits_is_the_models(name: str, kv_dtype: str):
    """A number next to the middle between two codes may fall to either side: one step of 1/127 or 1/16."""
    check_fused_forward(name, False, torch.float32, kv_dtype, 0.01 if kv_dtype == "int8" else 0.05)


def check_fused_forward(name: str, alone: bool, dtype: torch.dtype, kv_dtype: str | None, limit: float) -> None:
    """Chunks, decode steps and mixtures of both, against the model's own forward on caches of its own."""
    model = small(name).to(dtype)
    mine, theirs = (engine(model, max_running=3, kv_dtype=kv_dtype) for _ in range(2))
    fused, plain = FusedRunner(model, mine.cache.caches, alone=alone), Runner(model, theirs.cache.caches)
    rows = [[made.cache.admit([0]).row for _ in range(3)] for made in (mine, theirs)]  # type: ignore[union-attr]
    from attlas.shapes import SeqInfo

    for step, lengths in enumerate([(13, 5, 21), (1, 1, 1), (1, 17, 1), (2, 2, 2), (30, 1, 1)]):
        tokens = torch.tensor(prompt(sum(lengths), seed=step))
        with torch.inference_mode():
            got, want = (r._hidden(tokens, SeqInfo(lengths, ids=tuple(ids))) for r, ids in zip((fused, plain), rows, strict=True))
        assert (got.float() - want.float()).abs().max() < limit * want.float().abs().max()
    assert [p.lengths for c in mine.cache.caches for p in c.parts] == [p.lengths for c in theirs.cache.caches for p in c.parts]
