"""An endpoint of the OpenAI protocol on this machine, behind which each episode has an address of its own.

    agent ── POST http://127.0.0.1:PORT/KEY/v1/chat/completions ──► open(KEY)'s `ask` ──► the answer

It serves what an agent needs of chat completions (https://platform.openai.com/docs/api-reference/chat): messages,
tools, one choice, as a whole or as a stream of one piece. What would change the meaning of what is recorded is refused
with status 400. The sampling settings (temperature, max_tokens ...) are the recipe's; those of a request do not count.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp import web

Body = Mapping[str, Any]
Ask = Callable[[Body], Awaitable[dict[str, Any]]]  # a request's body -> the assistant's message
MAX_BODY_BYTES = 32 * 2**20
MODEL = "policy"  # what the one model is called
# By key of a request: the values that change nothing, None aside.
_ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tool_choice": ("auto",),
    "response_format": ({"type": "text"},),
    "logprobs": (False,),
    "logit_bias": ({},),
    "stop": ([], ""),
    "functions": ([],),
    "echo": (False,),
}


class Refused(Exception):
    """A request that is answered with an error. `status`: 4xx; the clients of the protocol repeat 408, 409 and 429."""

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.status = status


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
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "troupe"}]})

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        try:
            ask = self._open.get(request.match_info["key"])
            if ask is None:
                raise Refused("this episode is over", 410)
            body = _checked(await _json(request))
            message = await ask(body)
        except Refused as refused:
            error = {"message": str(refused), "type": "invalid_request_error", "code": None, "param": None}
            return web.json_response({"error": error}, status=refused.status)
        completion = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": MODEL}
        ended = "tool_calls" if message.get("tool_calls") else "stop"
        if body.get("stream"):
            return await _streamed(request, completion, message, ended)
        choice = {"index": 0, "message": message, "finish_reason": ended, "logprobs": None}
        return web.json_response({**completion, "object": "chat.completion", "choices": [choice]})


async def _json(request: web.Request) -> Any:
    try:
        return await request.json()
    except ValueError as error:
        raise Refused(f"the body is no JSON: {error}") from None


def _checked(body: Any) -> Body:
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise Refused("a request needs `messages`, a list")
    for key, allowed in _ONLY.items():
        if body.get(key) is not None and body[key] not in allowed:
            raise Refused(f"{key}={json.dumps(body[key])[:80]} is not supported while an episode is recorded")
    return body


async def _streamed(
    request: web.Request, completion: dict[str, Any], message: dict[str, Any], ended: str
) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    calls = [{**call, "index": index} for index, call in enumerate(message.get("tool_calls") or [])]
    deltas = [({**message, **({"tool_calls": calls} if calls else {})}, None), ({}, ended)]
    for delta, reason in deltas:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        piece = {**completion, "object": "chat.completion.chunk", "choices": [choice]}
        await response.write(b"data: " + json.dumps(piece).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


_endpoints: WeakKeyDictionary[asyncio.AbstractEventLoop, ChatEndpoint] = WeakKeyDictionary()


def endpoint() -> ChatEndpoint:
    """The one of the running loop."""
    return _endpoints.setdefault(asyncio.get_running_loop(), ChatEndpoint())
