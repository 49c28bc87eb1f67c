"""Plans, their refusals and their fit, without Ray: from two cores to 256 GPUs."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import Qwen2Config

from actors.errors import ConfigError
from orchestrator.config.colocation import bucket_bytes_between, transport_between
from orchestrator.config.schema import RunConfig
from orchestrator.losses.likelihood import nll
from orchestrator.losses.reduce import token_mean
from orchestrator.methods import build
from orchestrator.pipeline import Completions, Pairs, Pipeline, Prompts, generate, infer, score, update
from orchestrator.planning.bundles import Bundle, ClusterView, Node, fit, how_many_fit, shortages
from orchestrator.planning.machine import Machine
from orchestrator.planning.memory_estimate import Shape, Training, estimate
from orchestrator.planning.node_selectors import meets
from orchestrator.planning.plan import Plan, draft_plan, problems
from orchestrator.reporting.plan_report import as_data, render

SEVEN_BILLION = 7_000_000_000
SMALL = 1_300_000


def config(method: str = "grpo", *, options: dict[str, Any] | None = None, **keys: Any) -> RunConfig:
    """One phase of a method; `train`, `data`, `evaluation` go to the phase and everything else to the run."""
    of_phase = {key: keys.pop(key) for key in ("train", "data", "sampling", "evaluation") if key in keys}
    phase = {"method": method, "options": options or {}, **of_phase}
    return RunConfig.model_validate({"phases": {method: phase}, **keys})


def planned(config: RunConfig, *, cores: int = 2, parameters: int | None = SMALL) -> Plan:
    pipelines = {name: build(phase.method, phase.options) for name, phase in config.phases.items()}
    return draft_plan(config, pipelines, parameters=parameters, machine=Machine(cores))


def report(plan: Plan) -> str:
    """What `troupe plan` prints."""
    text = io.StringIO()
    Console(file=text, width=400).print(render(plan, gpu_nodes(1)))
    return text.getvalue()


def threads(plan: Plan) -> dict[str, int]:
    return {name: role.threads for name, role in plan.roles.items()}


def gpu_nodes(count: int, gpus: int = 8) -> ClusterView:
    return ClusterView(tuple(Node(f"node-{i}", {"CPU": 128.0, "GPU": float(gpus)}) for i in range(count)))


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


def test_a_trainer_that_alternates_with_its_engines_has_all_cores() -> None:
    assert threads(planned(config())) == {"policy": 2, "rollout": 1, "reward": 1}
    assert threads(planned(config(), cores=8)) == {"policy": 8, "rollout": 1, "reward": 1}


def test_a_trainer_that_works_beside_its_engines_has_the_cores_that_they_leave() -> None:
    ahead = {"max_staleness": 1}
    assert threads(planned(config(train=ahead)))["policy"] == 1
    two_engines = config(train=ahead, roles={"rollout": {"workers": 2}})
    assert threads(planned(two_engines, cores=8))["policy"] == 6


def test_a_reference_and_the_trainer_have_all_cores_by_turns() -> None:
    plan = planned(config("dpo"), cores=4)
    assert threads(plan) == {"policy": 4, "reference": 4}
    assert not plan.overlaps


@pytest.mark.parametrize("own", [{"threads": 2}, {"gpus": 1}])
def test_a_reference_works_ahead_of_the_trainer_where_both_have_what_they_need(own: dict[str, int]) -> None:
    assert planned(config("dpo", roles={"policy": own, "reference": own}), cores=4).overlaps
    assert not planned(config("dpo", roles={"policy": own}), cores=4).overlaps


def test_a_reference_that_shares_the_trainer_s_gpu_takes_turns_with_it() -> None:
    """Their peaks of memory would add up."""
    beside = {"policy": {"gpus": 0.7}, "reference": {"gpus": 0.3, "colocate": "policy"}}
    assert not planned(config("dpo", roles=beside)).overlaps
    fractions = {"policy": {"gpus": 0.5}, "reference": {"gpus": 0.5}}  # which Ray may put on one GPU
    assert not planned(config("dpo", roles=fractions)).overlaps


def test_idle_threads_spin_only_in_roles_that_compute_alone() -> None:
    def spinning(plan: Plan) -> set[str]:
        found = {name for name, role in plan.roles.items() if "GOMP_SPINCOUNT" in role.env}
        assert all(("OMP_WAIT_POLICY" in role.env) == (name not in found) for name, role in plan.roles.items())
        return found

    assert spinning(planned(config(), cores=2)) == {"policy"}
    assert spinning(planned(config(), cores=1)) == set()
    assert spinning(planned(config("dpo"), cores=2)) == {"policy", "reference"}
    assert spinning(planned(config(train={"max_staleness": 1}), cores=4)) == set()


def test_engines_share_all_cores_where_the_model_is_large() -> None:
    roles = {"rollout": {"workers": 2}}
    assert threads(planned(config(roles=roles), cores=8, parameters=SEVEN_BILLION))["rollout"] == 4


def test_threads_that_are_given_are_kept_and_reach_the_environment() -> None:
    plan = planned(config(roles={"policy": {"threads": 5}, "rollout": {"threads": 3}}))
    assert threads(plan) == {"policy": 5, "rollout": 3, "reward": 1}
    assert plan.roles["policy"].env["OMP_NUM_THREADS"] == "5"


def test_deepspeed_is_told_about_the_cpu_exactly_where_a_rank_has_no_gpu() -> None:
    on_cpu = planned(config(roles={"policy": {"backend": "deepspeed"}}))
    on_gpu = planned(config(roles={"policy": {"backend": "deepspeed", "gpus": 1}, "rollout": {"gpus": 1}}))
    assert on_cpu.roles["policy"].env["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in on_gpu.roles["policy"].env


@given(
    cores=st.integers(1, 64),
    workers=st.integers(1, 80),
    ranks=st.integers(1, 8),
    staleness=st.integers(0, 2),
    parameters=st.sampled_from([None, SMALL, SEVEN_BILLION]),
)
def test_processes_that_work_at_the_same_time_have_no_more_threads_than_cores(
    cores: int, workers: int, ranks: int, staleness: int, parameters: int | None
) -> None:
    roles = {"policy": {"backend": "deepspeed", "ranks": ranks}, "rollout": {"workers": workers}}
    train = {"max_staleness": staleness, "batch_size": 8}
    plan = planned(config(train=train, options={"beta": 0.0}, roles=roles), cores=cores, parameters=parameters)
    trainer = plan.roles["policy"].threads * ranks
    engines = plan.roles["rollout"].threads * workers
    busy = [trainer + engines] if staleness else [trainer, engines]
    processes = ranks + workers if staleness else max(ranks, workers)
    assert all(total <= max(cores, processes) for total in busy)
    assert min(threads(plan).values()) >= 1


@pytest.mark.parametrize(
    ("gpus", "policy", "reference", "rollout"), [(8, 4, 1, 3), (256, 128, 32, 96)], ids=["8 GPUs", "256 GPUs"]
)
def test_a_plan_that_fills_the_cluster_fits_and_one_more_rank_is_reported(
    gpus: int, policy: int, reference: int, rollout: int
) -> None:
    def plan(more: int) -> Plan:
        sizes = {
            "policy": {"backend": "deepspeed", "ranks": policy + more, "gpus": 1},
            "reference": {"backend": "deepspeed", "ranks": reference, "gpus": 1},
            "rollout": {"workers": rollout, "gpus": 1},
        }
        return planned(config(options={"beta": 0.1}, train={"batch_size": 512}, roles=sizes))

    cluster = gpu_nodes(gpus // 8)
    fitting = plan(0)
    assert problems(fitting, cluster) == []
    assert len(fitting.gang) == policy + reference and fitting.total("GPU") == gpus
    (problem,) = problems(plan(1), cluster)
    assert f"the plan needs {gpus + 1} GPU in all, the cluster has {gpus} GPU: 1 GPU short" in problem


def test_colocated_roles_add_up_in_the_bundles_of_their_host() -> None:
    roles = {
        "policy": {"backend": "deepspeed", "ranks": 2, "gpus": 0.5},
        "reference": {"backend": "deepspeed", "ranks": 1, "gpus": 0.25, "colocate": "policy"},
        "rollout": {"workers": 2, "gpus": 0.25, "colocate": "policy"},
    }
    plan = planned(config(options={"beta": 0.1}, roles=roles))
    assert [bundle.roles for bundle in plan.gang] == [("policy", "reference", "rollout"), ("policy", "rollout")]
    assert [bundle.resources["GPU"] for bundle in plan.gang] == [1.0, 0.75]
    assert plan.roles["reference"].bundles == (0,)
    assert plan.roles["rollout"].bundles == (0, 1)
    assert [role.name for role in plan.elastic if role.host is None] == ["reward"]


ON_ONE_GPU: dict[str, Any] = {
    "policy": {"gpus": 0.4},
    "reference": {"gpus": 0.2, "colocate": "policy"},
    "rollout": {"gpus": 0.4, "colocate": "policy", "kv_cache_gib": 8},
    "reward": {"gpus": 0.0, "colocate": "policy"},
}


def test_colocated_roles_that_hold_models_take_turns_so_that_the_largest_counts_and_not_the_sum() -> None:
    plan = planned(config(options={"beta": 0.1}, roles=ON_ONE_GPU), parameters=1_000_000_000)
    assert plan.turns == (("policy", "reference", "rollout"),), "not who runs users' code"
    held = [memory.on_device for role in plan.turns[0] if (memory := plan.roles[role].memory) is not None]
    assert len(held) == 3 and sum(held) > 1.4 * max(held)
    said = report(plan)
    assert f"about {max(held):.2f} GiB of each GPU are in use at most (policy) instead of {sum(held):.2f}" in said
    assert f"up to {sum(held) - min(held):.2f} wait on the host" in said
    on_cpu = {role: {"colocate": keys["colocate"]} for role, keys in ON_ONE_GPU.items() if "colocate" in keys}
    assert "and on a CPU keep their memory" in report(planned(config(options={"beta": 0.1}, roles=on_cpu)))
    apart = planned(config(options={"beta": 0.1}))
    assert apart.turns == () and "take turns" not in report(apart)


def test_an_engine_that_samples_ahead_of_training_stays_awake_while_the_others_take_turns() -> None:
    ahead = config(options={"beta": 0.1, "correction": "token_truncate"}, train={"max_staleness": 1}, roles=ON_ONE_GPU)
    assert planned(ahead).turns == (("policy", "reference"),)


@pytest.mark.parametrize(
    ("train", "asked", "used"),
    [
        ({}, None, "object_store"),
        ({}, "disk", "disk"),
        ({"max_staleness": 1}, None, "collective"),
        ({"max_staleness": 1}, "collective", "collective"),
    ],
)
def test_weights_wait_on_the_host_for_an_engine_that_sleeps_while_its_trainer_is_awake(
    train: dict[str, Any], asked: Any, used: str
) -> None:
    changed = config(train=train, roles=ON_ONE_GPU, weights={"transport": asked})
    assert transport_between(changed, planned(changed).turns, "policy", "rollout") == used


@pytest.mark.parametrize(
    ("policy", "rollout", "asked", "mib"),
    [(0, 0, None, 16), (1, 1, None, 256), (1, 0, None, 16), (1, 1, 0.5, 0.5), (0, 0, 64, 64)],
)
def test_buckets_are_larger_between_gpus_unless_the_user_says_a_size(
    policy: float, rollout: float, asked: float | None, mib: float
) -> None:
    roles = {"policy": {"gpus": policy}, "rollout": {"gpus": rollout}}
    changed = config(roles=roles, weights={"bucket_mib": asked})
    assert bucket_bytes_between(changed, "policy", "rollout") == int(mib * 2**20)


def test_what_a_frozen_role_samples_may_run_ahead_without_a_correction() -> None:
    keys: dict[str, Any] = {"train": {"max_staleness": 2, "batch_size": 8}, "roles": {"teacher": {"model": "big"}}}
    plan = planned(config("gkd", options={"lmbda": 0.0, "seq_kd": True}, **keys))
    assert plan.refusals == () and plan.phases[0].groups_in_flight == 24


def test_memory_and_custom_resources_are_reserved_as_given() -> None:
    plan = planned(config("sft", roles={"policy": {"memory_gib": 2, "resources": {"fast_disk": 1}}}))
    assert plan.gang[0].resources == {"CPU": 1.0, "memory": 2.0 * 2**30, "fast_disk": 1.0}


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


def test_a_plan_says_how_many_of_the_workers_that_autoscale_allows_there_is_room_for() -> None:
    plan = planned(config(roles={"rollout": {"cpus": 2, "autoscale": {"min": 0, "max": 8}}}))
    report = as_data(plan, ClusterView.of_machine(cpus=8), {"grpo": ()})["report"]
    assert "1 (0 to 8 by load)" in report
    assert "rollout: room for 3 of the 8 that autoscale allows" in report  # beside the policy and the rewards
    large = as_data(plan, ClusterView.of_machine(cpus=64), {"grpo": ()})
    assert large["accepted"] and "room for" not in large["report"]


def test_room_is_counted_in_whole_workers_on_nodes_that_they_may_run_on() -> None:
    nodes = [Node(str(each), {"CPU": 3.0}, {"role": role}) for each, role in enumerate("aab")]
    bundle = Bundle(("rollout",), {"CPU": 2.0}, ({"role": "a"},))
    assert how_many_fit(bundle, ClusterView(tuple(nodes)), at_most=9) == 2
    assert how_many_fit(replace(bundle, selectors=()), ClusterView(tuple(nodes)), at_most=9) == 3
    assert how_many_fit(bundle, ClusterView(tuple(nodes)), at_most=1) == 1


def test_all_refusals_are_reported_at_once_with_what_the_cluster_lacks() -> None:
    roles = {"policy": {"ranks": 2, "gpus": 1}, "rollout": {"gpus": 1, "colocate": "reward"}}
    plan = planned(config("grpo", train={"batch_size": 1}, roles=roles))
    found = problems(plan, ClusterView.of_machine(cpus=8))
    assert len(found) == 4
    assert "policy: no place for 2 of 2, each needs 1 GPU and 1 CPU: the largest node has 0 GPU" in found


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
    there = {"phases": {"one": phase}, "cluster": {"address": "head:6379"}}
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


def test_zero_stages_divide_what_they_shard_and_adapters_cost_little() -> None:
    def training(stage: int, **changes: Any) -> Training:
        return replace(Training(stage, 8, None, gradient_checkpointing=False), **changes)

    plain, one, two, three = (estimate(SEVEN_BILLION, "bfloat16", training=training(stage)) for stage in range(4))
    assert plain.weights == pytest.approx(7e9 * 2 / 2**30)
    assert plain.optimizer == pytest.approx(7e9 * 12 / 2**30) and one.optimizer == plain.optimizer / 8
    assert one.gradients == plain.gradients and two.gradients == plain.gradients / 8
    assert two.weights == plain.weights and three.weights == plain.weights / 8
    adapters = estimate(SEVEN_BILLION, "bfloat16", training=training(0, lora_rank=16))
    assert adapters.weights == plain.weights and adapters.optimizer < 0.02 * plain.optimizer


def test_activations_follow_from_the_shape_where_it_is_known() -> None:
    """Qwen2's 0.5B has a feed-forward of 5.4 times its width; a usual shape has 2.7 times."""
    config = Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                         num_key_value_heads=2)  # fmt: skip
    shape = Shape.of(config)
    assert shape == Shape(layers=24, hidden=896, queries=896, keys=128, gated=4864, fusable=True)
    training = Training(0, 1, None, gradient_checkpointing=False)
    told, guessed = (
        estimate(390_000_000, "bfloat16", tokens=16_384, training=training, shape=each) for each in (shape, None)
    )
    assert told.activations == pytest.approx(16_384 * 24 * 25_088 * 2 / 2**30)
    assert 1.3 < told.activations / guessed.activations < 2 and told.weights == guessed.weights


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "fused", "gib"),
    [
        (12_205, 32_000, False, 22.9),
        (12_205, 32_000, True, 16.8),
        (12_205, 151_936, True, 18.7),
        (46_493, 32_000, True, 48.1),
    ],
)
def test_the_estimate_is_near_the_peak_that_was_measured_on_an_h200(
    tokens: int, vocabulary: int, fused: bool, gib: float
) -> None:
    """docs/performance.md: `sft` of the 0.5B shape in bfloat16; `tokens` of the largest micro-batch."""
    shape = Shape(layers=24, hidden=896, queries=896, keys=128, gated=4864, fusable=True)
    training = Training(0, 1, None, gradient_checkpointing=False, fused=fused)
    parameters = 357_898_112 + 896 * vocabulary
    found = estimate(parameters, "bfloat16", tokens=tokens, training=training, shape=shape)
    assert found.total - found.process == pytest.approx(gib, rel=0.2)


