"""Routes that wait for a run, in threads of their own, so that however many wait, reads are answered.

GET ...   ──► the server's threads
PATCH ... ──► WAITING further threads ──► the run, up to `wait_s`
              a request that finds none free waits without a thread, and is refused after QUEUE_S
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar

import anyio
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync

from orchestrator.service.errors import Problem

WAITING = 64  # requests that wait for runs at the same time
QUEUE_S = 60.0
P = ParamSpec("P")
T = TypeVar("T")


class Places:
    """`count` places of each event loop, for what may take long. `name`: of these places alone."""

    def __init__(self, name: str, count: int) -> None:
        self._count = count
        self._limiter: RunVar[anyio.CapacityLimiter] = RunVar(name)

    @asynccontextmanager
    async def place(self, queue_s: float, busy: Problem) -> AsyncGenerator[None]:
        """While the block runs it has a place. Raises `busy` if none becomes free in that time."""
        limiter = self._of_this_loop()
        borrower = object()
        try:
            with anyio.fail_after(queue_s):
                await limiter.acquire_on_behalf_of(borrower)
        except TimeoutError:
            raise busy from None
        try:
            yield
        finally:
            limiter.release_on_behalf_of(borrower)

    def _of_this_loop(self) -> anyio.CapacityLimiter:
        try:
            return self._limiter.get()
        except LookupError:
            self._limiter.set(anyio.CapacityLimiter(self._count))
            return self._limiter.get()


_threads = Places("threads of routes that wait", WAITING)


async def in_thread(call: Callable[[], T]) -> T:
    """In a thread besides those that reads have. Whoever calls this has a place for it."""
    return await run_sync(call, limiter=anyio.CapacityLimiter(1))


def waits(route: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A route of the same signature, which does not take a thread that reads need. Raises Problem 429 if WAITING
    others have been waiting for QUEUE_S."""

    @functools.wraps(route)
    async def waiting(*args: P.args, **kwargs: P.kwargs) -> T:
        busy = Problem(429, f"{WAITING} requests wait for runs already; nothing was asked of this one")
        async with _threads.place(QUEUE_S, busy):  # before the thread: that wait has a deadline and can be ended
            return await in_thread(functools.partial(route, *args, **kwargs))

    return waiting
