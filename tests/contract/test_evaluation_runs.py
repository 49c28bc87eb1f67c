"""Held-out rows: a phase's loss and metrics on them, whatever a batch's size, and what is refused about them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator.config.schema import RunConfig
from orchestrator.planning.resolve import prepare
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run
from tests.unit.source_stub import write_rows
from tests.unit.tiny import tiny_model_folder


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Two steps on six pairs, with five held out."""
    pairs = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i + 11)} for i in range(11)]
    phase = {
        "method": "dpo",
        "data": {"path": str(write_rows(tmp_path / "train.jsonl", pairs[:6]))},
        "train": {"steps": 2, "batch_size": 2, "learning_rate": 1e-2, "scheduler": "constant"},
        "evaluation": {"rows": {"path": str(write_rows(tmp_path / "test.jsonl", pairs[6:]))}, "every": 1},
    }
    model = {"path": str(tiny_model_folder(tmp_path / "model", hidden=32))}
    return {
        "output": str(tmp_path),
        "model": model,
        "logging": {"trackers": [], "curves": False},
        "phases": {"first": phase},
    }


def ran(recipe: dict[str, Any], where: str = "run") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(lines of steps, lines of evaluations)."""
    config = RunConfig.model_validate({**recipe, "output": str(Path(recipe["output"]) / where)})
    lines = read(run(config, local=True).folder / METRICS_FILE)
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


def test_held_out_rows_are_evaluated_at_the_start_in_between_and_at_the_end(
    recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    steps, evaluations = ran(recipe)
    assert [line["step"] for line in evaluations] == [0, 1, 2]
    assert evaluations[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)  # it starts from its reference
    assert evaluations[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert evaluations[2]["eval_loss"] != pytest.approx(math.log(2), abs=1e-3)
    named = {f"eval_{name}" for name in steps[0] if name.startswith(("rewards/", "logps/"))}
    assert named and named <= set(evaluations[0])
    assert "held-out rows first@0:  loss 0.6931  margin 0.0000  accuracy 0.0%" in capsys.readouterr().out


def test_the_numbers_do_not_depend_on_how_rows_are_cut(recipe: dict[str, Any]) -> None:
    _, expected = ran(recipe)
    recipe["phases"]["first"]["train"]["token_budget"] = 24
    _, found = ran(recipe, "cut")
    unlike = {"eval_shared_share"}  # what begins alike is computed once per micro-batch
    for one, other in zip(found, expected, strict=True):
        metrics = [name for name in one if name.startswith("eval_") and name not in unlike]
        if one["step"] == 0:
            metrics.remove("eval_rewards/accuracies")  # of margins that are zero but for rounding
        assert [one[name] for name in metrics] == pytest.approx([other[name] for name in metrics], rel=1e-4, abs=1e-6)


def test_with_adapters_the_reference_of_held_out_rows_is_the_model_without_them(recipe: dict[str, Any]) -> None:
    recipe["model"]["lora"] = {"r": 4}
    _, evaluations = ran(recipe)
    assert evaluations[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert evaluations[2]["eval_loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_log_probabilities_of_a_reference_for_held_out_rows_are_cached_like_all_others(recipe: dict[str, Any]) -> None:
    _, expected = ran(recipe)
    recipe["phases"]["first"] |= {"options": {"precompute_ref_log_probs": True}}
    recipe["phases"]["first"]["data"]["cache_dir"] = str(Path(recipe["output"]) / "cache")
    for where in ("asked", "kept"):
        _, found = ran(recipe, where)
        losses = [line["eval_loss"] for line in found]
        assert losses == pytest.approx([line["eval_loss"] for line in expected], abs=1e-5)
    (phase,) = prepare(RunConfig.model_validate(recipe)).phases
    assert phase.pipeline.roles == ("policy",), "the third run would need no reference, not even to evaluate"


FOLLOWS = {"sync_ref_model": True, "ref_model_sync_steps": 2}


@pytest.mark.parametrize(("method", "options"), [("bco", {}), ("kto", {}), ("dpo", FOLLOWS)])
def test_an_evaluation_does_not_change_training(recipe: dict[str, Any], method: str, options: dict[str, Any]) -> None:
    # two look across the rows of a batch, one of them remembers; the reference of the third moves after some steps
    recipe["phases"]["first"] |= {"method": method, "options": options}
    recipe["phases"]["first"]["train"]["steps"] = 4
    evaluated, evaluations = ran(recipe)
    del recipe["phases"]["first"]["evaluation"]
    plain, none = ran(recipe, "plain")
    assert (len(evaluations), none) == (5, [])
    last = evaluations[-1]
    margin = last["eval_rewards/chosen"] - last["eval_rewards/rejected"]
    assert last["eval_rewards/margins"] == pytest.approx(margin, abs=1e-6)
    for one, other in zip(evaluated, plain, strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("dpo", {"rows": None}, r"phases\.first\.evaluation names nothing to evaluate on; set .*\.data .*\.rows"),
        ("dpo", {"rows.streaming": True}, r"rows\.streaming=true: what is held out is evaluated all at once"),
        (
            "dpo",
            {"data.streaming": True},
            r"data\.streaming=true: what is held out is .*; leave it out, and set .*limit",
        ),
        ("grpo", {}, r"phases\.first\.evaluation\.rows: grpo learns from what it samples"),
        ("kto", {"rows.limit": 1, "rows.path": "one.jsonl"}, r"has one item; kto swaps completions between items"),
    ],
)
def test_an_evaluation_that_is_impossible_is_refused_before_anything_starts(
    recipe: dict[str, Any], method: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    phase = recipe["phases"]["first"]
    phase["method"] = method
    if method == "grpo":
        phase["data"], recipe["rewards"] = {"path": "example:arithmetic"}, [{"fn": "exact_match"}]
    row = {"prompt": "1+1=", "completion": "2", "label": True}
    for key, value in change.items():
        head, _, below = key.partition(".")
        value = str(write_rows(tmp_path / value, [row])) if below == "path" else value
        target = phase["evaluation"].setdefault(head, {"path": "example:arithmetic"}) if below else phase["evaluation"]
        target[below or head] = value
    with pytest.raises(ConfigError, match=message):
        prepare(RunConfig.model_validate(recipe))


def test_runs_of_one_second_have_folders_of_their_own(recipe: dict[str, Any]) -> None:
    config = RunConfig.model_validate(recipe)
    folders = {run(config, local=True).folder for _ in range(3)}
    assert len(folders) == 3 and all((folder / METRICS_FILE).is_file() for folder in folders)


REWARDS = """
import time
from pathlib import Path
from actors.errors import InfraFailure

