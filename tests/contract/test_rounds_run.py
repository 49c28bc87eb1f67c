"""Whole runs of several rounds, without Ray, of a tiny model: what a round begins with, and what a kill leaves."""

from __future__ import annotations

import itertools
import json
import math
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file

from orchestrator.config.loading import config_of, load_run
from orchestrator.result import RunResult
from orchestrator.run import run
from tests.runs import Run
from tests.unit.tiny import tiny_model_folder

MAKING, LEARNING = 2, 2  # steps of a round
KILLED_AFTER = MAKING + LEARNING + MAKING + 1  # in the second of three rounds, half way through what it learns
CONTRAST = f"""
import time
from pathlib import Path

import torch

HOLD, HELD = Path(__file__).with_name("hold"), Path(__file__).with_name("held")
steps = 0


def sigmoid(scores, beta, *, label_smoothing=0.0):
    '''Of dpo. Where there is a file `hold`, the second step that the second round learns does not end.'''
    global steps
    steps += 1
    if HOLD.exists() and steps == {LEARNING + 2}:
        HELD.touch()
        time.sleep(300)
        raise TimeoutError("this step was to be killed")
    return -torch.nn.functional.logsigmoid(beta * scores.difference)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rounds")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a{i}"}) + "\n" for i in range(8)))
    reward, contrast = folder / "reward.py", folder / "contrast.py"
    reward.write_text(
        "def late_letters(completions, **columns):\n"
        "    return [sum(map(ord, text)) / len(text) if text.strip() else None for text in completions]\n"
    )
    contrast.write_text(CONTRAST)
    making = {
        "method": "generate_data",
        "options": {"num_generations": 4, "keep": "best_and_worst"},
        "data": {"path": str(rows)},
        "sampling": {"max_tokens": 6},
        "train": {"epochs": 1, "batch_size": 4},
    }
    learning = {
        "method": "dpo",
        "options": {"loss_type": f"{contrast}:sigmoid"},
        "data": {"path": "${phases.making.output}"},
        "train": {"steps": LEARNING, "batch_size": 4, "learning_rate": 0.01},
    }
    return {
        "name": "t",
        "phases": {"making": making, "learning": learning},
        "rounds": {"count": 3, "phases": ["making", "learning"]},
        "model": {"path": str(tiny_model_folder(folder, hidden=32))},
        "roles": {"rollout": {"engine": "hf"}},
        "rewards": [{"fn": f"{reward}:late_letters"}],
        "output": str(folder / "runs"),
        "logging": {"trackers": [], "curves": False},
        "checkpoint": {"every": 1, "keep": 99},
    }


@pytest.fixture(scope="module")
def finished(recipe: dict[str, Any]) -> RunResult:
    return run(config_of(recipe, [], "test"), local=True)


@pytest.fixture
def killed(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """The folder of a run whose process got SIGKILL in the step after `KILLED_AFTER`, which its own loss holds, so that
    what there is by then does not depend on how fast anything is."""
    hold, held = (Path(recipe["model"]["path"]).parent / name for name in ("hold", "held"))
    hold.touch()
    try:
        started = Run(tmp_path, {}, "--local", base=recipe)
        started.until(held.exists, "the step that is held")
        saved = f"the checkpoint of step {KILLED_AFTER}"
        started.until(lambda: any(each["step"] == KILLED_AFTER for each in started.events("checkpoint")), saved)
        started.process.send_signal(signal.SIGKILL)
        assert started.process.wait(300) == -signal.SIGKILL
    finally:
        hold.unlink()
    return started.folder


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
    finished: RunResult, killed: Path
) -> None:
    assert [(line["step"], line["phase"]) for line in lines(killed)][-1] == (KILLED_AFTER, "learning-2")
    assert not (killed / "phases/learning-2").exists() and not (killed / "data/making-3").exists()
    over = [killed / "data/making-1", killed / "phases/learning-1", killed / "data/making-2"]
    before = {file: file.stat().st_mtime_ns for each in over for file in each.rglob("*")}
    again = run(load_run(killed, []), local=True, resume=killed)
    assert {file: file.stat().st_mtime_ns for each in over for file in each.rglob("*")} == before
    events = [json.loads(line) for line in (killed / "events.jsonl").read_text().splitlines()]
    assert [each["step"] for each in events if each["event"] == "resumed"] == [KILLED_AFTER]
    steps = list(range(1, 3 * (MAKING + LEARNING) + 1))
    assert [line["step"] for line in lines(killed)] == [line["step"] for line in lines(finished.folder)] == steps
    assert finished.model is not None and again.model is not None
    assert equal(weights(again.model), weights(finished.model))
    left = [weights(killed / "phases" / f"learning-{number}" / "model") for number in (1, 2)]
    saved = weights(killed / f"checkpoints/step-{KILLED_AFTER:08d}/model")
    moved = [left[0], saved, left[1], weights(again.model)]
    assert not any(equal(one, other) for one, other in itertools.pairwise(moved))
    assert records(killed / "data/making-3") == records(finished.folder / "data/making-3")