def test_recomputing_activations_takes_a_fraction_of_storing_them() -> None:
    kept = Training(0, 1, None, gradient_checkpointing=False)
    stored = estimate(SEVEN_BILLION, "bfloat16", tokens=8192, training=kept)
    recomputed = estimate(SEVEN_BILLION, "bfloat16", tokens=8192, training=replace(kept, gradient_checkpointing=True))
    assert 0.05 < recomputed.activations / stored.activations < 0.2


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 8)), max_size=12),
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 16)), min_size=1, max_size=4),
)
def test_no_node_is_overcommitted_and_bundles_that_do_not_fit_are_reported(
    asked: list[tuple[int, int]], offered: list[tuple[int, int]]
) -> None:
    bundles = [Bundle((f"role{i}",), {"GPU": float(g), "CPU": float(c)}) for i, (g, c) in enumerate(asked)]
    cluster = ClusterView(tuple(Node(str(i), {"GPU": float(g), "CPU": float(c)}) for i, (g, c) in enumerate(offered)))
    found = fit(bundles, cluster)
    for node in cluster.nodes:
        for kind in ("GPU", "CPU"):
            given = sum(b.resources[kind] for b, at in zip(bundles, found.nodes, strict=True) if at == node.name)
            assert given <= node.resources[kind]
    homeless = {bundle.label for bundle, at in zip(bundles, found.nodes, strict=True) if at is None}
    assert {line.split(":")[0] for line in shortages(bundles, cluster)} == homeless


