"""Roles that share a device: one of them is awake while it works, the others sleep."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from actors.errors import InfraFailure
from actors.worker import LocalGroup, LocalWorker, WorkerInfo
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Pool, PoolPolicy
from orchestrator.cluster.turns import TurnGroup, Turns, takes_turns


class Role:
    """A rank that must not work when it sleeps, nor when another one is awake."""

    def __init__(self, name: str, device: list[Role], log: list[str]) -> None:
        self.name, self.awake, self.broken, self.broken_wake = name, True, "", ""
        self._device, self._log = device, log
        device.append(self)

    def work(self, until: Any = None) -> str:
        assert [role.name for role in self._device if role.awake] == [self.name]
        self._log.append(self.name)
        return self.name

    async def work_long(self, until: asyncio.Event) -> str:
        self.work()
        await asyncio.wait_for(until.wait(), 30)
        return self.work()

    def hold(self) -> bool:
        return self.awake

    def sleep(self) -> None:
        if self.broken:
            raise InfraFailure(self.broken)
        self.awake = False
        self._log.append(f"{self.name} sleeps")

    def state(self) -> bool:
        return self.awake

    def wake(self) -> None:
        if self.broken_wake:
            raise InfraFailure(self.broken_wake)
        self.awake = True
        self._log.append(f"{self.name} wakes")


class Device:
    def __init__(self, *names: str, join_s: float = 30.0) -> None:
        self.turns, self.log, self.roles = Turns(join_s), list[str](), list[Role]()
        self.groups = [
            TurnGroup(LocalGroup(name, LocalWorker(name, Role(name, self.roles, self.log))), self.turns)
            for name in names
        ]

    def call(self, place: int, *args: Any, method: str = "work") -> asyncio.Future[Any]:
        return asyncio.ensure_future(self.groups[place].call(method, *args, timeout_s=30))

    async def has_begun(self, name: str) -> None:
        async with asyncio.timeout(30):
            while name not in self.log:
                await asyncio.sleep(0.001)


async def settle() -> None:
    """Everything that can go on without a thread has."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_role_works_when_the_others_sleep_and_falls_asleep_when_another_works() -> None:
    device = Device("a", "b", "c")
    for place in (0, 1, 1, 0):
        assert await device.call(place) == [device.groups[place].name]
    assert device.log == ["b sleeps", "c sleeps", "a", "a sleeps", "b wakes", "b", "b", "b sleeps", "a wakes", "a"]


async def test_calls_at_the_same_time_are_carried_out_in_as_few_turns_as_can_be() -> None:
    device = Device("a", "b")
    await asyncio.gather(*(device.call(place) for place in (0, 1, 0, 1, 0, 1)))
    assert [line for line in device.log if " " in line] == ["b sleeps", "a sleeps", "b wakes"]
    assert device.log.count("a") == device.log.count("b") == 3


@pytest.mark.parametrize(("join_s", "order"), [(30.0, ["a", "a", "a", "b"]), (0.0, ["a", "a", "b", "a"])])
async def test_a_turn_takes_in_new_calls_of_its_role_for_a_limited_time(join_s: float, order: list[str]) -> None:
    device, until = Device("a", "b", join_s=join_s), asyncio.Event()
    first = device.call(0, until, method="work_long")
    await device.has_begun("a")
    second = device.call(1)
    await settle()
    third = device.call(0)
    if join_s:
        await third
    await settle()
    until.set()
    await asyncio.gather(first, second, third)
    assert [line for line in device.log if " " not in line] == order


async def test_what_keeps_a_role_from_falling_asleep_is_raised_where_its_turn_is_wanted() -> None:
    device = Device("a", "b")
    await device.call(0)
    device.roles[0].broken = "it is stuck"
    with pytest.raises(InfraFailure, match="it is stuck"):
        await device.call(1)
    device.roles[0].broken = ""
    assert await device.call(1) == ["b"]
    assert await device.call(0) == ["a"]


async def test_who_stops_waiting_does_not_keep_others_waiting() -> None:
    device, until = Device("a", "b"), asyncio.Event()
    first = device.call(0, until, method="work_long")
    await device.has_begun("a")
    waiting, next_one = device.call(1), device.call(1)
    await settle()
    waiting.cancel()
    until.set()
    assert (await first, await next_one) == (["a"], ["b"])
    assert await device.call(0) == ["a"]


