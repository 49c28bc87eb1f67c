"""Runs whose reference is asked once for the whole data set: they train as others do, and a second run asks nobody."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from orchestrator.config.loading import load_run
from orchestrator.config.schema import RunConfig
from orchestrator.planning.resolve import prepare
from orchestrator.result import RunResult
from orchestrator.run import run
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder

STEPS = 4
ONCE = {"precompute_ref_log_probs": True}
EVERY_STEP = {"precompute_ref_log_probs": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=32)


def config(
    where: Path,
    model: Path,
    method: str = "dpo",
    *,
    options: dict[str, Any] = ONCE,
    before: bool = False,
    lora: int = 0,
) -> RunConfig:
    """A phase of the method on pairs, several micro-batches a step; `before`: a supervised phase comes first; `lora`:
    the rank of adapters."""
    made = ({"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(10 * i)} for i in range(2, 26))
    data = {"path": str(write_rows(where / "pairs.jsonl", made)), "cache_dir": str(where / "cache")}
    train = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-3, "scheduler": "constant", "token_budget": 64}
    phase = {"method": method, "options": options, "data": data, "train": train}
    answers = ({"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(2, 26))
    supervised = {"method": "sft", "data": {"path": str(write_rows(where / "sft.jsonl", answers))}, "train": train}
    phases = {"sft": supervised, method: phase} if before else {method: phase}
    adapters = {"lora": {"r": lora, "alpha": 64.0}} if lora else {}
    rest = {"logging": {"trackers": [], "curves": False}, "checkpoint": {"every": 2, "keep": 3}}
    return RunConfig.model_validate({"model": {"path": str(model), **adapters}, "phases": phases, **rest})


def started(config: RunConfig, output: Path) -> RunResult:
    """A run in this process. Each has an output of its own: folders are named by the second."""
    return run(config.model_copy(update={"output": output}), local=True)


def metrics(result: RunResult) -> list[dict[str, float]]:
    """What was learned in each step; not how long it took."""
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    named = ("step", "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen")
    return [{name: line[name] for name in named if name in line} for line in lines]


def events(result: RunResult, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (result.folder / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def origins(result: RunResult) -> list[str]:
    return [event["from"] for event in events(result, "precomputed")]


def weights(result: RunResult) -> dict[str, Tensor]:
    assert result.model is not None
    return load_file(result.model / "model.safetensors")


def assert_alike(result: RunResult, expected: RunResult) -> None:
    """Equal but for rounding: rows go through the reference in other company."""
    for found, wanted in zip(metrics(result), metrics(expected), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert any(abs(line.get("rewards/chosen", 0)) > 1e-4 for line in metrics(result)), (
        "the policy must have left its reference"
    )


def assert_equal_bits(result: RunResult, expected: RunResult) -> None:
    assert metrics(result) == metrics(expected)
    assert all(line["grad_norm"] > 1e-3 for line in metrics(result)), "nothing was learned, so nothing is compared"
    found, wanted = weights(result), weights(expected)
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize(
    ("method", "options"),
    [("dpo", {}), ("bco", {}), ("kto", {"loss_type": "apo_zero_unpaired"})],
    ids=["dpo", "bco", "kto apo_zero_unpaired"],
)
def test_precomputed_values_train_like_a_reference_in_every_step_and_a_second_run_launches_none(
    method: str, options: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    once = config(tmp_path, model, method, options={**options, **ONCE})
    first = started(once, tmp_path / "first")
    plain = started(config(tmp_path, model, method, options={**options, **EVERY_STEP}), tmp_path / "plain")
    assert_alike(first, plain)
    assert origins(first) == ["reference"]
    assert [event["role"] for event in events(first, "released")] == ["reference"]
    assert origins(plain) == []
    assert prepare(once).phases[0].pipeline.roles == ("policy",)
    second = started(once, tmp_path / "second")
    assert origins(second) == ["cache"]
    assert_equal_bits(second, first)


def test_with_adapters_the_policy_without_them_computes_the_values_that_a_reference_would(
    model: Path, tmp_path: Path
) -> None:
    result = started(config(tmp_path, model, lora=4), tmp_path / "once")
    assert_alike(result, started(config(tmp_path, model, lora=4, options=EVERY_STEP), tmp_path / "plain"))
    assert origins(result) == ["reference"]
    assert events(result, "released") == [], "the policy goes on"
    assert origins(started(config(tmp_path, model), tmp_path / "whole")) == ["cache"], "the same base, the same values"


def test_the_reference_of_a_later_phase_is_the_policy_at_its_start_and_a_resumed_run_reads_the_cache(
    model: Path, tmp_path: Path
) -> None:
    once = config(tmp_path, model, before=True)
    result = started(once, tmp_path / "once")
    assert origins(result) == ["reference"]
    assert metrics(result)[STEPS]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert_alike(result, started(config(tmp_path, model, before=True, options=EVERY_STEP), tmp_path / "plain"))
    expected_metrics, expected = metrics(result), weights(result)
    assert all(line["grad_norm"] > 1e-3 for line in expected_metrics), "nothing was learned, so nothing is compared"
    shutil.rmtree(result.folder / "checkpoints" / f"step-{2 * STEPS:08d}")
    resumed = run(load_run(result.folder), local=True, resume=result.folder)
    assert origins(resumed) == ["reference", "cache"]
    assert metrics(resumed) == expected_metrics
    assert [name for name, tensor in weights(resumed).items() if not torch.equal(tensor, expected[name])] == []
