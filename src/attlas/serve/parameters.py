"""From the body of a request to what the engine takes, within the limits of the server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from attlas.engine.request import MAX_LOGPROBS, SamplingParams
from attlas.errors import AttlasError
from attlas.serve.errors import invalid, refused
from attlas.serve.options import Limits
from attlas.serve.protocol import ChatBody, CompletionBody, ResponseFormat, Sampling

MAX_BIASES = 1024
MAX_DEPTH = 64  # of a schema: whoever reads one recurses
MAX_JOINED = 10  # patterns that hold at once: whoever intersects n of them may take 2^n steps (16 took seconds)


def sampling(body: Sampling, limits: Limits, *, room: int, vocab_size: int, longest_default: int | None) -> SamplingParams:
    """The engine's parameters.

    room             tokens that fit behind the longest prompt
    longest_default  max_tokens where the body does not say; None = all the room
    """
    named = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "n": body.n,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "seed": body.seed,
        "top_k": _top_k(body.top_k, vocab_size),
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "ignore_eos": body.ignore_eos,
    }
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    if body.n is not None and body.n > limits.answers:
        raise invalid(f"n={_short(body.n)}; this server gives at most {limits.answers} answers", "n", "invalid_value")
    given["max_tokens"] = _max_tokens(body, room, longest_default)
    given["stop"] = _stops(body.stop, limits)
    given["stop_token_ids"] = tuple(in_vocabulary(body.stop_token_ids or (), vocab_size, "stop_token_ids"))
    given["logit_bias"] = _biases(body.logit_bias or {}, vocab_size)
    given["json_schema"] = _schema(body.response_format, limits)
    given.update(_logprobs(body))
    try:
        return SamplingParams(**given)
    except AttlasError as error:
        raise refused(error) from None


def _top_k(asked: int | None, vocab_size: int) -> int | None:
    """0 = all here; -1 means that elsewhere, and so does more than there are."""
    return 0 if asked is not None and (asked == -1 or asked >= vocab_size) else asked


def _max_tokens(body: Sampling, room: int, longest_default: int | None) -> int:
    name, asked = "max_tokens", body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        if asked is not None and asked != body.max_completion_tokens:
            raise invalid("max_tokens and max_completion_tokens say different things; give one", "max_tokens", "invalid_value")
        name, asked = "max_completion_tokens", body.max_completion_tokens
    if asked is None:
        return room if longest_default is None else min(room, longest_default)
    if asked == 0 and isinstance(body, CompletionBody) and body.echo:
        return 1  # the prompt alone is asked for, with its log probabilities; see `CompletionShape`
    if asked < 1:
        hint = " (0 goes with echo=true)" if isinstance(body, CompletionBody) else ""
        raise invalid(f"{name}={_short(asked)}; it must be at least 1{hint}", name, "invalid_value")
    if asked > room:
        raise invalid(
            f"{name}={_short(asked)} does not fit: behind the prompt the model's context has room for {room} tokens",
            name,
            "context_length_exceeded",
        )
    return asked


def _stops(stop: str | Sequence[str] | None, limits: Limits) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > limits.stops:
        raise invalid(f"{len(stops)} stop texts; at most {limits.stops} are taken", "stop", "invalid_value")
    if any(not s or len(s) > limits.stop_length for s in stops):
        raise invalid(f"a stop text has 1 to {limits.stop_length} characters", "stop", "invalid_value")
    return stops


def in_vocabulary(ids: Sequence[int], vocab_size: int, param: str) -> Sequence[int]:
    """The token ids; one that the model does not have is an error of `param`."""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise invalid(f"token id {_short(i)} is outside the model's vocabulary of {vocab_size}", param, "invalid_value")
    return ids


def _biases(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    if len(biases) > MAX_BIASES:
        raise invalid(f"{len(biases)} entries; at most {MAX_BIASES} are taken", "logit_bias", "invalid_value")
    found = []
    for name, bias in biases.items():
        if not (name.isascii() and name.isdigit() and len(name) < 12):
            raise invalid(f"{name[:32]!r} is not a token id", "logit_bias", "invalid_value")
        if not -100 <= bias <= 100:
            raise invalid(f"a bias is between -100 and 100, got {bias:g}", "logit_bias", "invalid_value")
        found.append((in_vocabulary([int(name)], vocab_size, "logit_bias")[0], bias))
    return tuple(found)


def _schema(format: ResponseFormat | None, limits: Limits) -> str | None:
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return '{"type":"object"}'
    if format.json_schema is None or format.json_schema.schema_ is None:
        raise invalid("a response_format of type 'json_schema' needs json_schema.schema", "response_format", "missing_parameter")
    if _depth(format.json_schema.schema_) > MAX_DEPTH:
        raise invalid(f"the schema is nested more than {MAX_DEPTH} deep", "response_format", "invalid_value")
    if (joined := _joined_patterns(format.json_schema.schema_)) > MAX_JOINED:
        message = (
            f"the schema joins patterns or formats by allOf or $ref, and has {joined} of them; at most {MAX_JOINED} are taken"
        )
        raise invalid(message, "response_format", "invalid_value")
    text = json.dumps(format.json_schema.schema_, separators=(",", ":"))
    if len(text) > limits.schema:
        raise invalid(
            f"a schema of {len(text)} characters; at most {limits.schema} are taken", "response_format", "invalid_value"
        )
    return text


def _depth(value: Any) -> int:
    """How deep lists and objects lie in each other, counted up to just above MAX_DEPTH."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [item for items in inner for item in items]
        depth += bool(inner)
    return depth


def _joined_patterns(schema: Any) -> int:
    """Patterns and formats of a schema that may hold for one text together; 0 where nothing joins them."""
    patterns, joins, level = 0, False, [schema]
    while level:
        found = level.pop()
        if isinstance(found, dict):
            patterns += ("pattern" in found) + ("format" in found)
            joins = joins or "allOf" in found or ("$ref" in found and len(found) > 1)
            level += found.values()
        elif isinstance(found, list):
            level += found
    return patterns if joins else 0


def _logprobs(body: Sampling) -> dict[str, int]:
    if isinstance(body, CompletionBody):
        wanted, param = body.logprobs, "logprobs"
    elif isinstance(body, ChatBody):
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs needs logprobs=true", "top_logprobs", "invalid_value")
        wanted, param = ((body.top_logprobs or 0) if body.logprobs else None), "top_logprobs"
    else:
        return {}
    if wanted is None:
        return {}
    if not 0 <= wanted <= MAX_LOGPROBS:
        raise invalid(f"{param}={_short(wanted)}; it must be from 0 to {MAX_LOGPROBS}", param, "invalid_value")
    echo = isinstance(body, CompletionBody) and body.echo
    return {"logprobs": wanted, "prompt_logprobs": wanted} if echo else {"logprobs": wanted}


def _short(number: int) -> str:
    """A number as a sentence can hold it; a client may send one with thousands of digits."""
    return str(number) if abs(number) < 10**18 else f"{'-' if number < 0 else ''}(a number above 10^18)"


def prompts_of(body: CompletionBody) -> list[str] | list[list[int]]:
    """The prompts of a completion: texts, or token ids."""
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt)
