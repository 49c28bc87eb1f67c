"""What is asked of a pool at the same time shares calls of its workers, where the work is small.

    ask(a) ──┐
    ask(b) ──┼──► one call ──► a worker: `together`
    ask(c) ──┘           ◄──── of each its result, or why there is none

A call over Ray costs both processes a millisecond or two, which is as long as small work itself. But the results of a
call come when its last one is there: who asks decides what is small enough.

A joined call is tried once. What it could not bring is then asked for `alone`, with all attempts, so that one item that
breaks a worker, or hangs, is not the end of the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from actors.errors import InfraFailure
from actors.worker import Worker
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Pool

A = TypeVar("A")
R = TypeVar("R")

MOST = 16  # items of one call
CALLS_PER_WORKER = 2  # at least, if there are so many items: the work is dealt to the workers call by call


@dataclass(eq=False)
class _Asked(Generic[A, R]):
    item: A
    result: asyncio.Future[R]


@dataclass(eq=False)
class _Call(Generic[A, R]):
    """A call with several items. `worker`: who carries it out, once somebody does; `under_way`: what it was given."""

    asked: Sequence[_Asked[A, R]]
    worker: Worker | None = None
    task: asyncio.Task[None] | None = None
    under_way: frozenset[_Asked[A, R]] = field(default_factory=frozenset[Any])


class JoinedCalls(Generic[A, R]):
    """Used from one event loop. `name`: of an item, for events. `withdraw` tells a worker that nobody waits any more
    for an item of a call that it carries out."""

    def __init__(
        self,
        pool: Pool,
        name: Callable[[A], str],
        alone: Callable[[A], Awaitable[R]],
        together: Callable[[Worker, Sequence[A], str], Awaitable[Sequence[R | Exception]]],
        withdraw: Callable[[Worker, A], Awaitable[None]] | None = None,
    ) -> None:
        self._pool, self._name, self._alone, self._together = pool, name, alone, together
        self._tell = withdraw
        self._waiting: list[_Asked[A, R]] = []  # until the event loop has run all that was ready
        self._calls = set[_Call[A, R]]()

    async def ask(self, item: A) -> R:
        """The result of an item. Raises what `alone` raises."""
        asked = _Asked[A, R](item, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._send)
        try:
            with suppress(_AskAlone):
                return await asked.result
        except asyncio.CancelledError:
            await self._withdraw(asked)
            raise
        return await self._alone(item)

    def _send(self) -> None:
        """Deal what waits to calls of about equal size, in the order in which it came."""
        waiting, self._waiting = [asked for asked in self._waiting if not asked.result.done()], []
        workers = max(1, self._pool.count(State.SERVING))
        size = max(1, min(MOST, -(-len(waiting) // (CALLS_PER_WORKER * workers))))
        for start in range(0, len(waiting), size):
            part = waiting[start : start + size]
            if len(part) == 1:
                part[0].result.set_exception(_AskAlone())
                continue
            call = _Call(part)
            self._calls.add(call)
            call.task = asyncio.ensure_future(self._carry_out(call))
            call.task.add_done_callback(lambda _, call=call: self._calls.discard(call))

    async def _carry_out(self, call: _Call[A, R]) -> None:
        """Settles every result of the call. Raises only if it is cancelled, because nobody waits for it."""
        name = f"{self._name(call.asked[0].item)} and {len(call.asked) - 1} more"
        try:
            items = len(call.asked)
            await self._pool.call(name, lambda worker: self._on(worker, call, name), items=items, max_attempts=1)
        except Exception as error:
            for asked in call.asked:
                self._fail(asked, error)

    async def _on(self, worker: Worker, call: _Call[A, R], name: str) -> None:
        asked = [each for each in call.asked if not each.result.done()]
        if not asked:
            return
        call.worker, call.under_way = worker, frozenset(asked)
        outcomes = await self._together(worker, [each.item for each in asked], name)
        for each, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._fail(each, outcome)
            elif not each.result.done():
                each.result.set_result(outcome)

    def _fail(self, asked: _Asked[A, R], error: Exception) -> None:
        if not asked.result.done():
            asked.result.set_exception(_AskAlone() if isinstance(error, InfraFailure) else error)

    async def _withdraw(self, asked: _Asked[A, R]) -> None:
        """A call in which no other item is waited for is cancelled."""
        call = next((each for each in self._calls if asked in each.asked), None)
        if call is None:
            return
        if call.task is not None and all(each.result.done() for each in call.asked):
            call.task.cancel()
            await asyncio.wait({call.task})  # ends at once: a cancelled call waits for nothing
        if self._tell is not None and call.worker is not None and asked in call.under_way:
            await self._tell(call.worker, asked.item)


class _AskAlone(Exception):
    """An item is to have a call of its own."""
