"""`${phases.NAME.model}`: which paths stand for what a phase leaves, and which of them a run can keep its word on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.schema import RunConfig
from orchestrator.methods import build
from orchestrator.phases.phase_weights import keep_phase
from orchestrator.planning.handover import is_handed_over, kept_folder, phase_of
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import draft_plan

PLACEHOLDER = "${phases.warm-up.model}"


def refusals(model: str, *phases: str, role: str = "reference") -> tuple[str, ...]:
    """Of a run with these phases, whose role begins with that model."""
    methods = {name: {"method": "dpo"} for name in phases}
    config = RunConfig.model_validate({"phases": methods, "roles": {role: {"model": model}}})
    pipelines = {name: build("dpo", {}) for name in phases}
    return draft_plan(config, pipelines, machine=Machine(2)).refusals


def test_a_placeholder_names_a_phase_and_a_folder_or_a_name_of_the_hub_names_none() -> None:
    assert is_handed_over(PLACEHOLDER) and phase_of(PLACEHOLDER) == "warm-up"
    for path in ("runs/sft/model", "Qwen/Qwen2.5-0.5B", "phases.sft.model"):
        assert not is_handed_over(path) and phase_of(path) is None


MISSPELT = ["${phases.sft}", "${phases.sft.modle}", "${phase.sft.model}", "a/${phases.sft.model}"]


@pytest.mark.parametrize("path", MISSPELT)
def test_a_misspelt_placeholder_is_no_folder_and_no_phase(path: str) -> None:
    assert is_handed_over(path) and phase_of(path) is None
    (refusal,) = refusals(path, "sft", "prefer")
    assert refusal.startswith(f"roles.reference.model={path}: ") and "NAME one of sft" in refusal


def test_an_earlier_phases_model_may_be_handed_over() -> None:
    assert refusals("${phases.first.model}", "first", "second") == ()


@pytest.mark.parametrize("name", ["second", "third", "mistyped"])
def test_a_phase_that_ends_too_late_is_refused_with_a_list_of_earlier_phases(name: str) -> None:
    (refusal,) = refusals(f"${{phases.{name}.model}}", "first", "second")
    assert "${phases.NAME.model} with NAME one of first" in refusal


def test_a_run_with_one_phase_hands_over_no_model() -> None:
    (refusal,) = refusals("${phases.first.model}", "first")
    assert "none: there is one phase" in refusal


def test_each_phase_has_a_folder_of_its_own_in_the_run() -> None:
    folders: Any = {kept_folder(Path("runs/r"), name) for name in ("sft", "rm", "models")}
    assert len(folders) == 3 and all(folder.parent == Path("runs/r/phases") for folder in folders)


def test_a_phase_that_ends_once_more_leaves_what_it_is_now(tmp_path: Path) -> None:
    """A run may go back to an earlier step, with other settings."""
    kept = kept_folder(tmp_path, "sft")
    for weights in ("first", "second"):
        checkpoint = tmp_path / weights
        for part in ("policy", "model"):
            (checkpoint / part).mkdir(parents=True)
            (checkpoint / part / "weights").write_text(f"{part}, {weights}")
        keep_phase(kept, ["policy"], checkpoint)
        left = {file.parent.name: file.read_text() for file in kept.glob("*/*")}
        assert left == {"policy": f"policy, {weights}", "model": f"model, {weights}"}
    assert [path.name for path in kept.parent.iterdir()] == ["sft"], "and nothing half-way beside it"
