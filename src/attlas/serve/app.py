"""The routes, and what every route stands behind."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from attlas._version import __version__
from attlas.serve.chat import chat
from attlas.serve.completions import complete
from attlas.serve.errors import ApiError, Disconnected, draining, failed, invalid, unavailable
from attlas.serve.overview import overview
from attlas.serve.parameters import in_vocabulary
from attlas.serve.protocol import ChatBody, CompletionBody, DetokenizeBody, ErrorBody, TokenizeBody, explained
from attlas.serve.security import OWNER, BodyLimit, Gate, Head, HostCheck, KeyCheck, Keys, error_response
from attlas.serve.service import Service
from attlas.serve.streams import CLIENT_GONE
from attlas.serve.wire import Json
from attlas.serve.worker import Unhealthy

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
BEING_READ = 64  # requests whose bodies may arrive and be cut into tokens, beyond those that the engine has room for
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "What is wrong with the request, and which parameter.",
        401: "A key is needed.",
        403: "The server was called by a name that it does not go by.",
        404: "No such model.",
        408: "The request took too long.",
        413: "The body is too large.",
        429: "The queue is full; Retry-After says when to come again.",
        503: "The server is shutting down, or the engine is broken.",
    }.items()
}


class Server(FastAPI):
    """The application; `service` and `gate` are what a runner needs of it."""

    service: Service
    gate: Gate

    def openapi(self) -> dict[str, Any]:
        """The schema without the 422 that FastAPI adds: here a wrong body is a 400."""
        if not self.openapi_schema:
            schema = get_openapi(title=self.title, version=self.version, routes=self.routes)
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            self.openapi_schema = schema
        return self.openapi_schema


def create_app(
    service: Service, keys: Sequence[str] = (), origins: Sequence[str] = (), hosts: Sequence[str] | None = None
) -> Server:
    """The application that serves `service` to those who bring one of `keys` (none: to everybody who reaches it). Pages of
    `origins` may read its answers in a browser; ("*",) = any page. `hosts`: names by which it may be called beside addresses and
    localhost; None = any."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()

    app = Server(title="attlas", version=__version__, lifespan=life, docs_url=None, redoc_url=None, responses=ERRORS)
    app.service = service
    _errors(app)
    _work(app, service)
    _views(app, service)
    app.add_middleware(BodyLimit, limits=service.limits)
    most = service.worker.capacity + BEING_READ
    app.gate = Gate(app.build_middleware_stack(), most, service.limits.stall, service.metrics.refuse)
    app.middleware_stack = KeyCheck(Head(app.gate), Keys(keys))
    if hosts is not None:
        app.middleware_stack = HostCheck(app.middleware_stack, hosts)
    if origins:  # before the keys: a browser asks for permission without one
        app.middleware_stack = CORSMiddleware(
            app.middleware_stack,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    return app


def _work(app: Server, service: Service) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await complete(service, request, body)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request, body: ChatBody) -> Response:
        return await chat(service, request, body)

    @app.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeBody) -> Response:
        body.check_extra()
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give either prompt or messages", "prompt", "invalid_value")
        if body.prompt is not None:
            ids = await service.encode(body.prompt, "prompt", special=body.add_special_tokens is not False)
        else:
            messages = [message.plain() for message in body.messages or ()]
            text = await service.chat_text(messages, body.add_generation_prompt is not False)
            ids = await service.encode(text, "messages", special=False)
        told = {"count": len(ids), "max_model_len": service.served.max_len, "tokens": ids}
        return Json({**told, "token_strs": [service.tokenizer.token(i) for i in ids]} if body.return_token_strs else told)

    @app.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeBody) -> Response:
        body.check_extra()
        service.check_model(body.model)
        return Json({"prompt": service.tokenizer.decode(in_vocabulary(body.tokens, service.served.vocab_size, "tokens"))})


def _views(app: Server, service: Service) -> None:
    card = {"id": service.served.name, "object": "model", "created": service.started, "owned_by": "attlas"}
    card_with_size = {**card, "max_model_len": service.served.max_len}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card_with_size]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return card_with_size

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if service.worker.problem is not None:
            raise unavailable(f"The engine is not running: {service.worker.problem}.", "unhealthy")
        if app.gate.closed:
            raise draining()
        return {"status": "ok"}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/v1/engine", response_model=None)
    async def engine(request: Request) -> Response:
        return Json(await overview(service, request.scope.get(OWNER, ""), draining=app.gate.closed))

    @app.get("/", response_model=None)
    async def page() -> Response:
        html = resources.files("attlas.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(html, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})


def _errors(app: Server) -> None:
    def answer(error: ApiError) -> Response:
        app.service.metrics.refuse(error.status)
        return error_response(error)

    @app.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def body(_: Request, error: RequestValidationError) -> Response:
        return answer(explained(list(error.errors())))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:
            reason = "The body is not JSON in UTF-8, is nested too deep, or holds a number of too many digits."
            return answer(invalid(reason, code="invalid_json"))
        path = request.url.path[:128]
        told = {404: f"There is no {path!r} here.", 405: f"{request.method} is not what {path!r} takes."}
        message = told.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return answer(ApiError(error.status_code, message, code=code, headers=error.headers))

    @app.exception_handler(Unhealthy)
    async def broken(_: Request, error: Unhealthy) -> Response:
        return answer(app.service.api_error(error))

    @app.exception_handler(Disconnected)
    async def gone(_: Request, __: Disconnected) -> Response:
        return Response(status_code=CLIENT_GONE)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, __: Exception) -> Response:
        return answer(failed())