def test_room_spread_over_nodes_is_distinguished_from_missing_room() -> None:
    cluster = gpu_nodes(2, gpus=3)
    bundles = [Bundle(("rollout",), {"GPU": 2.0})] * 3
    assert shortages(bundles, cluster) == [
        "rollout: no place for 1 of 3, each needs 2 GPU: enough is free in all, but not on one node"
    ]


def test_a_synchronised_reference_has_its_own_weights_and_starts_as_the_policy() -> None:
    options = {"sync_ref_model": True}
    assert planned(config("dpo", options=options)).refusals == ()
    (adapted,) = planned(config("dpo", options=options, model={"lora": {"r": 8}})).refusals
    assert "with model.lora the reference is the policy without its adapters" in adapted
    (other,) = planned(config("kto", options=options, roles={"reference": {"model": "another"}})).refusals
    assert "roles.reference.model=another" in other and "options.sync_ref_model=false" in other


def test_a_synchronised_reference_alternates_with_the_trainer_and_has_all_cores() -> None:
    following = planned(config("dpo", options={"sync_ref_model": True}), cores=4)
    assert threads(following) == {"policy": 4, "reference": 4}


def test_averages_cost_three_copies_of_what_is_trained_shared_by_the_ranks() -> None:
    roles = {"policy": {"backend": "deepspeed", "ranks": 4, "zero_stage": 0}}
    plain, averaged = (
        planned(config("dpo", train={"bema": bema}, roles=roles), parameters=SEVEN_BILLION).roles for bema in (None, {})
    )
    policy = averaged["policy"].memory
    assert policy is not None and policy.averages == pytest.approx(3 * 4 * 7e9 / 4 / 2**30)
    assert plain["policy"].memory == replace(policy, averages=0.0)
    assert averaged["reference"].memory == plain["reference"].memory


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


