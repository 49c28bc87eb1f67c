"""A program that talks to a model through the OpenAI protocol, as an environment: its conversation is an episode.

    rollout worker            environment worker
    ──────────────            ──────────────────────────────────────────────────────────────────────────
    reset ──────────────────► starts the agent ── chat.completions ─► endpoint: first request
      prompt ◄─────────────────────────────────────────────────────── its messages and tools
    step(model's turn) ────────────────────────────────────────────► answers that request, waits for the next
      answer ◄──────────────────────────────────────────────────────── the messages that were added
    step(model's turn) ────────────────────────────────────────────► answers; the agent returns a reward: done

The tokens that the model sampled are never tokenised again: a request has to repeat all earlier messages and to add
some, and only those that were added become tokens, by the chat template. An agent that changes or drops earlier
messages, or changes its tools, is no single episode; it fails, with the message that differs. Its requests come one
after another.

Waits: for the agent, until it asks or returns; the deadline of the environment's calls ends that, and this process with
it. The agent waits for its answer until the episode ends, and then is told so (status 410).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from threading import Thread
from typing import Any

from rewards.environments.chat_endpoint import endpoint
from rewards.environments.openai_protocol import (
    Body,
    Message,
    Refused,
    calls_of,
    for_client,
    for_template,
    short,
    text_of,
)

# run(row, base_url, api_key) -> what the episode earned, or None. Sync or async.
Agent = Callable[..., float | Awaitable[float | None] | None]
OVER = Refused("this episode is over", 410)


class AgentEnvironment:
    """An agent's conversation with the model. A user's file has a function that returns one:

        def my_agent(): return AgentEnvironment(run)

    `run(row, base_url, api_key)`: `row` has the data set's columns; what it returns is the reward of the last turn. It
    may be async; a sync one runs in a thread. What it raises fails the sample."""

    owns_prompt = True  # the conversation is the agent's from its first message on

    def __init__(self, run: Agent) -> None:
        self.tools: list[Any] = []
        self._run = run
        self._key = ""
        self._agent: asyncio.Future[float | None] | None = None
        self._pending: tuple[Body, asyncio.Future[Message]] | None = None  # a request and its answer
        self._asked = asyncio.Event()
        self._history: list[Message] = []
        self._names: dict[str, str] = {}  # of tools, by the id of a call

    async def reset(self, row: dict[str, Any]) -> list[Message]:
        """Start the agent; the messages of its first request. Raises RuntimeError if it asks for nothing."""
        self._end()
        self._history, self._names = [], {}
        self._key, base_url = await endpoint().open(self._ask)
        try:
            self._agent = _started(self._run, row, base_url, self._key)
            first = await self._next()
            if first is None:
                raise RuntimeError("the agent ended without a request to the model")
        except BaseException:  # a cancellation, too: the agent would wait for ever behind an address of its own
            self._end()
            raise
        self.tools = list(first.get("tools") or [])
        self._history = [dict(message) for message in first["messages"]]
        return [self._for_template(message) for message in self._history]

    async def step(self, message: Message) -> tuple[list[Message], float | None, bool]:
        """Answer the agent; what it adds, or its reward. Raises ValueError if it changes what was said."""
        answer = for_client(message, self._numbered)
        self._history.append(answer)
        assert self._pending is not None and self._agent is not None
        self._pending[1].set_result(answer)
        self._pending = None
        try:
            request = await self._next()
            if request is None:
                return [], self._agent.result(), True
            added = self._added(request)
        except BaseException:
            self._end()
            raise
        self._history += added
        return [self._for_template(each) for each in added], None, False

    async def get_reward(self) -> None:
        """The reward came with the last turn. An episode that was cut has none: its agent is stopped."""
        self._end()

    async def abandon(self) -> None:
        """The episode ends here, for a reason that is not the agent's."""
        self._end()

    async def _ask(self, body: Body) -> Message:
        """A request of the agent's. One that a client repeats while it waits is the same request."""
        if self._pending is None:
            self._pending = (body, asyncio.get_running_loop().create_future())
            self._asked.set()
        if self._pending[0] != body:
            raise Refused("another request of this episode is being answered; an episode is one conversation")
        return await asyncio.shield(self._pending[1])

    async def _next(self) -> Body | None:
        """The agent's next request; None if it has returned. Raises what it raised."""
        assert self._agent is not None
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({asked, self._agent}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
        self._asked.clear()
        if self._pending is not None:
            return self._pending[0]
        self._agent.result()
        return None

    def _added(self, body: Body) -> list[Message]:
        messages: Sequence[Message] = body["messages"]
        for place, earlier in enumerate(self._history):
            if place >= len(messages) or _meaning(messages[place]) != _meaning(earlier):
                now = messages[place] if place < len(messages) else "nothing"
                raise ValueError(
                    f"the agent changed message {place} of its conversation: it was {short(earlier)}, it is "
                    f"{short(now)}. An episode only grows; what it said before must be repeated as it was"
                )
        if (body.get("tools") or []) != self.tools:
            raise ValueError("the agent changed its tools during the episode; they are part of the prompt")
        if len(messages) == len(self._history):
            raise ValueError("the agent asked again and added no message to its conversation")
        return [dict(message) for message in messages[len(self._history) :]]

    def _numbered(self, name: str, arguments: str) -> Message:
        index = f"call_{len(self._names)}"
        self._names[index] = name
        return {"id": index, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _for_template(self, message: Message) -> Message:
        return for_template(message, self._names)

    def _end(self) -> None:
        """Stop an agent that is still at it: one that waits for an answer gets none."""
        endpoint().close(self._key)
        if self._pending is not None and not self._pending[1].done():
            self._pending[1].set_exception(OVER)
            self._pending[1].exception()  # consumed, should nobody be waiting for it any longer
        self._pending = None
        self._asked.clear()
        agent, self._agent = self._agent, None
        if agent is not None and not agent.done():
            agent.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            agent.cancel()


def _started(run: Agent, row: dict[str, Any], base_url: str, api_key: str) -> asyncio.Future[float | None]:
    """An async agent on this loop, a sync one in a thread of its own: however many wait, each has one."""
    if inspect.iscoroutinefunction(run):
        return asyncio.ensure_future(run(row, base_url, api_key))
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[float | None] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not ended.done():
            ended.set_result(result) if error is None else ended.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = run(row, base_url, api_key)
        except BaseException as raised:  # a future cannot carry every exception
            error = RuntimeError(f"{type(raised).__name__}: {raised}")
        with suppress(RuntimeError):  # the loop has ended before the agent
            loop.call_soon_threadsafe(settle, result, error)

    Thread(target=work, name="agent", daemon=True).start()
    return ended


def _meaning(message: Message) -> tuple[Any, ...]:
    """What two messages have in common if a client has merely rewritten one: no content is empty content, and ids,
    spaces in arguments and keys that are None do not count."""
    return (message.get("role"), text_of(message), calls_of(message))
