"""Publishing a version again, because the role that it is of was given other weights meanwhile."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from actors.worker import LocalGroup, LocalObjects, LocalWorker, WorkerInfo
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Pool, PoolPolicy
from orchestrator.config.schema import WeightsConfig
from orchestrator.publishing.publisher import Publisher
from rollout.weights import DiskWrite, PackBuckets
from rollout.weights.protocol import Ack, Manifest, SendReport, SyncOrder
from tests.waiting import until_true

BUCKET = 20_000
POLICY = PoolPolicy(
    slots=1, max_attempts=2, call_timeout_s=60.0, start_timeout_s=60.0, max_restarts=9, ping_every_s=0.02
)


class Reference:
    """Its weights are a word, which is their fingerprint as well."""

    weights = "mixed"

    def ready(self) -> WorkerInfo:
        return WorkerInfo("reference/0", os.getpid(), "here", "", {})

    def export(self, consumer: Any, bucket_bytes: int, form: str) -> Any:
        if isinstance(consumer, PackBuckets):
            return SendReport(consumer.version, self.weights, ()), self.weights
        if isinstance(consumer, DiskWrite):
            Path(str(consumer.order.folder)).write_text(self.weights)
            return SendReport(consumer.order.version, self.weights, ())
        return Manifest((), bucket_bytes)


class Receiver:
    def __init__(self, name: str, held: dict[str, list[str]]) -> None:
        self._name, self._held = name, held

    def ready(self) -> WorkerInfo:
        return WorkerInfo(self._name, os.getpid(), "here", "", {})

    def ping(self) -> dict[str, Any]:
        return {"alive": True}

    async def receive(self, order: SyncOrder, payload: Any) -> Ack:
        weights = payload or Path(str(order.folder)).read_text()
        self._held.setdefault(self._name, []).append(weights)
        return Ack(self._name, order.version, weights)


async def test_members_get_replaced_weights_of_the_same_version_also_one_that_joins_after_a_snapshot(
    tmp_path: Path,
) -> None:
    """Who joins late gets the weights as one object, which is kept for the next one."""
    held: dict[str, list[str]] = {}

    async def start(index: int) -> LocalWorker:
        name = f"rollout/{index}"
        return LocalWorker(name, Receiver(name, held))

    async def grown_to(count: int) -> None:
        pool.resize(count)
        await until_true(lambda: len(pool.indices(State.SERVING)) == count, f"{count} serving members")

    pool = Pool("rollout", 1, POLICY, start=start, stop=lambda w: w.kill(), event=lambda *_: None, watchdog=Watchdog())
    reference = Reference()
    publisher = Publisher(
        LocalGroup("reference", LocalWorker("reference/0", reference)),
        pool,
        LocalObjects(),
        WeightsConfig(),
        role="rollout",
        source="reference",
        dtype="float32",
        folder=str(tmp_path / "weights"),
        event=lambda *_: None,
        transport="disk",
        bucket_bytes=BUCKET,
    )
    pool.admit = publisher.admit
    await pool.open()
    async with publisher.changing:
        await publisher.publish(3)
    await grown_to(2)
    assert held == {"rollout/0": ["mixed"], "rollout/1": ["mixed"]}
    async with publisher.changing:
        reference.weights = "copied"
        publisher.source_replaced()
        assert publisher.outdated
        report = await publisher.publish(3)
    assert (report.version, report.fingerprint, publisher.outdated) == (3, "copied", False)
    await grown_to(3)
    assert held == {"rollout/0": ["mixed", "copied"], "rollout/1": ["mixed", "copied"], "rollout/2": ["copied"]}
    await asyncio.wait_for(pool.close(), 60)
