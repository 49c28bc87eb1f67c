"""Whole runs of several rounds, in this process, of a tiny model: what a round begins with, and what a kill leaves."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file

from orchestrator.config.loading import config_of, load_run
from orchestrator.result import RunResult
from orchestrator.run import run
from tests.unit.tiny import tiny_model_folder

MAKING, LEARNING = 2, 2  # steps of a round
KILLED_AFTER = MAKING + LEARNING + MAKING + 1  # in the second of three rounds, half way through what it learns


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("rounds")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a{i}"}) + "\n" for i in range(8)))
    reward = folder / "reward.py"
    reward.write_text(
        "def late_letters(completions, **columns):\n"
        "    return [sum(map(ord, text)) / len(text) if text.strip() else None for text in completions]\n"
    )
    making = {
        "method": "generate_data",
        "options": {"num_generations": 4, "keep": "best_and_worst"},
        "data": {"path": str(rows)},
        "sampling": {"max_tokens": 6},
        "train": {"epochs": 1, "batch_size": 4},
    }
    learning = {
        "method": "dpo",
        "data": {"path": "${phases.making.output}"},
        "train": {"steps": LEARNING, "batch_size": 4, "learning_rate": 0.01},
    }
    tree: dict[str, Any] = {
        "phases": {"making": making, "learning": learning},
        "rounds": {"count": 3, "phases": ["making", "learning"]},
        "model": {"path": str(tiny_model_folder(folder, hidden=32))},
        "roles": {"rollout": {"engine": "hf"}},
        "rewards": [{"fn": f"{reward}:late_letters"}],
        "output": str(folder / "runs"),
        "logging": {"trackers": []},
        "checkpoint": {"every": 1, "keep": 99},
    }
    return run(config_of(tree, [], "test"), local=True)


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(value, other[name]) for name, value in one.items())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def records(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("part-*.parquet")) for row in parquet.read_table(file).to_pylist()]


def test_each_round_samples_from_what_the_round_before_left_and_has_it_as_its_reference(finished: RunResult) -> None:
    folder = finished.folder
    left = [weights(folder / "phases" / f"learning-{number}" / "model") for number in (1, 2)]
    found = [weights(folder / "references" / f"learning-{number}" / "policy") for number in (2, 3)]
    assert equal(found[0], left[0]) and equal(found[1], left[1]) and not equal(left[0], left[1])
    first = [line["loss"] for line in lines(folder) if line["phase"].startswith("learning")][::LEARNING]
    assert first == pytest.approx([math.log(2)] * 3, abs=1e-6)  # the policy is its reference
    made = [records(folder / "data" / f"making-{number}") for number in (1, 2, 3)]
    assert made[0] != made[1] != made[2] and all(len(each) == 8 for each in made)


def test_each_round_of_iterative_dpo_begins_with_better_samples_than_the_one_before(finished: RunResult) -> None:
    sampled = [line["reward"] for line in lines(finished.folder) if line["phase"].startswith("making")]
    rewards = [sum(sampled[at : at + MAKING]) / MAKING for at in range(0, 3 * MAKING, MAKING)]  # of each round
    assert rewards[0] + 1 < rewards[1] < rewards[2] - 1, "two rounds improve over one"


def test_a_run_that_is_killed_in_its_second_round_does_not_repeat_the_first_and_ends_with_the_same_bits(
    finished: RunResult, tmp_path: Path
) -> None:
    """As a kill leaves it: neither a later checkpoint nor what a later phase made or left."""
    folder = Path(shutil.copytree(finished.folder, tmp_path / finished.folder.name))
    for step in range(KILLED_AFTER + 1, 3 * (MAKING + LEARNING) + 1):
        shutil.rmtree(folder / f"checkpoints/step-{step:08d}")
    for later in ("data/making-3", "phases/learning-2", "references/learning-3"):
        shutil.rmtree(folder / later)
    over = [folder / "data/making-1", folder / "phases/learning-1", folder / "data/making-2"]
    before = {file: file.stat().st_mtime_ns for each in over for file in each.rglob("*")}
    again = run(load_run(folder, []), local=True, resume=folder)
    assert {file: file.stat().st_mtime_ns for each in over for file in each.rglob("*")} == before
    resumed = [line["step"] for line in lines(folder)]
    assert resumed == [line["step"] for line in lines(finished.folder)] == list(range(1, len(resumed) + 1))
    assert finished.model is not None and again.model is not None
    assert equal(weights(again.model), weights(finished.model))
    assert not equal(weights(again.model), weights(folder / "phases/learning-2/model"))
    assert records(folder / "data/making-3") == records(finished.folder / "data/making-3")
