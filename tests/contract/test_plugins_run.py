"""Three steps with each example of docs/extending.md, in files outside of the repository."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.config.loading import load_config
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run
from tests.plugin_files import online
from tests.runs import ARITHMETIC, SFT, merged

EXTENDING = Path(__file__).parents[2] / "docs" / "extending.md"

pytestmark = pytest.mark.timeout(600)


def three_steps(where: Path, base: dict[str, Any], changes: dict[str, Any]) -> list[dict[str, Any]]:
    recipe = where / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(merged(base, {"output": str(where), **changes})))
    result = run(load_config(recipe), local=True)
    steps = [line for line in read(result.folder / METRICS_FILE) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(line["grad_norm"] > 0 and math.isfinite(line["loss"]) for line in steps)
    return steps


def examples(folder: Path) -> None:
    """The files of docs/extending.md: blocks that begin with a file's name as a comment. One without a name belongs to
    the file of the method."""
    name = ""
    for language, text in re.findall(r"```(python|yaml)\n(.*?)```", EXTENDING.read_text(), re.DOTALL):
        named = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        name = named[1] if named else name
        with (folder / name).open("w" if named else "a") as file:
            file.write(text)
        assert (language == "yaml") == name.endswith(".yaml")
        name = name if name.endswith(".py") else "squared_hinge.py"


def test_the_method_and_the_loss_of_the_documentation_are_trained_for_three_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((tmp_path / "my-run.yaml").read_text())
    steps = three_steps(
        tmp_path, recipe, {"train": {"steps": 3, "batch_size": 4}, "logging": {"trackers": [], "curves": False}}
    )
    assert steps[0]["loss"] == pytest.approx(1.0, abs=1e-5), "policy and reference are the same: (1 - 0)²"
    assert steps[0]["difference"] == pytest.approx(0.0, abs=1e-5)
    assert abs(steps[-1]["difference"]) > 1e-3, "the policy has moved, and the reference has not"


def test_the_contrast_of_the_documentation_is_a_loss_of_dpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    examples(tmp_path)
    monkeypatch.chdir(tmp_path)
    changes = {
        "method": "dpo",
        "options": {"loss_type": "squared_hinge.py:squared", "label_smoothing": 0.25},
        "data": {"path": "example:arithmetic_pairs"},
    }
    steps = three_steps(tmp_path, SFT, changes)
    assert steps[0]["loss"] == pytest.approx(0.75**2, abs=1e-5)


def test_the_engine_of_the_documentation_samples_and_a_users_reward_scores_for_three_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    examples(tmp_path)
    mine = online(tmp_path)
    monkeypatch.chdir(tmp_path)
    changes = {
        "rewards": [{"fn": f"{mine}:spread"}],
        "roles": {"rollout": {"engine": "my_engine.py:MyEngine", "kv_cache_gib": 0.05}},
        "train": {**ARITHMETIC["train"], "steps": 3, "batch_size": 2},
        "weights": {"transport": "disk"},
    }
    three_steps(tmp_path, ARITHMETIC, changes)
    assert len(re.findall(r"^\S+ has 6 tokens$", capfd.readouterr().out, re.MULTILINE)) >= 6
