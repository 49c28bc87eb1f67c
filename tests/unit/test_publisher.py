"""Publishing to a pool whose members go meanwhile: scaled down is not lost."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from actors.errors import InfraFailure, WeightSyncError
from actors.worker import LocalGroup, LocalObjects, LocalWorker, WorkerInfo
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Pool, PoolPolicy
from orchestrator.config.schema import WeightsConfig
from orchestrator.publishing.publisher import Publisher
from rollout.weights import DiskWrite, PackBuckets
from rollout.weights.protocol import Ack, Manifest, SendReport, SyncOrder

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


async def published(folder: Path, meanwhile: Any) -> tuple[Publisher, Pool]:
    """Version 0 is with two members; version 1 is asked for by `publish` of what is returned."""

    async def start(index: int) -> LocalWorker:
        name = f"rollout/{index}"
        return LocalWorker(name, Receiver(name, lambda: meanwhile(pool)))

    pool = Pool("rollout", 2, POLICY, start=start, stop=lambda w: w.kill(), event=lambda *_: None, watchdog=Watchdog())
    trainer = LocalGroup("policy", LocalWorker("policy/0", Trainer()))
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
        config = WeightsConfig()
        return Publisher(group, pool, LocalObjects(), config, **names, event=lambda *_: None, part=part, second=second)

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
