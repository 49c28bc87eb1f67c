"""The elastic pool over workers in this process: nothing lost, nothing doubled, whoever dies."""

import asyncio
import os
from collections import Counter
from itertools import count

import pytest

from actors.errors import BudgetExhausted, DataFailure, InfraFailure
from actors.worker import LocalWorker, WorkerInfo
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Pool, PoolPolicy

POLICY = PoolPolicy(
    slots=4,
    max_attempts=5,
    call_timeout_s=5.0,
    start_timeout_s=5.0,
    max_restarts=100,
    ping_every_s=0.02,
    ping_timeout_s=1.0,
)


class Doubler:
    """Doubles numbers, slowly enough to be killed meanwhile."""

    def __init__(self, index: int, *, broken: bool = False) -> None:
        self.index, self.broken = index, broken

    def ready(self) -> WorkerInfo:
        if self.broken:
            raise InfraFailure("no start for this one")
        return WorkerInfo(f"doubler/{self.index}", os.getpid(), "here", "", {})

    def ping(self) -> dict:
        return {"alive": True}

    async def double(self, number: int) -> int:
        await asyncio.sleep(0.01)
        if number < 0:
            raise DataFailure("no negative numbers")
        return 2 * number


def make_pool(desired: int, policy: PoolPolicy = POLICY, *, broken: frozenset[int] = frozenset(), admit=None):
    events: list[tuple[str, dict]] = []

    async def start(index: int) -> LocalWorker:
        return LocalWorker(f"doubler/{index}", Doubler(index, broken=index in broken))

    pool = Pool(
        "rollout",
        desired,
        policy,
        start=start,
        stop=lambda worker: worker.kill(),
        event=lambda kind, detail: events.append((kind, detail)),
        watchdog=Watchdog(),
    )
    if admit is not None:
        pool.admit = admit
    return pool, events


def double(number: int):
    return lambda worker: worker.call("double", number, timeout_s=5.0)


async def test_every_call_is_answered_exactly_once_while_workers_die_all_the_time():
    pool, events = make_pool(3)
    await pool.open()
    done: Counter[int] = Counter()

    async def one(number: int) -> None:
        assert await pool.call(str(number), double(number)) == 2 * number
        done[number] += 1

    async def chaos() -> None:
        while True:
            await asyncio.sleep(0.03)
            if pool.indices(State.SERVING):
                await pool.workers[pool.indices(State.SERVING)[0]].kill()

    killer = asyncio.ensure_future(chaos())
    await asyncio.wait_for(asyncio.gather(*(one(number) for number in range(300))), 30)
    killer.cancel()
    await pool.close()
    assert done == Counter(range(300))
    assert any(kind == "retry" for kind, _ in events), "the test killed nobody who had work"


async def test_a_resize_up_and_down_changes_the_serving_members():
    pool, _ = make_pool(1)
    await pool.open()
    for desired in (4, 2):
        pool.resize(desired)
        for _ in range(200):
            await asyncio.sleep(0.01)
            if pool.count(State.SERVING) == desired and len(pool.workers) == desired:
                break
        assert pool.count(State.SERVING) == desired
    await pool.close()


async def test_a_joining_worker_gets_work_only_after_it_was_admitted():
    gate = asyncio.Event()

    async def admit(index: int) -> None:
        await asyncio.wait_for(gate.wait(), 5)

    pool, _ = make_pool(1, admit=admit)
    await pool.open()
    call = asyncio.ensure_future(pool.call("1", double(1)))
    await asyncio.sleep(0.1)
    assert not call.done()
    gate.set()
    assert await call == 2
    await pool.close()


async def test_a_data_failure_is_not_tried_again():
    pool, events = make_pool(2)
    await pool.open()
    with pytest.raises(DataFailure, match="no negative"):
        await pool.call("-1", double(-1))
    assert not [kind for kind, _ in events if kind == "retry"]
    await pool.close()


async def test_a_worker_that_cannot_start_is_replaced():
    pool, events = make_pool(1, broken=frozenset({0}))
    pool.fleet.backoff_s = 0.01
    await pool.open()
    assert pool.indices(State.SERVING, State.JOINING) == [1]
    assert ("evicted", 0) in [(kind, detail.get("worker")) for kind, detail in events]
    await pool.close()


async def test_a_pool_that_loses_too_many_says_so_instead_of_waiting():
    pool, _ = make_pool(1, PoolPolicy(4, 2, 5.0, 5.0, max_restarts=2, ping_every_s=0.01), broken=frozenset(range(100)))
    pool.fleet.backoff_s = 0.001
    with pytest.raises(BudgetExhausted, match="max_restarts=2"):
        await pool.open()
    await pool.close()


async def test_waiting_for_a_worker_has_a_deadline_that_names_the_members():
    policy = PoolPolicy(1, 1, 5.0, 5.0, 10, ping_every_s=0.02, acquire_timeout_s=0.2)
    pool, _ = make_pool(0, policy)
    await pool.open()
    with pytest.raises(InfraFailure, match=r"waited 0\.2 s for a free rollout worker; members: none"):
        await pool.call("1", double(1))
    await pool.close()


async def test_no_worker_carries_more_calls_than_it_has_slots():
    pool, _ = make_pool(2)
    await pool.open()
    peak = count()
    highest = 0

    async def work(worker) -> int:
        nonlocal highest
        highest = max(highest, *(member.load for member in pool.fleet.members.values()))
        return await worker.call("double", next(peak), timeout_s=5.0)

    await asyncio.gather(*(pool.call(str(i), work) for i in range(40)))
    assert highest == POLICY.slots
    await pool.close()
