"""Which roles a plan launches, by what the methods ask of them and by their kinds."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config.schema import RunConfig
from orchestrator.losses.likelihood import nll
from orchestrator.losses.reduce import token_mean
from orchestrator.methods import build
from orchestrator.pipeline import Completions, Pairs, Pipeline, Prompts, generate, infer, score, update
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import Plan, draft_plan
from tests.unit.plan_stage import config, planned


def test_supervised_training_launches_a_policy_and_nothing_else() -> None:
    assert list(planned(config("sft")).roles) == ["policy"]


def test_evaluation_launches_workers_that_sample_and_score() -> None:
    evaluation = {"data": {"path": "example:arithmetic"}}
    assert list(planned(config("sft", evaluation=evaluation)).roles) == ["policy", "rollout", "reward"]


def test_held_out_prompts_are_answered_by_an_engine_of_the_trained_role_whichever_others_there_are() -> None:
    evaluation = {"data": {"path": "example:arithmetic"}}
    taught = config(
        "gkd", options={"lmbda": 0, "seq_kd": True}, evaluation=evaluation, roles={"teacher": {"model": "big"}}
    )
    plan = planned(taught)
    assert {"teacher_rollout", "rollout"} <= plan.roles.keys() and not plan.refusals
    assert taught.roles.engine_of(("policy",), ("teacher_rollout",)) == "rollout"
    assert taught.roles.engine_of(("teacher",), ()) == "teacher_rollout"


def test_held_out_prompts_of_a_role_that_no_engine_samples_from_are_refused_until_there_is_one() -> None:
    evaluation = {"data": {"path": "example:arithmetic"}}
    phases = {"a": {"method": "sft", "rename_roles": {"policy": "tutor"}, "evaluation": evaluation}}
    roles: dict[str, Any] = {"tutor": {"kind": "trainer"}}
    of_tutor = {"a": build("sft", {}).with_roles({"policy": "tutor"})}

    def plan() -> Plan:
        return draft_plan(RunConfig.model_validate({"phases": phases, "roles": roles}), of_tutor, machine=Machine(2))

    (refusal,) = plan().refusals
    assert "no engine samples from it; add a role with kind engine and follows tutor" in refusal
    roles["answers"] = {"kind": "engine", "follows": "tutor"}
    assert not plan().refusals and list(plan().roles) == ["tutor", "answers", "reward"]


def test_held_out_rows_launch_no_further_role() -> None:
    evaluation = {"rows": {"path": "example:arithmetic_sft", "split": "test"}}
    assert list(planned(config("sft", evaluation=evaluation)).roles) == ["policy"]


def test_a_reference_is_launched_exactly_if_the_method_asks_for_one() -> None:
    assert "reference" not in planned(config(options={"beta": 0.0})).roles
    assert "reference" in planned(config(options={"beta": 0.1})).roles


def test_with_adapters_the_policy_is_its_own_reference_unless_another_model_is_named() -> None:
    lora = {"lora": {"r": 8}}
    implicit = planned(config(options={"beta": 0.1}, model=lora))
    assert implicit.stand_ins == {"reference": "policy"} and "reference" not in implicit.roles
    named = planned(config(options={"beta": 0.1}, model=lora, roles={"reference": {"model": "another"}}))
    assert not named.stand_ins and "reference" in named.roles


def test_the_roles_of_all_phases_are_launched_once() -> None:
    phases = {"warm": {"method": "sft"}, "rl": {"method": "grpo", "options": {"beta": 0.1}}}
    plan = planned(RunConfig.model_validate({"phases": phases}))
    assert list(plan.roles) == ["policy", "reference", "rollout", "reward"]
    assert [phase.rows_per_item for phase in plan.phases] == [1, 8]


def test_a_role_without_settings_is_named() -> None:
    mystery = Pipeline(Pairs, infer("oracle", into="ref_logps"))
    plan = draft_plan(config("sft"), {"sft": mystery}, machine=Machine(2))
    (refusal,) = plan.refusals
    assert "there is no roles.oracle; describe it there with its kind" in refusal


ENSEMBLE = Pipeline(
    Prompts,
    generate("fast", n=2),
    score("judges"),
    infer("elder", into="ref_logps"),
    update("policy", nll, reduce=token_mean),
)
OTHER_NAMES: dict[str, Any] = {
    "fast": {"kind": "engine", "workers": 3, "engine": "hf"},
    "judges": {"kind": "scorers", "workers": 2},
    "elder": {"kind": "frozen", "ranks": 2, "backend": "deepspeed"},
}


def test_roles_with_new_names_are_launched_by_their_kind() -> None:
    plan = draft_plan(config("grpo", roles=OTHER_NAMES), {"grpo": ENSEMBLE}, machine=Machine(2))
    assert plan.refusals == ()
    assert {name: (role.count, role.elastic) for name, role in plan.roles.items()} == {
        "policy": (1, False),
        "elder": (2, False),
        "fast": (3, True),
        "judges": (2, True),
    }
    assert [bundle.roles for bundle in plan.gang] == [("policy",), ("elder",), ("elder",)]


def test_an_engine_launches_the_role_that_it_follows_and_a_frozen_role_the_one_that_it_copies() -> None:
    sampler = Pipeline(Prompts, generate("fast"), score("judges"))
    roles = {**OTHER_NAMES, "fast": {"kind": "engine", "follows": "writer"}, "writer": {"kind": "trainer"}}
    assert list(draft_plan(config("grpo", roles=roles), {"grpo": sampler}).roles) == ["writer", "fast", "judges"]
    reader = Pipeline(Pairs, infer("elder", into="ref_logps"))
    roles = {"elder": {"kind": "frozen", "copies": "writer"}, "writer": {"kind": "trainer"}}
    assert set(draft_plan(config("dpo", roles=roles), {"dpo": reader}).roles) == {"elder", "writer"}


@pytest.mark.parametrize(
    ("role", "kind", "wanted"),
    [
        ("fast", "frozen", "samples from it, so it must be engine"),
        ("judges", "engine", "scores with it, so it must be scorers"),
        ("elder", "scorers", "asks its model, so it must be trainer or frozen"),
    ],
)
def test_a_role_of_the_wrong_kind_for_its_verb_is_refused(role: str, kind: str, wanted: str) -> None:
    roles = {**OTHER_NAMES, role: {"kind": kind}}
    found = draft_plan(config("grpo", roles=roles), {"grpo": ENSEMBLE}, machine=Machine(2)).refusals
    assert [refusal for refusal in found if refusal.startswith(f"roles.{role}.kind={kind}: ")] == [
        f"roles.{role}.kind={kind}: phase grpo (grpo) {wanted}"
    ]


def test_a_frozen_role_cannot_be_trained() -> None:
    trains = Pipeline(Completions, update("reference", nll, reduce=token_mean))
    found = draft_plan(config("sft"), {"sft": trains}, machine=Machine(2)).refusals
    assert "roles.reference.kind=frozen: phase sft (sft) trains it, so it must be trainer" in found


def test_a_model_that_scores_is_launched_with_the_rewards_and_refused_as_a_second_head() -> None:
    rewards = [{"role": "reward_model"}]
    plan = planned(config("grpo", rewards=rewards))
    assert plan.refusals == () and plan.roles["reward_model"].count == 1
    assert "reward_model" not in planned(config("sft", rewards=rewards)).roles, "nobody asks it there"
    (refusal,) = planned(config("grpo", rewards=[{"role": "policy"}])).refusals
    assert refusal.startswith("roles.policy: one stage or reward asks for a model with a row_scalar head, another for")
    (pool,) = planned(config("grpo", rewards=[{"role": "rollout"}])).refusals
    assert "rollout has no model to score with" in pool


def test_a_synchronised_reference_has_its_own_weights_and_starts_as_the_policy() -> None:
    options = {"sync_ref_model": True}
    assert planned(config("dpo", options=options)).refusals == ()
    (adapted,) = planned(config("dpo", options=options, model={"lora": {"r": 8}})).refusals
    assert "with model.lora the reference is the policy without its adapters" in adapted
    (other,) = planned(config("kto", options=options, roles={"reference": {"model": "another"}})).refusals
    assert "roles.reference.model=another" in other and "options.sync_ref_model=false" in other
