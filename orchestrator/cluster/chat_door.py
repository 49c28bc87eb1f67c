"""Where a run's policy is chatted with: an endpoint of the OpenAI protocol in the driver, behind a path that nobody can
guess. `run.json` has its URL; the service passes requests on to it.

    POST URL/v1/chat/completions ──► LiveChat ──► the run's engines
    GET  URL/v1/models

A client that goes away ends its request: what is sampled for it is aborted.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.collection.live_chat import LiveChat
from rewards.environments.openai_protocol import DONE, Refused, event, heading, models, piece, whole

if TYPE_CHECKING:
    from aiohttp import web

MAX_BODY_BYTES = 32 * 2**20


@dataclass(frozen=True)
class ChatDoor:
    """`url`: None for a run without engines."""

    url: str | None
    models: tuple[str, ...]


@asynccontextmanager
async def chat_door(chat: LiveChat, host: str) -> AsyncIterator[ChatDoor]:
    """While the block runs the run's policy can be chatted with, at a free port of `host`."""
    if not chat.models:
        yield ChatDoor(None, ())
        return
    from aiohttp import web

    key, began = secrets.token_urlsafe(32), time.time()

    async def completions(request: web.Request) -> web.StreamResponse:
        try:
            body = await _json(request)
            stream = isinstance(body, dict) and bool(body.get("stream"))
            return await (_streamed if stream else _whole)(request, body, chat)
        except Refused as refused:
            return web.json_response(refused.body, status=refused.status)

    async def listed(_: web.Request) -> web.Response:
        return web.json_response(models(dict.fromkeys(chat.models, began)))

    application = web.Application(client_max_size=MAX_BODY_BYTES)
    application.router.add_post(f"/{key}/v1/chat/completions", completions)
    application.router.add_get(f"/{key}/v1/models", listed)
    runner = web.AppRunner(application, access_log=None, handle_signals=False, handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, 0, shutdown_timeout=1.0).start()
        yield ChatDoor(f"http://{host}:{runner.addresses[0][1]}/{key}", tuple(chat.models))
    finally:
        await runner.cleanup()


async def _json(request: web.Request) -> Any:
    try:
        return await request.json()
    except ValueError as error:
        raise Refused(f"the body is no JSON: {error}") from None


async def _whole(request: web.Request, body: Any, chat: LiveChat) -> web.StreamResponse:
    from aiohttp import web

    async with contextlib.aclosing(chat.answer(body, stream=False)) as parts:
        async for part in parts:
            head = heading(str(body["model"]))
            return web.json_response(whole(head, part.message, part.ended or "stop", part.usage))
    raise AssertionError("an answer has a part")


async def _streamed(request: web.Request, body: Any, chat: LiveChat) -> web.StreamResponse:
    """The status is sent with the first part; what fails after that is an event with an error."""
    from aiohttp import web

    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    async with contextlib.aclosing(chat.answer(body, stream=True)) as parts:
        head: dict[str, Any] = {}
        try:
            async for part in parts:
                if not head:
                    head = heading(str(body["model"]))
                    await response.prepare(request)
                if part.ended is None or part.message:
                    await response.write(piece(head, part.message))
                if part.ended is not None:
                    await response.write(piece(head, {}, part.ended))
                    if (body.get("stream_options") or {}).get("include_usage"):
                        chunk = {"object": "chat.completion.chunk", "choices": [], "usage": part.usage}
                        await response.write(event({**head, **chunk}))
        except Refused as refused:
            if not head:
                raise
            await response.write(event(refused.body))
    await response.write(DONE)
    await response.write_eof()
    return response
