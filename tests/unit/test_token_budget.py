"""The tokens of a micro-batch: 8,192 on a CPU, and on GPUs as many as their memory holds, unless they are given."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.config.loading import config_of
from orchestrator.methods import build
from orchestrator.planning.bundles import ClusterView
from orchestrator.planning.prepared import Prepared
from orchestrator.planning.resolve import prepare
from orchestrator.planning.token_budget import SHARE, largest_budget
from orchestrator.reporting.plan_report import render
from tests.runs import SFT, merged
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder

HALF_A_BILLION = 500_000_000
ON_GPUS: dict[str, Any] = {"roles": {"policy": {"gpus": 1}, "reference": {"gpus": 1}}}


def prepared(tmp_path: Path, **changes: Any) -> Prepared:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}] * 8)
    own = {"method": "dpo", "model": {"path": str(tiny_model_folder(tmp_path))}, "data": {"path": str(rows)}}
    return prepare(config_of(merged({**SFT, **own}, changes), [], "test"))


def said(run: Prepared) -> str:
    plan = run.plan().accepted()
    text = io.StringIO()
    Console(file=text, width=300).print(render(plan, ClusterView.of_machine(cpus=8, gpus=2)))
    return text.getvalue()


def test_a_gpu_gets_as_many_tokens_as_its_memory_holds_and_the_plan_says_so(tmp_path: Path) -> None:
    run = prepared(tmp_path, **ON_GPUS, cluster={"gpu_memory_gib": 80})
    (phase,) = run.phases
    assert phase.config.train.token_budget == run.config.phases[phase.name].train.token_budget == 65_536
    assert "train.token_budget: 65536, for GPUs of 80 GiB; at most 65536" in said(run)
    assert run.config.phases[phase.name].train.batch_size == 4, "everything else is as it was given"


KEPT: list[tuple[str, dict[str, Any], int]] = [
    ("on a CPU", {"cluster": {"gpu_memory_gib": 80}}, 8192),
    ("with a reference on a CPU", {"roles": {"policy": {"gpus": 1}}, "cluster": {"gpu_memory_gib": 80}}, 8192),
    ("if it is given", {**ON_GPUS, "cluster": {"gpu_memory_gib": 80}, "train": {"token_budget": 9000}}, 9000),
    ("if nothing more fits", {**ON_GPUS, "cluster": {"gpu_memory_gib": 0.01}}, 8192),
]


@pytest.mark.parametrize(("_", "changes", "tokens"), KEPT, ids=[case for case, _, _ in KEPT])
def test_the_tokens_of_a_micro_batch_are_not_changed(
    tmp_path: Path, _: str, changes: dict[str, Any], tokens: int
) -> None:
    run = prepared(tmp_path, **changes)
    assert run.phases[0].config.train.micro_batch_tokens == tokens
    assert "65536, for GPUs" not in said(run)


def test_the_budget_grows_with_the_gpu_and_shrinks_with_the_model_and_what_shares_the_gpu() -> None:
    def budget(gpu_gib: float, parameters: int = HALF_A_BILLION, **changes: Any) -> int:
        config = config_of(merged(merged({**SFT, "method": "dpo"}, ON_GPUS), changes), [], "test")
        pipelines = {name: build(phase.method, phase.options) for name, phase in config.phases.items()}
        return largest_budget(config, pipelines, gpu_gib, {"parameters": parameters})

    found = [budget(gib) for gib in (16, 40, 80, 192)]
    assert found == sorted(found) and len(set(found)) >= 3 and found[0] == 8192 and found[-1] == 65_536
    assert budget(192, 7_000_000_000) < budget(192)
    fractions = {"policy": {"gpus": 0.5}, "reference": {"gpus": 0.5}}
    in_turns = merged(fractions, {"reference": {"colocate": "policy"}})
    assert budget(80, roles=fractions) < budget(80, roles=in_turns) == budget(80)
    assert 0.5 < SHARE < 1
