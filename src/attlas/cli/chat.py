"""`attlas chat`: talk to a local model in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attlas.cli.options import from_dataclass
from attlas.cli.output import note, write_json
from attlas.errors import AttlasError, OptionError

if TYPE_CHECKING:
    from attlas.engine.engine import Engine
    from attlas.engine.tokenizer import Tokenizer

HELP = "/reset forgets the conversation, /exit ends it. Ctrl-C stops an answer, twice in a row ends the chat."


@dataclass(frozen=True)
class Request:
    """Which model to talk to, and how it answers.

    model        a folder with config.json, *.safetensors and tokenizer.json, or a .gguf file
    tokenizer    a tokenizer.json (with tokenizer_config.json beside it), where the model brings none
    system       what the model is told before the conversation
    dtype        in which it computes: bfloat16, float32 or float16
    new_tokens   longest answer
    max_len      longest conversation, in tokens
    temperature  0 takes the most likely token; above 0 samples
    top_k        sample among this many most likely tokens; 0 = all
    top_p        sample among the most likely tokens that hold this probability
    min_p        sample among tokens at least this fraction as likely as the most likely one
    seed         of the sampling; without it every answer is another one
    """

    model: Path | None = None
    tokenizer: Path | None = None
    system: str | None = None
    dtype: str = "bfloat16"
    new_tokens: int = 512
    max_len: int | None = None
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int | None = None


def build() -> Callable[..., None]:
    return from_dataclass(lambda: Request, chat)()


class Conversation:
    """Messages so far, and the engine that answers them; the text so far is found in its cache."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, request: Request) -> None:
        self.engine, self.tokenizer, self.request = engine, tokenizer, request
        self.asked = 0
        self.reset()

    def reset(self) -> None:
        system = self.request.system
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, text: str) -> Iterator[str]:
        """The answer to `text`, piece by piece. Closing the iterator stops it; what has come stays in the conversation."""
        from attlas.engine.request import SamplingParams

        wanted, name = self.request, str(self.asked)
        self.asked += 1
        messages = [*self.messages, {"role": "user", "content": text}]
        params = SamplingParams(
            max_tokens=wanted.new_tokens,
            temperature=wanted.temperature,
            top_k=wanted.top_k,
            top_p=wanted.top_p,
            min_p=wanted.min_p,
            seed=wanted.seed,
        )
        self.engine.add(name, self.tokenizer.encode_chat(messages), params)
        said = ""
        try:
            while self.engine.has_work():
                for output in self.engine.step():
                    said += output.text
                    yield output.text
        finally:
            if self.engine.abort(name):
                self.engine.step()  # reports the end that nobody waits for
            self.messages = [*messages, {"role": "assistant", "content": said}]


def begin(request: Request) -> Conversation:
    """Load what the request names."""
    from attlas.engine.engine import Engine
    from attlas.engine.options import EngineOptions
    from attlas.engine.tokenizer_files import load_tokenizer
    from attlas.models.load import dtype_of_weights, load_model, located

    if request.model is None:
        raise OptionError("name a model: attlas chat --model FOLDER or --model FILE.gguf")
    dtype = dtype_of_weights(request.dtype)
    tokenizer = load_tokenizer(request.tokenizer or located(request.model))
    if tokenizer.chat is None:
        raise OptionError(f"{request.model} brings no chat template, so it does not know conversations; try attlas generate")
    model = load_model(request.model, dtype=dtype)
    engine = Engine(model, tokenizer, options=EngineOptions(max_running=1, max_len=request.max_len))
    return Conversation(engine, tokenizer, request)


def chat(request: Request, as_json: bool) -> None:
    """Lines in, answers out, until the input ends. With --json: one answer per input line, as a list at the end."""
    from rich.console import Console

    talk = begin(request)
    console = Console(highlight=False)
    answers: list[dict[str, Any]] = []
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lines can be edited and called back
        note(HELP)
    stopped = False
    while True:
        try:
            line = console.input("[bold]> [/]" if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if stopped:
                break
            stopped = True
            note("Once more ends the chat.")
            continue
        stopped = False
        if line == "/exit":
            break
        if line == "/reset":
            talk.reset()
        elif line:
            answers.append({"prompt": line, "answer": _show(talk, line, quiet=as_json)})
    if as_json:
        write_json(answers)


def _show(talk: Conversation, line: str, *, quiet: bool) -> str:
    """Print an answer as it comes. Ctrl-C ends the answer only."""
    said, pieces = "", talk.ask(line)
    try:
        for piece in pieces:
            said += piece
            if not quiet:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        note("(stopped)")
    except AttlasError as error:
        note(f"{error}; /reset forgets the conversation")
    finally:
        pieces.close()  # type: ignore[attr-defined]
    if not quiet:
        print()
    return said
