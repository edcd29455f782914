"""The OpenAI API as the official client sees it, in front of an engine that repeats its prompt."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from serving import CONTEXT, NAME, Live, live


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Live) -> OpenAI:
    return server.client()


HELLO = [{"role": "user", "content": "hello"}]
TEMPLATED = "user: hello\nassistant: "


def test_models(client: OpenAI):
    assert [m.id for m in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.models.retrieve("nobody")


def test_completion(client: OpenAI):
    done = client.completions.create(model=NAME, prompt="abc", max_tokens=7)
    assert done.choices[0].text == "abcabca" and done.choices[0].finish_reason == "length"
    assert done.object == "text_completion" and done.model == NAME and done.choices[0].logprobs is None
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (3, 7, 10)
    assert done.usage.prompt_tokens_details is not None and done.usage.prompt_tokens_details.cached_tokens == 3


def test_max_tokens_of_a_completion_is_16_unless_said(client: OpenAI):
    assert len(client.completions.create(model=NAME, prompt="abc").choices[0].text) == 16


def test_token_ids_are_a_prompt(client: OpenAI, server: Live):
    ids = server.engine.tokenizer.encode("xy")
    assert client.completions.create(model=NAME, prompt=ids, max_tokens=3).choices[0].text == "xyx"
    both = client.completions.create(model=NAME, prompt=[ids, ids[:1]], max_tokens=3)
    assert [c.text for c in both.choices] == ["xyx", "xxx"]


def test_several_prompts_with_several_answers(client: OpenAI):
    done = client.completions.create(model=NAME, prompt=["ab", "cde"], max_tokens=5, n=3)
    assert [c.index for c in done.choices] == list(range(6))
    assert [c.text for c in done.choices] == ["ababa"] * 3 + ["cdecd"] * 3
    assert done.usage is not None and (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 30)


def test_stop_text_ends_an_answer_and_is_left_out(client: OpenAI):
    done = client.completions.create(model=NAME, prompt="abcd", max_tokens=50, stop=["cda"])
    assert done.choices[0].text == "ab" and done.choices[0].finish_reason == "stop"
    parts = list(client.completions.create(model=NAME, prompt="abcd", max_tokens=50, stop="cda", stream=True))
    assert "".join(p.choices[0].text for p in parts) == "ab" and parts[-1].choices[0].finish_reason == "stop"


def test_completion_stream(client: OpenAI):
    parts = list(client.completions.create(model=NAME, prompt="abc", max_tokens=7, stream=True))
    assert "".join(p.choices[0].text for p in parts) == "abcabca"
    assert [p.choices[0].finish_reason for p in parts] == [None] * 6 + ["length"]
    assert len({p.id for p in parts}) == 1


def test_completion_stream_of_several_choices(client: OpenAI):
    texts = dict.fromkeys(range(4), "")
    for part in client.completions.create(model=NAME, prompt=["ab", "cde"], max_tokens=5, n=2, stream=True):
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == {0: "ababa", 1: "ababa", 2: "cdecd", 3: "cdecd"}


def test_completion_logprobs(client: OpenAI):
    found = client.completions.create(model=NAME, prompt="abc", max_tokens=5, logprobs=2).choices[0].logprobs
    assert found is not None
    assert found.tokens == list("abcab") and found.token_logprobs == [-0.5] * 5 and found.text_offset == [0, 1, 2, 3, 4]
    assert found.top_logprobs is not None and found.top_logprobs[0] == {"a": -0.5, "b": -1.5}


def test_echo_puts_the_prompt_and_its_logprobs_first(client: OpenAI):
    whole = client.completions.create(model=NAME, prompt="abc", max_tokens=2, logprobs=0, echo=True).choices[0]
    assert whole.text == "abcab" and whole.logprobs is not None
    assert whole.logprobs.tokens == list("abcab") and whole.logprobs.token_logprobs == [None, -0.25, -0.25, -0.5, -0.5]
    parts = list(client.completions.create(model=NAME, prompt="abc", max_tokens=2, logprobs=0, echo=True, stream=True))
    assert "".join(p.choices[0].text for p in parts) == "abcab"
    logs = [p.choices[0].logprobs for p in parts if p.choices[0].logprobs is not None]
    assert [x for log in logs for x in log.token_logprobs or ()] == [None, -0.25, -0.25, -0.5, -0.5]
    assert [x for log in logs for x in log.text_offset or ()] == [0, 1, 2, 3, 4]


def test_chat(client: OpenAI):
    done = client.chat.completions.create(model=NAME, messages=HELLO, max_completion_tokens=11)  # type: ignore[arg-type]
    assert done.choices[0].message.content == TEMPLATED[:11] and done.choices[0].message.role == "assistant"
    assert done.choices[0].finish_reason == "length" and done.object == "chat.completion"


def test_chat_fills_the_context_unless_told_otherwise(client: OpenAI):
    done = client.chat.completions.create(model=NAME, messages=HELLO)  # type: ignore[arg-type]
    assert done.usage is not None and done.usage.total_tokens == CONTEXT


def test_chat_takes_parts_of_text_and_the_role_developer(client: OpenAI):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    done = client.chat.completions.create(model=NAME, messages=messages, max_tokens=23)  # type: ignore[arg-type]
    assert done.choices[0].message.content == "system: be\nuser: hello\n"


def test_chat_stream_with_usage(client: OpenAI):
    options = {"include_usage": True}
    parts = list(
        client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=7, stream=True, stream_options=options)  # type: ignore[call-overload]
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts[:-1]) == TEMPLATED[:7]
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens == 7
    assert all(p.usage is None for p in parts[:-1])


def test_chat_stream_of_two_answers_names_the_role_of_each(client: OpenAI):
    parts = list(client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=3, n=2, stream=True))  # type: ignore[call-overload]
    assert sorted(p.choices[0].index for p in parts if p.choices[0].delta.role) == [0, 1]
    assert sorted(p.choices[0].index for p in parts if p.choices[0].finish_reason) == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: OpenAI, stream: bool):
    asked = {"model": NAME, "messages": HELLO, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    if stream:
        parts = list(client.chat.completions.create(**asked, stream=True))  # type: ignore[call-overload]
        content = [entry for p in parts if p.choices[0].logprobs for entry in p.choices[0].logprobs.content]
    else:
        content = client.chat.completions.create(**asked).choices[0].logprobs.content  # type: ignore[call-overload]
    assert [entry.token for entry in content] == list("use")
    assert content[0].logprob == -0.5 and content[0].bytes == [ord("u")]
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("u", -0.5), ("v", -1.5)]


def test_stream_on_the_wire_ends_with_done(server: Live):
    body = {"prompt": "abc", "max_tokens": 2, "stream": True}
    done = server.post("/v1/completions", json=body)
    assert done.headers["content-type"].startswith("text/event-stream")
    events = done.text.split("\n\n")
    assert len(events) == 4 and events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])


def test_tokenize_and_detokenize(server: Live):
    text = "hé\U0001f600"
    told = server.post("/tokenize", json={"prompt": text}).json()
    assert told["count"] == len(text.encode()) == len(told["tokens"]) and told["max_model_len"] == CONTEXT
    assert server.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": text}
    chat = server.post("/tokenize", json={"messages": HELLO}).json()
    assert server.post("/detokenize", json={"tokens": chat["tokens"]}).json() == {"prompt": TEMPLATED}
    without = server.post("/tokenize", json={"messages": HELLO, "add_generation_prompt": False}).json()
    assert without["count"] == len("user: hello\n")


def test_fields_that_change_nothing_are_taken(client: OpenAI):
    done = client.completions.create(
        model=NAME, prompt="abc", max_tokens=3, user="u", best_of=1, suffix="", extra_body={"store": True}
    )
    assert done.choices[0].text == "abc"
