"""Answers to reads, kept for a moment: a run that a hundred browsers watch costs the service about what one does.

    GET ──► asked a moment ago? ── yes ──► the same bytes
              └── no ──► routes ──► kept for a moment

    anything else ──► routes; what was kept is forgotten before and after, so whoever has changed something sees it

It stands behind the gate: nobody gets an answer whom the routes would not have given it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEPT_BYTES, LARGEST_BYTES = 32 * 2**20, 2**20  # of all answers, of one
VARIED = ("accept", "last-event-id")  # headers that an answer may depend on
SAFE = ("GET", "HEAD", "OPTIONS")

Key = tuple[str, bytes, tuple[str | None, ...]]


@dataclass(frozen=True)
class Kept:
    """The two messages of an answer, as ASGI has them, and when it was made."""

    made: float
    head: Message
    body: Message


class Answers:
    """Middleware. `fresh_s`: how old an answer may be; 0: each is made anew. `clock`: in seconds."""

    def __init__(self, app: ASGIApp, fresh_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._fresh_s, self._clock = app, fresh_s, clock
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._bytes, self._changes = 0, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET":
            await self._read(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] not in SAFE:
            self._forget()
            try:
                await self._app(scope, receive, send)
            finally:
                self._forget()
        else:
            await self._app(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        key = scope["path"], scope["query_string"], tuple(headers.get(name) for name in VARIED)
        kept = self._kept.get(key)
        if kept is not None and self._clock() - kept.made < self._fresh_s:
            await send(kept.head)
            await send(kept.body)
            return
        changes, made = self._changes, self._clock()
        head: Message | None = None

        async def seen(message: Message) -> None:
            nonlocal made, head
            if message["type"] == "http.response.start":
                made, head = self._clock(), message
            elif head is not None:  # the first part of the body; of a stream it is not the last
                if head["status"] == 200 and not message.get("more_body") and changes == self._changes:
                    self._keep(key, Kept(made, head, message))
                head = None
            await send(message)

        await self._app(scope, receive, seen)

    def _keep(self, key: Key, answer: Kept) -> None:
        self._drop(key)
        if _size(answer) <= LARGEST_BYTES:
            self._kept[key] = answer
            self._bytes += _size(answer)
        while self._bytes > KEPT_BYTES:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        if (dropped := self._kept.pop(key, None)) is not None:
            self._bytes -= _size(dropped)

    def _forget(self) -> None:
        """An answer that is being made now may not have seen the change, so it is not kept either."""
        self._kept.clear()
        self._bytes = 0
        self._changes += 1


def _size(answer: Kept) -> int:
    return len(answer.body.get("body", b"")) + 2**10  # with its key and headers
