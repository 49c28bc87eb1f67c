"""Which engines get adapters alone, and why others do not: decided before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.errors import ConfigError
from orchestrator.config.loading import config_of
from orchestrator.planning.bundles import ClusterView
from orchestrator.planning.plan import Plan
from orchestrator.planning.resolve import prepare
from orchestrator.reporting.plan_report import render
from tests.runs import merged
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder


def plan_of(tmp_path: Path, **changes: Any) -> Plan:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    tree: dict[str, Any] = {
        "method": "grpo",
        "model": {"path": str(tiny_model_folder(tmp_path, hidden=128)), "lora": {"r": 4}},
        "data": {"path": str(rows)},
        "train": {"steps": 1, "batch_size": 1},
        "sampling": {"max_tokens": 4},
        "rewards": [{"fn": "completion_length"}],
    }
    config = config_of(merged(tree, changes), [], "test")
    return prepare(config).plan().accepted()


def said(plan: Plan) -> str:
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(plan, ClusterView.of_machine(cpus=8)))
    return console.export_text()


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_engines_that_take_adapters_are_sent_them_alone_and_the_plan_says_so(tmp_path: Path, engine: str) -> None:
    plan = plan_of(tmp_path, roles={"rollout": {"engine": engine}})
    assert plan.adapters_alone("rollout")
    assert "rollout: is sent the adapters alone" in said(plan)


def test_without_adapters_nothing_is_said_of_them(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, model={"lora": None})
    assert not plan.adapters_alone("rollout")
    assert "adapters" not in said(plan)


VLLM: dict[str, Any] = {"roles": {"rollout": {"engine": "vllm"}}}
OBSTACLES: list[tuple[dict[str, Any], str]] = [
    ({"roles": {"rollout": {"engine": "scripted"}}}, "roles.rollout.engine=scripted takes whole models only"),
    ({"roles": {"rollout": {"engine": "hf", "dtype": "bfloat16"}}}, "it would read the model in bfloat16"),
    ({**VLLM, "model": {"lora": {"use_dora": True}}}, r"vLLM does not compute weight-decomposed adapters"),
    ({**VLLM, "model": {"lora": {"r": 600}}}, "vLLM computes adapters of rank 512 at most, and model.lora.r=600"),
]


@pytest.mark.parametrize(("changes", "why"), OBSTACLES, ids=[why for _, why in OBSTACLES])
def test_what_an_engine_cannot_hold_is_merged_and_refused_if_it_is_asked_for(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    plan = plan_of(tmp_path, **changes)
    assert not plan.adapters_alone("rollout")
    assert f"rollout: is sent weights with the adapters merged in: {why}" in said(plan)
    with pytest.raises(ConfigError, match=f"weights.lora=adapter: rollout cannot get the adapters alone: {why}"):
        plan_of(tmp_path, **merged(changes, {"weights": {"lora": "adapter"}}))


def test_adapters_are_merged_where_that_is_asked_for(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, weights={"lora": "merged"}, roles={"rollout": {"engine": "hf"}})
    assert plan.merged_because == {"rollout": "weights.lora=merged"}
