"""Routes that wait for a run, in threads of their own, so that however many wait, reads are answered.

GET ...   ──► the server's threads
PATCH ... ──► WAITING further threads ──► the run, up to `wait_s`
              a request that finds none free waits without a thread, and is refused after QUEUE_S
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import anyio
from anyio.lowlevel import RunVar
from anyio.to_thread import run_sync

from orchestrator.service.errors import Problem

WAITING = 64  # requests that wait for runs at the same time
QUEUE_S = 60.0
P = ParamSpec("P")
T = TypeVar("T")

_threads: RunVar[anyio.CapacityLimiter] = RunVar("threads of routes that wait")  # of each event loop, as anyio's own


def waits(route: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A route of the same signature, which does not take a thread that reads need. Raises Problem 429 if WAITING
    others have been waiting for QUEUE_S."""

    @functools.wraps(route)
    async def waiting(*args: P.args, **kwargs: P.kwargs) -> T:
        threads = _limiter()
        borrower = object()  # a thread is borrowed before it is used, because that wait has a deadline and can be ended
        try:
            with anyio.fail_after(QUEUE_S):
                await threads.acquire_on_behalf_of(borrower)
        except TimeoutError:
            raise Problem(429, f"{WAITING} requests wait for runs already; nothing was asked of this one") from None
        try:
            # One of its own: `threads` has counted this request already.
            return await run_sync(functools.partial(route, *args, **kwargs), limiter=anyio.CapacityLimiter(1))
        finally:
            threads.release_on_behalf_of(borrower)

    return waiting


def _limiter() -> anyio.CapacityLimiter:
    try:
        return _threads.get()
    except LookupError:
        _threads.set(anyio.CapacityLimiter(WAITING))
        return _threads.get()
