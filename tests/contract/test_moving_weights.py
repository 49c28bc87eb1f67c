"""Weights that move besides training, in whole runs in one process: a reference that follows the policy, and averages.
Beside each run stands the loop that one would write without roles, collectors or stages.
"""

from __future__ import annotations

import shutil
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from actors.batch import Batch
from actors.columns import Head
from actors.errors import ConfigError
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.sharding import shard
from actors.specs import BackendSpec
from orchestrator.cluster.launch import optim_spec
from orchestrator.collection.cursor import Cursor
from orchestrator.config.schema import RunConfig
from orchestrator.losses.objective import LossObjective
from orchestrator.planning.resolve import prepare
from orchestrator.result import RunResult
from orchestrator.run import run
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder

STEPS, EVERY, SHARE = 5, 2, 0.6
ROWS = {
    "dpo": lambda i: {"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 11)},
    "kto": lambda i: {"prompt": f"{i}+1=", "completion": str(i + i % 2), "label": i % 2 == 1},
}
ROWS["bco"] = ROWS["kto"]
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": EVERY, "ref_model_mixup_alpha": SHARE}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=32)


def phase(where: Path, method: str = "dpo", *, options: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    rows = write_rows(where / f"{method}.jsonl", map(ROWS[method], range(24)))
    schedule = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-2, "token_budget": 64, **train}
    return {
        "method": method,
        "options": SYNC if options is None else options,
        "data": {"path": str(rows)},
        "train": schedule,
    }


def configured(where: Path, model: Path, phases: dict[str, Any], lora: dict[str, Any] | None = None) -> RunConfig:
    keys = {"output": where, "logging": {"trackers": [], "curves": False}, "checkpoint": {"every": 1, "keep": 99}}
    return RunConfig.model_validate({**keys, "model": {"path": str(model), "lora": lora}, "phases": phases})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_bits(one: Path, other: Path) -> None:
    found, expected = weights(one), weights(other)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def naive_loop(config: RunConfig, to: Path) -> None:
    """Draw, compare with the reference, step, and every second step move the reference: one after the other."""
    (prepared,) = prepare(config).phases
    pipeline, train = prepared.pipeline, prepared.config.train
    stage = pipeline.updates[0]
    assert stage.call is not None
    objective = LossObjective(stage.call, stage.options["reduce"], stage.options["loss_options"])
    spec, optim = ModelSpec(config.model.path), optim_spec(prepared, "policy", config.roles.policy)
    policy = ModelWorker("policy", spec, BackendSpec("single", optim), threads=torch.get_num_threads())
    reference = ModelWorker("reference", spec, BackendSpec("single"), threads=torch.get_num_threads())
    for role in (policy, reference):
        role.ready()
    positions = Cursor().unsettled()
    for step in range(1, STEPS + 1):
        batch: Batch = prepared.source.batch(list(islice(positions, train.batch_size)))
        ((rows, part),) = shard(batch.only({"tokens", "mask", "group"}), 1, train.token_budget)
        column = np.zeros(batch.num_tokens, np.float32)
        _, block = reference.infer(part, ("ref_logps",), Head.VOCABULARY, 1.0, True)
        column[batch.token_index(np.asarray(rows))] = block["ref_logps"]
        needed = batch.with_columns(ref_logps=column).only({"tokens", "mask", "group"} | objective.columns)
        kept = objective.keep_groups
        ((_, part),) = shard(needed, 1, train.token_budget, keep_groups=kept, statistics_rows=objective.statistics_rows)
        policy.update(part, objective, 1.0, stage.name)
        if step % EVERY == 0:
            with torch.no_grad():
                ours = policy.backend.model.parameters()
                for own, trained in zip(reference.backend.model.parameters(), ours, strict=True):
                    own.mul_(1 - SHARE).add_(trained, alpha=SHARE)
    policy.save_model(str(to / "model"))
    reference.save_model(str(to / "reference"))


@pytest.mark.parametrize("method", ROWS)
def test_a_run_with_a_synchronised_reference_equals_the_naive_loop_bit_for_bit(
    model: Path, tmp_path: Path, method: str
) -> None:
    config = configured(tmp_path, model, {method: phase(tmp_path, method)})
    result = run(config, local=True)
    naive_loop(config, tmp_path / "naive")
    assert result.checkpoint is not None
    for role in ("model", "reference"):
        assert_equal_bits(result.checkpoint / role, tmp_path / "naive" / role)
    assert not torch.equal(*(weights(result.checkpoint / role)["model.norm.weight"] for role in ("model", "reference")))


def test_a_synchronised_reference_changes_training_from_the_next_step_on(model: Path, tmp_path: Path) -> None:
    still, following = (
        run(configured(tmp_path, model, {"dpo": phase(tmp_path, options=options)}), local=True)
        for options in ({}, SYNC)
    )
    checkpoints = [result.folder / "checkpoints" for result in (still, following)]
    second = [weights(folder / f"step-{EVERY:08d}" / "model") for folder in checkpoints]
    third = [weights(folder / f"step-{EVERY + 1:08d}" / "model") for folder in checkpoints]
    assert all(torch.equal(weight, second[1][name]) for name, weight in second[0].items())
    assert not all(torch.equal(weight, third[1][name]) for name, weight in third[0].items())
    assert not (checkpoints[0] / f"step-{STEPS:08d}" / "reference").exists()


BEMA = {"update_freq": 2}
PHASES = {
    "a reference that follows": lambda where: {"dpo": phase(where)},
    "an average": lambda where: {"dpo": phase(where, options={}, bema=BEMA)},
    "both, in the second phase": lambda where: {"kto": phase(where, "kto"), "dpo": phase(where, bema=BEMA)},
}


@pytest.mark.parametrize("phases", PHASES.values(), ids=PHASES)
@pytest.mark.parametrize("left", [3, 4], ids=lambda left: f"step {left}")
def test_a_resumed_run_ends_with_the_same_bits(model: Path, tmp_path: Path, phases: Any, left: int) -> None:
    config = configured(tmp_path, model, phases(tmp_path))
    whole = run(config, local=True)
    assert whole.checkpoint is not None
    kept = whole.checkpoint.rename(tmp_path / "kept")
    before = STEPS * (len(config.phases) - 1)
    left_at = weights(whole.folder / "checkpoints" / f"step-{before + left:08d}" / "model")
    for step in range(before + left + 1, before + STEPS):
        shutil.rmtree(whole.folder / "checkpoints" / f"step-{step:08d}")
    resumed = run(config, local=True, resume=whole.folder)
    assert resumed.checkpoint == whole.checkpoint
    models = [path.parent.relative_to(kept) for path in kept.rglob("model.safetensors")]
    last = list(config.phases.values())[-1]
    expected = {"model"} | ({"reference"} if last.options else set()) | ({"bema"} if last.train.bema else set())
    assert {str(path) for path in models} == expected
    for name in models:
        assert_equal_bits(resumed.checkpoint / name, kept / name)
    moved = [name for name, weight in weights(kept / "model").items() if not torch.equal(weight, left_at[name])]
    assert moved, "what was trained after the resume must move the weights, or nothing is compared"


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "adapters"])
def test_the_average_of_a_run_equals_the_papers_formula_on_its_checkpoints(
    model: Path, tmp_path: Path, lora: dict[str, Any] | None
) -> None:
    """With adapters the merged weights are no average of merged weights, so there only that it is another model."""
    config = configured(tmp_path, model, {"dpo": phase(tmp_path, options={}, bema=BEMA)}, lora)
    result = run(config, local=True)
    assert result.averaged is not None and result.checkpoint is not None
    found = weights(result.averaged)
    trained = weights(result.checkpoint / "model")
    assert not all(torch.allclose(weight, trained[name], atol=1e-4) for name, weight in found.items())
    assert (result.averaged / "tokenizer.json").is_file()
    if lora is None:
        start = ema = average = weights(model)
        for step in (2, 4):
            theta = weights(result.folder / "checkpoints" / f"step-{step:08d}" / "model")
            beta, alpha = (10 + step) ** -0.5, (10 + step) ** -0.2
            ema = {name: (1 - beta) * ema[name] + beta * weight for name, weight in theta.items()}
            average = {name: ema[name] + alpha * (weight - start[name]) for name, weight in theta.items()}
        for name, weight in average.items():
            torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-6)


