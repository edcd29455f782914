"""`attlas generate` with a model: what a person at the terminal sees while it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from attlas.cli import generate
from attlas.errors import DataError
from attlas.models.config import language_model
from attlas.models.transformer import Transformer
from attlas.serve.load import byte_tokenizer
from engine_models import lively

PROMPT = "one é"


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    made = lively(Transformer(language_model(257, 30, 1, 3, hidden=37)))
    monkeypatch.setattr("attlas.models.load.load_model", lambda path: made)
    monkeypatch.setattr(generate, "codec", lambda request: byte_tokenizer())


def asked(*prompts: str) -> generate.Request:
    return generate.Request(prompts=prompts, model=Path("somewhere"), new_tokens=23)


def test_one_prompt_is_answered_as_it_comes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    seen: list[str] = []
    whole: Any = generate.continued

    def watched(*arguments: Any) -> Any:
        def tell(tokens: Any) -> None:
            arguments[-1](tokens)
            seen.append(capsys.readouterr().out)

        return whole(*arguments[:-1], tell)

    monkeypatch.setattr(generate, "continued", watched)
    generate.answer(asked(PROMPT), as_json=False)
    text = "".join(seen) + capsys.readouterr().out
    assert len(seen) == 23 and seen[0].startswith(PROMPT) and sum(map(bool, seen)) > 5
    monkeypatch.setattr(generate, "continued", whole)
    generate.answer(asked(PROMPT), as_json=True)
    assert text == PROMPT + json.loads(capsys.readouterr().out)[0]["text"] + "\n"


def test_ctrl_c_leaves_what_has_come(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupted(*arguments: Any) -> None:
        arguments[-1]([ord("s"), ord("o"), 0xC3])
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "continued", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate.answer(asked("a"), as_json=False)
    assert capsys.readouterr().out.startswith("a") and capsys.readouterr().err == ""


def test_several_prompts_are_printed_in_their_order(capsys: pytest.CaptureFixture[str]):
    generate.answer(asked("first", "second"), as_json=False)
    out = capsys.readouterr().out
    assert out.startswith("first") and "\nsecond" in out


def test_a_name_in_place_of_a_path_says_that_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    with pytest.raises(DataError, match="not downloaded"):
        generate.answer(generate.Request(prompts=("a",), model=Path("owner/model")), as_json=False)
