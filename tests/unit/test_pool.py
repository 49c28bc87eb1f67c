"""The elastic pool over workers in this process: nothing lost, nothing doubled, whoever dies."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from actors.errors import BudgetExhausted, DataFailure, InfraFailure
from actors.worker import LocalWorker, WorkerInfo
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Pool, PoolPolicy

POLICY = PoolPolicy(
    slots=4,
    max_attempts=5,
    call_timeout_s=60.0,
    start_timeout_s=60.0,
    max_restarts=100,
    ping_every_s=0.02,
    ping_timeout_s=60.0,
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


class Fragile(Doubler):
    """Some numbers kill it, with everything that it works on; to others it does not answer."""

    def __init__(self, index: int, *, fatal: frozenset[int] = frozenset(), endless: frozenset[int] = frozenset()):
        super().__init__(index)
        self.fatal, self.endless = fatal, endless
        self.kill: Any = None  # set once it has a worker

    async def double(self, number: int) -> int:
        await asyncio.sleep(0.005)
        if number in self.fatal:
            await self.kill()
        if number in self.fatal | self.endless:
            await asyncio.sleep(60)
        return await super().double(number)


def fragile_pool(policy: PoolPolicy, **fragile: frozenset[int]) -> tuple[Pool, list[tuple[str, dict]]]:
    async def start(index: int) -> LocalWorker:
        target = Fragile(index, **fragile)
        worker = LocalWorker(f"reward/{index}", target)
        target.kill = worker.kill
        return worker

    events: list[tuple[str, dict]] = []
    pool = Pool(
        "reward",
        1,
        policy,
        start=start,
        stop=lambda worker: worker.kill(),
        event=lambda kind, detail: events.append((kind, detail)),
        watchdog=Watchdog(),
    )
    return pool, events


def make_pool(
    desired: int,
    policy: PoolPolicy = POLICY,
    *,
    broken: frozenset[int] = frozenset(),
    homeless: int = 0,
    admit=None,
    watchdog=None,
):
    """`broken` members fail to start; for the first `homeless` there is no room."""
    events: list[tuple[str, dict]] = []

    async def start(index: int) -> LocalWorker:
        if index < homeless:
            raise InfraFailure("no room for a rollout worker")
        return LocalWorker(f"doubler/{index}", Doubler(index, broken=index in broken))

    pool = Pool(
        "rollout",
        desired,
        policy,
        start=start,
        stop=lambda worker: worker.kill(),
        event=lambda kind, detail: events.append((kind, detail)),
        watchdog=watchdog or Watchdog(),
    )
    if admit is not None:
        pool.admit = admit
    return pool, events


def double(number: int):
    return lambda worker: worker.call("double", number, timeout_s=60.0)


async def test_every_call_is_answered_exactly_once_while_workers_die_all_the_time():
    """A worker dies with every tenth answer: deaths by the clock would be more the slower the machine is, and exceed
    the pool's limit of restarts on a busy one."""
    pool, events = make_pool(3, replace(POLICY, max_attempts=31))  # one more than there are deaths
    await pool.open()
    done: Counter[int] = Counter()
    killed: list[int] = []

    async def one(number: int) -> None:
        assert await pool.call(str(number), double(number)) == 2 * number
        done[number] += 1
        if done.total() % 10 == 0 and (serving := pool.indices(State.SERVING)):
            killed.append(serving[0])
            await pool.workers[serving[0]].kill()

    await asyncio.wait_for(asyncio.gather(*(one(number) for number in range(300))), 120)
    await pool.close()
    assert done == Counter(range(300))
    assert len(set(killed)) > 10
    assert any(kind == "retry" for kind, _ in events), "the test killed nobody who had work"


async def test_a_resize_up_and_down_changes_the_serving_members():
    pool, _ = make_pool(1)
    await pool.open()
    for desired in (4, 2):
        pool.resize(desired)
        async with asyncio.timeout(60):
            while not pool.count(State.SERVING) == len(pool.workers) == desired:
                await asyncio.sleep(0.01)
    await pool.close()


async def test_a_joining_worker_gets_work_only_after_it_was_admitted():
    gate = asyncio.Event()

    async def admit(index: int) -> None:
        await asyncio.wait_for(gate.wait(), 60)

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


