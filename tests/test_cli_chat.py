"""`attlas chat`: a conversation in the terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attlas.cli import chat
from attlas.engine.tokenizer import ChatTemplate, Tokenizer
from attlas.errors import OptionError
from attlas.models.config import language_model
from attlas.models.transformer import Transformer
from engine_models import engine, lively

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"


def talk(**options: Any) -> chat.Conversation:
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    inner = Inner(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(inner, chat=ChatTemplate(TEMPLATE))
    model = lively(Transformer(language_model(256, 30, 1, 3, hidden=37)))
    request = chat.Request(**{"new_tokens": 9, "temperature": 0.0, **options})
    return chat.Conversation(engine(model, tokenizer, max_len=200), tokenizer, request)


def test_the_conversation_goes_on_from_the_cache():
    found = talk(system="be kind")
    first = "".join(found.ask("hello"))
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant"]
    assert found.messages[-1]["content"] == first
    before = found.engine.stats()
    assert before.cached_tokens == 0
    "".join(found.ask("more"))
    assert found.engine.stats().cached_tokens >= 16
    found.reset()
    assert [m["role"] for m in found.messages] == ["system"]


def test_a_stopped_answer_leaves_the_engine_ready():
    found = talk(new_tokens=60)
    pieces = found.ask("hello")
    some = "".join(next(pieces) for _ in range(20))
    pieces.close()
    assert not found.engine.has_work() and found.engine.cache.stats().used == 0
    assert found.messages[-1] == {"role": "assistant", "content": some}
    assert len("".join(found.ask("again"))) > 0


def test_a_question_that_is_too_long_changes_nothing():
    found = talk()
    with pytest.raises(OptionError, match="at most 200"):
        next(found.ask("x" * 300))
    assert found.messages == [] and not found.engine.has_work()


def test_lines_in_answers_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    made = talk()
    monkeypatch.setattr(chat, "begin", lambda request: made)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/reset\nhello\n/exit\nnever\n"))
    chat.chat(chat.Request(), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [t["prompt"] for t in told] == ["hello", "hello"]
    assert told[0]["answer"] == told[1]["answer"] != ""


def test_ctrl_c_stops_the_answer_and_not_the_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    made = talk(new_tokens=60)

    def interrupted(text: str) -> Iterator[str]:
        yield "so"
        raise KeyboardInterrupt

    asked = iter([interrupted, made.ask])
    monkeypatch.setattr(chat, "begin", lambda request: made)
    monkeypatch.setattr(made, "ask", lambda text: next(asked)(text))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    chat.chat(chat.Request(), as_json=False)
    out = capsys.readouterr()
    assert "stopped" in out.err and out.out.startswith("so\n") and len(out.out) > 20


def test_what_chat_refuses(tmp_path: Path):
    for request, message in (
        (chat.Request(), "--model"),
        (chat.Request(model=tmp_path, dtype="int3"), "int3"),
    ):
        with pytest.raises(OptionError, match=message):
            chat.begin(request)
