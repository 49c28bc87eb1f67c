"""What a plan refuses and warns of, and what it shows, without Ray."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from actors.errors import ConfigError
from orchestrator.config.schema import RunConfig
from orchestrator.methods import build
from orchestrator.planning.bundles import ClusterView
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import draft_plan, problems
from orchestrator.reporting.plan_report import render
from tests.unit.plan_stage import config, gpu_nodes, planned


def test_bfloat16_on_a_processor_without_instructions_for_it_is_warned_of_and_float32_is_not() -> None:
    def warned(machine: Machine, **keys: Any) -> list[str]:
        found = draft_plan(config("grpo", **keys), {"grpo": build("grpo", {})}, machine=machine).warnings
        return [each for each in found if "bfloat16" in each]

    half = {"model": {"dtype": "bfloat16"}}
    (said,) = warned(Machine(2, bfloat16=False), **half)
    assert said.startswith("policy, rollout: this processor") and said.endswith("set model.dtype=float32")
    assert warned(Machine(2, bfloat16=True), **half) == []
    assert warned(Machine(2, bfloat16=False)) == []
    on_gpus = {"policy": {"gpus": 1}, "rollout": {"gpus": 1}}
    assert warned(Machine(2, bfloat16=False), **half, roles=on_gpus) == []


def test_what_a_frozen_role_samples_may_run_ahead_without_a_correction() -> None:
    keys: dict[str, Any] = {"train": {"max_staleness": 2, "batch_size": 8}, "roles": {"teacher": {"model": "big"}}}
    plan = planned(config("gkd", options={"lmbda": 0.0, "seq_kd": True}, **keys))
    assert plan.refusals == () and plan.phases[0].groups_in_flight == 24


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (config(train={"max_staleness": 1}, options={"correction": "none"}), "does not correct for that"),
        (config("online_dpo", train={"max_staleness": 1}), "does not correct for that"),
        (
            config(
                "gkd",
                options={"lmbda": 0.5, "seq_kd": True},
                train={"max_staleness": 1},
                roles={"teacher": {"model": "big"}},
            ),
            "does not correct for that",
        ),
        (config("iw_opd"), "learns from the distributions of teacher, and roles.teacher.model is not set"),
        (
            config(
                "gkd",
                options={"teachers": ["coach"], "teacher_top_k": 4},
                roles={"coach": {"kind": "engine", "follows": "policy"}},
            ),
            "learns from the distributions of coach, and roles.policy.model is not set",
        ),
        (
            config(
                "iw_opd",
                options={"teachers": ["coach"]},
                roles={"coach": {"kind": "engine", "follows": "teacher"}, "teacher": {"model": "big"}},
            ),
            "roles.coach.kind=engine: phase iw_opd (iw_opd) asks its model, so it must be trainer or frozen",
        ),
        (config("xpo", model={"lora": {}}), "roles.reference_rollout.follows=reference: with model.lora"),
        (config("nash_md", model={"lora": {}}), "roles.mixture_rollout.mixes=reference: with model.lora"),
        (config("nash_md", roles={"mixture_rollout": {"mixes": None}}), "roles.mixture_rollout.mixes is not set, and"),
        (config("nash_md", roles={"mixture_rollout": {"mixes": "reward"}}), "mixes=reward is no role with a model to"),
        (config("nash_md", roles={"mixture_rollout": {"mixes": "policy"}}), "mixes=policy is the role that it follows"),
        (
            config("nash_md", roles={"mixture_rollout": {"tensor_parallel": 2}}),
            "holds both in one process; set it to 1",
        ),
        (config("sft", train={"max_staleness": 1}), "sft samples nothing"),
        (config(roles={"policy": {"ranks": 2}}), "set roles.policy.backend=deepspeed"),
        (
            config(train={"batch_size": 3}, roles={"policy": {"ranks": 4, "backend": "deepspeed"}}),
            "leaves some of roles.policy.ranks=4 without data; use a batch of at least 4",
        ),
        (
            config(options={"minibatches": 5}, train={"batch_size": 32}),
            "batch_size=32 does not divide into 5 minibatches",
        ),
        (
            config(roles={"rollout": {"colocate": "polcy"}}),
            "rollout.colocate=polcy: it can share the bundles of policy",
        ),
        (config(roles={"policy": {"colocate": "policy"}}), "policy.colocate=policy: it can share the bundles of"),
        (
            config(roles={"rollout": {"colocate": "policy", "workers": 3}}),
            "3 processes cannot share the 1 bundle(s) of policy",
        ),
        (
            config(roles={"policy": {"gpus": 0.7}, "rollout": {"gpus": 0.7, "colocate": "policy"}}),
            "roles.policy with rollout beside it: 1.4 GPUs per bundle",
        ),
        (config(roles={"policy": {"gpus": 1}, "rollout": {"gpus": 0.5, "workers": 2}}), "several of them on one GPU"),
        (config(roles={"policy": {"gpus": 1}}), "set weights.transport=object_store"),
        (
            config(roles={"rollout": {"autoscale": {"min": 3, "max": 2}}}),
            "roles.rollout.autoscale.min=3 is more than roles.rollout.autoscale.max=2",
        ),
        (
            config(roles={"rollout": {"workers": 9, "autoscale": {"min": 0, "max": 8}}}),
            "roles.rollout.workers=9 is the number to begin with, and roles.rollout.autoscale allows 0 to 8",
        ),
        (
            config(roles={"rollout": {"colocate": "policy", "autoscale": {"max": 4}}}),
            "roles.rollout.autoscale.max: 4 processes cannot share the 1 bundle(s) of policy",
        ),
        (
            config(roles={"rollout": {"colocate": "policy"}}, weights={"transport": "collective"}),
            "weights.transport=collective needs policy and the workers of rollout awake at the same time",
        ),
        (
            config(roles={"policy": {"gpus": 1}, "rollout": {"gpus": 1, "tensor_parallel": 2}}),
            "set roles.rollout.gpus=2",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_invalid_settings_are_refused_with_the_key_and_a_remedy(changed: RunConfig, said: str) -> None:
    plan = planned(changed)
    (refusal,) = plan.refusals
    assert said in refusal
    with pytest.raises(ConfigError) as caught:
        plan.accepted()
    assert str(caught.value) == refusal


def test_all_refusals_are_reported_at_once_with_what_the_cluster_lacks() -> None:
    roles = {"policy": {"ranks": 2, "gpus": 1}, "rollout": {"gpus": 1, "colocate": "reward"}}
    plan = planned(config("grpo", train={"batch_size": 1}, roles=roles))
    found = problems(plan, ClusterView.of_machine(cpus=8))
    assert len(found) == 4
    assert "policy: no place for 2 of 2, each needs 1 GPU and 1 CPU: the largest node has 0 GPU" in found


def test_staleness_with_a_correction_is_allowed_and_widens_what_is_in_flight() -> None:
    plan = planned(config(train={"max_staleness": 2, "batch_size": 16}, options={"correction": "token_truncate"}))
    assert plan.refusals == ()
    assert plan.phases[0].groups_in_flight == 48


def test_a_reference_that_forgets_earlier_phases_is_warned_about() -> None:
    phases = {"warm": {"method": "sft"}, "prefer": {"method": "dpo"}}
    assert planned(RunConfig.model_validate({"phases": phases})).warnings == ()
    (warning,) = planned(RunConfig.model_validate({"phases": phases, "model": {"lora": {"r": 8}}})).warnings
    assert warning.startswith("phases.prefer: with model.lora the reference is the model without adapters")


def test_a_batch_of_one_is_refused_where_examples_swap_their_completions() -> None:
    assert "use 2 or more" in planned(config("kto", train={"batch_size": 1})).refusals[0]
    assert planned(config("bco", train={"batch_size": 1})).refusals == ()


def test_cpus_for_a_ray_that_is_not_started_are_warned_about() -> None:
    phase = {"method": "sft", "train": {"steps": 1}}
    there: dict[str, Any] = {"phases": {"one": phase}, "cluster": {"address": "head:6379"}}
    assert planned(RunConfig.model_validate(there)).warnings == ()
    there["cluster"]["num_cpus"] = 8
    (warning,) = planned(RunConfig.model_validate(there)).warnings
    assert "cluster.num_cpus=8" in warning and "head:6379" in warning


def test_a_truncated_distribution_is_warned_about_once_and_not_refused() -> None:
    plan = planned(config(sampling={"top_p": 0.9}))
    assert plan.refusals == () and len(plan.warnings) == 1 and "top_p" in plan.warnings[0]
    assert planned(config(sampling={"top_p": 0.9, "temperature": 0})).warnings == ()


def test_batch_arithmetic_counts_rows_optimizer_steps_and_micro_batches() -> None:
    phase = planned(
        config(
            options={"num_generations": 4, "minibatches": 2, "updates_per_batch": 3},
            train={"batch_size": 16, "token_budget": 1000},
            sampling={"max_tokens": 60},
            data={"max_prompt_length": 40},
        )
    ).phases[0]
    assert phase.rows_per_step == 64
    assert phase.optimizer_steps_per_batch == 6
    assert phase.longest_row == 100
    assert phase.micro_batches == 4  # 32 rows of a minibatch, ten of the longest in each micro-batch


def test_an_average_that_a_later_phase_would_not_update_is_a_warning() -> None:
    first, second = ({"method": "sft", "train": {"bema": bema}} for bema in ({}, None))
    plan = planned(RunConfig.model_validate({"phases": {"one": first, "two": second}}))
    assert len(plan.warnings) == 1 and plan.warnings[0].startswith("phases.one.train.bema: ")
    assert planned(RunConfig.model_validate({"phases": {"one": second, "two": first}})).warnings == ()


def test_the_plan_shows_changes_of_weights_other_than_training() -> None:
    options = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 64}
    plan = planned(config("dpo", options=options, train={"bema": {"update_after": 50}}))
    terminal = Console(width=200, record=True, file=io.StringIO())
    terminal.print(render(plan, gpu_nodes(1)))
    shown = terminal.export_text()
    assert "reference: after every 64 steps 0.25 policy + 0.75 reference" in shown
    assert "bema: an average every 400 optimizer steps, first at step 450; saved as bema/" in shown
    assert "averages" in shown


def test_the_plan_shows_stages_arithmetic_memory_placement_and_refusals() -> None:
    roles = {"policy": {"ranks": 2, "gpus": 1}, "rollout": {"gpus": 1}}
    plan = planned(config(options={"beta": 0.1}, roles=roles), parameters=26_000_000)
    terminal = Console(width=200, record=True, file=io.StringIO())
    terminal.print(render(plan, gpu_nodes(1, gpus=2)))
    shown = terminal.export_text()
    for expected in (
        "reference.infer",
        "ref_logps",
        "collect",
        "learn",
        "a batch is 32 prompts x 8 samples = 256 rows",
        "0-1 of the gang",
        "weights",
        "2 GPU, 128 CPU on 1 node(s)",
        "set roles.policy.backend=deepspeed",
        "rollout: no place for 1 of 1",
    ):
        assert expected in shown, expected


@pytest.mark.parametrize(
    ("samples", "arithmetic"),
    [(4, "16 prompts x 4 samples, regrouped to 2 rows each = 32 rows"), (2, "16 prompts x 2 samples = 32 rows")],
)
def test_a_batch_counts_the_rows_that_are_made_of_the_samples(samples: int, arithmetic: str) -> None:
    plan = planned(config("online_dpo", options={"num_generations": samples}, train={"batch_size": 16}))
    terminal = Console(width=200, record=True, file=io.StringIO())
    terminal.print(render(plan, gpu_nodes(1)))
    assert f"a batch is {arithmetic};" in terminal.export_text()
    assert plan.phases[0].rows_per_step == 32
