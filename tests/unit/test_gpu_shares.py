"""Shares of a GPU that roles together fill: sums of fractions, as they are meant."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.config.schema import RunConfig
from orchestrator.methods import build
from orchestrator.planning.plan import Plan, draft_plan

FULL = [(0.1, 0.2, 0.7), (0.1, 0.3, 0.6), (0.35, 0.35, 0.3), (0.2, 0.2, 0.6)]
NOT_FULL = [(0.1, 0.2, 0.6), (0.1, 0.2, 0.699)]


def plan_of(policy: float, reference: float, rollout: float) -> Plan:
    ranks: dict[str, Any] = {"ranks": 2, "backend": "deepspeed"}
    roles = {
        "policy": {**ranks, "gpus": policy},
        "reference": {**ranks, "gpus": reference, "colocate": "policy"},
        "rollout": {"workers": 2, "gpus": rollout, "colocate": "policy"},
    }
    phases = {"grpo": {"method": "grpo", "train": {"steps": 1, "batch_size": 4}}}
    config = RunConfig.model_validate({"phases": phases, "roles": roles, "rewards": [{"fn": "exact_match"}]})
    return draft_plan(config, {"grpo": build("grpo", {"num_generations": 4, "beta": 0.1})})


@pytest.mark.parametrize("shares", FULL, ids=str)
def test_roles_whose_shares_make_one_gpu_fill_it_in_any_order(shares: tuple[float, float, float]) -> None:
    first, second, third = shares
    for order in (shares, (third, second, first), (second, third, first)):
        plan = plan_of(*order)
        assert plan.refusals == ()
        shared = [bundle.resources["GPU"] for bundle in plan.bundles if "policy" in bundle.roles]
        assert shared == [1.0, 1.0], "what is reserved is a whole GPU as well"


@pytest.mark.parametrize("shares", NOT_FULL, ids=str)
def test_roles_that_leave_a_part_of_each_gpu_free_are_refused(shares: tuple[float, float, float]) -> None:
    (line,) = plan_of(*shares).refusals
    assert f"{sum(shares):g} GPU for each of 2 processes would put several of them on one GPU" in line
