"""What goes on beside the loop for as long as a run lasts: how it is reached from outside, whether those it waits for
are alive, and who waits on what.

troupe scale RUN rollout=4 ──► board ◄── every second: status up, desired counts down ──► pools
                               ranks ── every two seconds: ping ──► a rank that died or hangs ends the loop
                               Ray ──── every second: gone? ──────► the process ends
                               watchdog ── every five seconds: overdue waits ──► console
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from actors.errors import InfraFailure, NoAnswer, WorkerDied
from actors.worker import Worker
from orchestrator.cluster import Cluster
from orchestrator.config import RunConfig
from orchestrator.control import Board, RunFile, board_name
from orchestrator.fleet import State
from orchestrator.rank_health import Rank, RankHealth, RankLimits
from orchestrator.ray_address import AUTH_MODE
from orchestrator.roles import Roles
from orchestrator.supervision import Watchdog

BOARD_EVERY_S = 1.0
LOST_EVERY_S = 1.0
WATCH_EVERY_S = 5.0
PING_EVERY_S = 2.0
PING_TIMEOUT_S = 5.0  # of one ping; what ends a run is `roles.ROLE.ping_timeout_s` without any


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
async def watching(
    cluster: Cluster, watchdog: Watchdog, warn: Callable[[str], None], gone: Callable[[str], None]
) -> AsyncIterator[None]:
    """For as long as the block lasts, overdue waits are printed, and `gone` is told what of the cluster is."""

    async def look() -> None:
        while (lost := cluster.lost()) is None:
            await asyncio.sleep(LOST_EVERY_S)
        gone(lost)

    async with AsyncExitStack() as stack:
        for work in (_watch(watchdog.overdue, warn), look()):
            stack.push_async_callback(_cancelled, asyncio.ensure_future(work))
        yield


@asynccontextmanager
async def beside(config: RunConfig, roles: Roles, board: Worker, warn: Callable[[str], None]) -> AsyncIterator[None]:
    """For as long as the block lasts, what the board desires is done, and ranks are pinged. The block is cancelled, and
    InfraFailure raised in its place, when one of them died or hangs."""
    limits = {role: _limits(config, role) for role in roles.groups}
    health = RankHealth(limits, report_after_s=config.cluster.watchdog_s)
    block, failure = asyncio.current_task(), None
    assert block is not None

    async def look() -> None:
        nonlocal failure
        while (failure := health.failure(time.monotonic())) is None:
            await asyncio.sleep(PING_EVERY_S)
            await _ping(roles, health)
        block.cancel()

    try:
        async with AsyncExitStack() as stack:
            for work in (look(), _watch(lambda: health.overdue(time.monotonic()), warn), _obey(board, roles)):
                stack.push_async_callback(_cancelled, asyncio.ensure_future(work))
            yield
    except asyncio.CancelledError:
        if failure is None or block.uncancel() > 0:  # somebody else ends it
            raise
        raise InfraFailure(failure) from None


def _limits(config: RunConfig, role: str) -> RankLimits:
    own = getattr(config.roles, role)
    return RankLimits(own.ping_timeout_s, own.call_timeout_s)


async def _ping(roles: Roles, health: RankHealth) -> None:
    """All ranks at once, on a thread of theirs that verbs do not keep busy."""

    async def one(rank: Rank, worker: Worker) -> None:
        health.expect(rank, time.monotonic())
        try:
            report = await worker.call("ping", timeout_s=PING_TIMEOUT_S)
            health.seen(rank, report["verb"], report["busy_s"], time.monotonic())
        except WorkerDied as error:
            health.died(rank, str(error))
        except NoAnswer:
            pass  # `health` counts since when

    groups = dict(roles.groups)
    ranks = [
        (Rank(role, index, worker.where), worker)
        for role, group in groups.items()
        for index, worker in enumerate(group.workers)
    ]
    await asyncio.gather(*(one(rank, worker) for rank, worker in ranks))
    for role in groups.keys() - roles.groups.keys():  # ended on purpose meanwhile
        health.forget(role)


async def _watch(overdue: Callable[[], list[str]], warn: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(WATCH_EVERY_S)
        for line in overdue():
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
