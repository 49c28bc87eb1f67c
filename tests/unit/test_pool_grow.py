"""A pool that starts with some of its members, and gets the others later."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from actors.errors import InfraFailure, WorkerDied
from actors.worker import LocalWorker, WorkerInfo
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.fleet import SAME_IN_A_ROW, State
from orchestrator.cluster.pool import Pool
from tests.unit.test_pool import POLICY, Doubler


def pool_of(desired: int, startable: int, events: list[tuple[str, dict[str, Any]]], start_timeout_s: float) -> Pool:
    """The first `startable` members start; the others never do."""

    async def start(index: int) -> LocalWorker:
        if index >= startable:
            await asyncio.Event().wait()
        return LocalWorker(f"doubler/{index}", Doubler(index))

    policy = replace(POLICY, start_timeout_s=start_timeout_s)
    note = lambda kind, detail: events.append((kind, detail))  # noqa: E731
    return Pool("rollout", desired, policy, start=start, stop=lambda w: w.kill(), event=note, watchdog=Watchdog())


def test_the_other_members_start_when_the_pool_grows_and_nobody_is_told_of_a_resize():
    async def body() -> None:
        events: list[tuple[str, dict[str, Any]]] = []
        pool = pool_of(0, 3, events, 60.0)
        await pool.open()
        assert pool.indices(State.SERVING) == [] and events == []
        await pool.grow(3)
        assert pool.count(State.JOINING, State.SERVING) == 3
        assert await pool.call("a", lambda worker: worker.call("double", 21, timeout_s=5)) == 42
        assert "resized" not in [kind for kind, _ in events]
        await pool.close()

    asyncio.run(body())


def test_who_waits_for_members_that_do_not_start_is_told_at_the_deadline_which_there_are():
    async def body() -> None:
        pool = pool_of(1, 1, [], 0.5)
        await pool.open()
        with pytest.raises(InfraFailure, match=r"waited 0\.5 s for 2 rollout worker\(s\) to start; members: {0: "):
            await pool.grow(2)
        await pool.close()

    asyncio.run(body())


class Starting(Doubler):
    """`until` returns when it is up, or raises why it cannot start."""

    def __init__(self, index: int, until: Callable[[], Awaitable[None]]) -> None:
        super().__init__(index)
        self._until = until

    async def ready(self) -> WorkerInfo:  # pyright: ignore[reportIncompatibleMethodOverride]
        await self._until()
        return super().ready()


def starting(desired: int, start_timeout_s: float, until: Callable[[int], Awaitable[None]]) -> Pool:
    async def start(index: int) -> LocalWorker:
        return LocalWorker(f"doubler/{index}", Starting(index, lambda: until(index)))

    policy = replace(POLICY, start_timeout_s=start_timeout_s)
    note = lambda kind, detail: None  # noqa: E731
    pool = Pool("rollout", desired, policy, start=start, stop=lambda w: w.kill(), event=note, watchdog=Watchdog())
    pool.fleet.backoff_s = 0.01
    return pool


async def test_the_replacement_of_a_worker_that_died_while_it_started_has_a_deadline_of_its_own():
    began = time.monotonic()

    async def until(index: int) -> None:
        await asyncio.sleep(began + (2.5 if index == 0 else 5.8) - time.monotonic())
        if index == 0:
            raise WorkerDied("its process was killed")

    pool = starting(1, 5.0, until)
    await pool.open()
    assert time.monotonic() > began + 5.0, "the first one's deadline is over"
    assert pool.indices(State.JOINING, State.SERVING) == [1] and pool.fleet.restarts == 1
    await pool.close()


async def test_a_worker_that_hangs_while_it_starts_is_replaced():
    async def until(index: int) -> None:
        if index == 0:
            await asyncio.Event().wait()

    pool = starting(1, 2.0, until)
    await pool.open()
    assert pool.indices(State.JOINING, State.SERVING) == [1] and pool.fleet.restarts == 1
    await pool.close()


async def test_workers_that_die_one_after_another_while_they_start_are_not_waited_for_without_end():
    async def until(index: int) -> None:
        if index:
            await asyncio.sleep(0.3)
            raise WorkerDied("its process was killed")

    pool = starting(1, 0.5, until)
    await pool.open()
    pool.fleet.backoff_s = 0.0
    with pytest.raises(InfraFailure, match=r"waited 0\.5 s for 2 rollout worker\(s\) to start; members: {0: "):
        await asyncio.wait_for(pool.grow(2), 30)
    assert POLICY.max_restarts > pool.fleet.restarts >= SAME_IN_A_ROW
    await pool.close()


def test_a_pool_that_is_made_smaller_while_it_grows_is_waited_for_no_longer():
    async def body() -> None:
        pool = pool_of(1, 1, [], 60.0)
        await pool.open()
        growing = asyncio.ensure_future(pool.grow(2))
        await asyncio.sleep(0.05)
        assert not growing.done()
        pool.resize(1)
        async with asyncio.timeout(30):
            await growing
        await pool.close()

    asyncio.run(body())
