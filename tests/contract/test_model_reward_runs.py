"""Runs that models reward, step by step and several of them together, in this process and with the hf engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.columns import Head
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.specs import BackendSpec, OptimSpec
from orchestrator.config.loading import config_of
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run
from tests.online_phases import Phase, recipe
from tests.unit.tiny import tiny_model_folder

TWO = 2  # steps: the second has the weights of the first
PROCESS = {"supervision": "process", "num_generations": 4}
PHASES = {
    "grpo": Phase("grpo", {**PROCESS, "scale_rewards": "batch"}, "kl"),
    "reinforce_pp_baseline": Phase("reinforce_pp_baseline", PROCESS, "kl"),
    "reinforce_pp": Phase("reinforce_pp", {"num_generations": 4}, "kl"),
}


def scoring_folder(where: Path, head: Head, seed: int) -> str:
    """A model with a head that gives numbers, as a phase would leave it."""
    model = ModelSpec(str(tiny_model_folder(where, seed=seed)))
    worker = ModelWorker(
        "rm", replace(model, head=head), BackendSpec("single", OptimSpec(1e-3, total_steps=1)), threads=1, seed=seed
    )
    worker.ready()
    folder = where / f"{head}-{seed}"
    folder.mkdir()
    worker.save_model(str(folder))
    return str(folder)


def rewarded(where: Path, phases: dict[str, Phase]) -> list[dict[str, Any]]:
    """The metrics of the steps of a run with a process reward model, an ensemble of two, and a function."""
    tree = recipe(where, {"engine": "hf"}, phases)
    models = {"prm": (Head.STEP_SCALAR, 1), "rm_a": (Head.ROW_SCALAR, 2), "rm_b": (Head.ROW_SCALAR, 3)}
    tree["roles"] = {"rollout": {"engine": "hf"}} | {
        role: {"kind": "frozen", "model": scoring_folder(where, *of)} for role, of in models.items()
    }
    tree["rewards"] += [
        {"role": "prm", "steps": "each", "step_separator": "a", "weight": 2.0},
        {"role": ["rm_a", "rm_b"], "combine": "mean_minus_std", "deviations": 0.5},
    ]
    for phase in tree["phases"].values():
        phase["sampling"] = {"max_tokens": 24}
        phase["train"] |= {"batch_size": 3, "steps": TWO}
    lines = read(run(config_of(tree, [], "test"), local=True).folder / METRICS_FILE)
    return [line for line in lines if "loss" in line]


def test_methods_learn_from_the_rewards_of_steps_beside_an_ensemble_and_a_function(tmp_path: Path) -> None:
    lines = rewarded(tmp_path, PHASES)
    assert [line["phase"] for line in lines] == [name for name in PHASES for _ in range(TWO)]
    further: list[float] = []  # steps of an answer beyond its first
    for line in lines:
        said = {name: line[f"rewards/{name}/mean"] for name in ("spread", "prm", "ensemble")}
        said["prm"] *= 1 - line["rewards/prm/frac_none"]  # an empty answer has no step
        assert line["reward"] == pytest.approx(said["spread"] + 2 * said["prm"] + said["ensemble"], rel=1e-4)
        assert line["rewards/ensemble/ensemble_std"] > 0 and line["grad_norm"] > 0
        if PHASES[line["phase"]].options.get("supervision") == "process":
            assert line["steps/per_answer"] * line["steps/mean_reward"] == pytest.approx(said["prm"], rel=1e-4)
            further.append(line["steps/per_answer"] - (1 - line["rewards/prm/frac_none"]))
    assert max(further) > 0, "some answers have several steps"
