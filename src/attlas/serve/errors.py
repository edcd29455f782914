"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}} and a status."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attlas.errors import AttlasError

# Options of SamplingParams that a request calls by another name.
PARAM_OF = {"json_schema": "response_format", "prompt_logprobs": "logprobs"}
LONGEST_MESSAGE = 1000  # characters: what a client sent may be repeated in it


class ApiError(Exception):
    """An answer that is an error. Clients of OpenAI do not retry an error that carries `x-should-retry: false`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def refused(error: AttlasError) -> ApiError:
    """What attlas refused, as an error of the request; the parameter is the one that the sentence names."""
    found = re.match(r"(SamplingParams: )?(\w+)", str(error))
    param = None if found is None else PARAM_OF.get(found[2], found[2] if found[1] else None)
    return invalid(str(error).removeprefix("SamplingParams: ")[:LONGEST_MESSAGE], param, "invalid_value")


def unauthorized() -> ApiError:
    message = "A key is needed: send it as 'Authorization: Bearer KEY' (a browser may send it as the password)."
    headers = {"WWW-Authenticate": 'Basic realm="attlas"'}
    return ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=headers)


def overloaded(seconds: int) -> ApiError:
    message = f"The queue is full. Try again in {seconds} s."
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers={"Retry-After": str(seconds)})


def unavailable(message: str, code: str, seconds: int = 5) -> ApiError:
    return ApiError(503, message, kind="service_unavailable", code=code, headers={"Retry-After": str(seconds)})


def draining() -> ApiError:
    return unavailable("The server is shutting down and takes no new requests.", "draining")


def timed_out(seconds: float) -> ApiError:
    message = f"The request took longer than the {seconds:g} s that this server allows; ask for fewer tokens."
    return ApiError(408, message, kind="timeout_error", code="request_timeout", headers={"x-should-retry": "false"})


def failed() -> ApiError:
    message = "The engine failed while it worked on this request; the log of the server says more. Other requests go on."
    return ApiError(500, message, kind="server_error", code="engine_error")


class Disconnected(Exception):
    """The client has gone; there is nobody to answer."""
