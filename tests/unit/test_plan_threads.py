"""How a plan divides the cores among roles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.plan import Plan
from tests.unit.plan_stage import SEVEN_BILLION, SMALL, config, planned, threads


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


def test_a_synchronised_reference_alternates_with_the_trainer_and_has_all_cores() -> None:
    following = planned(config("dpo", options={"sync_ref_model": True}), cores=4)
    assert threads(following) == {"policy": 4, "reference": 4}