def test_a_run_without_averaging_saves_no_average(model: Path, tmp_path: Path) -> None:
    result: RunResult = run(configured(tmp_path, model, {"dpo": phase(tmp_path, options={})}), local=True)
    assert result.averaged is None


def test_resuming_with_sync_ref_model_newly_set_is_refused(model: Path, tmp_path: Path) -> None:
    make = partial(configured, tmp_path, model)
    result = run(make({"dpo": phase(tmp_path, options={})}), local=True)
    shutil.rmtree(result.folder / "checkpoints" / f"step-{STEPS:08d}")
    with pytest.raises(ConfigError, match=r"would move the weights of reference: .* leave those options as they were"):
        run(make({"dpo": phase(tmp_path)}), local=True, resume=result.folder)


@pytest.mark.parametrize(
    ("options", "train", "message"),
    [
        (
            SYNC | {"ref_model_sync_steps": 6},
            {},
            r"reference follow every 6 steps, but the phase has 5; lower options\.",
        ),
        (
            {},
            {"bema": {"update_after": 2, "update_freq": 4}},
            r"first average at step 6 .* has 5 optimizer steps; lower",
        ),
        ({}, {"bema": {}}, r"first average at step 400 .* lower phases\.dpo\.train\.bema\.update_freq"),
    ],
    ids=["reference", "update_after", "default"],
)
def test_an_interval_longer_than_the_phase_is_refused(
    model: Path, tmp_path: Path, options: dict[str, Any], train: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(configured(tmp_path, model, {"dpo": phase(tmp_path, options=options, **train)}))
