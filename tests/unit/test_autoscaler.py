"""A pool whose number of workers follows what is asked of it: gathered, decided, carried out and shown."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.worker import LocalWorker
from orchestrator.cluster.autoscaler import Autoscaler
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Pool, PoolPolicy
from orchestrator.cluster.pool_load import LoadSeen, PoolLoad
from orchestrator.config.autoscale import AutoscaleConfig
from tests.unit.test_pool import Doubler

POLICY = PoolPolicy(4, 2, 60.0, 60.0, max_restarts=5, at_a_time=2)


class Scaled:
    """A pool of one worker with an autoscaler, on a clock that stands still. `room`: for so many workers more."""

    def __init__(self, **limits: Any) -> None:
        self.now, self.room = 1000.0, None
        self.events: list[dict[str, Any]] = []
        self.pool = Pool(
            "reward", 1, POLICY, start=self.start, stop=lambda it: it.kill(), event=self.event, watchdog=Watchdog()
        )
        self.pool.load = PoolLoad(lambda: self.now)
        self.hold = asyncio.Event()
        bounds = AutoscaleConfig(**{"max": 4, "steps": 1, "cooldown_s": 0, "idle_s": 100, **limits})
        self.autoscaler = Autoscaler({"reward": bounds}, self.event, lambda: self.now)

    async def start(self, index: int) -> LocalWorker:
        return LocalWorker(f"reward/{index}", Doubler(index))

    def event(self, kind: str, detail: dict[str, Any]) -> None:
        self.events.append({"event": kind, **detail})

    @property
    def resized(self) -> list[tuple[int, int, str | None]]:
        return [(it["from"], it["to"], it.get("why")) for it in self.events if it["event"] == "resized"]

    async def __aenter__(self) -> Scaled:
        await self.pool.open()
        await self.served(1)
        self.autoscaler.attach({"reward": self.pool}, self.has_room)
        return self

    async def has_room(self, role: str) -> int | None:
        return self.room

    async def __aexit__(self, *_: object) -> None:
        self.hold.set()
        await self.pool.close()

    async def served(self, count: int) -> None:
        async with asyncio.timeout(30):
            while self.pool.count(State.SERVING) != count or self.pool.count(*State) != count:
                await asyncio.sleep(0.005)

    def called(self, times: int) -> list[asyncio.Task[int]]:
        """Calls that end when `hold` is set."""

        async def work(worker: Any) -> int:
            await self.hold.wait()
            return await worker.call("double", 1, timeout_s=60.0)

        return [asyncio.ensure_future(self.pool.call(str(each), work)) for each in range(times)]


def test_the_load_of_a_pool_is_averaged_over_time_and_forgotten_when_it_is_taken() -> None:
    now = 0.0
    load = PoolLoad(lambda: now)
    load.note(0, 4)
    now = 1.0
    load.note(2, 4)  # half of the places, for two seconds
    now = 3.0
    load.note(6, 4)  # all of them, for one
    load.fills(0.5)
    load.fills(0.2)
    now = 4.0
    load.note(-8, 4)
    assert (load.calls, load.idle_s) == (0, 0.0)
    assert load.take() == LoadSeen(peak=8, busy=pytest.approx(2 / 4), memory=0.5)
    now = 6.0
    assert load.idle_s == 2.0
    assert load.take() == LoadSeen(peak=0, busy=0.0, memory=None)


async def test_calls_without_a_place_bring_workers_and_the_calls_are_all_answered() -> None:
    async with Scaled() as scaled:
        calls = scaled.called(8)
        await asyncio.sleep(0)
        await scaled.autoscaler.stepped(0.5, None)
        assert scaled.resized == [
            (1, 2, "training waited 50% of the last 1 steps for samples, and at the peak 8 calls shared 2 places")
        ]
        await scaled.autoscaler.stepped(0.5, None)
        assert len(scaled.resized) == 1, "the second one has to serve first"
        await scaled.served(2)
        await scaled.autoscaler.stepped(0.5, None)
        assert scaled.resized[1][:2] == (2, 4)
        scaled.hold.set()
        assert await asyncio.gather(*calls) == [2] * 8


async def test_the_time_that_a_pool_takes_to_start_is_no_time_without_a_call() -> None:
    scaled = Scaled(min=0)
    scaled.now += 5000
    async with scaled:
        await scaled.autoscaler.look()
        assert scaled.resized == []
        scaled.now += 100
        await scaled.autoscaler.look()
        assert scaled.resized == [(1, 0, "nothing was asked for 100 s")]


async def test_a_pool_sleeps_when_nothing_is_asked_and_a_call_wakes_it_to_as_many_workers_as_there_were() -> None:
    async with Scaled(min=0) as scaled:
        scaled.pool.resize(2)
        await scaled.served(2)
        scaled.now += 99
        await scaled.autoscaler.look()
        assert scaled.pool.fleet.desired == 2
        scaled.now += 1
        await scaled.autoscaler.look()
        await scaled.served(0)
        assert not scaled.pool.paused, "nobody has to resize it"
        scaled.hold.set()
        (call,) = scaled.called(1)
        await asyncio.sleep(0)
        scaled.room = 0
        await scaled.autoscaler.look()
        assert scaled.autoscaler.described("reward")["autoscale"]["said"] == "0: 1 call(s) wait, and there is no room"
        scaled.room = 5
        await scaled.autoscaler.look()
        assert await call == 2
        assert scaled.resized[1:] == [
            (2, 0, "nothing was asked for 100 s"),
            (0, 2, "1 call(s) came after a time without any"),
        ]


async def test_a_number_that_somebody_asked_for_stays_until_it_is_to_be_automatic_again() -> None:
    async with Scaled(min=0) as scaled:
        scaled.pool.resize(0)
        await scaled.autoscaler.look(held={"reward"})
        assert scaled.pool.paused, "whoever set it to nothing wants nothing"
        calls = scaled.called(1)
        await asyncio.sleep(0)
        scaled.now += 1000
        await scaled.autoscaler.stepped(0.9, None)
        await scaled.autoscaler.look(held={"reward"})
        assert scaled.pool.fleet.desired == 0
        assert scaled.autoscaler.described("reward") == {"autoscale": {"min": 0, "max": 4, "held": True, "said": ""}}
        await scaled.autoscaler.look()
        assert [each["event"] for each in scaled.events if "autoscale" in each["event"]] == [
            "autoscale_held",
            "autoscale_goes_on",
        ]
        assert scaled.resized[1] == (0, 1, "1 call(s) came after a time without any")
        scaled.hold.set()
        assert await asyncio.gather(*calls) == [2]


async def test_a_step_in_which_the_number_changed_counts_for_nothing() -> None:
    async with Scaled(min=0, steps=1, idle_s=1) as scaled:
        scaled.now += 1
        await scaled.autoscaler.look()
        await scaled.served(0)
        calls = scaled.called(8)
        await asyncio.sleep(0)
        await scaled.autoscaler.look()
        await scaled.served(1)
        await scaled.autoscaler.stepped(0.99, None)  # it waited for the worker to start
        assert scaled.pool.fleet.desired == 1
        await scaled.autoscaler.stepped(0.99, None)
        assert scaled.pool.fleet.desired == 2
        scaled.hold.set()
        await asyncio.gather(*calls)
