"""Runs that change the number of their workers by themselves, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.loading import config_of
from orchestrator.json_lines import LineReader
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run

pytestmark = pytest.mark.timeout(300)

STEPS = 4  # of each phase
WINDOW = 3  # steps that a decision looks back on


def recipe(folder: Path, rollout: dict[str, Any]) -> dict[str, Any]:
    """A phase with eight prompts a step, then one with a single prompt. A worker works on two prompts at a time."""
    data = {"path": "example:arithmetic"}
    common = {"method": "grpo", "options": {"num_generations": 4}, "data": data, "sampling": {"max_tokens": 5}}
    engine = {"engine": "scripted", "max_concurrency": 8, "engine_options": {"seconds_per_step": 0.01}}
    return {
        "name": "t",
        "model": {"path": "example:arithmetic"},
        "rewards": [{"fn": "exact_match"}, {"fn": "completion_length"}],
        "phases": {
            "many": {**common, "train": {"steps": STEPS, "batch_size": 8}},
            "few": {**common, "train": {"steps": STEPS, "batch_size": 1}},
        },
        "roles": {"rollout": {**engine, **rollout}},
        "output": str(folder),
        "logging": {"trackers": [], "curves": False},
    }


def test_a_run_adds_a_worker_while_calls_wait_and_removes_it_when_few_come_and_learns_the_same(tmp_path: Path) -> None:
    limits = {"min": 1, "max": 2, "steps": WINDOW, "cooldown_s": 0, "target_wait": 0.001}
    scaled = run(config_of(recipe(tmp_path, {"autoscale": limits}), [], "test"), local=True)
    fixed = run(config_of(recipe(tmp_path, {}), [], "test"), local=True)
    events = LineReader(scaled.folder / "events.jsonl").new()
    up, down = [event for event in events if event["event"] == "resized"]
    assert (up["from"], up["to"], down["from"], down["to"]) == (1, 2, 2, 1)
    assert up["why"].startswith("training waited ") and up["why"].endswith("the peak 8 calls shared 2 places")
    assert down["why"] == f"at the peak of the last {WINDOW} steps 1 calls shared 4 places"
    lines = {line["step"]: line for line in read(scaled.folder / METRICS_FILE)}
    assert lines[WINDOW]["time"] <= up["time"] + 0.001 + 60 and up["time"] <= lines[WINDOW + 1]["time"]
    assert lines[STEPS + WINDOW - 1]["time"] <= down["time"] <= lines[STEPS + WINDOW + 1]["time"]
    others = {line["step"]: line for line in read(fixed.folder / METRICS_FILE)}
    assert lines.keys() == others.keys() and len(lines) == 2 * STEPS
    assert [lines[step]["loss"] for step in lines] == [others[step]["loss"] for step in lines]
    assert len({line["loss"] for line in lines.values()}) > 1
