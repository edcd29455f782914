"""Sampling: each rule against its definition, many rows at once against one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from attlas.engine.detokenizer import Detokenizer
from attlas.engine.request import SamplingParams
from attlas.engine.sampler import uniform
from attlas.errors import OptionError
from attlas.models.config import language_model
from attlas.models.sampling import draw, filtered_probabilities, most_likely, penalised
from attlas.models.transformer import Transformer
from engine_models import GREEDY, answers, engine, lively, prompt, run, small, tokens_of

PROMPTS = [prompt(n, seed=n) for n in (7, 11, 19)]


def kept_by_definition(p: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    order = sorted(range(len(p)), key=lambda i: (-float(p[i]), i))[: top_k or None]
    if top_p < 1:
        total, mass, nucleus = sum(float(p[i]) for i in order) if top_k else 1.0, 0.0, []
        for i in order:
            if mass >= top_p * total:
                break
            nucleus.append(i)
            mass += float(p[i])
        order = nucleus
    order = [i for i in order if float(p[i]) >= min_p * float(p.max())]
    return torch.zeros_like(p).index_copy(0, torch.tensor(order), p[order])


def test_most_likely_follows_the_definition():
    generator = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(23, 1009, generator=generator)).softmax(-1)
    p[3] = p[3].bfloat16().float()  # with many equals
    p[4] = 1 / 1009
    rules = [(k, q, m) for k in (0, 1, 7, 400, 5000) for q in (1.0, 0.9, 0.3, 1e-6) for m in (0.0, 0.2)][:40:2] + [
        (0, 0.999, 0)
    ] * 3
    assert len(rules) == 23
    got = most_likely(p, *(torch.tensor(x) for x in zip(*rules, strict=True)))
    for row, rule, kept in zip(p, rules, got, strict=True):
        want = kept_by_definition(row, *rule)
        assert torch.equal(kept, want), (rule, int(kept.count_nonzero()), int(want.count_nonzero()))
        alone = most_likely(row[None], *(torch.tensor([x]) for x in rule))[0]
        assert torch.equal(alone, kept)


def test_min_p_of_a_distribution():
    p = torch.tensor([0.5, 0.26, 0.14, 0.1])
    got = filtered_probabilities(p.log(), 1.0, min_p=0.25)
    torch.testing.assert_close(got, torch.tensor([0.5, 0.26, 0.14, 0.0]) / 0.9)


def test_draw_inverts_the_distribution():
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]])
    at = torch.tensor([0.0, 0.4999, 0.5, 0.7499, 0.75, 0.999999999], dtype=torch.float64)
    assert draw(weights.expand(6, -1), at).tolist() == [1, 1, 3, 3, 4, 4]
    numbers = [uniform(5, 0, position) for position in range(4000)]
    counts = draw(weights.expand(4000, -1), torch.tensor(numbers, dtype=torch.float64)).bincount(minlength=6) / 4000
    torch.testing.assert_close(counts, weights[0] / 4, atol=0.02, rtol=0)
    assert len({uniform(s, i, p) for s in range(7) for i in range(7) for p in range(7)}) == 343


def test_penalties_follow_the_definition():
    logits = torch.tensor([[2.0, -3.0, 1.0, 0.5]])
    seen, counts = torch.tensor([[True, True, False, False]]), torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    got = penalised(logits, seen, counts, *(torch.tensor([x]) for x in (2.0, 0.25, 0.5)))
    assert got.tolist() == [[1.0, -6.0 - 0.25 - 1.0, 1.0, 0.5]]


@pytest.mark.parametrize(
    "rule",
    [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.9},
        {"frequency_penalty": 1.1},
        {"logit_bias": ((5, 100.0),)},
        {"temperature": 0.7, "seed": 1},
        {"temperature": 0.7, "seed": 1, "min_p": 0.3},
        {"temperature": 1.5, "seed": 1, "top_p": 0.4},
        {"temperature": 1.5, "seed": 1, "top_k": 2},
    ],
)
def test_every_rule_matters_and_rows_do_not_mix(rule: dict[str, Any]):
    model = small()
    params = replace(GREEDY, max_tokens=17, **rule)
    made = engine(model)
    for i, p in enumerate(PROMPTS):
        made.add(f"ruled {i}", p, params)
        made.add(f"free {i}", p, replace(GREEDY, max_tokens=17))
    found = run(made)
    ruled, free = ([tokens_of(found[f"{kind} {i}", 0]) for i in range(3)] for kind in ("ruled", "free"))
    assert ruled != free
    assert ruled == [answers(engine(model), [p], params)[0] for p in PROMPTS]
    assert free == answers(engine(model), PROMPTS, replace(GREEDY, max_tokens=17))


def test_a_tiny_temperature_is_greedy():
    model = small()
    assert answers(engine(model), PROMPTS, replace(GREEDY, temperature=1e-30)) == answers(engine(model), PROMPTS, GREEDY)


def test_logprobs_are_those_of_the_full_forward():
    model = small("windows and full")
    params = replace(GREEDY, logprobs=3, prompt_logprobs=2, repetition_penalty=1.5)
    made = engine(model, max_batched_tokens=6)
    answers(made, [PROMPTS[2]], GREEDY)  # its pages may not be used: they would leave the prompt without logits
    made.add("a", PROMPTS[2], params)
    made.add("b", PROMPTS[0], replace(params, logprobs=0, prompt_logprobs=None))
    found = run(made)
    outputs = found["a", 0]
    tokens = tokens_of(outputs)
    with torch.no_grad():
        want = model(torch.tensor([PROMPTS[2] + tokens]))[0].log_softmax(-1)
    (prompt_logs,) = [o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None]
    logs = [*prompt_logs, *(entry for o in outputs for entry in o.logprobs or ())]
    text = PROMPTS[2] + tokens
    assert len(logs) == len(text) - 1
    for i, entry in enumerate(logs):
        assert entry.token == text[i + 1]
        assert entry.logprob == pytest.approx(float(want[i, entry.token]), abs=1e-4)
        best = want[i].topk(2 if i < len(PROMPTS[2]) - 1 else 3)
        assert [t for t, _ in entry.top] == best.indices.tolist()
        assert [x for _, x in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert all(entry.top == () for o in found["b", 0] for entry in o.logprobs or ())
    assert found["b", 0][0].prompt_logprobs is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("n", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.01),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("seed", "x"),
        ("stop", ("",)),
        ("stop_token_ids", (-1,)),
        ("logit_bias", ((1, float("nan")),)),
        ("json_schema", {}),
    ],
)
def test_parameters_out_of_range_are_named(name: str, value: Any):
    with pytest.raises(OptionError, match=rf"{name}=.*"):
        SamplingParams(**{name: value})


# ---- text -------------------------------------------------------------------------------------------------------------------


class Bytes:
    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["plain", "ünïcödé 🦊 日本", "🦊" * 3, "a\ufffdb"])
def test_characters_come_whole(text: str):
    found = Detokenizer(Bytes())
    pieces = [found.add(b) for b in text.encode()]
    assert "".join(pieces) + found.flush() == text
    assert all("\ufffd" not in p for p in pieces) or "\ufffd" in text


def test_bytes_that_are_no_text_do_not_hold_the_answer_up():
    found, junk = Detokenizer(Bytes()), [0xFF, 0xC3, 0x28, 0xE2, 0x82, 0x41, 0x42, 0x43, 0x44, 0x45]
    text = "".join(found.add(b) for b in junk) + found.flush()
    assert text.endswith("ABCDE") and text.count("\ufffd") >= 3


@pytest.mark.parametrize("stop", [("end",), ("nd", "end"), ("ee",), ("x", "e end"), ("abc end here",)])
def test_stop_texts_never_come_out(stop: tuple[str, ...]):
    text = "ee en e end here"
    found = Detokenizer(Bytes(), stop)
    got = ""
    for b in text.encode():
        if found.stopped:
            break
        got += found.add(b)
    got += found.flush()
    ends = [text.find(s) for s in stop if s in text]
    assert got == (text[: min(ends)] if ends else text)
    assert found.stopped == bool(ends)


# ---- grammars ---------------------------------------------------------------------------------------------------------------


def byte_tokenizer() -> Any:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Inner

    from attlas.engine.tokenizer import Tokenizer

    inner = Inner(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(inner, ends=frozenset({256}))


SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}


def test_answers_follow_a_schema():
    model = lively(Transformer(language_model(259, 30, 1, 3, hidden=37)))  # more logits than the tokenizer has tokens
    tokenizer = byte_tokenizer()
    made = engine(model, tokenizer, max_len=300)
    params = SamplingParams(max_tokens=200, temperature=1.0, seed=3, n=3, json_schema=json.dumps(SCHEMA))
    made.add("json", [1, 2, 3], params)
    made.add("free", [1, 2, 3], replace(params, json_schema=None, n=1, max_tokens=50))
    found = run(made)
    for i in range(3):
        outputs = found["json", i]
        told = json.loads("".join(o.text for o in outputs))
        assert set(told) == {"kind", "legs"} and told["kind"] in ("cat", "dog") and 0 <= told["legs"] <= 99
        assert outputs[-1].finish_reason == "stop"
    with pytest.raises(ValueError, match=r"Expecting|Extra|Invalid|control"):
        json.loads("".join(o.text for o in found["free", 0]))


@pytest.mark.parametrize("schema", ["{", '"text"', '{"type": "nothing"}'])
def test_what_is_no_schema(schema: str):
    made = engine(Transformer(language_model(257, 12, 1, 2)), byte_tokenizer())
    with pytest.raises(OptionError, match="json_schema"):
        made.add("a", [1], replace(GREEDY, json_schema=schema))
    assert not made.has_work()
