"""`/v1/chat/completions`: the next message of a conversation."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from attlas.engine.request import Output
from attlas.serve.answers import Answer, chat_logprobs
from attlas.serve.flight import Flight, Job
from attlas.serve.parameters import sampling
from attlas.serve.protocol import ChatBody
from attlas.serve.service import Service
from attlas.serve.streams import Shape, check_stream, respond


async def chat(service: Service, request: Request, body: ChatBody) -> Response:
    arrival = time.monotonic()
    body.check_extra()
    check_stream(body)
    service.check_model(body.model)
    text = await service.chat_text([message.plain() for message in body.messages], add_generation_prompt=True)
    service.check_length(text, "messages")
    prompt = await service.encode(text, "messages", special=False)
    room = service.room([prompt], "messages")
    params = sampling(body, service.limits, room=room, vocab_size=service.served.vocab_size, longest_default=None)
    flight = await service.launch(request, [Job(prompt, params, service.salt(request, body.cache_salt))], arrival)
    return await respond(service, flight, body, ChatShape(service, flight, body))


class ChatShape(Shape):
    """Chat completions, whole and in parts. The part that names the role comes with a choice's first token, so that the first
    part of a stream means that the prompt has been read."""

    def __init__(self, service: Service, flight: Flight, body: ChatBody) -> None:
        super().__init__(service, flight, f"chatcmpl-{flight.id}", "chat.completion", "chat.completion.chunk")
        self.wants_logprobs = bool(body.logprobs)

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(answer.text), "refusal": None},
            "logprobs": chat_logprobs(answer.logprobs, self.service.spelling) if self.wants_logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    def parts(self, index: int, answer: Answer, output: Output) -> list[dict[str, Any]]:
        said = []
        if len(answer.text) == 1:
            said.append(self._part(index, {"role": "assistant", "content": "", "refusal": None}))
        if output.text or output.logprobs:
            logprobs = chat_logprobs(output.logprobs or (), self.service.spelling) if self.wants_logprobs else None
            said.append(self._part(index, {"content": output.text}, logprobs))
        if output.finish_reason is not None:
            said.append(self._part(index, {}, None, output.finish_reason))
        return said

    @staticmethod
    def _part(
        index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