async def test_an_ended_role_is_neither_put_to_sleep_nor_waited_for() -> None:
    device = Device("a", "b")
    await device.call(0)
    await device.groups[0].kill()
    device.roles.pop(0)
    assert await device.call(1) == ["b"]
    assert device.log[-2:] == ["b wakes", "b"]


async def test_a_verb_that_needs_no_device_is_carried_out_in_anyones_turn() -> None:
    device = Device("a", "b")
    await device.call(0)
    assert await device.call(1, method="hold") == [False]
    assert device.roles[0].awake


class Ranks:
    """The ranks of a role, which are ordered at the same time and fail each by itself."""

    def __init__(self, name: str, device: Device, ranks: int) -> None:
        self.name = name
        self.roles = [Role(f"{name}{rank}", [], device.log) for rank in range(ranks)]
        self.workers = [LocalWorker(role.name, role) for role in self.roles]

    async def call(self, method: str, *args: Any, timeout_s: float, **_: Any) -> list[Any]:
        found = await asyncio.gather(
            *(worker.call(method, *args, timeout_s=timeout_s) for worker in self.workers), return_exceptions=True
        )
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return found


@pytest.mark.parametrize("another_first", [True, False], ids=["another works", "it works"])
@pytest.mark.parametrize("verb", ["sleep", "wake"])
async def test_a_role_that_fell_asleep_or_woke_only_in_part_is_woken_as_a_whole_and_put_to_sleep_as_a_whole(
    verb: str, another_first: bool
) -> None:
    device = Device("b", "c")
    both: Any = Ranks("a", device, 2)
    ranks = TurnGroup(both, device.turns)
    first, second = both.roles

    async def states(group: TurnGroup) -> tuple[bool, bool]:
        await group.call("state", timeout_s=30)
        return first.awake, second.awake

    assert await states(ranks) == (True, True)
    if verb == "wake":
        assert await states(device.groups[0]) == (False, False)
    setattr(second, "broken" if verb == "sleep" else "broken_wake", "it is stuck")
    with pytest.raises(InfraFailure, match="it is stuck"):
        await states(device.groups[0] if verb == "sleep" else ranks)
    assert (first.awake, second.awake) == (verb == "wake", verb == "sleep"), "only one of the ranks has changed"
    second.broken = second.broken_wake = ""
    if another_first:
        assert await states(device.groups[1]) == (False, False), "whoever works is alone on the device"
    assert await states(ranks) == (True, True)


class Sleeper:
    """An engine of a pool that takes turns."""

    def __init__(self, name: str) -> None:
        self._name, self.slept = name, 0

    def ready(self) -> WorkerInfo:
        return WorkerInfo(self._name, os.getpid(), "here", "", {})

    def ping(self) -> dict[str, Any]:
        return {"alive": True}

    def sleep(self) -> None:
        self.slept += 1

    def wake(self) -> None: ...


async def test_a_member_that_is_lost_between_the_order_to_sleep_and_its_call_keeps_nobody_from_their_turn() -> None:
    engines = list[Sleeper]()

    async def start(index: int) -> LocalWorker:
        engines.append(Sleeper(f"rollout/{index}"))
        return LocalWorker(f"rollout/{index}", engines[-1])

    policy = PoolPolicy(slots=1, max_attempts=1, call_timeout_s=60.0, start_timeout_s=60.0, max_restarts=9)
    events = list[str]()
    note = lambda kind, _: events.append(kind)  # noqa: E731
    pool = Pool("rollout", 2, policy, start=start, stop=lambda w: w.kill(), event=note, watchdog=Watchdog())
    device = Device("a")
    takes_turns(pool, device.turns)
    await pool.open()
    indices = pool.indices

    def and_then_lost(*states: State) -> list[int]:
        found = indices(*states)
        asyncio.get_running_loop().call_soon(pool.workers.pop, 0)  # as `evict` does, before the calls begin
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pool, "indices", and_then_lost)
        assert await device.call(0) == ["a"]
    assert [engine.slept for engine in engines] == [0, 1] and "evicted" not in events
    await pool.close()
