"""The bodies of requests. Field names are those of the OpenAI API, then those that vLLM's users know."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from attlas.serve.errors import ApiError, invalid

# Documented fields that do not change an answer: they may say anything.
WITHOUT_EFFECT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "parallel_tool_calls",
}
# Documented fields that would change an answer and that nothing here can do: they may only say what is done anyway.
ONLY: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "min_tokens": (0,),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "logits_processors": ([],),
    "best_of": (),  # also n itself: see `check_extra`
}

# Fields of a message that clients send back as they were answered, with nothing in them.
EMPTY_IN_MESSAGES = {"annotations", "audio", "function_call", "tool_calls", "reasoning", "reasoning_content"}

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=16 * 2**20)]


class Body(BaseModel):
    """Strict: "3" is not 3. NaN and infinities are refused. Fields beyond these are checked by `check_extra`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    def check_extra(self) -> None:
        """Refuse a field that is unknown, or that asks for something that would not be done; name it."""
        known = {*type(self).model_fields, *WITHOUT_EFFECT, *ONLY}
        for name, value in (self.model_extra or {}).items():
            if name in WITHOUT_EFFECT or (value is None and name in known):
                continue
            if name not in ONLY:
                near = difflib.get_close_matches(name, sorted(known), n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise invalid(f"Unknown parameter {name[:64]!r}{hint}", name[:64], "unknown_parameter")
            if value in ONLY[name] or (name == "best_of" and value == (getattr(self, "n", None) or 1)):
                continue
            raise invalid(
                f"{name!r} is not supported with this value, and is not ignored: leave it out.", name, "unsupported_parameter"
            )


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampling(Body):
    """What completions and chat completions share."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None


class CompletionBody(Sampling):
    prompt: Text | list[TokenId] | list[Text] | list[list[TokenId]]
    echo: bool | None = None
    logprobs: int | None = None


class Content(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"a part of type {kind[:64]!r} is not supported; this server reads text")
        return value


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Content] | None = None
    name: str | None = None
    refusal: None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _nothing_more(self) -> Message:
        for name, value in (self.model_extra or {}).items():
            if name not in EMPTY_IN_MESSAGES or value not in (None, [], {}, ""):
                raise ValueError(f"{name[:64]!r} in a message is not supported, and is not ignored: leave it out")
        return self

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TokenizeBody(Body):
    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[TokenId]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


def explained(errors: list[dict[str, Any]]) -> ApiError:
    """What pydantic says about a body, as one sentence about the first field that is wrong."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return invalid(f"The body is not valid JSON: {reason} (at character {first['loc'][-1]})", code="invalid_json")
    if not where:
        return invalid("The body must be a JSON object, sent with 'Content-Type: application/json'.", code="invalid_body")
    param = where[0]
    if first["type"] == "missing":
        return invalid(f"Missing required parameter: {'.'.join(where)[:128]!r}", ".".join(where)[:128], "missing_parameter")
    told = [e for e in errors if [str(p) for p in e["loc"] if p != "body"][:1] == [param]]
    if ours := [e for e in told if e["type"] == "value_error"]:  # it knows what was meant
        told, where = ours, [str(part) for part in ours[0]["loc"] if part != "body"]
    reasons = "; or ".join(sorted({str(e["msg"]).removeprefix("Value error, ") for e in told})[:4])
    place = ".".join(part for part in where if part.isidentifier() or part.isdigit())[:128]
    return invalid(f"Invalid value for {place!r}: {reasons[:400]}", param[:64], "invalid_value")
