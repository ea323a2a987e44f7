"""What every request passes before it is read: key, host, size and time. And its line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import time
from typing import Any

from modules.serving.errors import ApiError, too_slow

log = logging.getLogger("kivi.serve")
OPEN = ("/health",)  # needs no key
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_GONE = 499  # of a client that went away
_LINGER = 2.0  # seconds


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of what one client may ask for.

    Attributes:
        api_key: it has to know; None asks for none.
        max_body: bytes of a request.
        max_seconds: for a request to come in, and for an answer.
        hosts: names under which it may call, None for any. Without a key a page in a browser could otherwise reach a server
            of this machine through a name of its own (DNS rebinding).
    """

    api_key: str | None
    max_body: int
    max_seconds: float
    hosts: tuple[str, ...] | None = None


class Gate:
    """An ASGI application around another one, in which a request's body is whole and a request may be answered."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)

    async def _answer(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        start, status = time.monotonic(), _GONE
        noted: dict[str, Any] = scope.setdefault("state", {})

        async def counted(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            async with asyncio.timeout(self.limits.max_seconds):  # for a reader that does not read
                await send(message)

        try:
            try:
                self._check(scope)
                body = await self._body(scope, receive)
            except ApiError as error:
                await self._discard(receive)
                await _refuse(counted, error)
            else:
                if body is not None:
                    await self.app(scope, _replayed(body, receive), counted)
        finally:
            details = "".join(f" {name}={value}" for name, value in noted.get("log", {}).items())
            path = scope["path"] if scope["path"] in KNOWN else "(other)"
            log.info("%s %s %d%s total=%.2fs", scope["method"], path, status, details, time.monotonic() - start)

    def _check(self, scope: dict[str, Any]) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if self.limits.hosts is not None and name not in self.limits.hosts:
            raise ApiError(403, f"this server is called {' or '.join(self.limits.hosts)}.", code="wrong_host")
        key = self.limits.api_key
        if key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + key.encode()):
                raise ApiError(
                    401, "a wrong API key, or none: send it as `Authorization: Bearer KEY`.",
                    type="authentication_error", code="invalid_api_key",
                )  # fmt: skip
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise ApiError(415, "send JSON, with `Content-Type: application/json`.", code="not_json")
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length[:20]) > self.limits.max_body:
                raise self._too_large()

    async def _body(self, scope: dict[str, Any], receive: Any) -> bytes | None:
        """The whole body; None of a client that went away."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.max_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.limits.max_body:
                        raise self._too_large()
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise too_slow(self.limits.max_seconds) from None

    async def _discard(self, receive: Any) -> None:
        """Read some of what is left of a body, which is not kept: a client that still sends does not see the answer."""
        left = 2 * self.limits.max_body
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(_LINGER, self.limits.max_seconds)):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body"):
                        return

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.limits.max_body} bytes.", code="body_too_large")


KNOWN = ("/v1/chat/completions", "/v1/completions", "/v1/models", *OPEN)  # paths that may be logged as they are


def _replayed(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the body that was read, then goes on."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Any:
        return parts.pop() if parts else await receive()

    return next_message


async def _refuse(send: Any, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")]  # a body may not have been read to its end
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
