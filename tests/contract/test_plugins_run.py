"""Three steps with a method, losses and an engine of a user's own, in files outside of the repository."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.loading import load_config
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run
from tests.plugin_files import engine, written
from tests.runs import ARITHMETIC, SFT, merged

pytestmark = pytest.mark.timeout(600)


def three_steps(where: Path, base: dict[str, Any], changes: dict[str, Any]) -> list[dict[str, Any]]:
    recipe = where / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(merged(base, {"output": str(where), **changes})))
    result = run(load_config(recipe), local=True)
    steps = [line for line in read(result.folder / METRICS_FILE) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(line["grad_norm"] > 0 and math.isfinite(line["loss"]) for line in steps)
    return steps


def test_a_users_method_with_a_loss_of_its_own_is_trained_for_three_steps(tmp_path: Path):
    file = written(tmp_path / "elsewhere")
    steps = three_steps(
        tmp_path,
        SFT,
        {"method": f"{file}:my_method", "options": {"beta": 0.5}, "data": {"path": "example:arithmetic_pairs"}},
    )
    assert steps[0]["loss"] == pytest.approx(1.0, abs=1e-5), "policy and reference are the same: (1 - 0)²"
    assert steps[0]["margin"] == pytest.approx(0.0, abs=1e-5)
    assert abs(steps[-1]["margin"]) > 1e-3, "the policy has moved, and the reference has not"


def test_a_users_engine_samples_and_a_users_reward_scores_for_three_steps(tmp_path: Path):
    told = tmp_path / "told.txt"
    mine = engine(tmp_path, told)
    changes = {
        "rewards": [{"fn": f"{mine}:spread"}],
        "roles": {"rollout": {"engine": f"{mine}:CountingEngine", "kv_cache_gib": 0.05}},
        "train": {**ARITHMETIC["train"], "steps": 3, "batch_size": 2},
        "weights": {"transport": "disk"},
    }
    three_steps(tmp_path, ARITHMETIC, changes)
    assert len(told.read_text().splitlines()) >= 3