def fragile(completions, **columns):
    if columns["kind"][0] == "breaks":
        raise InfraFailure("this worker is broken, and so are the others")
    if columns["kind"][0] == "raises":
        raise KeyError("answer")
    end = time.monotonic() + 200
    while not (saved := len(list(Path({output!r}).glob("*/checkpoints/step-00000002")))) and time.monotonic() < end:
        time.sleep(0.01)
    return [float(saved)] * len(completions)
"""


@pytest.fixture
def answered(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Two steps, and three held-out prompts at the end; a reward waits for the checkpoint of the last
    step, which is written beside the evaluation, and is 1 then."""
    (tmp_path / "rewards_of_test.py").write_text(REWARDS.format(output=str(tmp_path)))
    recipe["rewards"] = [{"fn": f"{tmp_path / 'rewards_of_test.py'}:fragile"}]
    recipe["roles"] = {"rollout": {"engine": "scripted"}, "reward": {"max_attempts": 1}}
    recipe["phases"]["first"]["evaluation"] = {"data": {"path": str(tmp_path / "held.jsonl")}, "at_start": False}
    return recipe


def held_out(tmp_path: Path, *kinds: str) -> None:
    write_rows(tmp_path / "held.jsonl", [{"prompt": f"{i}+2=", "kind": kind} for i, kind in enumerate(kinds)])


def test_a_checkpoint_does_not_wait_for_the_evaluation_and_prompts_that_fail_are_counted(
    answered: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out(tmp_path, "fine", "breaks", "raises")
    result = run(RunConfig.model_validate(answered), local=True)
    [line] = [line for line in read(result.folder / METRICS_FILE) if "eval_reward" in line]
    assert (line["eval_reward"], line["eval_failed"]) == (1.0, 2.0)
    assert result.scores == {"first": 1.0}
    assert "evaluation first: 2 prompt(s) failed and are not in its mean" in capsys.readouterr().out


def test_an_evaluation_that_fails_becomes_a_warning_and_its_metrics_are_missing(
    answered: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out(tmp_path, "breaks", "raises")
    result = run(RunConfig.model_validate(answered), local=True)
    assert result.scores == {}
    assert result.model is not None and (result.model / "model.safetensors").is_file()
    out = " ".join(capsys.readouterr().out.split())
    assert "evaluation first failed, and its number is missing; training goes on: all 2 prompts failed" in out


def test_a_resumed_run_makes_a_missing_evaluation_and_repeats_no_other(
    answered: dict[str, Any], tmp_path: Path
) -> None:
    held_out(tmp_path, "fine")
    config = RunConfig.model_validate(answered)
    first = run(config, local=True)
    file = first.folder / METRICS_FILE
    lines = file.read_text().splitlines(keepends=True)
    assert "eval_reward" in lines[-1]
    file.write_text("".join(lines[:-1]))  # as if it had been killed after its checkpoint
    for _ in range(2):
        assert run(config, local=True, resume=first.folder).scores == {"first": 1.0}
        assert ["eval_reward" in line for line in read(file)] == [False, False, True]
