"""`attlas generate`: continue prompts with a local model, or with random weights to see a mechanism run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from attlas.cli.options import from_dataclass
from attlas.cli.output import note, write_json
from attlas.cli.parse import settings
from attlas.errors import DataError, OptionError, UnsupportedError

if TYPE_CHECKING:
    from attlas.models.transformer import Transformer


@dataclass(frozen=True)
class Request:
    """What to continue, with which model, and how.

    prompts      texts to continue; with --ids token ids such as 1,15043,29892
    model        a folder with config.json, *.safetensors and tokenizer.json, or a .gguf file (Llama, Mixtral, Qwen 2 and 3,
                 Gemma 2 and 3). Without it the model is small, has random weights and reads bytes
    tokenizer    a tokenizer.json, where the model brings none
    ids          prompts are token ids, and so is the answer
    mechanism    which mechanism mixes tokens in a random model
    option       option of that mechanism, such as window=16
    layers       layers of a random model
    new_tokens   how many tokens to add at most
    temperature  0 takes the most likely token; above 0 samples
    top_k        sample among this many most likely tokens
    top_p        sample among the most likely tokens that hold this probability
    seed         of the sampling and of random weights
    """

    prompts: tuple[str, ...] = field(default=(), metadata={"argument": True})
    model: Path | None = None
    tokenizer: Path | None = None
    ids: bool = False
    mechanism: str = "causal"
    option: tuple[str, ...] = field(default=(), metadata={"whole": True, "flag": "--set"})
    layers: int = 2
    new_tokens: int = 32
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


class Codec(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Bytes:
    """UTF-8 bytes as token ids."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Numbers:
    """Token ids as the text that the user typed and reads."""

    def encode(self, text: str) -> list[int]:
        try:
            return [int(part) for part in text.split(",")]
        except ValueError:
            raise OptionError(f"--ids: {text!r} is not a list of token ids such as 1,2,3") from None

    def decode(self, ids: Sequence[int]) -> str:
        return ",".join(map(str, ids))


def build() -> Callable[..., None]:
    return from_dataclass(lambda: Request, answer)()


def random_model(request: Request) -> tuple[Transformer, bool]:
    """A byte-level decoder of the asked mechanism, and whether the mechanism has a cache."""
    from attlas.catalogue.index import card
    from attlas.models.config import language_model
    from attlas.models.transformer import Transformer

    known = card(request.mechanism)
    if "causal" not in known.supports:
        raise UnsupportedError(f"{known.name} is not causal: its outputs depend on later tokens, so it cannot generate")
    options = {**known.example, **settings(request.option)}
    dim, heads = options.pop("dim", 64), options.pop("num_heads", 4)
    config = language_model(256, dim, request.layers, heads, mixers=((known.name, options),))
    return Transformer(config, seed=request.seed), "decode" in known.supports


def ends(path: Path | None) -> list[int]:
    """The token ids at which the model says it stops, where its config.json names them."""
    config = path / "config.json" if path is not None else None
    if config is None or not config.is_file():
        return []
    found = json.loads(config.read_text(encoding="utf-8")).get("eos_token_id")
    return [] if found is None else found if isinstance(found, list) else [found]


def codec(request: Request) -> Codec:
    from attlas.engine.tokenizer_files import load_tokenizer
    from attlas.models.load import located

    if request.ids:
        return Numbers()
    if request.tokenizer is not None:
        return load_tokenizer(request.tokenizer)
    if request.model is None:
        return Bytes()
    path = located(request.model)
    try:
        return load_tokenizer(path)
    except (DataError, UnsupportedError) as error:
        raise OptionError(f"{error}. Name another tokenizer with --tokenizer, or give token ids with --ids") from error


def check_room(model: Transformer, prompts: list[list[int]], new_tokens: int) -> None:
    from attlas.engine.memory import max_len

    longest, limit = max(map(len, prompts)), max_len(model)
    if limit is not None and longest + new_tokens > limit:
        raise OptionError(f"--new-tokens {new_tokens} behind a prompt of {longest} tokens: the model takes {limit} tokens in all")


Tell = Callable[[Sequence[int]], None]