async def test_a_pool_that_loses_too_many_workers_is_an_error():
    pool, _ = make_pool(
        1, PoolPolicy(4, 2, 60.0, 60.0, max_restarts=1, ping_every_s=0.01), broken=frozenset(range(100))
    )
    pool.fleet.backoff_s = 0.001
    with pytest.raises(BudgetExhausted, match="max_restarts=1"):
        await pool.open()
    await pool.close()


async def test_calls_wait_while_no_worker_is_wanted_and_go_on_when_one_is_wanted_again():
    now = [0.0]
    watchdog = Watchdog(clock=lambda: now[0])
    pool, events = make_pool(1, watchdog=watchdog)
    await pool.open()
    pool.resize(0)
    while pool.workers:
        await asyncio.sleep(0.01)
    calls = [asyncio.ensure_future(pool.call(str(number), double(number))) for number in range(16)]
    await asyncio.sleep(0.05)
    now[0] = 100_000.0
    assert pool.paused and not any(call.done() for call in calls)
    assert watchdog.overdue() == []
    assert [detail["paused"] for kind, detail in events if kind == "resized"] == [
        "whatever needs a rollout worker, until there is one again"
    ]
    pool.resize(2)
    assert await asyncio.gather(*calls) == [2 * number for number in range(16)]
    assert not [kind for kind, _ in events if kind in ("retry", "evicted")]
    await pool.close()


async def test_time_in_the_queue_does_not_count_towards_a_calls_deadline():
    policy = PoolPolicy(1, 1, call_timeout_s=1.0, start_timeout_s=60.0, max_restarts=10, ping_every_s=0.02)
    pool, events = make_pool(1, policy)
    await pool.open()
    began = time.monotonic()
    work = [pool.call(str(number), lambda worker: worker.call("double", 1, timeout_s=1.0)) for number in range(130)]
    assert await asyncio.gather(*work) == [2] * 130  # one by one, 0.01 s each
    assert time.monotonic() - began > 1.2, "the last ones waited for longer than their deadline"
    assert not [kind for kind, _ in events if kind == "retry"]
    await pool.close()


async def test_queued_calls_of_a_pool_that_lost_too_many_workers_fail():
    pool, _ = make_pool(1, PoolPolicy(1, 2, 60.0, 60.0, max_restarts=0, ping_every_s=0.01))
    await pool.open()
    calls = [asyncio.ensure_future(pool.call(str(number), double(number))) for number in range(5)]
    await asyncio.sleep(0)
    await pool.workers[0].kill()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, BudgetExhausted) for outcome in outcomes), outcomes
    await pool.close()


async def test_a_member_that_is_evicted_while_it_waits_for_its_weights_is_replaced():
    async def admit(index: int) -> None:
        if index == 0:
            await pool.evict(0, "weights of version 3 not confirmed")

    pool, events = make_pool(1, admit=admit)
    await pool.open()
    assert await pool.call("1", double(1)) == 2
    assert [detail["worker"] for kind, detail in events if kind == "joined"] == [1]
    await pool.close()


async def test_no_worker_carries_more_calls_than_it_has_slots():
    pool, _ = make_pool(2)
    await pool.open()
    peak = count()
    highest = 0

    async def work(worker) -> int:
        nonlocal highest
        highest = max(highest, *(member.load for member in pool.fleet.members.values()))
        return await worker.call("double", next(peak), timeout_s=60.0)

    await asyncio.gather(*(pool.call(str(i), work) for i in range(40)))
    assert highest == POLICY.slots
    await pool.close()


async def test_waiting_calls_get_slots_in_the_order_in_which_they_came_and_a_cancelled_one_keeps_none():
    pool, _ = make_pool(1, replace(POLICY, slots=1))
    await pool.open()
    ran: list[int] = []

    def work(number: int):
        async def run(worker) -> None:
            await worker.call("double", number, timeout_s=5.0)
            ran.append(number)
            if number == 4:  # call 5 is given the slot that this one leaves, and is cancelled before it hears of it
                asyncio.get_running_loop().call_soon(calls[5].cancel)

        return run

    calls = [asyncio.ensure_future(pool.call(str(number), work(number))) for number in range(12)]
    async with asyncio.timeout(30):
        await asyncio.gather(*calls, return_exceptions=True)
    assert calls[5].cancelled() and ran == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert pool.fleet.members[0].load == 0
    await pool.close()


