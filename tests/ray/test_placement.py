"""Plans of 8 and 256 GPUs on an invented cluster: real Ray, several raylets on this machine, no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as InventedCluster
from ray.util.placement_group import placement_group_table

import actors
from actors.errors import ConfigError, InfraFailure, PlacementError, RunError
from actors.worker import WorkerInfo
from orchestrator.cluster.ray_cluster import RayCluster
from orchestrator.cluster.ray_connection import connect, end_half_started, started, view_cluster
from orchestrator.config.roles import RolesConfig
from orchestrator.config.schema import ClusterConfig, PhaseConfig, RunConfig, TrainConfig
from orchestrator.methods import build
from orchestrator.planning.plan import Plan, draft_plan, problems
from tests.resident import Resident
from tests.waiting import until_true

READY_S = 300.0
ROOT = Path(actors.__file__).parents[1]
GPUS_PER_NODE = 128  # invented: two nodes are 256 GPUs
ZONE = "z"


@pytest.fixture(scope="module")
def invented() -> Iterator[InventedCluster]:
    """A head and two nodes with labels, each with room for one rollout worker that wants a resource of its own."""
    head = {"num_cpus": 32, "num_gpus": 0, "object_store_memory": 100 * 2**20}

    def start() -> InventedCluster:
        cluster = InventedCluster(initialize_head=True, head_node_args=head)
        for role in ("rollout", "spare"):
            cluster.add_node(
                num_cpus=256,
                num_gpus=GPUS_PER_NODE,
                object_store_memory=80 * 2**20,
                resources={"engine": 1},
                labels={"role": role, "zone": ZONE},
            )
        return cluster

    cluster = started(start, end_half_started, warnings.warn)  # each of the three may take more than Ray's 30 s
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def anyone() -> str:
    return f"test-{time.monotonic_ns()}"


def config(roles: dict[str, Any], *, beta: float = 0.04, batch_size: int = 512, timeout_s: float = 30.0) -> RunConfig:
    """GRPO with a reference (`beta`), sized by `roles`."""
    phase = PhaseConfig(method="grpo", options={"beta": beta}, train=TrainConfig(steps=1, batch_size=batch_size))
    return RunConfig.model_validate(
        {
            "phases": {"grpo": phase},
            "roles": RolesConfig.model_validate(roles),
            "weights": {"transport": "object_store"},
            "cluster": {"placement_timeout_s": timeout_s},
        }
    )


def planned(config: RunConfig) -> Plan:
    pipelines = {name: build(phase.method, phase.options) for name, phase in config.phases.items()}
    return draft_plan(config, pipelines).accepted()


def gpus_in_use() -> float:
    return ray.cluster_resources().get("GPU", 0.0) - ray.available_resources().get("GPU", 0.0)


def groups_alive() -> int:
    return sum(table["state"] == "CREATED" for table in placement_group_table().values())


SIZES = {
    8: {"policy": 4, "reference": 1, "rollout": 3},
    256: {"policy": 128, "reference": 32, "rollout": 96},
}


@pytest.mark.parametrize("gpus", SIZES)
async def test_a_plan_is_reserved_as_one_gang_and_one_group_per_rollout_worker(
    invented: InventedCluster, anyone: str, gpus: int
) -> None:
    size = SIZES[gpus]
    wanted = config(
        {
            "policy": {"backend": "deepspeed", "ranks": size["policy"], "gpus": 1},
            "reference": {"backend": "deepspeed", "ranks": size["reference"], "gpus": 1},
            "rollout": {"workers": size["rollout"], "gpus": 1},
        }
    )
    plan = planned(wanted)
    assert problems(plan, view_cluster()) == []
    before = groups_alive()
    cluster = RayCluster(wanted, anyone, disconnect=False)
    try:
        await cluster.reserve(plan)
        assert groups_alive() - before == 1 + size["rollout"] + 1  # the gang, the rollout workers, a reward worker
        await until_true(lambda: gpus_in_use() == gpus, "such number of GPUs in use")
    finally:
        await cluster.close()
    await until_true(lambda: gpus_in_use() == 0, "such number of GPUs in use")
    assert groups_alive() == before


async def test_neighbouring_ranks_share_a_node_and_each_has_its_gpu_and_environment(
    invented: InventedCluster, anyone: str
) -> None:
    wanted = config({"policy": {"backend": "deepspeed", "ranks": 6, "gpus": 1, "threads": 3}}, beta=0.0)
    cluster = RayCluster(wanted, anyone, disconnect=False)
    try:
        await cluster.reserve(planned(wanted))
        group = await cluster.start_group("policy", Resident, [{"name": f"policy/{rank}"} for rank in range(6)])
        infos: list[WorkerInfo] = await group.call("ready", timeout_s=READY_S)
        assert len({info.pid for info in infos}) == 6
        nodes = [info.node for info in infos]
        assert sum(left != right for left, right in pairwise(nodes)) == len(set(nodes)) - 1
        held = [
            (info.node, *gpus) for info, gpus in zip(infos, await group.call("gpus", timeout_s=READY_S), strict=True)
        ]
        assert len(set(held)) == 6
        assert await group.call("environment", "OMP_NUM_THREADS", timeout_s=READY_S) == ["3"] * 6
        rows = cluster.describe()
        assert [(row["role"], row["name"], row["gpus"], row["threads"]) for row in rows] == [
            ("policy", f"policy/{rank}", 1.0, 3) for rank in range(6)
        ]
    finally:
        await cluster.close()


async def test_colocated_roles_share_each_gpu_by_fractions(invented: InventedCluster, anyone: str) -> None:
    wanted = config(
        {
            "policy": {"backend": "deepspeed", "ranks": 2, "gpus": 0.5},
            "reference": {"backend": "deepspeed", "ranks": 2, "gpus": 0.25, "colocate": "policy"},
            "rollout": {"workers": 2, "gpus": 0.25, "colocate": "policy"},
        }
    )
    cluster = RayCluster(wanted, anyone, disconnect=False)
    try:
        await cluster.reserve(planned(wanted))
        await until_true(lambda: gpus_in_use() == 2, "such number of GPUs in use")
        held: list[tuple[str, tuple[int, ...]]] = []
        for role in ("policy", "reference"):
            group = await cluster.start_group(role, Resident, [{}, {}])
            infos = await group.call("ready", timeout_s=READY_S)
            gpus = await group.call("gpus", timeout_s=READY_S)
            held += [(info.node, tuple(mine)) for info, mine in zip(infos, gpus, strict=True)]
        for index in range(2):
            worker = await cluster.start_worker("rollout", index, Resident, {})
            info = await worker.call("ready", timeout_s=READY_S)
            held.append((info.node, tuple(await worker.call("gpus", timeout_s=READY_S))))
        assert sorted(Counter(held).values()) == [3, 3]  # two GPUs, each with policy, reference and rollout
        await until_true(lambda: gpus_in_use() == 2, "such number of GPUs in use")
        with pytest.raises(InfraFailure, match=r"shares the 2 bundle\(s\) of policy"):
            await cluster.start_worker("rollout", 2, Resident, {})
        await cluster.stop_worker(worker)
        replacement = await cluster.start_worker("rollout", 3, Resident, {})
        assert (await replacement.call("ready", timeout_s=READY_S)).node == info.node
    finally:
        await cluster.close()
    await until_true(lambda: gpus_in_use() == 0, "such number of GPUs in use")


async def test_a_placement_group_is_created_with_a_joining_worker_and_removed_with_it(
    invented: InventedCluster, anyone: str
) -> None:
    wanted = config({"policy": {"gpus": 1}, "rollout": {"workers": 1, "gpus": 2, "tensor_parallel": 2}}, beta=0.0)
    cluster = RayCluster(wanted, anyone, disconnect=False)
    try:
        await cluster.reserve(planned(wanted))
        reserved = groups_alive()
        workers = [await cluster.start_worker("rollout", index, Resident, {}) for index in range(3)]
        for worker in workers:
            await worker.call("ready", timeout_s=READY_S)
        assert groups_alive() == reserved + 2
        await until_true(lambda: gpus_in_use() == 1 + 3 * 2, "such number of GPUs in use")
        for worker in workers:
            await cluster.stop_worker(worker)
            await cluster.stop_worker(worker)
        await until_true(lambda: gpus_in_use() == 1, "such number of GPUs in use")
        assert groups_alive() == reserved - 1
    finally:
        await cluster.close()


async def test_a_plan_that_does_not_fit_is_an_error_within_the_deadline_that_names_role_and_resource(
    invented: InventedCluster, anyone: str
) -> None:
    wanted = config(
        {
            "policy": {"backend": "deepspeed", "ranks": 2, "gpus": 1},
            "reference": {"backend": "deepspeed", "ranks": 1, "gpus": GPUS_PER_NODE + 1},
            "rollout": {"workers": 1, "gpus": 1, "cpus": 1000},
        },
        timeout_s=1.0,
    )
    before = groups_alive()
    cluster = RayCluster(wanted, anyone, disconnect=False)
    began = time.monotonic()
    with pytest.raises(PlacementError) as caught:
        await cluster.reserve(planned(wanted))
    assert time.monotonic() - began < 20, "far from the 30 s that there are by default"
    message = str(caught.value)
    assert f"reference: no place for 1 of 1, each needs {GPUS_PER_NODE + 1} GPU" in message
    assert f"the largest node has {GPUS_PER_NODE} GPU" in message
    assert "rollout: no place for 1 of 1, each needs 1 GPU and 1000 CPU: the largest node has 256 CPU" in message
    assert "policy" not in message
    assert groups_alive() == before
    await cluster.close()


async def test_a_cluster_that_others_use_is_not_reported_as_too_small(invented: InventedCluster, anyone: str) -> None:
    many = config({"policy": {"backend": "deepspeed", "ranks": 256, "gpus": 1}}, beta=0.0)
    more = config({"policy": {"gpus": 1}}, beta=0.0, timeout_s=0.5)
    first, second = (RayCluster(each, anyone, disconnect=False) for each in (many, more))
    try:
        await first.reserve(planned(many))
        with pytest.raises(PlacementError, match="others use it"):
            await second.reserve(planned(more))
    finally:
        await first.close()
        await second.close()


def labels_of(node_id: str) -> dict[str, str]:
    [labels] = [node["Labels"] for node in ray.nodes() if node["NodeID"] == node_id]
    return labels


async def test_labels_choose_the_nodes_of_rollout_workers_and_a_fallback_takes_those_that_do_not_fit(
    invented: InventedCluster, anyone: str
) -> None:
    rollout = {
        "workers": 1,
        "resources": {"engine": 1},
        "label_selector": {"role": "rollout", "zone": ZONE},
        "fallback_strategy": [{"label_selector": {"role": "in(spare, other)"}}],
    }
    wanted = config({"rollout": rollout}, beta=0.0, timeout_s=2.5)  # what there is room for has a place within this
    cluster = RayCluster(wanted, anyone, disconnect=False)
    try:
        await cluster.reserve(planned(wanted))
        places: list[str] = []
        for index in range(2):
            worker = await cluster.start_worker("rollout", index, Resident, {})
            places.append(labels_of((await worker.call("ready", timeout_s=READY_S)).node)["role"])
        assert places == ["rollout", "spare"]
        with pytest.raises(InfraFailure, match="role=rollout and zone=z, else role=in"):
            await cluster.start_worker("rollout", 2, Resident, {})
    finally:
        await cluster.close()


async def test_a_label_that_no_node_has_is_named_within_the_deadline(invented: InventedCluster, anyone: str) -> None:
    rollout = {"label_selector": {"role": "nobody"}}
    wanted = config({"rollout": rollout}, beta=0.0, timeout_s=0.5)
    before = groups_alive()
    cluster = RayCluster(wanted, anyone, disconnect=False)
    with pytest.raises(PlacementError, match="no node meets role=nobody"):
        await cluster.reserve(planned(wanted))
    assert groups_alive() == before
    await cluster.close()


OWN_RAY = """
import asyncio, gc, os, ray
from pathlib import Path
from orchestrator.config.schema import RunConfig
from orchestrator.methods import build
from orchestrator.cluster.ray_cluster import RayCluster
from orchestrator.cluster.ray_connection import cluster_at_hand, connect
from orchestrator.planning.plan import draft_plan, problems
from rewards.worker import RewardWorker
from rewards.loading import RewardSpec

