"""Workers that the first phase can begin without start beside it; if one cannot, the run ends as at any other start."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator.cluster.base import LocalCluster
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.fleet import State
from orchestrator.cluster.launch import launch
from orchestrator.config.loading import config_of
from orchestrator.config.schema import RunConfig
from orchestrator.executor import Executor
from orchestrator.planning.resolve import prepare
from tests.runs import ARITHMETIC, merged

WAIT_S = 60.0
HELD_OUT = {"data": {"path": "example:arithmetic", "split": "test", "limit": 8}}
SFT: dict[str, Any] = {
    "method": "sft",
    "data": {"path": "example:arithmetic_sft"},
    "train": {"steps": 2, "batch_size": 4},
    "sampling": {"max_tokens": 5},
}
GRPO: dict[str, Any] = {key: ARITHMETIC[key] for key in ("method", "options", "data", "train", "sampling")}
BROKEN = """
from actors.errors import ConfigError
from rollout.hf_engine import HfEngine

class Broken(HfEngine):
    def __init__(self, spec):
        raise ConfigError("this engine needs a card that nobody has")
"""


def config(where: Path, *phases: dict[str, Any], engine: str = "hf") -> RunConfig:
    """Runs these phases in order, with two engines."""
    around = {key: value for key, value in ARITHMETIC.items() if key not in GRPO}
    roles = {"rollout": {"engine": engine, "kv_cache_gib": None, "workers": 2}}
    named = {f"p{index}": phase for index, phase in enumerate(phases)}
    return config_of(merged(around, {"output": str(where), "roles": roles, "phases": named}), [], "test")


class Apart(LocalCluster):
    """As if each worker were a process of its own."""

    has_processes = True


@asynccontextmanager
async def launched(config: RunConfig, folder: Path, cluster: LocalCluster) -> AsyncIterator[Executor]:
    """The roles of a run in this process, when its first phase may begin."""
    prepared = prepare(config)
    plan = prepared.plan().accepted()
    await cluster.reserve(plan)
    try:
        async with launch(prepared, plan, cluster, folder, lambda *_: None, Watchdog(), prepared.phases[0]) as roles:
            yield roles
    finally:
        await cluster.close()


def up(roles: Executor) -> dict[str, int]:
    return {role: len(pool.indices(State.JOINING, State.SERVING)) for role, pool in roles.pools.items()}


@pytest.mark.parametrize(
    ("phases", "at_first"),
    [
        pytest.param([SFT, GRPO], {"rollout": 0, "reward": 0}, id="none where the phase only learns from rows"),
        pytest.param(
            [{**SFT, "evaluation": HELD_OUT}, GRPO],
            {"rollout": 2, "reward": 1},
            id="all where it is evaluated",
        ),
        pytest.param([GRPO, SFT], {"rollout": 2, "reward": 1}, id="all where the phase samples"),
    ],
)
def test_a_phase_waits_for_the_workers_that_it_needs_and_the_others_come(
    phases: list[dict[str, Any]], at_first: dict[str, int], tmp_path: Path
):
    async def body() -> None:
        async with launched(config(tmp_path, *phases), tmp_path, Apart()) as roles:
            assert up(roles) == at_first
            async with asyncio.timeout(WAIT_S):
                while up(roles) != {"rollout": 2, "reward": 1}:
                    await asyncio.sleep(0.02)

    asyncio.run(body())


def test_in_one_process_all_workers_are_up_before_anything_is_computed(tmp_path: Path):
    async def body() -> None:
        async with launched(config(tmp_path, SFT, GRPO), tmp_path, LocalCluster()) as roles:
            assert up(roles) == {"rollout": 2, "reward": 1}

    asyncio.run(body())


def test_a_worker_that_cannot_start_ends_the_phase_beside_which_it_starts_with_its_own_error(tmp_path: Path):
    (tmp_path / "broken.py").write_text(BROKEN)
    engine = f"{tmp_path / 'broken.py'}:Broken"

    async def body(first: dict[str, Any], then: dict[str, Any]) -> str:
        entered, chosen = False, config(tmp_path, first, then, engine=engine)
        try:
            async with asyncio.timeout(WAIT_S), launched(chosen, tmp_path, Apart()):
                entered = True
                await asyncio.Event().wait()
        except ConfigError as error:
            assert entered == (first is SFT), "a phase that needs the engine does not begin"
            return str(error)
        raise AssertionError("the block ended without an error")

    assert "needs a card that nobody has" in asyncio.run(body(SFT, GRPO))
    assert asyncio.run(body(SFT, GRPO)) == asyncio.run(body(GRPO, SFT))
