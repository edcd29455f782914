"""The engine computes what one request alone would get, however requests are scheduled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from attlas.engine.request import SamplingParams
from attlas.errors import OptionError, UnsupportedError
from attlas.models.config import FeedForwardConfig, StackConfig, TransformerConfig
from attlas.models.generate import generate
from attlas.models.transformer import Transformer
from attlas.ops.decode import cascade_pages
from engine_models import GREEDY, PATTERNS, VOCAB, Letters, answers, engine, prompt, run, small, tokens_of

PROMPTS = [prompt(n, seed=n) for n in (7, 1, 19, 12, 30)]


@pytest.mark.parametrize("options", [{}, {"max_batched_tokens": 5}, {"max_running": 2, "max_batched_tokens": 16}])
@pytest.mark.parametrize("name", PATTERNS)
def test_greedy_tokens_are_those_of_generate(name: str, options: dict[str, Any]):
    model = small(name)
    want = generate(model, PROMPTS, GREEDY.max_tokens)
    assert len({tuple(w) for w in want}) > 2
    assert answers(engine(model, **options), PROMPTS, GREEDY) == want


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_preempted_request_gets_the_same_tokens(name: str, preemption: str):
    model = small(name)
    want = answers(engine(model), PROMPTS, replace(GREEDY, max_tokens=29))
    probe = engine(model, max_len=64, max_running=1)
    pages = probe.cache.stats().total + 1
    tight = engine(model, max_len=64, pages=pages, preemption=preemption, swap_bytes=1 << 22 if preemption == "swap" else 0)
    assert answers(tight, PROMPTS, replace(GREEDY, max_tokens=29)) == want
    if name != "rwkv":  # has no pages that could run out
        assert tight.stats().preemptions > 0


def test_requests_may_come_at_any_time():
    model = small()
    want = generate(model, PROMPTS, GREEDY.max_tokens)
    made, found = engine(model, max_batched_tokens=9), {}
    for step in range(100):
        if step % 3 == 0 and step // 3 < len(PROMPTS):
            made.add(str(step // 3), PROMPTS[step // 3], GREEDY)
        for output in made.step():
            found.setdefault(output.request_id, []).append(output)
    assert [tokens_of(found[str(i)]) for i in range(len(PROMPTS))] == want
    assert not made.has_work() and made.step() == []


def test_samples_do_not_depend_on_the_company():
    model = small()
    params = SamplingParams(max_tokens=17, temperature=1.1, top_k=31, top_p=0.95, min_p=0.01, seed=5, presence_penalty=0.3)
    alone = [answers(engine(model), [p], params)[0] for p in PROMPTS]
    assert answers(engine(model, max_batched_tokens=11), PROMPTS, params) == alone
    tight = engine(model, max_len=64, pages=11)
    assert answers(tight, PROMPTS, params) == alone
    assert tight.stats().preemptions > 0
    assert answers(engine(model), PROMPTS, replace(params, seed=6)) != alone


def test_n_answers_share_the_prompt():
    model = small("windows and full")
    params = SamplingParams(max_tokens=11, temperature=1.2, seed=3, n=4)
    made = engine(model)
    made.add("a", PROMPTS[2], params)
    steps = [made.step(), made.step()]
    made.cache.check()
    assert made.stats().running == 4
    found = run(made)
    for output in (o for step in steps for o in step):
        found[output.request_id, output.index].insert(len([o for s in steps for o in s if o.index == output.index]) - 1, output)
    texts = {i: sum(len(o.token_ids) for o in found["a", i]) for i in range(4)}
    assert texts == dict.fromkeys(range(4), 11)
    assert len({tuple(tokens_of(found["a", i])) for i in range(4)}) == 4
    assert made.cache.stats().used == 0
    narrow = engine(model, max_running=2)
    narrow.add("a", PROMPTS[2], params)
    other = run(narrow)
    assert {i: sorted(tokens_of(other["a", i])) for i in range(4)} == {i: sorted(tokens_of(found["a", i])) for i in range(4)}


def test_a_prefix_is_found_and_changes_nothing():
    model = small()
    made = engine(model)
    long = prompt(41)
    first = answers(made, [long], GREEDY)
    made.add("again", long, GREEDY)
    made.add("else", [*long[:25], 3, 4], GREEDY)
    made.add("salted", long, GREEDY, salt="other")
    found = run(made)
    assert tokens_of(found["again", 0]) == tokens_of(found["salted", 0]) == first[0]
    assert tokens_of(found["else", 0]) == generate(model, [[*long[:25], 3, 4]], 13)[0]
    assert [found[k, 0][0].cached_tokens for k in ("again", "else", "salted")] == [40, 24, 0]
    stats = made.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (3 * 41 + 27, 64)
    assert stats.generated_tokens == 4 * 13 and stats.finished == {"length": 4}


def test_the_longest_prefix_goes_first_and_nobody_starves():
    model = small()
    made = engine(model, max_running=1)
    shared = prompt(33)
    answers(made, [shared], replace(GREEDY, max_tokens=1))
    made.add("stranger", prompt(9, seed=4), replace(GREEDY, max_tokens=1))
    for i in range(12):
        made.add(f"friend {i}", [*shared, i], replace(GREEDY, max_tokens=1))
    order = [o.request_id for _ in range(13) for o in made.step()]
    assert order.index("friend 0") == 0
    assert order.index("stranger") == 8


def test_priority():
    made = engine(small(), max_running=1)
    for i, priority in enumerate((0, 5, 1)):
        made.add(str(i), prompt(3, seed=i), replace(GREEDY, max_tokens=2), priority=priority)
    order = [o.request_id for _ in range(6) for o in made.step() if o.finish_reason]
    assert order == ["1", "2", "0"]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_abort_frees_the_pages_at_once(steps: int):
    made = engine(small("windows and full"), max_batched_tokens=16)
    made.add("a", prompt(31), replace(GREEDY, n=3, temperature=1.0))
    made.add("b", prompt(5), GREEDY)
    for _ in range(steps):
        made.step()
    used = made.cache.stats().used
    assert made.abort("a") and not made.abort("a") and not made.abort("c")
    made.cache.check()
    assert made.cache.stats().used < used or not steps
    ended = [o for o in made.step() if o.finish_reason == "abort"]
    assert sorted(o.index for o in ended) == [0, 1, 2]
    assert run(made)["b", 0][-1].finish_reason == "length"
    assert made.cache.stats().used == 0
    assert made.stats().finished == {"abort": 3, "length": 1}


def test_an_aborted_swapped_request_leaves_nothing():
    made = engine(small(), max_len=64, pages=9, preemption="swap", swap_bytes=1 << 20)
    for i in range(4):
        made.add(str(i), prompt(19, seed=i), replace(GREEDY, max_tokens=40))
    while not made.stats().swapped:
        made.step()
    (name,) = {s.request_id for s in made.scheduler.waiting if s.handle is not None}
    assert made.abort(name)
    assert made.cache.stats().swapped == 0
    assert len({k for k, _ in run(made)}) == 4


def test_ends_and_lengths():
    model, long = small(), replace(GREEDY, max_tokens=40)
    free = answers(engine(model), [PROMPTS[0]], long)[0]
    stop = free[4]
    cut = free[: free.index(stop) + 1]
    assert answers(engine(model), [PROMPTS[0]], replace(long, stop_token_ids=(stop, 3)))[0] == cut
    made = engine(model, max_len=20)
    made.add("a", PROMPTS[0], long)
    found = run(made)["a", 0]
    assert tokens_of(found) == free[:13] and found[-1].finish_reason == "length"
    assert sum(bool(o.finish_reason) for o in found) == 1


def test_text_and_stop_texts():
    model, long = small(), replace(GREEDY, max_tokens=30, ignore_eos=True)
    free = answers(engine(model, Letters()), [PROMPTS[0]], long)[0]
    text = Letters().decode(free)
    stop = text[5:8]
    made = engine(model, Letters())
    made.add("a", PROMPTS[0], replace(long, stop=(stop, "never there")))
    found = run(made)["a", 0]
    assert "".join(o.text for o in found) == text[: text.index(stop)]
    assert found[-1].finish_reason == "stop"
    assert all(stop[0] not in o.text for o in found) or text.index(stop[0]) < text.index(stop)
    with pytest.raises(UnsupportedError, match="stop"):
        engine(model).add("a", [1], replace(GREEDY, stop=("x",)))


def test_a_shared_prefix_is_read_once(monkeypatch: pytest.MonkeyPatch):
    from attlas.engine import fused_layers

    model, prefix = small(), prompt(290)
    prompts = [[*prefix, *prompt(3 + i, seed=i)] for i in range(4)]
    calls = []
    monkeypatch.setattr(fused_layers, "cascade_pages", lambda *a: calls.append(a[-1]) or real(*a))
    real = cascade_pages
    got = {}
    for cascade in (False, True):
        made = engine(model, max_len=400, cascade=cascade)
        answers(made, [prefix], replace(GREEDY, max_tokens=1))
        got[cascade] = answers(made, prompts, GREEDY)
        assert bool(calls) == cascade
    assert got[True] == got[False]
    assert set(calls) == {288}


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_keys_and_values_in_eight_bits(kv_dtype: str):
    model = small()
    made, plain = engine(model, kv_dtype=kv_dtype), engine(model)
    got, want = answers(made, PROMPTS, GREEDY), answers(plain, PROMPTS, GREEDY)
    alike = sum(a == b for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))
    assert alike > 13
    assert made.cache.page_bytes < plain.cache.page_bytes
    with pytest.raises(OptionError, match="int4"):
        engine(model, kv_dtype="int4")


def test_what_add_refuses():
    made = engine(small(), max_len=32)
    for wrong, message in (([], "empty"), ([1, VOCAB], "89"), ([-1], "-1"), ([1] * 32, "at most 32")):
        with pytest.raises(OptionError, match=message):
            made.add("a", wrong, GREEDY)
    with pytest.raises(OptionError, match="logit_bias"):
        made.add("a", [1], replace(GREEDY, logit_bias=((VOCAB, 1.0),)))
    with pytest.raises(UnsupportedError, match="tokenizer"):
        made.add("a", [1], replace(GREEDY, json_schema="{}"))
    made.add("a", [1], GREEDY)
    with pytest.raises(OptionError, match="not finished"):
        made.add("a", [1], GREEDY)
    assert len(run(made)) == 1


def test_what_an_engine_refuses():
    model = small()
    for wrong, message in (
        ({"max_running": 0}, "max_running=0"),
        ({"preemption": "hope"}, "preemption='hope'"),
        ({"preemption": "swap"}, "swap_bytes"),
        ({"pages": 3, "cache_bytes": 5}, "give one"),
        ({"cache_bytes": 5}, "one page"),
        ({"speculative": -1}, "speculative=-1"),
        ({"cascade": True, "batch_invariant": True}, "cascade"),
    ):
        with pytest.raises(OptionError, match=message):
            engine(model, **wrong)
    with pytest.raises(UnsupportedError, match="layer 0"):
        engine(small("mamba"), speculative=3)
    encoder = TransformerConfig("encoder", VOCAB, 30, 3, encoder=StackConfig(1, ("full",), FeedForwardConfig(37)))
    with pytest.raises(UnsupportedError, match="encoder"):
        engine(Transformer(encoder))
    assert engine(model, pages=4).max_len == 32