def labelled_nodes(*labels: dict[str, str]) -> ClusterView:
    return ClusterView(tuple(Node(f"node-{i}", {"CPU": 4.0}, each) for i, each in enumerate(labels)))


def test_a_labelled_role_goes_to_such_nodes_only_and_the_others_make_room() -> None:
    roles = {"rollout": {"workers": 2, "cpus": 2, "label_selector": {"role": "rollout"}}, "policy": {"cpus": 4}}
    plan = planned(config(roles=roles))
    cluster = labelled_nodes({"role": "rollout"}, {"role": "trainer"}, {})
    assert problems(plan, cluster) == []
    nodes = dict(zip((bundle.label for bundle in plan.bundles), fit(plan.bundles, cluster).nodes))
    assert nodes["rollout"] == "node-0" and nodes["policy"] != "node-0"


def test_a_label_that_no_node_has_is_named_with_the_values_that_there_are() -> None:
    plan = planned(config(roles={"rollout": {"label_selector": {"role": "rollout", "zone": "!in(a, b)"}}}))
    [refused] = problems(plan, labelled_nodes({"role": "trainer", "zone": "a"}, {"zone": "b"}))
    assert "rollout: no place for 1 of 1, each needs 1 CPU on a node with role=rollout and zone=!in(a, b)" in refused
    assert "no node meets role=rollout (the values there are: trainer)" in refused
    assert "no node meets zone=!in(a, b) (the values there are: a, b)" in refused


