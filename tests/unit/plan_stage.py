"""Plans of small configurations, and clusters of invented nodes, for the tests of plans."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from orchestrator.config.schema import RunConfig
from orchestrator.methods import build
from orchestrator.planning.bundles import ClusterView, Node
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import Plan, draft_plan
from orchestrator.reporting.plan_report import render

SEVEN_BILLION = 7_000_000_000
SMALL = 1_300_000


def config(method: str = "grpo", *, options: dict[str, Any] | None = None, **keys: Any) -> RunConfig:
    """One phase of a method; `train`, `data`, `evaluation` go to the phase and everything else to the run."""
    of_phase = {key: keys.pop(key) for key in ("train", "data", "sampling", "evaluation") if key in keys}
    phase = {"method": method, "options": options or {}, **of_phase}
    return RunConfig.model_validate({"phases": {method: phase}, **keys})


def planned(config: RunConfig, *, cores: int = 2, parameters: int | None = SMALL) -> Plan:
    pipelines = {name: build(phase.method, phase.options) for name, phase in config.phases.items()}
    return draft_plan(config, pipelines, parameters=parameters, machine=Machine(cores))


def report(plan: Plan) -> str:
    """What `troupe plan` prints."""
    text = io.StringIO()
    Console(file=text, width=400).print(render(plan, gpu_nodes(1)))
    return text.getvalue()


def threads(plan: Plan) -> dict[str, int]:
    return {name: role.threads for name, role in plan.roles.items()}


def gpu_nodes(count: int, gpus: int = 8) -> ClusterView:
    return ClusterView(tuple(Node(f"node-{i}", {"CPU": 128.0, "GPU": float(gpus)}) for i in range(count)))
