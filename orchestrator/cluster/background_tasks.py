"""Background tasks of a run: they take requests, ping the ranks, check that Ray is alive, and print overdue waits.

troupe scale RUN rollout=4 ──► RUN/requests ── twice a second: desired counts ──► pools
                             the load of the pools ──────────────────► pools (`autoscaler.py`)
troupe pause RUN           ──►                        pause, checkpoint, stop ──► requests, read between two steps
troupe status RUN          ◄── RUN/status.json ◄── every second ── pools, stages at work, waits
                               ranks ── every two seconds: ping ──► a rank that died or hangs ends the loop
                               Ray ──── a thread waits for its end ► the process ends
                               watchdog ── every five seconds: overdue waits ──► console
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from actors.errors import ConfigError, InfraFailure, NoAnswer, WorkerDied
from actors.worker import Worker
from orchestrator.cluster.autoscaler import Autoscaler
from orchestrator.cluster.base import Cluster
from orchestrator.cluster.control import Desired, RunFile, forget_requests, put_status, take_requests
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.rank_health import Rank, RankHealth, RankLimits
from orchestrator.cluster.requests import Requests
from orchestrator.config.schema import RunConfig
from orchestrator.executor import Executor

LOOK_EVERY_S, STATUS_EVERY_S = 0.5, 1.0
WATCH_EVERY_S = 5.0
LOST_WITHIN_S = 1.0  # of one wait of the thread, which ends with the block
PING_EVERY_S = 2.0
PING_TIMEOUT_S = 5.0  # of one ping; what ends a run is `roles.ROLE.ping_timeout_s` without any


@asynccontextmanager
async def watching(
    cluster: Cluster, watchdog: Watchdog, warn: Callable[[str], None], gone: Callable[[str], None]
) -> AsyncIterator[None]:
    """While the block runs: prints overdue waits, and calls `gone` with what was lost if the cluster dies, from a
    thread that waits for it: Ray's client ends this process without a word once it meets the store of a dead raylet."""
    left = threading.Event()

    def look() -> None:
        while not left.is_set():
            if (lost := cluster.lost(within_s=LOST_WITHIN_S)) is not None and not left.is_set():
                gone(lost)
                return

    watching = asyncio.ensure_future(_watch(watchdog.overdue, warn))
    threading.Thread(target=look, name="the end of Ray", daemon=True).start()
    try:
        yield
    finally:
        left.set()
        await _cancelled(watching)


@asynccontextmanager
async def supervised(
    config: RunConfig,
    run: RunFile,
    folder: Path,
    roles: Executor,
    requests: Requests,
    watchdog: Watchdog,
    warn: Callable[[str], None],
    autoscaler: Autoscaler,
    *,
    ping_every_s: float = PING_EVERY_S,
) -> AsyncIterator[None]:
    """While the block runs: the run can be found and controlled through its folder, and the ranks are pinged. If a rank
    died or hangs, the block is cancelled and InfraFailure raised in its place."""
    health = RankHealth(partial(rank_limits, config), report_after_s=config.cluster.watchdog_s)
    block, failure = asyncio.current_task(), None
    assert block is not None

    async def look() -> None:
        nonlocal failure
        while (failure := health.failure(time.monotonic())) is None:
            await asyncio.sleep(ping_every_s)
            await _ping(roles, health)
        block.cancel()

    forget_requests(folder)
    run.write(folder)
    put_up = partial(_put_up, folder, roles, watchdog, autoscaler, health)
    polling = _take_requests(
        folder, Desired(run.elastic, run.autoscaled, run.attachable), roles, requests, put_up, warn, autoscaler
    )
    try:
        async with AsyncExitStack() as stack:
            for work in (look(), _watch(lambda: health.overdue(time.monotonic()), warn), polling):
                stack.push_async_callback(_cancelled, asyncio.ensure_future(work))
            yield
    except asyncio.CancelledError:
        if failure is None or block.uncancel() > 0:  # cancelled from outside
            raise
        raise InfraFailure(failure) from None


def rank_limits(config: RunConfig, role: str) -> RankLimits:
    own = config.roles.ranks(role)
    return RankLimits(own.ping_timeout_s, own.call_timeout_s)


async def _ping(roles: Executor, health: RankHealth) -> None:
    """Pings all ranks at once. They answer on a thread of their own, so a running verb does not delay it."""

    async def one(rank: Rank, worker: Worker) -> None:
        health.expect(rank, time.monotonic())
        try:
            report = await worker.call("ping", timeout_s=PING_TIMEOUT_S)
            health.seen(rank, report["verb"], report["busy_s"], time.monotonic())
        except WorkerDied as error:  # on purpose, if its role is no role any more: `keep` forgets it
            health.died(rank, str(error))
        except NoAnswer:
            pass  # `health` counts for how long

    ranks = _ranks(roles)
    health.keep(ranks.keys())
    await asyncio.gather(*(one(rank, worker) for rank, worker in ranks.items()))
    health.keep(_ranks(roles).keys())  # some may have been ended on purpose during the pings


def _ranks(roles: Executor) -> dict[Rank, Worker]:
    """Those that there are now."""
    return {
        Rank(role, index, worker.where, worker.place): worker
        for role, group in roles.groups.items()
        for index, worker in enumerate(group.workers)
    }


async def _watch(overdue: Callable[[], list[str]], warn: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(WATCH_EVERY_S)
        for line in overdue():
            warn(line)


def _put_up(folder: Path, roles: Executor, watchdog: Watchdog, autoscaler: Autoscaler, health: RankHealth) -> None:
    now = time.monotonic()
    for rank in _ranks(roles):  # one that has just started is shown before its first ping
        health.expect(rank, now)
    described = {role: {**pool.described(), **autoscaler.described(role)} for role, pool in roles.pools.items()}
    at_work, waits = roles.activity.observed(), watchdog.waits()
    put_status(folder, described, ranks=health.described(now), phase=roles.activity.phase, at_work=at_work, waits=waits)


async def _take_requests(
    folder: Path,
    desired: Desired,
    roles: Executor,
    requests: Requests,
    put_up_status: Callable[[], None],
    warn: Callable[[str], None],
    autoscaler: Autoscaler,
) -> None:
    """Put up how the run stands, and take over what was requested from outside."""
    put_up = -math.inf
    while True:
        with contextlib.suppress(OSError):  # a full disk must not end the training because of this
            if time.monotonic() - put_up >= STATUS_EVERY_S:
                put_up_status()
                put_up = time.monotonic()
            for request in take_requests(folder):
                try:
                    desired.add(request)
                except ConfigError as error:
                    warn(f"a request is refused: {error}")
        for role, count in desired.workers.items():
            if role in roles.pools:  # or as soon as a later phase starts it
                roles.pools[role].resize(count)
        while desired.engines:
            engine = desired.engines.pop(0)
            if engine.token is None:
                roles.pools[engine.role].detach(engine.address, engine.ticket)
            else:
                roles.pools[engine.role].attach(engine.address, engine.token, engine.ticket)
        await autoscaler.look(held=desired.workers)
        requests.update(desired)
        await asyncio.sleep(LOOK_EVERY_S)


async def _cancelled(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
