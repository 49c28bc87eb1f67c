"""Calls of users' functions, sync or async, such that nothing that they raise reaches the loop as it is: a future
cannot carry every exception (a StopIteration would leave the loop waiting for ever, a SystemExit would end it)."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from actors.errors import InfraFailure


class Raised(Exception):
    """A user's function raised an exception. `text`: its message alone."""

    def __init__(self, error: BaseException) -> None:
        self.text = str(error) or type(error).__name__
        super().__init__(f"{type(error).__name__}: {error}")


class UserCalls:
    """Sync functions run in `threads`, async ones on the loop. An InfraFailure is raised as it is: with it, a function
    says that the machinery failed. Everything else is `Raised`."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads

    async def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if inspect.iscoroutinefunction(function):
            return await _awaited(function, args, kwargs)
        run = asyncio.get_running_loop().run_in_executor(self._threads, _outcome, function, args, kwargs)
        result, error = await run
        if error is not None:
            raise error
        return result


async def _awaited(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return await function(*args, **kwargs)
    except (InfraFailure, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        if isinstance(error, asyncio.CancelledError) and _is_cancelled():
            raise
        raise Raised(error) from None


def _outcome(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Exception | None]:
    """(result, error) in a thread."""
    try:
        return function(*args, **kwargs), None
    except InfraFailure as error:
        return None, error
    except BaseException as error:
        return None, Raised(error)


def _is_cancelled() -> bool:
    """Whether it is the call that was cancelled, and not something inside the function."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