config = RunConfig.model_validate({"phases": {"grpo": {"method": "grpo"}}, "roles": {"rollout": {"workers": 40}}})
plan = draft_plan(config, {"grpo": build("grpo", {})}).accepted()
assert problems(plan, cluster_at_hand(config.cluster, plan)) == []
assert not ray.is_initialized()

async def main():
    assert connect(config.cluster, plan) is None, "no dashboard unless it is asked for"
    cluster = RayCluster(config, "own")
    assert cluster.address == ray.get_runtime_context().gcs_address
    await cluster.reserve(plan)
    reward = await cluster.start_worker("reward", 0, RewardWorker, {"name": "r", "rewards": [], "tokenizer": "nowhere"})
    print("health:", await reward.call("ping", timeout_s=120))
    await cluster.close()
    await cluster.close()
    print("connected:", ray.is_initialized(), "watched:", watched())

def watched():
    # How many processes this one waits for to end.
    return sum("pidfd" in str(Path(f"/proc/self/fd/{name}").resolve()) for name in os.listdir("/proc/self/fd"))

asyncio.run(main())
gc.collect()
print("watched afterwards:", watched())
"""


def test_without_an_address_a_ray_of_our_own_holds_more_workers_than_there_are_cores_and_ends_with_the_run() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", OWN_RAY], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "'alive': True" in done.stdout and "connected: False watched: 2" in done.stdout
    assert "watched afterwards: 0" in done.stdout


def test_an_address_that_must_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(ConfigError, match="may find somebody else's Ray"):
        connect(ClusterConfig(), planned(config({})))


async def test_a_worker_that_imported_other_packages_is_refused(invented: InventedCluster, anyone: str) -> None:
    wanted = config({}, beta=0.0)
    cluster = RayCluster(wanted, anyone, disconnect=False)
    try:
        await cluster.reserve(planned(wanted))
        worker = await cluster.start_worker("rollout", 0, Resident, {"packages": "/home/somebody/actors"})
        with pytest.raises(RunError, match="imported `actors` from /home/somebody/actors"):
            await worker.call("ready", timeout_s=READY_S)
    finally:
        await cluster.close()