REWARDS = replace(POLICY, max_attempts=3, kill_on_timeout=True)


async def outcomes(pool: Pool, numbers: range, deadlines: Mapping[int, float] | None = None) -> dict[int, Any]:
    """What each number came to: its double, or an exception. `deadlines`: of single numbers, in seconds."""

    async def one(number: int) -> int:
        timeout_s = (deadlines or {}).get(number, 5.0)
        return await pool.call(str(number), lambda worker: worker.call("double", number, timeout_s=timeout_s))

    results = await asyncio.gather(*map(one, numbers), return_exceptions=True)
    return dict(zip(numbers, results, strict=True))


async def test_calls_that_kill_their_worker_fail_no_other_call():
    fatal = frozenset({1, 4, 6, 11})
    pool, events = fragile_pool(REWARDS, fatal=fatal)
    await pool.open()
    found = await asyncio.wait_for(outcomes(pool, range(12)), 60)
    await pool.close()
    assert {number for number, result in found.items() if isinstance(result, InfraFailure)} == fatal
    assert [found[number] for number in range(12) if number not in fatal] == [0, 4, 6, 10, 14, 16, 18, 20]
    charged = Counter(detail["key"] for kind, detail in events if kind == "retry" and detail["attempt"] == 3)
    assert charged == Counter(map(str, fatal)), "each used up its own three attempts"


async def test_a_call_that_hangs_fails_no_other_call():
    pool, _ = fragile_pool(REWARDS, endless=frozenset({2}))
    await pool.open()
    found = await asyncio.wait_for(outcomes(pool, range(4), {2: 0.1}), 60)
    await pool.close()
    assert [found[0], found[1], found[3]] == [0, 2, 6]
    assert isinstance(found[2], InfraFailure) and "did not answer within 0.1 s" in str(found[2])


async def test_a_call_that_lost_a_shared_worker_is_tried_again_alone():
    pool, _ = fragile_pool(replace(REWARDS, max_attempts=1), fatal=frozenset({0}))
    await pool.open()
    company: dict[int, list[int]] = {0: [], 1: []}

    async def one(number: int) -> int:
        async def work(worker: Any) -> int:
            company[number].append(sum(member.load for member in pool.fleet.members.values()))
            return await worker.call("double", number, timeout_s=60.0)

        return await pool.call(str(number), work)

    found = await asyncio.wait_for(asyncio.gather(one(0), one(1), return_exceptions=True), 60)
    await pool.close()
    assert isinstance(found[0], InfraFailure) and found[1] == 2
    assert [loads[-1] for loads in company.values()] == [1, 1]
    assert [len(loads) for loads in company.values()] == [2, 2], "one in company that is not counted, one alone"


async def test_a_death_while_alone_counts_as_an_attempt():
    pool, _ = fragile_pool(replace(REWARDS, max_attempts=1), fatal=frozenset({0}))
    await pool.open()
    found = await asyncio.wait_for(outcomes(pool, range(1)), 60)
    await pool.close()
    assert isinstance(found[0], InfraFailure) and pool.fleet.restarts == 1


async def test_a_worker_that_reports_an_infrastructure_failure_is_kept():
    pool, events = fragile_pool(replace(REWARDS, max_attempts=2))
    await pool.open()

    async def work(worker: Any) -> int:
        await worker.call("ping", timeout_s=60.0)
        raise InfraFailure("the judge's server is down")

    with pytest.raises(InfraFailure, match="server is down"):
        await pool.call("1", work)
    await pool.close()
    assert [kind for kind, _ in events if kind in ("retry", "evicted")] == ["retry", "retry"]


async def test_a_worker_that_fails_to_start_for_one_reason_three_times_ends_the_run_with_it():
    pool, events = make_pool(1, broken=frozenset(range(100)))
    pool.fleet.backoff_s = 0.001
    with pytest.raises(BudgetExhausted, match=r"3 workers in a row failed to start .*no start for this one"):
        await pool.open()
    await pool.close()
    assert len([kind for kind, _ in events if kind == "evicted"]) == 3


async def test_a_lack_of_room_for_a_worker_is_waited_out():
    pool, events = make_pool(1, homeless=5)
    pool.fleet.backoff_s = 0.001
    await pool.open()
    await pool.close()
    assert len([kind for kind, _ in events if kind == "evicted"]) == 5
