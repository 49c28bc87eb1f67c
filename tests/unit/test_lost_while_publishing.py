"""A publish that no member confirms: whether they died, which costs a restart each, or live and do not confirm."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.errors import BudgetExhausted, InfraFailure, WeightSyncError
from actors.worker import Worker
from orchestrator.cluster.fleet import State
from orchestrator.cluster.pool import Pool
from orchestrator.publishing.publisher import Publisher, SyncReport
from rollout.weights.protocol import Ack, SyncOrder
from tests.unit.test_publisher import POLICY, Receiver, published
from tests.waiting import until_true


async def publish(publisher: Publisher, version: int) -> SyncReport:
    async with publisher.changing:
        return await asyncio.wait_for(publisher.publish(version), 60)


async def kill(pool: Pool, *indices: int) -> None:
    for index in indices:
        if index in pool.workers:
            await pool.workers[index].kill()


async def until_killed() -> None:
    await asyncio.Event().wait()


async def test_the_death_of_all_members_during_a_publish_costs_their_restarts_and_the_others_catch_up(
    tmp_path: Path,
) -> None:
    async def first_ones_die(pool: Pool) -> None:
        if publisher.version == 0:
            await kill(pool, 0, 1)
            await until_killed()

    publisher, pool = await published(tmp_path, first_ones_die)
    report = await publish(publisher, 1)
    assert (report.version, report.members, report.fingerprint) == (1, (), None)
    await until_true(lambda: len(pool.indices(State.SERVING)) == 2, "the members that replace them", timeout_s=60)
    assert pool.indices(State.SERVING) == [2, 3] and pool.fleet.restarts == 2
    assert all(publisher.holds(index) for index in (2, 3)) and publisher.version == 1
    assert (await publish(publisher, 2)).members == (2, 3)
    await pool.close()


async def test_a_member_that_lives_and_does_not_confirm_ends_the_run_also_where_the_others_died(tmp_path: Path) -> None:
    async def one_dies(pool: Pool) -> None:
        await kill(pool, 0)
        raise InfraFailure("the transfer broke")

    publisher, pool = await published(tmp_path, one_dies)
    with pytest.raises(WeightSyncError, match=r"none of 2 rollout .* confirmed the weights; worker 1 lives: the trans"):
        await publish(publisher, 1)
    await pool.close()


async def test_members_that_confirm_other_weights_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(_: Pool) -> None: ...

    publisher, pool = await published(tmp_path, nothing)
    confirm = Receiver.receive

    async def another(self: Receiver, order: SyncOrder, payload: Any) -> Ack:
        return replace(await confirm(self, order, payload), fingerprint="another")

    monkeypatch.setattr(Receiver, "receive", another)
    with pytest.raises(WeightSyncError, match="worker 0 lives: acknowledged 1/another, sent 1/same"):
        await publish(publisher, 1)
    await pool.close()


async def test_weights_that_every_member_dies_of_end_the_run_when_its_restarts_are_used_up(tmp_path: Path) -> None:
    async def die(pool: Pool) -> None:
        await kill(pool, *pool.workers)
        await until_killed()

    publisher, pool = await published(tmp_path, die)
    assert (await publish(publisher, 1)).members == ()

    async def nothing(worker: Worker) -> None: ...

    with pytest.raises(BudgetExhausted, match=f"max_restarts={POLICY.max_restarts}; the last: .*the worker was killed"):
        await asyncio.wait_for(pool.call("a", nothing), 60)
    await pool.close()
