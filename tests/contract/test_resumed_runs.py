"""What a resume may change, what it refuses, and what it remembers: whole runs in this process, of a tiny model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from actors.errors import ConfigError, DiskError
from orchestrator.checkpoint import CheckpointStore
from orchestrator.cluster.run_lock import driving
from orchestrator.config.loading import config_of, load_run
from orchestrator.result import RunResult
from orchestrator.run import run
from tests.unit.test_saved_state import disk_of
from tests.unit.tiny import tiny_model_folder

STEPS, LEARNING_RATE = 4, 0.01
VALUE = "checkpoints/step-00000004/models/value/model.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """Four steps of sft with a linear schedule, a checkpoint every two."""
    folder = tmp_path_factory.mktemp("resuming")
    rows = folder / "rows.jsonl"
    answers = ({"prompt": f"a{i}", "completion": f"b{i}", "label": i % 2 == 0} for i in range(12))
    rows.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    tree: dict[str, Any] = {
        "method": "sft",
        "model": {"path": str(tiny_model_folder(folder))},
        "data": {"path": str(rows)},
        "train": {"steps": STEPS, "batch_size": 2, "learning_rate": LEARNING_RATE},
        "output": str(folder / "runs"),
        "logging": {"trackers": [], "curves": False},
        "checkpoint": {"every": 2, "keep": 9},
    }
    return run(config_of(tree, [], "test"), local=True)


@pytest.fixture
def folder(finished: RunResult, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished.folder, tmp_path / finished.folder.name))


def resume(folder: Path, *overrides: str, step: int | None = None) -> RunResult:
    return run(load_run(folder, overrides), local=True, resume=folder, from_step=step)


def refusal(folder: Path, *overrides: str, step: int | None = None) -> str:
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    with pytest.raises(ConfigError) as caught:
        resume(folder, *overrides, step=step)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    return str(caught.value)


def lines(folder: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def rates(folder: Path) -> list[float]:
    return [line["learning_rate"] for line in lines(folder, "metrics.jsonl")]


def weights(result: RunResult) -> dict[str, np.ndarray]:
    assert result.model is not None
    return load_file(result.model / "model.safetensors")


def differing(one: RunResult, other: RunResult) -> list[str]:
    return [name for name, value in weights(one).items() if not np.array_equal(value, weights(other)[name])]


def test_a_run_resumed_from_a_chosen_step_ends_with_the_same_bits(finished: RunResult, folder: Path):
    half_way = finished.folder / "checkpoints" / "step-00000002" / "model" / "model.safetensors"
    again = resume(folder, step=2)
    assert [line["grad_norm"] > 0.1 for line in lines(folder, "metrics.jsonl")] == [True] * STEPS
    assert rates(folder) == pytest.approx([LEARNING_RATE * (1 - step / STEPS) for step in range(STEPS)])
    assert differing(again, finished) == []
    moved = [name for name, value in load_file(half_way).items() if not np.array_equal(value, weights(again)[name])]
    assert moved, "the resumed steps must move the weights, or nothing is compared"


@pytest.mark.parametrize("dies", ["orchestrator.reporting.metrics.MetricsLog.rewind", "orchestrator.run.PhaseRun.run"])
def test_a_run_that_dies_before_its_first_checkpoint_after_a_chosen_step_comes_back_to_that_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, dies: str
):
    with monkeypatch.context() as patched:
        patched.setattr(dies, raising(ZeroDivisionError()))
        with pytest.raises(ZeroDivisionError):
            resume(folder, step=2)
    again = resume(folder)
    assert [event["step"] for event in lines(folder, "events.jsonl") if event["event"] == "resumed"][-1] == 2
    assert [line["step"] for line in lines(folder, "metrics.jsonl")] == [1, 2, 3, 4]
    assert again.checkpoint is not None and again.checkpoint.name == "step-00000004"


def raising(error: Exception) -> Callable[..., None]:
    def raises(*_: Any) -> None:
        raise error

    return raises


def test_a_chosen_step_that_is_refused_gives_nothing_up(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert "holds no checkpoint of step 3; there are: 2, 4" in refusal(folder, step=3)
    assert "seed is 1" in refusal(folder, "seed=1", step=2)
    config = (folder / "config.json").read_text()
    two = ("roles.policy.ranks=2", "roles.policy.backend=deepspeed")
    assert "ranks=2: with --local a role is one rank" in refusal(folder, *two, step=2), "refused by the cluster"
    assert (folder / "config.json").read_text() == config, "what is refused is not recorded"
    with driving(folder):
        assert "is driven by process" in refusal(folder, step=2)
    with monkeypatch.context() as patched:
        patched.setattr("actors.model_worker.ModelWorker.ready", raising(ConfigError("no such model")))
        assert "no such model" in refusal(folder, step=2), "refused by a role"
    state = folder / "checkpoints" / "step-00000002" / "state.json"
    state.write_text(state.read_text() + " ")
    assert "checkpoint of step 2 cannot be used" in refusal(folder, step=2)
    assert len(rates(folder)) == STEPS, "no metric is taken away either"


def test_a_chosen_step_with_which_nothing_is_left_to_do_gives_up_those_after_it(folder: Path):
    resume(folder, "train.steps=6")
    result = resume(folder, f"train.steps={STEPS}", step=STEPS)
    assert result.checkpoint is not None and result.checkpoint.name == "step-00000004"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert [line["step"] for line in lines(folder, "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_run_that_replays_groups_resumes_to_the_same_bits_with_those_that_the_checkpoint_has(tmp_path: Path):
    """Every second prompt teaches nothing, so that some group is replayed in each step after the first."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a{i}", "taught": i % 2}) + "\n" for i in range(12)))
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def spread(completions, taught, **columns):\n"
        "    return [flag * sum(map(ord, text)) % 7 for text, flag in zip(completions, taught)]\n"
    )
    tree: dict[str, Any] = {
        "method": "grpo",
        "options": {"num_generations": 4, "replay_buffer_size": 3, "beta": 0.01},
        "model": {"path": str(tiny_model_folder(tmp_path, hidden=32))},
        "roles": {"rollout": {"engine": "hf"}},
        "rewards": [{"fn": f"{reward}:spread"}],
        "data": {"path": str(rows), "shuffle": False},
        "sampling": {"max_tokens": 4},
        "train": {"steps": STEPS, "batch_size": 6, "learning_rate": LEARNING_RATE},
        "output": str(tmp_path / "runs"),
        "logging": {"trackers": [], "curves": False},
        "checkpoint": {"every": 2, "keep": 9},
    }
    whole = run(config_of(tree, [], "test"), local=True)
    expected = lines(whole.folder, "metrics.jsonl")
    assert expected[0]["replay/groups_replaced"] == 0 and expected[0]["replay/groups_without_spread"] >= 3
    assert [line["replay/buffer"] for line in expected] == [3] * STEPS
    assert all(line["replay/groups_replaced"] == 3 for line in expected[1:])
    again = resume(Path(shutil.copytree(whole.folder, tmp_path / "again")), step=2)
    assert differing(again, whole) == []
    found = lines(again.folder, "metrics.jsonl")
    assert [line["replay/age"] for line in found[1:]] == [line["replay/age"] for line in expected[1:]]
    double = f"rewards=[{{fn: '{reward}:spread', weight: 2}}]"
    other = resume(Path(shutil.copytree(whole.folder, tmp_path / "other")), double, step=2)
    left_out = lines(other.folder, "metrics.jsonl")[2]
    assert (left_out["replay/groups_replaced"], left_out["replay/buffer"]) == (0, 3), "it begins without the old ones"
    (again.folder / "checkpoints/step-00000004/replay.npz").unlink()
    with pytest.raises((ConfigError, DiskError)):
        resume(again.folder, "train.steps=5", step=4)


