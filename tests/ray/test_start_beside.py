"""A whole run whose engines and scorers start beside its first phase, each in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import ARITHMETIC, Run

pytestmark = pytest.mark.timeout(600)

GRPO = ("method", "options", "data", "sampling")
RECIPE: dict[str, Any] = {
    **{key: value for key, value in ARITHMETIC.items() if key not in (*GRPO, "train")},
    "phases": {
        "sft": {"method": "sft", "data": {"path": "example:arithmetic_sft"}, "train": {"steps": 3, "batch_size": 8}},
        "grpo": {**{key: ARITHMETIC[key] for key in GRPO}, "train": {"steps": 2, "batch_size": 8}},
    },
    "roles": {"policy": {"cpus": 0.5}, "rollout": {"engine": "hf", "cpus": 0.5, "workers": 2}, "reward": {"cpus": 0.1}},
}


def test_training_begins_before_the_engines_are_up_and_samples_with_them_in_the_next_phase(tmp_path: Path):
    run = Run(tmp_path, {}, base=RECIPE)
    run.wait(500)
    kinds = [(event["event"], event.get("role")) for event in run.lines("events.jsonl")]
    started = kinds.index(("started", None))
    assert kinds.index(("up", "policy")) < started < kinds.index(("up", "rollout"))
    assert ("first_result", "rollout") in kinds and ("first_result", "reward") in kinds
    steps = [(line["phase"], line["step"]) for line in run.lines("metrics.jsonl") if "step_time" in line]
    assert steps == [("sft", 1), ("sft", 2), ("sft", 3), ("grpo", 4), ("grpo", 5)]
    assert "2 rollout worker(s) start beside sft" in run.output.read_text()
