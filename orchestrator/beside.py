"""What goes on beside the loop for as long as a run lasts: how it is reached from outside, and who waits on what.

troupe scale RUN rollout=4 ──► board ◄── every second: status up, desired counts down ──► pools
                               watchdog ── every five seconds: overdue waits ──► console
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from actors.errors import InfraFailure
from actors.worker import Worker
from orchestrator.cluster import Cluster
from orchestrator.control import Board, RunFile, board_name
from orchestrator.fleet import State
from orchestrator.ray_address import AUTH_MODE
from orchestrator.roles import Roles
from orchestrator.supervision import Watchdog

BOARD_EVERY_S = 1.0
WATCH_EVERY_S = 5.0


@asynccontextmanager
async def board_of(folder: Path, cluster: Cluster) -> AsyncIterator[asyncio.Future[Worker]]:
    """The actor through which the run in this folder is reached from outside; it starts while the roles do."""

    async def put_up() -> Worker:
        name = board_name(folder.name)
        board = await cluster.start_board(name, Board)
        mode = os.environ.get(AUTH_MODE)  # set by Ray itself, if it was started here
        RunFile(folder.name, cluster.address, name, os.getpid(), mode).write(folder)
        return board

    starting = asyncio.ensure_future(put_up())
    try:
        yield starting
    finally:
        await _cancelled(starting)


@asynccontextmanager
async def beside(roles: Roles, board: Worker, watchdog: Watchdog, warn: Callable[[str], None]) -> AsyncIterator[None]:
    """The board is obeyed and the watchdog heard for as long as the block lasts."""
    async with AsyncExitStack() as stack:
        for work in (_watch(watchdog, warn), _obey(board, roles)):
            task = asyncio.ensure_future(work)
            stack.push_async_callback(_cancelled, task)
        yield


async def _watch(watchdog: Watchdog, warn: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(WATCH_EVERY_S)
        for line in watchdog.overdue():
            warn(line)


async def _obey(board: Worker, roles: Roles) -> None:
    """Put up the status and take what is desired."""
    pools = {role: pool for role, pool in (("rollout", roles.rollout), ("reward", roles.reward)) if pool is not None}
    while True:
        status = {
            role: {"desired": pool.fleet.desired, "serving": pool.count(State.SERVING)} for role, pool in pools.items()
        }
        with contextlib.suppress(InfraFailure):  # a board that died costs scaling, not the run
            for role, count in (await board.call("exchange", status, timeout_s=10.0)).items():
                if role in pools:
                    pools[role].resize(count)
        await asyncio.sleep(BOARD_EVERY_S)


async def _cancelled(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
