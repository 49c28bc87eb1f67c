"""Rounds in which the model of the round before is the opponent, the reference or the judge: whole runs in this
process, of a tiny model; which weights they are is told by fingerprints."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet
from safetensors.numpy import load_file

from orchestrator.config.loading import config_of
from orchestrator.result import RunResult
from orchestrator.run import run
from tests.unit.tiny import tiny_model_folder


def tree(folder: Path, generating: dict[str, Any], rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Two rounds of one step that makes data and two of dpo."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generate = {
        "method": "generate_data",
        "data": {"path": str(data)},
        "sampling": {"max_tokens": 6},
        "train": {"epochs": 1, "batch_size": len(rows)},
        "options": generating,
    }
    dpo = {
        "method": "dpo",
        "data": {"path": "${phases.generate.output}"},
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
    }
    return {
        "phases": {"generate": generate, "dpo": dpo},
        "rounds": {"count": 2, "phases": ["generate", "dpo"]},
        "model": {"path": str(tiny_model_folder(folder, hidden=32))},
        "roles": {"rollout": {"engine": "hf"}},
        "output": str(folder / "runs"),
        "logging": {"trackers": [], "curves": False},
        **changes,
    }


def published(result: RunResult) -> dict[tuple[str, str], str]:
    """(phase, engine role) -> the fingerprint of the weights with which the engines began the phase."""
    events = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    found = [event for event in events if event["event"] == "published"]
    assert all(event["source"] == "policy" for event in found)
    return {(event["phase"], event["role"]): event["fingerprint"] for event in found}


def left_by(result: RunResult, phase: str) -> Path:
    return result.folder / "phases" / phase / "model"


def test_in_self_rewarding_rounds_the_judge_and_the_sampler_are_the_model_that_the_round_before_left(
    tmp_path: Path,
) -> None:
    judge = {
        "kind": "binary",
        "role": "judge",
        "template": "{prompt}{completion}?",
        "pattern": r"(?s)^(?P<yes>[a-zA-Z])|^(?P<no>.)",
        "judgements": 8,
        "temperature": 1.0,
        "max_tokens": 1,
    }
    roles = {"rollout": {"engine": "hf"}, "judge": {"kind": "engine", "engine": "hf", "max_model_len": 64}}
    rows = [{"prompt": f"a{i}"} for i in range(12)]
    given = tree(
        tmp_path, {"num_generations": 4, "keep": "best_and_worst"}, rows, roles=roles, rewards=[{"judge": judge}]
    )
    result = run(config_of(given, [], "test"), local=True)
    seen = published(result)
    first, second = (seen[f"generate-{number}", "rollout"] for number in (1, 2))
    assert seen["generate-1", "judge"] == first != second == seen["generate-2", "judge"]
    alone = {
        **given["phases"]["generate"],
        "model": {"path": str(left_by(result, "dpo-1"))},
        "roles": roles,
        "options": {"scored": False},
        "output": str(tmp_path / "alone"),
        "logging": {"trackers": [], "curves": False},
    }
    assert set(published(run(config_of(alone, [], "test"), local=True)).values()) == {second}
    made = [parquet.read_table(result.folder / "data" / f"generate-{number}").to_pylist() for number in (1, 2)]
    assert all(len(rows) >= 4 and all(row["score_chosen"] > row["score_rejected"] for row in rows) for rows in made)


def test_in_self_play_rounds_the_opponent_and_the_reference_are_the_model_that_the_round_before_left(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"a{i}", "completion": f"b{i}c"} for i in range(8)]
    result = run(config_of(tree(tmp_path, {"keep": "data_and_samples"}, rows), [], "test"), local=True)
    seen = published(result)
    assert seen["generate-1", "rollout"] != seen["generate-2", "rollout"] == seen["dpo-2", "rollout"]
    left, found = (
        load_file(folder / "model.safetensors")
        for folder in (left_by(result, "dpo-1"), result.folder / "references" / "dpo-2" / "policy")
    )
    assert all(np.array_equal(value, found[name]) for name, value in left.items())
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["phase"].startswith("dpo")]
    assert [losses[0], losses[2]] == pytest.approx([math.log(2)] * 2, abs=1e-6)  # the policy is its reference
    for number in (1, 2):
        made = parquet.read_table(result.folder / "data" / f"generate-{number}").to_pylist()
        assert sorted(row["chosen"] for row in made) == sorted(f"b{i}c" for i in range(8))
        assert all(row["rejected"] != row["chosen"] for row in made)
