"""What stands before every route: keys, the gate that drains, and the limit of a body. Plain ASGI, so that nothing is buffered on
the way out and a disconnect reaches the one who waits for it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from attlas.serve.errors import ApiError, draining, overloaded, unauthorized
from attlas.serve.options import Limits
from attlas.serve.wire import Json

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("attlas.serve")

OWNER = "attlas-owner"  # in a scope: which key asks; "" without keys


def error_response(error: ApiError) -> Json:
    """A response, which is also an application that answers with it."""
    return Json(error.body(), status_code=error.status, headers=error.headers)


class Keys:
    """The keys of a server. Only their SHA-256 digests are held, and every comparison looks at all of all of them, so that the
    time that a wrong key takes says nothing about a right one."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def owner(self, header: bytes) -> str | None:
        """Who sends this Authorization header: a name made from the key, "" where no keys are set, None for nobody known."""
        if not self.digests:
            return ""
        given = hashlib.sha256(_secret(header)).digest()
        found = [hmac.compare_digest(given, digest) for digest in self.digests]
        return hashlib.sha256(b"owner" + given).hexdigest()[:16] if any(found) else None


def _secret(header: bytes) -> bytes:
    """The key of `Bearer KEY`, or the password of `Basic ...` (what a browser sends)."""
    scheme, _, rest = header.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


class KeyCheck:
    """Lets a request through that brings a key; every route, unknown ones included. Marks the scope with its owner."""

    def __init__(self, app: App, keys: Keys) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            found = [value for name, value in scope["headers"] if name == b"authorization"]
            owner = self.keys.owner(found[0] if len(found) == 1 else b"")
            scope[OWNER] = owner
            await (error_response(unauthorized()) if owner is None else self.app)(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


class HostCheck:
    """Lets requests through that call the server by an address, as localhost, or by one of `names`.

    A page in a browser on this machine can reach a server that listens here by a name of its own that resolves to 127.0.0.1 (DNS
    rebinding); the browser then lets it read the answers. The name gives it away.
    """

    def __init__(self, app: App, names: Iterable[str]) -> None:
        self.app, self.names = app, {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        called = [value for name, value in scope["headers"] if name == b"host"] if scope["type"] == "http" else []
        wrong = next((value for value in called if not self.known(value)), None)
        if wrong is None:
            await self.app(scope, receive, send)
            return
        name = wrong.decode("latin-1")[:128]
        message = f"This server does not go by the name {name!r}: start it with --allow-host, or with keys."
        await error_response(ApiError(403, message, kind="permission_error", code="unknown_host"))(scope, receive, send)

    def known(self, host: bytes) -> bool:
        name = re.sub(r":\d*$", "", host.decode("latin-1").strip().lower())
        if name in self.names or name.endswith(".localhost"):
            return True
        try:
            return bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return False


class Head:
    """Answers HEAD as it would GET; the one who writes the answer leaves its body out."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = scope["type"] == "http" and scope["method"] == "HEAD"
        await self.app({**scope, "method": "GET"} if head else scope, receive, send)


class Stalled(OSError):
    """A client that does not read what it has asked for."""


def impatient(send: Send, seconds: float) -> Send:
    """A `send` that raises Stalled when a message has waited `seconds` for the client to read what came before it."""

    async def bounded(message: Message) -> None:
        task, late = asyncio.current_task(), False
        assert task is not None

        def stop() -> None:
            nonlocal late
            late = True
            task.cancel()

        timer = asyncio.get_running_loop().call_later(seconds, stop)
        try:
            await send(message)
        except asyncio.CancelledError:
            if not late:
                raise
            getattr(task, "uncancel", int)()  # this cancellation was ours, and ends here
            raise Stalled(f"a client has not read its answer for {seconds:g} s") from None
        finally:
            timer.cancel()

    return bounded


class Gate:
    """Counts the requests that it has let in; once it is closed, work is answered with 503 while what is inside goes on.

    most       requests inside at once; more are answered with 429 before their bodies are read
    stall      seconds that an answer waits for a client that does not read it; then the request ends
    on_refuse  is told the status of a request that was not let in
    """

    def __init__(self, app: App, most: int, stall: float, on_refuse: Callable[[int], None]) -> None:
        self.app, self.most, self.stall, self.on_refuse = app, most, stall, on_refuse
        self.closed = False
        self.inside = 0
        self.empty = asyncio.Event()
        self.empty.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self.closed or self.inside >= self.most:
            error = draining() if self.closed else overloaded(1)
            error.headers["Connection"] = "close"
            self.on_refuse(error.status)
            await error_response(error)(scope, receive, send)
            return
        self.inside += 1
        self.empty.clear()
        try:
            await self.app(scope, receive, impatient(send, self.stall))
        except Stalled as error:
            log.warning("%s", error)
        finally:
            self.inside -= 1
            if not self.inside:
                self.empty.set()


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands the body out in one piece, and after it what comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def first_the_body() -> Message:
        return waiting.pop() if waiting else await receive()

    return first_the_body


class BodyLimit:
    """Reads the body within a size and a time, then hands the request on with it."""

    def __init__(self, app: App, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(scope, receive), self.limits.body_seconds)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
        except asyncio.TimeoutError:
            late = ApiError(408, f"The body did not arrive within {self.limits.body_seconds:g} s.", code="body_timeout")
            await error_response(late)(scope, receive, send)
        else:
            if body is not None:
                await self.app(scope, replayed(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when the client has gone."""
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if any(value.isdigit() and int(value[:20]) > self.limits.body for value in lengths):
            raise self._too_large()
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.limits.body:
                raise self._too_large()
            more = message.get("more_body", False)
        return b"".join(chunks)

    def _too_large(self) -> ApiError:
        message = f"The body is larger than the {self.limits.body} bytes that this server takes."
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