def test_labelled_nodes_that_are_too_few_are_counted_without_the_others() -> None:
    roles = {"rollout": {"workers": 3, "cpus": 2, "label_selector": {"role": "rollout"}}}
    [refused] = problems(planned(config(roles=roles)), labelled_nodes({"role": "rollout"}, {}, {}))
    assert "no place for 1 of 3" in refused
    assert "the plan needs 6 CPU in all, the nodes with these labels have 4 CPU: 2 CPU short" in refused


def test_a_fallback_takes_what_the_preferred_nodes_cannot() -> None:
    rollout = {"label_selector": {"role": "rollout"}, "fallback_strategy": [{"label_selector": {"role": "any"}}]}
    plan = planned(config(roles={"rollout": rollout}))
    assert problems(plan, labelled_nodes({"role": "any"})) == []
    [refused] = problems(plan, labelled_nodes({}))
    assert (
        "on a node with role=rollout, else role=any: no node meets role=rollout (no node has a label 'role'" in refused
    )


@pytest.mark.parametrize(
    ("roles", "part"),
    [
        ({"rollout": {"fallback_strategy": [{"label_selector": {}}]}}, "roles.rollout.fallback_strategy needs a"),
        (
            {"rollout": {"colocate": "policy", "label_selector": {"role": "rollout"}}},
            "roles.rollout.label_selector: a colocated role runs where policy runs",
        ),
    ],
)
def test_labels_without_effect_are_refused(roles: dict[str, Any], part: str) -> None:
    assert any(part in refused for refused in planned(config(roles=roles)).refusals)


