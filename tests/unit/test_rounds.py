"""Phases that repeat: what they are called, what they hand on, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator.config.loading import config_of
from orchestrator.config.schema import RunConfig
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import draft_plan
from orchestrator.planning.resolve import build_pipeline


def tree(**changes: Any) -> dict[str, Any]:
    making = {
        "method": "generate_data",
        "options": {"num_generations": 2, "keep": "best_and_worst"},
        "data": {"path": "prompts-${round}.jsonl", "options": {"seed": "${round}", "note": "of ${round}"}},
        "train": {"steps": 2, "batch_size": 4},
    }
    learning = {"method": "dpo", "data": {"path": "${phases.making.output}"}, "train": {"steps": 2, "batch_size": 4}}
    phases = {
        "sft": {"method": "sft", "train": {"steps": 2}},
        "making": making,
        "learning": learning,
        "last": {"method": "dpo", "data": {"path": "${phases.making.output}"}, "train": {"steps": 2}},
    }
    rounds = {"count": 3, "phases": ["making", "learning"]}
    return {"phases": phases, "rounds": rounds, "rewards": [{"fn": "exact_match"}], **changes}


def loaded(given: dict[str, Any], *overrides: str) -> RunConfig:
    return config_of(given, overrides, "test")


def test_each_round_has_its_own_phases_between_those_that_run_once() -> None:
    config = loaded(tree())
    assert config.rounds is None
    assert list(config.phases) == [
        *("sft", "making-1", "learning-1", "making-2", "learning-2", "making-3", "learning-3", "last"),
    ]
    pipelines = {name: build_pipeline(phase) for name, phase in config.phases.items()}
    assert draft_plan(config, pipelines, machine=Machine(4)).refusals == ()


def test_a_phase_of_a_round_reads_what_that_round_makes_and_a_later_phase_what_the_last_one_made() -> None:
    phases = loaded(tree()).phases
    assert [phases[f"learning-{i}"].data.path for i in (1, 2, 3)] == [
        f"${{phases.making-{i}.output}}" for i in (1, 2, 3)
    ]
    assert phases["last"].data.path == "${phases.making-3.output}"


def test_the_number_of_the_round_stands_in_texts_and_alone_it_is_a_number() -> None:
    data = [loaded(tree()).phases[f"making-{i}"].data for i in (1, 2, 3)]
    assert [each.path for each in data] == [f"prompts-{i}.jsonl" for i in (1, 2, 3)]
    assert [each.options["seed"] for each in data] == [1, 2, 3]
    assert data[1].options["note"] == "of 2"


def test_the_number_of_rounds_and_the_settings_of_all_of_them_can_be_overridden() -> None:
    config = loaded(tree(), "rounds.count=1", "phases.learning.train.steps=7")
    assert list(config.phases) == ["sft", "making-1", "learning-1", "last"]
    assert config.phases["learning-1"].train.steps == 7


def test_what_is_written_out_is_loaded_again_as_it_is() -> None:
    config = loaded(tree())
    assert loaded(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": {"count": 2, "phases": ["makin"]}}, "rounds.phases names 'makin', which is no phase; did you mean"),
        ({"rounds": {"count": 2, "phases": ["learning", "making"]}}, "follow one another"),
        ({"rounds": {"count": 2, "phases": ["making", "last"]}}, "follow one another"),
        ({"rounds": {"count": 0, "phases": ["making"]}}, "rounds.count"),
        (
            {"roles": {"reward_model": {"model": "${phases.learning.model}"}}},
            r"phase learning repeats, and the role starts once",
        ),
    ],
)
def test_what_cannot_repeat_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tree(**changes))
    assert said in str(caught.value)


def test_a_phase_that_is_called_like_that_of_a_round_is_refused() -> None:
    given = tree()
    given["phases"]["learning-2"] = given["phases"]["last"]
    with pytest.raises(ConfigError, match="a phase is called like that of a round"):
        loaded(given)
