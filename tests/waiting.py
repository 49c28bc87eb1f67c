"""Waiting for what another process, thread or task does: with a deadline, and saying what did not come about."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import psutil


def until(condition: Callable[[], Any], what: str, *, timeout_s: float = 300.0, every_s: float = 0.05) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s"
        time.sleep(every_s)
    return found


async def until_true(condition: Callable[[], Any], what: str, *, timeout_s: float = 300.0) -> None:
    """The same, while the tasks of the event loop go on."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s"
        await asyncio.sleep(0.005)


def ended(process: psutil.Process) -> bool:
    """Whether it runs no more. A zombie does not: without a parent it stays in the table of processes for seconds on a
    machine whose first process looks for such ones only now and then."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