@pytest.mark.parametrize("selector", [{"-role": "a"}, {"role": "a b"}, {"role": "in()"}, {"role": "!!a"}])
def test_a_selector_that_ray_would_not_take_is_refused_when_the_configuration_is_read(selector: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"is no (label|condition)"):
        config(roles={"rollout": {"label_selector": selector}})


@pytest.mark.parametrize(
    ("condition", "value", "met"),
    [
        ("a", "a", True),
        ("a", None, False),
        ("!a", "b", True),
        ("!a", None, True),
        ("in(a, b)", "b", True),
        ("in(a,b)", "c", False),
        ("!in(a, b)", None, True),
        ("!in(a, b)", "a", False),
    ],
)
def test_conditions_on_labels_mean_what_they_mean_to_ray(condition: str, value: str | None, met: bool) -> None:
    assert meets({} if value is None else {"role": value}, {"role": condition}) is met


def test_a_role_without_gpus_sees_none() -> None:
    plan = planned(config(roles={"policy": {"gpus": 1}, "rollout": {"gpus": 1}}))
    hidden = {name: role.env.get("CUDA_VISIBLE_DEVICES") for name, role in plan.roles.items()}
    assert hidden == {"policy": None, "rollout": None, "reward": ""}
    segments = {name: role.env.get("PYTORCH_ALLOC_CONF") for name, role in plan.roles.items()}
    assert segments == {"policy": "expandable_segments:True", "rollout": None, "reward": None}


def test_an_engine_s_cache_is_what_is_left_of_a_gpu_and_small_on_a_cpu() -> None:
    def cache(**rollout: Any) -> float:
        plan = planned(config(roles={"policy": {"gpus": 1}, "rollout": {"gpus": 1, **rollout}}), parameters=10**9)
        memory = plan.roles["rollout"].memory
        assert memory is not None
        return memory.kv_cache

    assert cache() == 0 and cache(kv_cache_gib=2.0) == 2.0
    on_cpu = planned(config(), parameters=10**9).roles["rollout"].memory
    assert on_cpu is not None and on_cpu.kv_cache == 0.25
