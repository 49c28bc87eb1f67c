"""Publishing to a pool whose members go meanwhile: scaled down is not lost."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.errors import InfraFailure, WeightSyncError
from actors.worker import LocalGroup, LocalObjects, LocalWorker, WorkerInfo
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Pool, PoolPolicy
from orchestrator.cluster.turns import TurnGroup, Turns
from orchestrator.config.schema import WeightsConfig
from orchestrator.publishing.publisher import Publisher, SyncReport
from rollout.weights import CollectiveSend, DiskWrite, OpenCollective, PackBuckets, receiver
from rollout.weights.collective import CollectiveReceiver
from rollout.weights.protocol import Ack, Manifest, SendReport, SyncOrder
from tests.waiting import until_true

CPU = torch.device("cpu")
BUCKET = 20_000
POLICY = PoolPolicy(
    slots=1, max_attempts=2, call_timeout_s=60.0, start_timeout_s=60.0, max_restarts=9, ping_every_s=0.02
)


class Trainer:
    """Sends without weights."""

    def ready(self) -> WorkerInfo:
        return WorkerInfo("policy/0", os.getpid(), "here", "", {})

    def export(self, consumer: Any, bucket_bytes: int, form: str) -> Any:
        if isinstance(consumer, DiskWrite):
            return SendReport(consumer.order.version, "same", ())
        return Manifest((), bucket_bytes)


class Receiver:
    """Confirms version 0; of the next one it answers what `meanwhile` raises."""

    def __init__(self, name: str, meanwhile: Any) -> None:
        self._name, self._meanwhile = name, meanwhile

    def ready(self) -> WorkerInfo:
        return WorkerInfo(self._name, os.getpid(), "here", "", {})

    def ping(self) -> dict[str, Any]:
        return {"alive": True}

    async def receive(self, order: SyncOrder, payload: Any) -> Ack:
        if order.version:
            await self._meanwhile()
        return Ack(self._name, order.version, "same")


async def published(folder: Path, meanwhile: Any, policy: LocalGroup | None = None) -> tuple[Publisher, Pool]:
    """Version 0 is with two members; version 1 is asked for by `publish` of what is returned."""

    async def start(index: int) -> LocalWorker:
        name = f"rollout/{index}"
        return LocalWorker(name, Receiver(name, lambda: meanwhile(pool)))

    pool = Pool("rollout", 2, POLICY, start=start, stop=lambda w: w.kill(), event=lambda *_: None, watchdog=Watchdog())
    trainer = policy or LocalGroup("policy", LocalWorker("policy/0", PackingTrainer()))
    config = WeightsConfig()
    publisher = Publisher(
        trainer,
        pool,
        LocalObjects(),
        config,
        role="rollout",
        source="policy",
        dtype="float32",
        folder=str(folder),
        event=lambda *_: None,
        transport="disk",
        bucket_bytes=BUCKET,
    )
    pool.admit = publisher.admit
    await pool.open()
    async with publisher.changing:
        report = await publisher.publish(0)
    assert report.members == (0, 1)
    return publisher, pool


async def test_a_pool_that_is_scaled_to_nothing_during_a_publish_gets_the_version_without_members(tmp_path: Path):
    async def scaled_down(pool: Pool) -> None:
        pool.resize(0)
        while pool.workers:
            await asyncio.sleep(0.01)
        raise InfraFailure("its process is gone")

    publisher, pool = await published(tmp_path, scaled_down)
    async with publisher.changing:
        report = await asyncio.wait_for(publisher.publish(1), 60)
    assert (report.version, report.members, publisher.version) == (1, (), 1)
    await pool.close()


async def test_a_publish_that_every_member_fails_is_an_error(tmp_path: Path):
    async def fail(_: Pool) -> None:
        raise InfraFailure("the transfer broke")

    publisher, pool = await published(tmp_path, fail)
    async with publisher.changing:
        with pytest.raises(WeightSyncError, match=r"version 1: none of 2 rollout worker\(s\) confirmed the weights"):
            await publisher.publish(1)
    await pool.close()


class TwoModels(Receiver):
    """Confirms everything, and notes of which of its models the weights were."""

    def __init__(self, name: str, received: list[tuple[str, str]]) -> None:
        super().__init__(name, None)
        self._received = received

    async def receive(self, order: SyncOrder, payload: Any) -> Ack:
        self._received.append((self._name, order.part))
        return Ack(self._name, order.version, "same")


class PackingTrainer(Trainer):
    def export(self, consumer: Any, bucket_bytes: int, form: str) -> Any:
        if isinstance(consumer, PackBuckets):
            return SendReport(consumer.version, "same", ()), None
        return super().export(consumer, bucket_bytes, form)


async def test_a_member_with_two_models_serves_when_it_holds_both_also_one_that_joins_late(
    tmp_path: Path,
) -> None:
    received: list[tuple[str, str]] = []

    async def start(index: int) -> LocalWorker:
        name = f"mixture/{index}"
        return LocalWorker(name, TwoModels(name, received))

    pool = Pool("mixture", 1, POLICY, start=start, stop=lambda w: w.kill(), event=lambda *_: None, watchdog=Watchdog())

    def publisher(source: str, part: Any, second: Publisher | None = None) -> Publisher:
        group = LocalGroup(source, LocalWorker(f"{source}/0", PackingTrainer()))
        names = {"role": "mixture", "source": source, "dtype": "float32", "folder": str(tmp_path / part)}
        names["transport"] = "disk"
        more = {"bucket_bytes": BUCKET, "event": lambda *_: None, "part": part, "second": second}
        return Publisher(group, pool, LocalObjects(), WeightsConfig(), **names, **more)

    second = publisher("reference", "second")
    own = publisher("policy", "own", second)
    pool.admit = own.admit
    await pool.open()
    async with second.changing, own.changing:
        await second.publish(0)
        assert pool.indices(State.SERVING) == [], "with the reference alone nobody serves"
        report = await own.publish(0)
    assert report.members == (0,)
    pool.resize(2)
    while len(pool.indices(State.SERVING)) < 2:
        await asyncio.sleep(0.01)
    for index in pool.indices(State.SERVING):
        assert [part for name, part in received if name == f"mixture/{index}"] == ["second", "own"]
    async with second.changing, own.changing:
        await own.publish(1)
    assert [part for _, part in received[4:]] == ["own", "own"], "what does not change is not sent again"
    await pool.close()


class BroadcastingTrainer(Trainer):
    """Sends real weights, which are other ones in each version."""

    opens = False
    opened: threading.Event | None = None  # waited for before a store is open

    def __init__(self) -> None:
        self.reports: list[SendReport] = []

    @property
    def sent(self) -> int:
        return len(self.reports)

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def run(self, task: Any) -> Any:
        if isinstance(task, OpenCollective) and self.opened is not None:
            self.opens = True
            self.opened.wait(60)
        return task()

    def export(self, consumer: Any, bucket_bytes: int, form: str) -> Any:
        if isinstance(consumer, CollectiveSend):
            self.reports.append(consumer(weights(consumer.order.version)))
            return self.reports[-1]
        return consumer(weights(0))


def weights(version: int) -> list[tuple[str, torch.Tensor]]:
    return [(f"w{index}", torch.full((4_000,), float(10 * index + version))) for index in range(6)]


class Broadcasts:
    """A pool whose members receive by broadcast, and a publisher to it. `breaks`: members that fail when their first
    bucket of version 1 arrives; `dies`: one that dies when it is ordered to receive."""

    def __init__(self, count: int, breaks: set[int], dies: int | None = None) -> None:
        self.breaks, self.dies, self.trainer = breaks, dies, BroadcastingTrainer()
        self.held: dict[str, tuple[int, list[float]]] = {}
        self.ordered = list[int]()  # versions, by whom does not matter
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.pool = Pool(
            "rollout",
            count,
            POLICY,
            start=self._start,
            stop=lambda worker: worker.kill(),
            event=lambda name, what: self.events.append((name, what)),
            watchdog=Watchdog(),
        )
        self.turns = Turns()  # of the policy and others on its device
        self.publisher = Publisher(
            TurnGroup(LocalGroup("policy", LocalWorker("policy/0", self.trainer)), self.turns),
            self.pool,
            LocalObjects(),
            WeightsConfig(timeout_s=60.0),
            role="rollout",
            source="policy",
            dtype="float32",
            folder="",
            event=lambda name, what: self.events.append((name, what)),
            transport="collective",
            bucket_bytes=BUCKET,
        )
        self.pool.admit = self.publisher.admit

    async def _start(self, index: int) -> LocalWorker:
        name = f"rollout/{index}"
        return LocalWorker(name, BroadcastReceiver(name, self, index))

    async def publish(self, version: int) -> SyncReport:
        async with self.publisher.changing:
            return await asyncio.wait_for(self.publisher.publish(version), 60)


class BroadcastReceiver:
    def __init__(self, name: str, stage: Broadcasts, index: int) -> None:
        self._name, self._stage, self._index = name, stage, index
        self._receiver = CollectiveReceiver(name, CPU)

    def ready(self) -> WorkerInfo:
        return WorkerInfo(self._name, os.getpid(), "here", "", {"receivers": (self._name,)})

    def ping(self) -> dict[str, Any]:
        return {"alive": True}

    async def receive(self, order: SyncOrder, payload: Any) -> Ack:
        return await asyncio.to_thread(self._take, order, payload)

    def _take(self, order: SyncOrder, payload: Any) -> Ack:
        self._stage.ordered.append(order.version)
        if self._index == self._stage.dies:
            raise InfraFailure("its process is gone")
        by = self._receiver if order.transport == "collective" else receiver(order.transport, self._name, CPU)
        values: list[float] = []
        with by.receive(order, payload) as incoming:
            for _, tensor in incoming:
                values.append(float(tensor[0]))
                if order.version == 1 and self._index in self._stage.breaks:
                    raise InfraFailure("its memory is gone")
        self._stage.held[self._name] = order.version, values
        return Ack(self._name, order.version, incoming.finish())

    def close(self) -> None:
        self._receiver.close()


@pytest.mark.parametrize(("breaks", "rounds"), [(set[int](), 1), ({0}, 2), ({4}, 1), ({1, 2}, 2), ({0, 2}, 3)])
async def test_members_that_a_lost_one_has_cut_off_get_the_version_by_another_broadcast(
    breaks: set[int], rounds: int
) -> None:
    stage = Broadcasts(5, breaks)  # 0 sends to 2 and 3, and 1 to 4
    await stage.pool.open()
    assert (await stage.publish(0)).members == (0, 1, 2, 3, 4)
    assert stage.trainer.sent == 1
    report = await stage.publish(1)
    left = {index for index in range(5) if index not in breaks}
    assert set(report.members) == left
    values = [float(tensor[0]) for _, tensor in weights(1)]
    assert values != [float(tensor[0]) for _, tensor in weights(0)]
    for index in left:
        assert stage.held[f"rollout/{index}"] == (1, values)
    assert stage.trainer.sent == 1 + rounds
    assert {what["worker"] for name, what in stage.events if name == "sync_failed"} == breaks, "the others are innocent"
    await stage.pool.close()


async def test_nobody_waits_for_a_member_that_dies_before_it_has_joined_the_broadcast() -> None:
    """Neither the sender nor those below it, who get the version by another broadcast. Nothing is joined yet."""
    stage = Broadcasts(5, set(), dies=0)  # 0 sends to 2 and 3
    await stage.pool.open()
    assert (await stage.publish(0)).members == (1, 2, 3, 4)
    assert [report.failed for report in stage.trainer.reports] == [{"rollout/0": "it is lost"}, {}]
    (why,) = [what["why"] for name, what in stage.events if name == "sync_failed"]
    assert why == "its process is gone; policy gave it up: it is lost"
    await stage.pool.close()


async def killed(pool: Pool) -> None:
    await pool.evict(0, "killed")


async def scaled_down(pool: Pool) -> None:
    for index in (1, 2, 3, 4):
        pool.fleet.add_load(index, 1)  # so the first one is stopped
    pool.resize(4)
    await until_true(lambda: 0 not in pool.workers, "the end of the first member")


@pytest.mark.parametrize("goes", [killed, scaled_down])
async def test_a_member_that_goes_while_the_trainer_opens_its_store_takes_nobody_with_it(goes: Any) -> None:
    stage, gone = Broadcasts(5, set()), threading.Event()
    stage.trainer.opened = gone
    await stage.pool.open()
    publishing = asyncio.ensure_future(stage.publish(0))
    await until_true(lambda: stage.trainer.opens, "the order to open a store")
    await goes(stage.pool)
    gone.set()
    report = await publishing
    assert {1, 2, 3, 4} <= set(report.members) and stage.trainer.sent == 1
    assert not [what for name, what in stage.events if name == "sync_failed"]
    await stage.pool.close()


async def test_engines_decode_until_the_policy_has_its_turn() -> None:
    stage = Broadcasts(3, set())

    async def order(verb: str) -> None: ...

    stage.turns.joins("reference", order)
    await stage.pool.open()
    await stage.publish(0)
    async with stage.turns.at_work("reference"):
        publishing = asyncio.ensure_future(stage.publish(1))
        await asyncio.sleep(0.1)
        assert 1 not in stage.ordered, "they would stand still while the reference is at work"
    assert (await publishing).members == (0, 1, 2) and stage.ordered.count(1) == 3
    await stage.pool.close()
