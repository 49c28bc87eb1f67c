"""An endpoint of the OpenAI protocol on this machine, behind which each episode has an address of its own.

    agent ── POST http://127.0.0.1:PORT/KEY/v1/chat/completions ──► open(KEY)'s `ask` ──► the answer

It serves what an agent needs of chat completions (https://platform.openai.com/docs/api-reference/chat): messages,
tools, one choice, as a whole or as a stream of one piece. What would change the meaning of what is recorded is refused
with status 400. The sampling settings (temperature, max_tokens ...) are the recipe's; those of a request do not count.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp import web

from rewards.environments.openai_protocol import DONE, Body, Message, Refused, checked, heading, models, piece, whole

Ask = Callable[[Body], Awaitable[dict[str, Any]]]  # a request's body -> the assistant's message
MAX_BODY_BYTES = 32 * 2**20
MODEL = "policy"  # what the one model is called


class ChatEndpoint:
    """One per event loop, started with the first episode and ended with the process."""

    def __init__(self) -> None:
        self._open: dict[str, Ask] = {}
        self._port = 0
        self._starting = asyncio.Lock()

    async def open(self, ask: Ask) -> tuple[str, str]:
        """A new key, and the `base_url` that has it."""
        async with self._starting:
            if not self._port:
                self._port = await self._start()
        key = secrets.token_urlsafe(16)
        self._open[key] = ask
        return key, f"http://127.0.0.1:{self._port}/{key}/v1"

    def close(self, key: str) -> None:
        """From now on that address is answered with 410."""
        self._open.pop(key, None)

    async def _start(self) -> int:
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.router.add_post("/{key}/v1/chat/completions", self._completion)
        application.router.add_get("/{key}/v1/models", self._models)
        runner = web.AppRunner(application, access_log=None, handle_signals=False)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return int(runner.addresses[0][1])

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response(models({MODEL: 0.0}))

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        try:
            ask = self._open.get(request.match_info["key"])
            if ask is None:
                raise Refused("this episode is over", 410)
            body = checked(await _json(request), "while an episode is recorded")
            message = await ask(body)
        except Refused as refused:
            return web.json_response(refused.body, status=refused.status)
        head = heading(MODEL)
        ended = "tool_calls" if message.get("tool_calls") else "stop"
        if body.get("stream"):
            return await _streamed(request, head, message, ended)
        return web.json_response(whole(head, message, ended))


async def _json(request: web.Request) -> Any:
    try:
        return await request.json()
    except ValueError as error:
        raise Refused(f"the body is no JSON: {error}") from None


async def _streamed(request: web.Request, head: dict[str, Any], message: Message, ended: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    for part in (piece(head, message), piece(head, {}, ended), DONE):
        await response.write(part)
    await response.write_eof()
    return response


_endpoints: WeakKeyDictionary[asyncio.AbstractEventLoop, ChatEndpoint] = WeakKeyDictionary()


def endpoint() -> ChatEndpoint:
    """The one of the running loop."""
    return _endpoints.setdefault(asyncio.get_running_loop(), ChatEndpoint())