def test_a_run_that_samples_some_completions_and_takes_the_others_resumes_to_the_same_bits(tmp_path: Path):
    """The teacher's own samples would do as well; with the data's, both kinds of rows are in one batch."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a{i}", "completion": f"b{i}"}) + "\n" for i in range(12)))
    teacher = tiny_model_folder(tmp_path, hidden=32, seed=1)
    tree: dict[str, Any] = {
        "method": "gkd",
        "options": {"lmbda": 0.5},
        "model": {"path": str(tiny_model_folder(tmp_path, hidden=32))},
        "roles": {"teacher": {"model": str(teacher)}, "rollout": {"engine": "hf"}},
        "data": {"path": str(rows)},
        "sampling": {"max_tokens": 4},
        "train": {"steps": STEPS, "batch_size": 4, "learning_rate": LEARNING_RATE},
        "evaluation": {"rows": {"path": str(rows)}},
        "output": str(tmp_path / "runs"),
        "logging": {"trackers": [], "curves": False},
        "checkpoint": {"every": 2, "keep": 9},
    }
    whole = run(config_of(tree, [], "test"), local=True)
    folder = Path(shutil.copytree(whole.folder, tmp_path / "again"))
    again = resume(folder, step=2)
    half_way = load_file(whole.folder / "checkpoints" / "step-00000002" / "model" / "model.safetensors")
    assert any(not np.array_equal(value, weights(again)[name]) for name, value in half_way.items())
    assert differing(again, whole) == []
    shares = [line["completions/from_data"] for line in lines(folder, "metrics.jsonl") if "loss" in line]
    assert len(shares) == STEPS and all(0 < share < 1 for share in shares)
    held_out = [line["eval_divergence"] for line in lines(folder, "metrics.jsonl") if "eval_divergence" in line]
    assert held_out[-1] < held_out[0]


def test_a_longer_run_goes_on_at_the_rate_of_the_longer_schedule(finished: RunResult, folder: Path):
    longer = resume(folder, "train.steps=8")
    assert rates(folder)[STEPS:] == pytest.approx([LEARNING_RATE * (1 - step / 8) for step in range(4, 8)])
    assert differing(longer, finished)
    assert [line["step"] for line in lines(folder, "metrics.jsonl")] == list(range(1, 9))


def test_changed_settings_act_and_are_remembered_by_the_next_resume(folder: Path):
    resume(folder, "train.steps=6", "train.learning_rate=0.5", "phases.sft.train.scheduler=constant")
    assert rates(folder)[STEPS:] == [0.5, 0.5]
    resume(folder, "train.steps=7")
    assert rates(folder)[STEPS:] == [0.5, 0.5, 0.5]
    changed = [event["changed"] for event in lines(folder, "events.jsonl") if event["event"] == "resumed"]
    phase = "phases.sft.train."
    assert changed == [
        {phase + "steps": [4, 6], phase + "learning_rate": [0.01, 0.5], phase + "scheduler": ["linear", "constant"]},
        {phase + "steps": [6, 7]},
    ]
    train = load_run(folder).phases["sft"].train
    assert (train.steps, train.learning_rate, train.scheduler) == (7, 0.5, "constant")
    newest = CheckpointStore(folder / "checkpoints", keep=9).latest()
    assert newest is not None and newest.state.config["phases"]["sft"]["train"]["learning_rate"] == 0.5


def test_a_batch_size_may_change_and_the_items_go_on_where_they_were(folder: Path):
    resume(folder, "train.batch_size=4", "train.steps=5", step=2)
    newest = CheckpointStore(folder / "checkpoints", keep=9).latest()
    assert newest is not None and newest.state.cursor == {"frontier": 2 * 2 + 3 * 4, "beyond": []}


def test_a_finished_run_says_that_there_is_nothing_to_do(folder: Path, capsys: pytest.CaptureFixture[str]):
    before = (folder / "metrics.jsonl").read_text()
    result = resume(folder)
    assert "nothing to do" in capsys.readouterr().out
    assert result.model == folder / "checkpoints" / "step-00000004" / "model"
    assert (folder / "metrics.jsonl").read_text() == before
    assert [event["event"] for event in lines(folder, "events.jsonl")].count("started") == 1, "nothing was launched"


REFUSED = {
    "seed=1": r"seed is 1, and was 0: it decides.*leave it at 0",
    "output=/elsewhere": "output is .*a run stays in its folder",
    "model.dtype=bfloat16": 'model.dtype is "bfloat16", and was "float32"',
    "model.lora={r: 4}": "model.lora.r is 4, and was not set",
    "data.max_length=6": "data.max_length is 6, and was not set: .*positions.*leave it out",
    "data.limit=8": "data.limit is 8, and was not set",
    "data.shuffle=false": "data.shuffle is false, and was true",
    "method=kto": 'phases.sft.method is "kto", and was "sft"',
    "train.steps=3": "would have 3 steps, and 4 are done: raise .*--step",
    "train.bema={update_freq: 1, update_after: 0}": "bema is set, and was not: the checkpoint holds no average",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_setting_that_the_checkpoint_depends_on_is_refused_with_a_remedy(folder: Path, override: str):
    config = (folder / "config.json").read_text()
    said = refusal(folder, override)
    assert "cannot go on from step 4" in said and f"model.path={folder}" in said
    assert re.search(REFUSED[override], said), said
    assert (folder / "config.json").read_text() == config, "what is refused is not recorded"


def test_other_rows_are_refused_and_the_same_rows_may_have_moved(folder: Path, tmp_path: Path):
    moved = tmp_path / "moved.jsonl"
    rows = Path(load_run(folder).phases["sft"].data.path or "").read_text()
    moved.write_text(rows.replace("b7", "b8"))
    assert "rows of phases.sft.data" in refusal(folder, f"data.path={moved}", "train.steps=5")
    moved.write_text(rows)
    resume(folder, f"data.path={moved}", "train.steps=5")
    assert len(rates(folder)) == 5


def test_a_batch_size_under_epochs_would_count_other_steps_and_is_refused(folder: Path):
    config = load_run(folder, ["train.steps=null", "train.epochs=1"])
    again = run(config.model_copy(update={"output": folder / "more"}), local=True)
    assert "set phases.sft.train.steps instead" in refusal(again.folder, "train.batch_size=3", step=2)


def test_a_run_that_is_driven_is_refused_before_anything_of_it_is_read(folder: Path):
    with driving(folder):
        said = refusal(folder, "seed=1")
    assert "is driven by process" in said and "seed" not in said


@pytest.mark.parametrize("largest_file", [0, 200])
def test_a_full_disk_ends_a_resume_with_an_error_of_its_own_and_leaves_what_there_was(folder: Path, largest_file: int):
    kept = ("config.json", "metrics.jsonl")
    before = [(folder / file).read_text() for file in kept]
    with disk_of(largest_file), pytest.raises(DiskError, match=f"{folder}.*MiB free there"):
        resume(folder, "train.steps=5")
    assert [(folder / file).read_text() for file in kept] == before
    resume(folder, "train.steps=5")
    assert len(rates(folder)) == 5


def test_a_new_run_is_its_owners_alone(finished: RunResult):
    assert finished.folder.stat().st_mode & 0o777 == 0o700


def test_ppo_goes_on_with_the_kl_coefficient_that_it_had_adapted_and_with_both_its_models(tmp_path: Path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a{i}"}) + "\n" for i in range(12)))
    (tmp_path / "digits.py").write_text(
        "def digits(completions, **columns):\n    return [sum(map(str.isdigit, text)) for text in completions]\n"
    )
    tree: dict[str, Any] = {
        "method": "ppo",
        "options": {"kl_coef": 0.2, "kl_target": 0.01, "kl_horizon": 40},
        "model": {"path": str(tiny_model_folder(tmp_path))},
        "rewards": [{"fn": f"{tmp_path / 'digits.py'}:digits"}],
        "data": {"path": str(rows)},
        "train": {"steps": STEPS, "batch_size": 4, "learning_rate": LEARNING_RATE},
        "sampling": {"max_tokens": 6},
        "roles": {"rollout": {"engine": "hf"}},
        "output": str(tmp_path / "runs"),
        "logging": {"trackers": [], "curves": False},
        "checkpoint": {"every": 2, "keep": 9},
    }
    whole = run(config_of(tree, [], "test"), local=True)
    coefficients = [line["objective/kl_coef"] for line in lines(whole.folder, "metrics.jsonl")]
    assert coefficients[0] == 0.2 and len(set(coefficients)) == STEPS, "the coefficient must move at every step"
    again = resume(Path(shutil.copytree(whole.folder, tmp_path / whole.folder.name)), step=2)
    assert [line["objective/kl_coef"] for line in lines(again.folder, "metrics.jsonl")] == coefficients
    assert differing(again, whole) == []
    values = [load_file(found.folder / VALUE) for found in (again, whole)]
    assert values[0].keys() == values[1].keys()
    assert all(np.array_equal(value, values[1][name]) for name, value in values[0].items())
