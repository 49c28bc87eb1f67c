"""A coroutine from beginning to end, wherever it is called from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run_to_end(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """As `asyncio.run(work())`. Where a loop runs already (a notebook), the work has a thread and a loop of its own; an
    interrupt of the caller cancels it, and is raised once everything is in order."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    begun: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any] | None]] = Future()

    async def noted() -> T:
        begun.set_result((asyncio.get_running_loop(), asyncio.current_task()))
        return await work()

    with ThreadPoolExecutor(1, thread_name_prefix="troupe") as thread:
        done = thread.submit(lambda: asyncio.run(noted()))
        try:
            return done.result()
        except KeyboardInterrupt:
            loop, task = begun.result()
            if task is not None and not done.done():
                loop.call_soon_threadsafe(task.cancel)
            raise  # leaving the block waits for the thread