def continued(
    model: Transformer, prompts: list[list[int]], stops: frozenset[int], request: Request, tell: Tell | None = None
) -> list[list[int]]:
    """The new tokens of each prompt, from an engine that runs them together; `tell` gets them as they come."""
    from attlas.engine.engine import Engine
    from attlas.engine.options import EngineOptions
    from attlas.engine.request import SamplingParams

    if not request.new_tokens:
        return [[] for _ in prompts]
    longest = max(map(len, prompts)) + request.new_tokens
    engine = Engine(model, options=EngineOptions(max_len=longest, max_running=min(len(prompts), 32)))
    new: list[list[int]] = [[] for _ in prompts]
    for b, ids in enumerate(prompts):
        params = SamplingParams(
            max_tokens=request.new_tokens,
            temperature=request.temperature,
            top_k=request.top_k or 0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed + b,
            stop_token_ids=tuple(stops),
        )
        engine.add(str(b), ids, params)
    while engine.has_work():
        for output in engine.step():
            new[int(output.request_id)] += output.token_ids
            if tell is not None:
                tell(output.token_ids)
    return new


class Live:
    """Prints the answer to one prompt as it comes, so that Ctrl-C loses nothing of it."""

    def __init__(self, speech: Codec, prompt: str, ids: list[int]) -> None:
        from attlas.engine.detokenizer import Detokenizer

        self.text = Detokenizer(speech, after=ids)
        print(prompt, end="", flush=True)

    def tell(self, tokens: Sequence[int]) -> None:
        print("".join(self.text.add(token) for token in tokens), end="", flush=True)

    def close(self) -> None:
        print(self.text.flush(), flush=True)


def told(speech: Codec, ids: list[int], added: list[int]) -> str:
    """The text of the new tokens, as it goes on from the prompt's."""
    from attlas.engine.detokenizer import Detokenizer

    if isinstance(speech, Numbers):
        return speech.decode(added)
    text = Detokenizer(speech, after=ids)
    return "".join(text.add(token) for token in added) + text.flush()


def answer(request: Request, as_json: bool) -> None:
    if not request.prompts:
        raise OptionError("give at least one prompt: attlas generate 'Once upon a time'")
    if request.model is not None and (request.option or request.mechanism != "causal"):
        raise OptionError("--mechanism and --set describe a random model; --model brings its own mechanisms")
    from attlas.models.generate import generate
    from attlas.models.load import load_model
    from attlas.models.sampling import check_sampling

    speech = codec(request)
    prompts = [speech.encode(text) for text in request.prompts]
    model, cached = random_model(request) if request.model is None else (load_model(request.model), True)
    vocabulary = model.config.vocab_size
    if wrong := [i for ids in prompts for i in ids if not 0 <= i < vocabulary]:
        raise OptionError(f"token ids {wrong[:5]} are outside the model's vocabulary of {vocabulary}")
    check_sampling(request.temperature, request.top_k, request.top_p)
    if request.model is not None:
        check_room(model, prompts, request.new_tokens)
        stops = getattr(speech, "ends", frozenset()) | frozenset(ends(request.model))
        if len(prompts) == 1 and not (as_json or request.ids):
            with contextlib.closing(Live(speech, request.prompts[0], prompts[0])) as live:
                continued(model, prompts, stops, request, live.tell)
            return
        new = continued(model, prompts, stops, request)
    else:
        rules: dict[str, Any] = {
            "temperature": request.temperature,
            "top_k": request.top_k,
            "top_p": request.top_p,
            "seed": request.seed,
        }
        new = generate(model, prompts, request.new_tokens, use_cache=cached, **rules)
    results: list[dict[str, Any]] = [
        {"prompt": text, "prompt_ids": ids, "text": told(speech, ids, added), "ids": added}
        for text, ids, added in zip(request.prompts, prompts, new, strict=True)
    ]
    if as_json:
        write_json(results)
    else:
        if request.model is None:
            note("The weights are random, so the text is noise. A real model: --model FOLDER or --model FILE.gguf")
        for found in results:
            print(found["prompt"] + ("," if request.ids else "") + found["text"])
