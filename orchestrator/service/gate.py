"""What stands before every route: the token, the name of the host, and the size of the body.

    request ──► host ──► token ──► size ──► routes

It wraps the whole application, so a route that somebody adds is behind it, and so is a path that no route has: without
the token one cannot even tell which there are. Open are PUBLIC, which says no more than that the service lives, and the
files of the page, which are the same everywhere.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.service.errors import encoded
from orchestrator.service.settings import Settings

PUBLIC = ("/healthz", "/readyz")
PAGE = "/page"
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")  # of this machine, as a browser writes them into `Host`


class Gate:
    """Middleware. Refuses with 401, 403 and 413."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if refusal := self._refusal(scope["path"], headers):
            await _refuse(send, *refusal)
            return
        await _Counted(self._app, self._settings.max_body_bytes)(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        token = self._settings.token
        if token is None and not _is_local(headers.get("host", "")):
            # A page of another site cannot read our answers, unless its name resolves to this machine (DNS rebinding).
            return 403, "without a token the service answers only to the names of this machine", []
        if token is not None and not is_open(path) and not _has_token(headers, token):
            return (
                401,
                "this needs the service's token: `Authorization: Bearer TOKEN`",
                [(b"www-authenticate", b"Bearer")],
            )
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._settings.max_body_bytes:
            return 413, _too_large(self._settings.max_body_bytes), []
        return None


class _Counted:
    """The application, with bodies that are not longer than `limit` whatever their header says."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seen, started, cut = 0, False, False

        async def counted() -> Message:
            nonlocal seen, cut
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                cut = True
                return {"type": "http.request", "body": b"", "more_body": False}
            return message

        async def watched(message: Message) -> None:
            nonlocal started
            if cut and not started:
                started = True
                await _refuse(send, 413, _too_large(self._limit), [])
            elif not cut:
                started = True
                await send(message)

        await self._app(scope, counted, watched)


def is_open(path: str) -> bool:
    """Whether a path needs no token."""
    return path in (*PUBLIC, "/") or path.startswith(f"{PAGE}/")


def _has_token(headers: Headers, token: str) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    # Compared as bytes, because `compare_digest` refuses text that is not ASCII.
    return secrets.compare_digest(given.strip().encode(), token.encode()) and scheme.lower() == "bearer"


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return name in LOCAL_NAMES


def _too_large(limit: int) -> str:
    return f"the body is larger than {limit} bytes"


async def _refuse(send: Send, status: int, message: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
    body = encoded(status, message)
    own: list[Any] = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": own})
    await send({"type": "http.response.body", "body": body})
