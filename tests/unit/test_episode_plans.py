"""What a plan makes of `episode:`, and what of it is refused before anything is launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from actors.errors import ConfigError
from orchestrator.config.schema import RunConfig
from orchestrator.methods import METHODS, build
from orchestrator.pipeline import Verb
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import Plan, draft_plan
from orchestrator.planning.resolve import build_pipeline, prepare
from rewards.functions import exact_match
from tests.conversations import FORGETFUL, TEMPLATE
from tests.unit.source_stub import write_rows

ONLINE = [name for name in METHODS if build(name, {}).generates]


def config(episode: dict[str, Any], method: str = "grpo", **changes: Any) -> dict[str, Any]:
    phase = {"method": method, "train": {"steps": 3, "batch_size": 2}, "episode": episode}
    return {"phases": {"a": phase}, "rewards": [{"fn": "exact_match"}], **changes}


def drafted(tree: dict[str, Any]) -> Plan:
    read = RunConfig.model_validate(tree)
    pipelines = {name: build_pipeline(phase) for name, phase in read.phases.items()}
    return draft_plan(read, pipelines, machine=Machine(4))


@pytest.mark.parametrize("method", ONLINE)
def test_the_pipeline_of_every_method_that_samples_closes_on_episodes(method: str) -> None:
    pipeline = build(method, {}).with_episodes("environment")
    assert "environment" in pipeline.roles and pipeline.environments == ("environment",)
    for stage in pipeline.generates:
        assert stage.episode == "environment" and "turn_reward" in stage.writes
    rewarding = {"reward_at_the_end", "kl_in_reward"}
    for stage in pipeline:
        if stage.verb is Verb.CREDIT and getattr(stage.call, "__name__", "") in rewarding:
            assert "turn_reward" in stage.reads


def test_a_phase_with_episodes_launches_their_role_and_another_one_if_it_is_renamed() -> None:
    tree = config({"tools": ["calculator"]})
    assert drafted(tree).roles["environment"].pool
    tree["phases"]["a"]["rename_roles"] = {"environment": "tools"}
    tree["roles"] = {"tools": {"kind": "environments", "workers": 3}}
    plan = drafted(tree)
    assert plan.roles["tools"].count == 3 and "environment" not in plan.roles and not plan.refusals
    tree["roles"] = {"tools": {"kind": "scorers"}}
    assert any("roles.tools.kind=scorers" in said and "must be environments" in said for said in drafted(tree).refusals)


def test_a_method_that_also_learns_from_the_data_s_completions_takes_no_episodes() -> None:
    tree = config({"tools": ["calculator"]}, "gkd", roles={"teacher": {"model": "big"}})
    tree["phases"]["a"]["options"] = {"lmbda": 0.5}
    assert any("which are no episodes" in said for said in drafted(tree).refusals)
    tree["phases"]["a"]["options"] = {"lmbda": 1.0}
    assert not any("episodes" in said for said in drafted(tree).refusals)


@pytest.mark.parametrize("keep", ["last_turn", "last_turn_over_first"])
def test_turns_become_data_where_each_is_a_row_and_nowhere_else(keep: str) -> None:
    tree = config({"environment": "guessing_game", "split": "turns"}, "generate_data", rewards=[])
    tree["phases"]["a"]["options"] = {"keep": keep}
    assert not drafted(tree).refusals
    tree["phases"]["a"]["options"] = {"keep": "all", "scored": False}
    assert any("writes completions of one turn" in said for said in drafted(tree).refusals)
    tree["phases"]["a"]["options"] = {"keep": keep}
    for episode in (None, {"environment": "guessing_game"}):
        tree["phases"]["a"]["episode"] = episode
        assert any("a.episode.split=turns" in said for said in drafted(tree).refusals)


def test_a_phase_that_samples_nothing_is_warned_of_its_episodes() -> None:
    plan = drafted(config({"tools": ["calculator"]}, "sft", rewards=[]))
    assert any("episode" in said and "samples nothing" in said for said in plan.warnings)


@pytest.mark.parametrize(
    ("episode", "why"),
    [
        ({}, "names nobody to talk to"),
        ({"environment": "guessing_game", "tools": ["calculator"]}, "environment and tools"),
        ({"environment": "guessing_game", "environment_factory": "search"}, "environment and environment_factory"),
        ({"tools": ["calculator"], "options": {"a": 1}}, "options are those of a class"),
        ({"tools": ["calculator"], "max_turns": 0}, "max_turns"),
    ],
)
def test_an_episode_without_or_with_too_many_to_talk_to_is_refused(episode: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        RunConfig.model_validate(config(episode))


def prepared(tmp_path: Path, episode: dict[str, Any], template: str | None, **changes: Any) -> Any:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}+1?", "answer": str(i + 1)} for i in range(4)])
    model: dict[str, Any] = {"path": "example:arithmetic"}
    if template is not None:
        (tmp_path / "template.jinja").write_text(template)
        model["chat_template"] = str(tmp_path / "template.jinja")
    tree = config(episode, model=model, **changes)
    tree["phases"]["a"] |= {"data": {"path": str(rows)}, "sampling": {"max_tokens": 64}}
    return prepare(RunConfig.model_validate(tree))


@pytest.mark.parametrize(
    ("episode", "template", "why"),
    [
        ({"tools": ["calculator"]}, None, r"no chat template: set model\.chat_template"),
        ({"tools": ["calculater"]}, TEMPLATE, "did you mean calculator"),
        ({"tools": ["calculator"]}, TEMPLATE.replace("m.content", "loop.revindex"), "rewrites history"),
        ({"environment": "guessing_game", "options": {"speed": 1}}, TEMPLATE, "has no option 'speed'"),
        ({"tools": ["calculator"], "tool_parser": "response_template"}, TEMPLATE, "has no response template"),
    ],
)
def test_what_no_episode_could_be_made_of_is_refused_before_a_launch(
    tmp_path: Path, episode: dict[str, Any], template: str | None, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        prepared(tmp_path, episode, template)


def test_the_context_has_room_for_the_tools_and_what_an_environment_says_first(tmp_path: Path) -> None:
    alone = prepared(tmp_path, {"tools": ["calculator"]}, TEMPLATE).longest
    game = prepared(tmp_path, {"environment": "guessing_game"}, FORGETFUL).longest
    given = prepared(tmp_path, {"tools": ["calculator"], "max_prompt_tokens": 700}, TEMPLATE).longest
    assert alone > 4 + 300 + 64 and game > 512 + 64 and given == 700 + 64


def test_an_environment_that_rewards_needs_no_other_reward_and_tools_do(tmp_path: Path) -> None:
    assert prepared(tmp_path, {"environment": "guessing_game"}, TEMPLATE, rewards=[]).rewards == ()
    with pytest.raises(ConfigError, match="the run has no rewards"):
        prepared(tmp_path, {"tools": ["calculator"]}, TEMPLATE, rewards=[])
    with pytest.raises(ConfigError, match="environment is the name of two rewards"):
        prepared(tmp_path, {"tools": ["calculator"]}, TEMPLATE, rewards=[{"fn": "exact_match", "name": "environment"}])


def test_rewards_that_come_with_troupe_read_the_last_that_the_model_says() -> None:
    said = [{"role": "assistant", "content": "hm"}, {"role": "tool", "content": "7"}]
    assert exact_match([[*said, {"role": "assistant", "content": "5"}, said[1]]], ["5"]) == [1.0]
