"""A flight as a response: whole, or as server-sent events while it goes on."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.responses import Response

from attlas.engine.request import Output, TokenLogprobs
from attlas.serve.answers import Answer
from attlas.serve.errors import Disconnected, invalid
from attlas.serve.flight import Flight
from attlas.serve.protocol import Sampling
from attlas.serve.service import Service
from attlas.serve.wire import DONE, EventStream, Json, event

CLIENT_GONE = 499  # nobody reads it; proxies log it under this number


class Shape(ABC):
    """How one kind of answer is written: the head that all its objects share, its choices, and the parts of a stream."""

    def __init__(self, service: Service, flight: Flight, name: str, kind: str, part_kind: str) -> None:
        self.service, self.flight = service, flight
        self.kind, self.part_kind = kind, part_kind
        self.head = {"id": name, "created": int(time.time()), "model": service.served.name}
        self.prompt_logprobs: dict[int, Sequence[TokenLogprobs]] = {}

    def note(self, index: int, output: Output) -> None:
        """Keep what belongs to the prompt."""
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[self.job(index)] = output.prompt_logprobs

    def job(self, index: int) -> int:
        """Which prompt a choice continues."""
        return index // self.flight.jobs[0].params.n

    @abstractmethod
    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A finished choice."""

    @abstractmethod
    def parts(self, index: int, answer: Answer, output: Output) -> list[dict[str, Any]]:
        """What a stream says of a choice when `output` has been added to it; nothing where there is nothing to say yet."""

    def usage(self) -> dict[str, Any]:
        flight = self.flight
        return {
            "prompt_tokens": flight.prompt_tokens,
            "completion_tokens": flight.tokens,
            "total_tokens": flight.prompt_tokens + flight.tokens,
            "prompt_tokens_details": {"cached_tokens": flight.cached_tokens},
        }

    def whole(self, answers: dict[int, Answer]) -> dict[str, Any]:
        choices = [self.choice(index, answers[index]) for index in sorted(answers)]
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": self.part_kind, "choices": choices}


async def respond(service: Service, flight: Flight, body: Sampling, shape: Shape) -> Response:
    """The response to a request whose flight has been launched; lands the flight."""
    if body.stream:
        return EventStream(_events(service, flight, body, shape))
    answers: defaultdict[int, Answer] = defaultdict(Answer)
    try:
        async for index, output in flight.parts():
            shape.note(index, output)
            answers[index].add(output)
    except Exception as error:
        raise service.api_error(error) from None
    finally:
        service.land(flight)
    return Json(shape.whole(answers))


async def _events(service: Service, flight: Flight, body: Sampling, shape: Shape) -> AsyncIterator[bytes]:
    count = body.stream_options is not None and bool(body.stream_options.include_usage)
    extra = {"usage": None} if count else {}
    answers: defaultdict[int, Answer] = defaultdict(Answer)
    try:
        async for index, output in flight.parts():
            shape.note(index, output)
            answers[index].add(output)
            for choice in shape.parts(index, answers[index], output):
                yield event({**shape.part([choice]), **extra})
        if count:
            yield event({**shape.part([]), "usage": shape.usage()})
        yield DONE
    except Disconnected:
        return
    except Exception as error:
        yield event(service.api_error(error).body())
    finally:
        service.land(flight)


def check_stream(body: Sampling) -> None:
    """Options of a stream make no sense without one, and only some are known."""
    if body.stream_options is None:
        return
    if not body.stream:
        raise invalid("stream_options goes with stream=true", "stream_options", "invalid_value")
    body.stream_options.check_extra()
