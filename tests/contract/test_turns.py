"""Roles that share a device take turns, and what is learned does not depend on it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.errors import InfraFailure, RunError
from orchestrator.batches.batch_stages import PhaseSettings
from orchestrator.batches.row_table import RowTable
from orchestrator.cluster.base import LocalCluster
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.fleet import State
from orchestrator.cluster.launch import launch
from orchestrator.config.loading import config_of
from orchestrator.executor import Executor
from orchestrator.planning.resolve import prepare
from orchestrator.run import run as run_config
from rollout.sampling import Request, Sampling
from tests.runs import ARITHMETIC, merged

STEPS = 2
ON_ONE_DEVICE = {role: {"colocate": "policy"} for role in ("reference", "rollout")}


def config(where: Path, roles: dict[str, Any], **changes: Any) -> Any:
    small = {"output": str(where), "train": {"steps": STEPS, "batch_size": 4}}
    tree = merged(ARITHMETIC, {**small, "roles": merged({"rollout": {"engine": "hf"}}, roles)})
    return config_of({**tree, "options": {"num_generations": 4, "beta": 0.1}, **changes}, [], "test")


@asynccontextmanager
async def launched(config: Any, folder: Path) -> AsyncIterator[Executor]:
    """The roles of a run in this process, in its first phase."""
    prepared = prepare(config)
    (phase,) = prepared.phases
    plan, cluster = prepared.plan().accepted(), LocalCluster()
    await cluster.reserve(plan)
    async with launch(prepared, plan, cluster, folder, lambda *_: None, Watchdog(), phase) as roles:
        roles.enter(PhaseSettings(phase.pipeline, 8192, 1.0, 0, Sampling(max_tokens=5)))
        yield roles
    await cluster.close()


async def awake(roles: Executor) -> set[str]:
    """The roles whose processes are awake, as these say."""
    workers = [(role, worker) for role, group in roles.groups.items() for worker in group.workers]
    workers += [(role, worker) for role, pool in roles.engines.items() for worker in pool.workers.values()]
    return {role for role, worker in workers if not (await worker.call("ping", timeout_s=200))["asleep"]}


async def sampled(roles: Executor, name: str) -> RowTable:
    request = Request(name, (5, 6, 7), 4, Sampling(max_tokens=5), seed=1)
    return (await roles.group_stages.sample("rollout", request))[1]


async def test_one_role_of_a_device_is_awake_at_a_time_through_a_step_and_a_joining_engine(tmp_path: Path) -> None:
    async with launched(config(tmp_path, merged(ON_ONE_DEVICE, {"policy": {"ranks": 1}})), tmp_path) as roles:
        assert len(await awake(roles)) == 1, "roles that have started sleep when the next one starts"
        async with roles.changing_weights():
            (report,) = await roles.publish(0, begins=True)
        assert (report.members, await awake(roles)) == ((0,), {"rollout"})
        rows = (await sampled(roles, "a")).with_values(advantages=[1.0, -1.0, 0.5, -0.5], reward=[1.0, 0.0, 0.0, 0.0])
        assert await awake(roles) == {"rollout"}
        infer = [stage for stage in roles.phase.pipeline.batch_stages if stage.role == "reference"]
        rows, _ = await roles.run(infer, rows)
        assert await awake(roles) == {"reference"}
        update = [stage for stage in roles.phase.pipeline.learn if stage.role == "policy"]
        async with roles.changing_weights():
            await roles.run(update, rows, 0)
            assert await awake(roles) == {"policy"}
            (later,) = await roles.publish(1)
        assert later.fingerprint != report.fingerprint, "nothing was learned: this test shows nothing"
        assert await awake(roles) == {"rollout"}
        await roles.evaluate(rows)
        assert "rollout" not in await awake(roles)
        with pytest.raises(InfraFailure, match="rollout/0 sleeps, and its weights are not on its device"):
            await (
                roles.engines["rollout"]
                .workers[0]
                .call("generate", Request("b", (5,), 1, Sampling(2), seed=1), timeout_s=200)
            )
        with pytest.raises(RunError, match=r"(reference|policy)/0 sleeps"):
            for role in ("policy", "reference"):
                await roles.groups[role].workers[0].call("run", dict, timeout_s=200)


async def test_an_engine_that_replaces_another_starts_in_its_turn_and_serves(tmp_path: Path) -> None:
    async with launched(config(tmp_path, ON_ONE_DEVICE), tmp_path) as roles:
        async with roles.changing_weights():
            await roles.publish(0, begins=True)
        before = await sampled(roles, "a")
        pool = roles.engines["rollout"]
        await roles.groups["policy"].call("run", dict, timeout_s=200)
        assert await awake(roles) == {"policy"}
        await pool.evict(0, "as if it had died")
        async with asyncio.timeout(200):
            while not pool.indices(State.SERVING):
                await asyncio.sleep(0.01)
        after = await sampled(roles, "a")
        assert await awake(roles) == {"rollout"}
        assert before.lengths.tolist() == after.lengths.tolist()


def model(finished: Path) -> bytes:
    return (finished / "checkpoints" / f"step-{STEPS:08d}" / "model" / "model.safetensors").read_bytes()


PPO: dict[str, Any] = {"method": "ppo", "options": {"num_ppo_epochs": 1}}
EVERY_ROLE = {role: {"colocate": "policy"} for role in ("value", "reference", "rollout")}


def test_a_run_in_turns_ends_with_the_bits_of_one_whose_roles_are_all_awake(tmp_path: Path) -> None:
    """With all kinds of roles that hold a model: trained ones, a frozen one, and an engine."""
    apart = run_config(config(tmp_path / "apart", {}, **PPO), local=True).folder
    in_turns = run_config(config(tmp_path / "turns", EVERY_ROLE, **PPO), local=True).folder
    assert model(apart) == model(in_turns)
    steps = [json.loads(line) for line in (in_turns / "metrics.jsonl").read_text().splitlines()]
    norms = [step["policy/grad_norm"] for step in steps if "policy/grad_norm" in step]
    assert len(norms) == STEPS and min(norms) > 1e-4, "nothing was learned: this test shows nothing"
