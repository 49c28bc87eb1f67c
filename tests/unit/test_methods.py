"""Methods as data: which roles, columns and stages follow from a method's options."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from actors.columns import Head
from actors.errors import ConfigError
from orchestrator.credit.advantages import credits
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.pairwise import CONTRASTS
from orchestrator.methods import METHODS, build
from orchestrator.methods.dpo import TRANSPORT, LossName
from orchestrator.pipeline import (
    AnsweredPrompts,
    Completions,
    Pipeline,
    Prompts,
    Verb,
    credit,
    generate,
    in_conflict,
    infer,
    mix,
    one_of,
    only_where,
    score,
    take,
)

DOCS = Path(__file__).parents[2] / "docs" / "methods"


def verbs(pipeline: Pipeline) -> list[str]:
    return [stage.name for stage in pipeline]


def test_supervised_fine_tuning_is_one_update_of_one_role() -> None:
    pipeline = build("sft", {})
    assert (pipeline.data.name, pipeline.roles, verbs(pipeline)) == ("completions", ("policy",), ["policy.update"])


def test_grpo_without_kl_launches_no_reference_and_spends_no_pass_on_old_log_probabilities() -> None:
    pipeline = build("grpo", {})
    assert pipeline.roles == ("policy", "rollout", "reward")
    assert verbs(pipeline) == ["rollout.generate", "reward.score", "driver.credit", "policy.update"]
    assert pipeline.updates[0].reads == {"advantages", "mask"}


def test_options_of_grpo_bring_the_stages_and_columns_that_they_need_and_no_others() -> None:
    with_kl = build("grpo", {"beta": 0.04})
    assert "reference" in with_kl.roles
    assert "ref_logps" in with_kl.updates[0].reads
    reused = build("grpo", {"updates_per_batch": 2})
    assert "policy.infer" in verbs(reused)
    assert reused.updates[0].options["epochs"] == 2
    assert "old_logps" in build("grpo", {"minibatches": 4}).updates[0].reads
    assert "driver.keep" in verbs(build("grpo", {"dynamic_sampling": True}))
    masked = build("grpo", {"mask_truncated_completions": True})
    assert [stage.writes for stage in masked if stage.verb is Verb.CREDIT] == [{"learned"}, {"advantages", "learned"}]


def test_gfpo_filters_each_groups_samples_before_anything_else_is_computed_of_them() -> None:
    pipeline = build("gfpo", {"num_generations": 6, "num_remains_in_group": 2, "dynamic_sampling": True, "beta": 0.1})
    assert verbs(pipeline)[:5] == [
        "rollout.generate",
        "reward.score",
        "driver.regroup",
        "driver.keep",
        "reference.infer",
    ]
    assert (pipeline.samples_per_prompt, pipeline.rows_per_item) == (6, 2)
    counted = build("gfpo", {"rejected": "advantage_0"})
    assert "driver.regroup" not in verbs(counted) and counted.rows_per_item == 16


def test_rewards_that_are_normalised_one_by_one_are_written_one_by_one() -> None:
    pipeline = build("grpo", {"multi_objective_aggregation": "normalize_then_sum"})
    (scored,), (credited,) = ([stage for stage in pipeline if stage.verb is verb] for verb in (Verb.SCORE, Verb.CREDIT))
    assert {"reward_parts", "reward_weights"} <= scored.writes & credited.reads
    assert all(stage.writes == {"reward"} for stage in build("grpo", {}) if stage.verb is Verb.SCORE)


def test_leave_one_out_takes_the_kl_off_the_reward_before_siblings_are_compared() -> None:
    pipeline = build("rloo", {})
    credits = [stage for stage in pipeline if stage.verb is Verb.CREDIT]
    assert [stage.writes for stage in credits] == [{"reward"}, {"advantages", "learned"}]
    assert pipeline.updates[0].reads == {"advantages", "mask"}
    without = build("rloo", {"beta": 0.0})
    assert without.roles == ("policy", "rollout", "reward") and "policy.infer" not in verbs(without)


def test_only_the_variant_with_a_baseline_has_its_kl_in_the_loss_and_needs_siblings() -> None:
    plain, baseline = build("reinforce_pp", {}), build("reinforce_pp_baseline", {})
    assert (plain.samples_per_prompt, baseline.samples_per_prompt) == (1, 8)
    assert "ref_logps" in baseline.updates[0].reads and "ref_logps" not in plain.updates[0].reads
    assert "policy.infer" in verbs(plain) and "policy.infer" not in verbs(baseline)


def test_a_credit_call_where_the_tokens_are_writes_per_token_or_per_row() -> None:
    @credits(reads={"mask"}, writes={"advantages", "reward"})
    def both() -> None: ...

    with pytest.raises(ConfigError, match="advantages, reward, of which some are per token and some per row"):
        Pipeline(Completions, credit(both), *build("sft", {}))


def test_online_dpo_makes_pairs_of_its_samples_and_infers_the_reference_for_these_only() -> None:
    pipeline = build("online_dpo", {"num_generations": 4})
    names = ["rollout.generate", "reward.score", "driver.regroup", "reference.infer", "policy.update"]
    assert verbs(pipeline) == names
    assert (pipeline.samples_per_prompt, pipeline.rows_per_item) == (4, 2)
    assert [stage.name for stage in pipeline.group_stages] == names[:3]
    assert [stage.name for stage in pipeline.batch_stages] == ["reference.infer"]
    assert pipeline.roles == ("policy", "rollout", "reward", "reference")


def test_gkd_takes_each_prompt_s_completion_from_where_lmbda_and_seq_kd_say() -> None:
    def sources(**options: Any) -> tuple[str, list[tuple[str, tuple[float, float]]]]:
        pipeline = build("gkd", options)
        assert pipeline.rows_per_item == 1
        return pipeline.data.name, [(stage.name, stage.share) for stage in pipeline.row_sources]

    everywhere = (0.0, 1.0)
    assert sources() == ("prompts", [("rollout.generate", everywhere)])
    assert sources(lmbda=0.0) == ("completions", [])
    assert sources(lmbda=0.0, seq_kd=True) == ("prompts", [("teacher_rollout.generate", everywhere)])
    mixed = [("rollout.generate", (0.0, 0.3)), ("driver.take", (0.3, 1.0))]
    assert sources(lmbda=0.3) == ("answered_prompts", mixed)
    taught = [("rollout.generate", (0.0, 0.3)), ("teacher_rollout.generate", (0.3, 1.0))]
    assert sources(lmbda=0.3, seq_kd=True) == ("prompts", taught)


def test_a_teacher_of_sampled_tokens_is_a_role_and_one_of_whole_distributions_a_companion() -> None:
    beside, alone = build("minillm", {}), build("minillm", {"single_step_decomposition": False})
    assert beside.companions == {"policy": "teacher"} and "teacher" not in beside.roles
    assert alone.companions == {} and "teacher.infer" in verbs(alone) and verbs(alone) == verbs(build("iw_opd", {}))
    wire = build("minillm", {"teacher_top_k": 4})
    assert verbs(wire) == verbs(alone) and "teacher_logps" in wire.updates[0].reads  # one pass says both
    for pipeline in (beside, alone, wire, build("on_policy_distillation", {})):
        assert pipeline.teachers == ("teacher",) and pipeline.temperature is None  # that of sampling


def test_several_teachers_are_asked_by_the_rows_that_name_them_or_all_of_them_side_by_side() -> None:
    options: dict[str, Any] = {"teachers": ["math", "code"], "teacher_top_k": 4}
    routed, mixed = build("gkd", options), build("gkd", {**options, "teacher_weights": [3, 1]})
    for pipeline in (routed, mixed):
        assert verbs(pipeline) == ["rollout.generate", "math.infer", "code.infer", "policy.update"]
        assert pipeline.teachers == ("math", "code")
    assert [stage.only for stage in routed if stage.top_k] == [("teacher", 0), ("teacher", 1)]
    assert (routed.data.teachers, mixed.data.teachers) == (("math", "code"), ())
    assert routed.held_out and routed.held_out.teachers == ("math", "code")
    one, other = (stage for stage in routed if stage.top_k)
    assert not in_conflict(other, one), "they may be asked at the same time"
    one, other = (stage for stage in mixed if stage.top_k)
    assert in_conflict(other, one), "whose values come first must not depend on who is faster"
    assert mixed.updates[0].options["loss_options"]["weights"] == (0.75, 0.25)
    renamed = routed.with_roles({"math": "big"})
    assert renamed.teachers == ("big", "code") and renamed.data.teachers == ("math", "code")


def test_a_stage_runs_for_some_rows_only_if_it_infers_columns_per_token() -> None:
    scores = only_where("teacher", 0, infer("reward_model", into="reward", head=Head.ROW_SCALAR))
    with pytest.raises(ConfigError, match=r"reward_model\.infer runs for some rows only"):
        Pipeline(Completions.with_teachers(("a", "b")), scores)


def test_a_pipeline_must_bring_rows_into_every_prompt_group_and_can_take_only_completions_that_are_there() -> None:
    first, other = one_of(0.25, generate(n=4), take())
    assert Pipeline(AnsweredPrompts, first, other).rows_per_item == 4
    assert Pipeline(AnsweredPrompts, first, other).samples_per_prompt == 4
    for stages in ((first,), (other,), (first, replace(other, share=(0.3, 1.0)))):
        with pytest.raises(ConfigError, match=r"some prompt groups get no rows: .*together they must cover 0 to 1"):
            Pipeline(AnsweredPrompts, *stages)
    with pytest.raises(ConfigError, match=r"driver\.take takes completions, and prompts bring none"):
        Pipeline(Prompts, first, other)
    with pytest.raises(ConfigError, match=r"reward\.score runs for a share .* only generate and take may"):
        Pipeline(Prompts, generate(), replace(score(), share=(0.0, 0.5)))


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("sft", {}, "completions"),
        ("dpo", {}, "pairs"),
        ("gkd", {}, "completions"),
        ("gkd", {"lmbda": 0.5, "teacher_top_k": 4}, "completions"),
        ("grpo", {}, None),
        ("online_dpo", {}, None),
    ],
)
def test_held_out_rows_have_a_loss_where_it_needs_nothing_of_samples_but_their_tokens(
    name: str, options: dict[str, Any], kind: str | None
) -> None:
    found = build(name, options).held_out
    assert (found and found.name) == kind


@pytest.mark.parametrize(("name", "samples", "rows"), [("xpo", [1, 1], 2), ("a2po", [1, 8], 1)])
def test_the_reference_samples_beside_the_policy_where_a_method_compares_the_two(
    name: str, samples: Any, rows: int
) -> None:
    pipeline = build(name, {})
    assert [stage.role for stage in pipeline.generates] == ["rollout", "reference_rollout"]
    assert [stage.options["n"] for stage in pipeline.generates] == samples
    assert pipeline.rows_per_item == rows
    assert pipeline.roles == ("policy", "rollout", "reference_rollout", "reward", "reference")


def test_the_penalty_on_unfinished_completions_is_applied_before_they_are_compared() -> None:
    pipeline = build("online_dpo", {"missing_eos_penalty": 1.5})
    penalty, pair = [stage for stage in pipeline if stage.verb is Verb.REGROUP]
    assert (penalty.writes, penalty.options["call"]) == ({"reward"}, {"penalty": 1.5})
    assert pair.writes == {"preferred"} and pipeline.rows_per_item == 2


def test_log_probabilities_of_online_dpo_are_the_models_own_at_any_sampling_temperature() -> None:
    assert build("online_dpo", {}).temperature == 1.0
    assert build("grpo", {}).temperature is None  # that of sampling


@pytest.mark.parametrize(
    "options",
    [
        {"correction": "token_truncate"},
        {"correction": "sequence_mask"},
        {"off_policy_mask_threshold": 0.0},
        {"loss_type": "vespo"},
        {"loss_type": "dppo"},
    ],
    ids=str,
)
def test_what_makes_up_for_staleness_reads_the_sampler_s_log_probabilities(options: dict[str, Any]) -> None:
    assert "sample_logps" in build("grpo", options).updates[0].reads


@pytest.mark.parametrize("name", ["dpo", "kto", "bco"])
def test_methods_against_a_reference_launch_one(name: str) -> None:
    assert build(name, {}).roles == ("policy", "reference")


@pytest.mark.parametrize("name", ["dpo", "kto", "bco"])
def test_a_synchronised_reference_moves_after_the_update_and_is_not_inferred_ahead_of_it(name: str) -> None:
    pipeline = build(name, {"sync_ref_model": True})
    assert verbs(pipeline) == ["reference.infer", "policy.update", "reference.mix"]
    assert (pipeline.trained, pipeline.mixed, pipeline.roles) == (("policy",), ("reference",), ("policy", "reference"))
    assert pipeline.mixes[0].options == {"source": "policy", "share": 0.6, "every": 512}
    assert pipeline.collect == () and pipeline.learn == pipeline.stages
    still = build(name, {})
    assert [stage.name for stage in still.collect] == ["reference.infer"] and still.mixed == ()


def test_only_a_role_that_is_not_trained_moves_towards_one_that_is() -> None:
    with pytest.raises(ConfigError, match=r"reference\.mix moves reference towards policy: .* \(trained: nothing\)"):
        Pipeline(Completions, mix("reference", "policy", share=0.5, every=1))
    with pytest.raises(ConfigError, match=r"policy\.mix moves policy towards policy: .* \(trained: policy\)"):
        Pipeline(Completions, *build("sft", {}), mix("policy", "policy", share=0.5, every=1))


@pytest.mark.parametrize("name", ["cpo", "simpo", "alphapo", "orpo", "tpo"])
def test_methods_without_a_reference_launch_none(name: str) -> None:
    assert build(name, {}).roles == ("policy",)


def test_only_the_kl_estimate_of_kto_needs_mismatched_rows() -> None:
    assert build("kto", {}).data.name == "mismatched_labelled"
    assert build("kto", {"loss_type": "apo_zero_unpaired"}).data.name == "labelled"


def test_density_ratios_need_weights_from_the_data() -> None:
    assert "weight" in build("bco", {"density_ratio": True}).data.columns
    assert "weight" not in build("bco", {}).data.columns


def test_every_loss_of_dpo_has_a_name_and_every_name_a_loss() -> None:
    assert set(get_args(LossName)) == {*CONTRASTS, *TRANSPORT, "sft"}


def test_weighted_losses_become_one_sum() -> None:
    stage = build("dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}).updates[0]
    assert stage.call is not None
    objective = LossObjective(stage.call, stage.options["reduce"], stage.options["loss_options"])
    assert [term.weight for term in objective.terms] == [0.8, 0.2, 1.0]


def test_a_loss_of_whole_sequences_needs_log_probabilities_of_prompts() -> None:
    stage = build("orpo", {}).updates[0]
    assert stage.call is not None
    assert LossObjective(stage.call, None, {}).needs == {"all_tokens"}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_builds_with_its_defaults_has_a_description_and_keyword_options_only(name: str) -> None:
    pipeline, method = build(name, {}), METHODS[name]
    assert pipeline.trained or pipeline.written_columns
    assert method.__doc__
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in inspect.signature(method).parameters.values())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_page_that_names_each_of_its_options(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text()
    for option in inspect.signature(METHODS[name]).parameters:
        assert f"`{option}`" in page, f"docs/methods/{name}.md does not mention {option}"


def test_other_roles_in_the_places_of_a_methods_leave_its_temperature_as_it_is():
    pipeline = build("online_dpo", {})
    renamed = pipeline.with_roles({"policy": "tutor"})
    assert renamed.trained == ("tutor",) and renamed.temperature == pipeline.temperature == 1.0
