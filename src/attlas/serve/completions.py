"""`/v1/completions`: continue texts or token ids."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from attlas.engine.request import Output, TokenLogprobs
from attlas.serve.answers import Answer, completion_logprobs
from attlas.serve.errors import invalid
from attlas.serve.flight import Flight, Job
from attlas.serve.parameters import prompts_of, sampling
from attlas.serve.protocol import CompletionBody
from attlas.serve.service import Service
from attlas.serve.spelling import Place
from attlas.serve.streams import Shape, check_stream, respond

DEFAULT_MAX_TOKENS = 16


async def complete(service: Service, request: Request, body: CompletionBody) -> Response:
    arrival = time.monotonic()
    body.check_extra()
    check_stream(body)
    service.check_model(body.model)
    given = prompts_of(body)
    if len(given) > service.limits.prompts:
        raise invalid(f"{len(given)} prompts; at most {service.limits.prompts} are taken at once", "prompt", "invalid_value")
    for text in given:
        if isinstance(text, str):
            service.check_length(text, "prompt")
    prompts = [await service.encode(p, "prompt") if isinstance(p, str) else p for p in given]
    room = service.room(prompts, "prompt")
    vocabulary = service.served.vocab_size
    params = sampling(body, service.limits, room=room, vocab_size=vocabulary, longest_default=DEFAULT_MAX_TOKENS)
    salt = service.salt(request, body.cache_salt)
    jobs = [Job(prompt, params, salt, i * params.n) for i, prompt in enumerate(prompts)]
    flight = await service.launch(request, jobs, arrival)
    echoes = [p if isinstance(p, str) else service.tokenizer.decode(p) for p in given] if body.echo else None
    return await respond(service, flight, body, CompletionShape(service, flight, body, echoes))


class CompletionShape(Shape):
    """Completions, whole and in parts. `echoes`: the texts of the prompts, where answers begin with them."""

    def __init__(self, service: Service, flight: Flight, body: CompletionBody, echoes: Sequence[str] | None) -> None:
        super().__init__(service, flight, f"cmpl-{flight.id}", "text_completion", "text_completion")
        self.echoes, self.wants_logprobs = echoes, body.logprobs is not None
        self.only_echo = body.max_tokens == 0

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self._choice(index, "".join(answer.text), answer.finish_reason, answer.logprobs, answer.place, begins=True)

    def parts(self, index: int, answer: Answer, output: Output) -> list[dict[str, Any]]:
        begins = len(answer.text) == 1
        if not (output.text or output.logprobs or output.finish_reason or (begins and self.echoes)):
            return []
        return [self._choice(index, output.text, output.finish_reason, output.logprobs or (), answer.place, begins=begins)]

    def usage(self) -> dict[str, Any]:
        told = super().usage()
        return {**told, "completion_tokens": 0, "total_tokens": told["prompt_tokens"]} if self.only_echo else told

    def _choice(
        self, index: int, text: str, reason: str | None, found: Sequence[TokenLogprobs], place: Place, *, begins: bool
    ) -> dict[str, Any]:
        """One choice, or what a part adds to it; `begins`: it is the first part."""
        job = self.job(index)
        if self.only_echo:  # the engine makes a token all the same: nobody asked for it
            text, reason, found = "", "length", ()
        reported: list[TokenLogprobs | None] = list(found)
        if begins and self.echoes is not None:
            text = self.echoes[job] + text
            reported = [None, *self.prompt_logprobs.get(job, ()), *reported]
        first = self.flight.jobs[job].prompt[0]
        logprobs = completion_logprobs(reported, self.service.spelling, place, first) if self.wants_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
