"""Whether samples of a checkpoint are as good as new ones: a property of each key."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config.loading import config_of
from orchestrator.config.roles import EngineRole, EnvironmentsRole, FrozenRole, ScorersRole, TrainerRole
from orchestrator.config.schema import RunConfig
from orchestrator.phases.collected_by import OTHERWISE_THE_SAME, collected_by, differing, scored_by
from orchestrator.planning.resolve import build_pipeline

TREE: dict[str, Any] = {
    "phases": {"one": {"method": "gkd", "options": {"lmbda": 0.0, "seq_kd": True}, "sampling": {"max_tokens": 5}}},
    "roles": {"judge": {"kind": "engine", "follows": "other"}, "other": {"kind": "frozen"}, "rm": {"kind": "frozen"}},
    "rewards": [{"role": "rm"}, {"judge": {"role": "judge"}}],
}


def configured(*overrides: str, **changes: Any) -> RunConfig:
    return config_of({**TREE, **changes}, list(overrides), "test")


def changed(*overrides: str, **changes: Any) -> tuple[list[str], list[str]]:
    """What decides samples, and what decides rewards, of these changes."""
    before, now = configured(**changes), configured(*overrides, **changes)
    pipeline = build_pipeline(now.phases["one"])
    collected = differing(collected_by(before, "one", pipeline), collected_by(now, "one", pipeline))
    return collected, differing(scored_by(before, "one"), scored_by(now, "one"))


@pytest.mark.parametrize("key", ["rm.model", "rm.dtype", "judge.engine", "other.model", "judge.engine_options"])
def test_a_role_that_scores_and_the_one_whose_weights_it_has_decide_samples_and_rewards(key: str) -> None:
    value = {"dtype": "bfloat16", "engine": "hf", "engine_options": "{a: 1}"}.get(key.split(".")[1], "elsewhere")
    named = f"roles.{key}"
    assert changed(f"{named}={value}") == ([named], [named])


@pytest.mark.parametrize("key", ["teacher_rollout.engine", "teacher_rollout.dtype", "teacher.model"])
def test_a_role_that_samples_decides_samples_and_no_rewards(key: str) -> None:
    value = {"dtype": "bfloat16", "engine": "hf"}.get(key.split(".")[1], "elsewhere")
    assert changed(f"roles.{key}={value}") == ([f"roles.{key}"], [])


def test_a_role_that_neither_samples_nor_scores_decides_nothing() -> None:
    assert changed("roles.rollout.engine=hf", "roles.value.model=elsewhere") == ([], [])


def test_the_place_the_number_and_the_deadlines_of_roles_decide_nothing() -> None:
    keys = ("roles.teacher_rollout.workers=3", "roles.rm.ranks=2", "roles.rm.gpus=1", "roles.judge.max_attempts=9")
    assert changed(*keys, "roles.judge.request_timeout_s=7", "phases.one.train.learning_rate=1e-3") == ([], [])


def test_rewards_episodes_and_what_the_phase_says_of_samples() -> None:
    assert changed("phases.one.sampling.temperature=0.5") == (["phases.one.sampling"], [])
    assert changed("phases.one.rename_roles={teacher: rm}")[1] == []
    assert changed("rewards=[{role: rm, weight: 2}]")[1][0] == "rewards"
    assert changed(
        "phases.one.episode.max_turns=3", phases={"one": {"method": "grpo", "episode": {"tools": ["t"]}}}
    ) == (
        ["phases.one.episode"],
        ["phases.one.episode"],
    )
    assert changed("weights.dtype=bfloat16", "model.lm_head_fp32=true")[0] == ["weights.dtype", "model.lm_head_fp32"]


def test_the_keys_that_decide_nothing_exist_and_the_others_are_these() -> None:
    """Whoever adds a key to a role sees here whether samples of a checkpoint outlive a change of it."""
    kinds = (TrainerRole, FrozenRole, EngineRole, ScorersRole, EnvironmentsRole)
    keys = {name for kind in kinds for name in kind.model_fields}
    assert keys >= OTHERWISE_THE_SAME
    models = {"model", "dtype", "copies", "deepspeed"}
    assert keys - OTHERWISE_THE_SAME == {
        "kind",
        *models,
        "follows",
        "mixes",
        "engine",
        "max_model_len",
        "engine_options",
    }
