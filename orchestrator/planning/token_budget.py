"""How many tokens a micro-batch has where `train.token_budget` does not say: on GPUs, as many as their memory holds."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.config.colocation import taking_turns
from orchestrator.config.roles import RanksRole
from orchestrator.config.schema import DEFAULT_TOKEN_BUDGET, RunConfig
from orchestrator.pipeline import Pipeline
from orchestrator.planning.plan import Plan, draft_plan
from orchestrator.planning.prepared import Prepared

BUDGETS = (16_384, 32_768, 65_536)  # above the default; a GPU was not faster with more (docs/performance.md)
SHARE = 0.75  # of a GPU's memory that the estimate may fill: it is right within a fifth
MIB_PER_GIB = 1024


def with_token_budgets(prepared: Prepared) -> Prepared:
    """Every phase with a number of tokens; `budget_notes` says of those that did not have one where it comes from. A
    phase keeps the default if a model of the run is computed on a CPU."""
    config, pipelines = prepared.config, {phase.name: phase.pipeline for phase in prepared.phases}
    sizes: dict[str, Any] = {"parameters": prepared.parameters, "own_parameters": prepared.own_parameters}
    plan = draft_plan(config, pipelines, **sizes, shapes=prepared.shapes)
    open_phases = [phase.name for phase in prepared.phases if phase.config.train.token_budget is None]
    if not open_phases or not _all_on_gpus(config, plan):
        return prepared
    gpu_gib = config.cluster.gpu_memory_gib or smallest_gpu_gib()
    if gpu_gib is None:
        note = "the default, because this machine has no GPU to measure; cluster.gpu_memory_gib says what those have"
        return replace(prepared, budget_notes=dict.fromkeys(open_phases, note))
    budget = largest_budget(config, pipelines, gpu_gib, {**sizes, "shapes": prepared.shapes})
    given = {name: with_budget(phase, budget) for name, phase in config.phases.items()}
    return replace(
        prepared,
        config=config.model_copy(update={"phases": given}),
        phases=tuple(replace(phase, config=given[phase.name]) for phase in prepared.phases),
        budget_notes=dict.fromkeys(open_phases, f"for GPUs of {gpu_gib:.0f} GiB; at most {BUDGETS[-1]}"),
    )


def largest_budget(
    config: RunConfig, pipelines: Mapping[str, Pipeline], gpu_gib: float, sizes: Mapping[str, Any]
) -> int:
    """The largest of `BUDGETS` whose estimate fits on every GPU, else the default. `sizes`: as `draft_plan` takes
    them; a model of unknown size fits nothing."""
    found = DEFAULT_TOKEN_BUDGET
    for budget in BUDGETS:
        phases = {name: with_budget(phase, budget) for name, phase in config.phases.items()}
        if not _fits(draft_plan(config.model_copy(update={"phases": phases}), pipelines, **sizes), config, gpu_gib):
            break
        found = budget
    return found


def with_budget(phase: Any, budget: int) -> Any:
    """The phase with that budget, unless it has one."""
    if phase.train.token_budget is not None:
        return phase
    return phase.model_copy(update={"train": phase.train.model_copy(update={"token_budget": budget})})


def smallest_gpu_gib() -> float | None:
    """Memory of the smallest GPU of this machine; None if it has none. Does not take any of it, as torch would."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30.0).stdout.split()
    return min((int(mib) / MIB_PER_GIB for mib in said if mib.isdigit()), default=None)


def _all_on_gpus(config: RunConfig, plan: Plan) -> bool:
    ranks = [settings for role in plan.roles if isinstance(settings := config.roles[role], RanksRole)]
    return bool(ranks) and all(settings.gpus > 0 for settings in ranks)


def _fits(plan: Plan, config: RunConfig, gpu_gib: float) -> bool:
    """A role has the whole GPU if those that share it sleep meanwhile, else its fraction of it."""
    alone = {role for roles in taking_turns(config, plan.roles) for role in roles}
    for role, planned in plan.roles.items():
        settings = config.roles[role]
        if isinstance(settings, RanksRole):
            share = 1.0 if role in alone else min(1.0, settings.gpus)
            if planned.memory is None or planned.memory.on_device > SHARE * share * gpu_gib:
                return False
    return True
