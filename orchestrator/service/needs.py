"""What a run reserves, from its configuration alone: no model is opened and no data is read."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.config.schema import RunConfig
from orchestrator.planning.bundles import Bundle
from orchestrator.restarts import COMMAND, REFUSED
from orchestrator.service.code_in_recipes import code_in
from orchestrator.service.errors import Problem
from orchestrator.service.planning import ADDRESS

PLAN_TIMEOUT_S = 120.0


def bundles_of(config: RunConfig) -> tuple[Bundle, ...]:
    """Everything that the run reserves at its start. A method that is user's code is run in a process of its own, not
    in this one. Raises Problem 422 if that refuses it, ConfigError for what the plan refuses."""
    if code_in({name: {"method": phase.method, "options": phase.options} for name, phase in config.phases.items()}):
        return _planned_elsewhere(config)
    from orchestrator.planning.plan import draft_plan  # with the methods: imports the losses, and torch
    from orchestrator.planning.resolve import build_pipeline

    pipelines = {name: build_pipeline(phase, config.rewards) for name, phase in config.phases.items()}
    return draft_plan(config, pipelines).accepted().bundles


def _planned_elsewhere(config: RunConfig) -> tuple[Bundle, ...]:
    with tempfile.TemporaryDirectory(prefix="troupe-needs-") as scratch:
        recipe = Path(scratch) / "recipe.json"
        recipe.write_text(config.model_dump_json())
        environment = {name: value for name, value in os.environ.items() if name != ADDRESS}  # no Ray is asked
        command = [*COMMAND, "plan", str(recipe), "--json"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PLAN_TIMEOUT_S, env=environment)
        except subprocess.TimeoutExpired:
            raise Problem(504, f"planning took longer than {PLAN_TIMEOUT_S:g} s") from None
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        said = done.stderr.strip().replace(str(recipe), "the recipe").removeprefix("troupe: refused: ")
        raise Problem(422 if done.returncode == REFUSED else 500, said[-2000:])
    planned: dict[str, Any] = json.loads(lines[-1])
    return tuple(
        Bundle(tuple(each["roles"]), each["resources"], tuple(each["selectors"])) for each in planned["bundles"]
    )
