"""The cluster that is this process, and the check that every worker runs the driver's packages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import actors
from actors.errors import ConfigError, InfraFailure, RunError
from actors.worker import WorkerInfo
from orchestrator.cluster.base import LocalCluster, refuse_foreign
from orchestrator.config.schema import RunConfig
from orchestrator.methods import build
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import Plan, draft_plan

OURS = str(Path(actors.__file__).parent)


class Resident:
    """Stands in for a trainer or an engine."""

    def __init__(self, name: str, rank: int = 0) -> None:
        self.name, self.rank, self.closed = name, rank, False
        self.loaded = 0

    def ready(self) -> WorkerInfo:
        self.loaded += 1
        return WorkerInfo(self.name, os.getpid(), "here", OURS, {})

    def times_loaded(self) -> int:
        return self.loaded

    def ping(self) -> dict[str, Any]:
        return {"alive": True}

    def close(self) -> None:
        self.closed = True


def planned(**roles: Any) -> Plan:
    config = RunConfig.model_validate({"phases": {"grpo": {"method": "grpo"}}, "roles": roles})
    return draft_plan(config, {"grpo": build("grpo", {})}, machine=Machine(4)).accepted()


async def test_groups_come_up_ready_and_workers_wait_for_their_ready_call() -> None:
    cluster = LocalCluster()
    await cluster.reserve(planned())
    group = await cluster.start_group("policy", Resident, [{"name": "policy/0"}])
    worker = await cluster.start_worker("rollout", 0, Resident, {"name": "rollout/0"})
    assert await group.call("times_loaded", timeout_s=1) == [1]
    assert await worker.call("times_loaded", timeout_s=1) == 0
    rows = [(row["role"], row["name"], row["pid"], row["threads"]) for row in cluster.describe()]
    assert rows == [("policy", "policy/0", os.getpid(), 4), ("rollout", "rollout/0", os.getpid(), 1)]
    await cluster.close()


async def test_a_stopped_worker_is_closed_and_calls_to_it_fail() -> None:
    cluster = LocalCluster()
    await cluster.reserve(planned())
    resident: list[Resident] = []

    class Kept(Resident):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            resident.append(self)

    worker = await cluster.start_worker("rollout", 0, Kept, {"name": "rollout/0"})
    await cluster.stop_worker(worker)
    await cluster.stop_worker(worker)
    assert resident[0].closed
    with pytest.raises(InfraFailure, match="was killed"):
        await worker.call("ready", timeout_s=1)
    assert cluster.describe() == []


async def test_several_ranks_in_one_process_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"roles\.policy\.ranks=2: with --local a role is one rank"):
        await LocalCluster().reserve(planned(policy={"ranks": 2, "backend": "deepspeed"}))


def test_a_worker_with_other_packages_is_refused_with_both_places() -> None:
    refuse_foreign(WorkerInfo("policy/0", 1, "node", OURS, {}))
    with pytest.raises(RunError) as caught:
        refuse_foreign(WorkerInfo("policy/0", 1, "node", "/home/somebody/actors", {}))
    assert "/home/somebody/actors" in str(caught.value) and OURS in str(caught.value)
