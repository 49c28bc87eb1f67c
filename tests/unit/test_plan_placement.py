"""Where the processes of a plan find room: bundles, nodes and labels, up to 256 GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.bundles import Bundle, ClusterView, Node, fit, how_many_fit, shortages
from orchestrator.planning.node_selectors import meets
from orchestrator.planning.plan import Plan, problems
from orchestrator.reporting.plan_report import as_data
from tests.unit.plan_stage import config, gpu_nodes, planned


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


def test_memory_and_custom_resources_are_reserved_as_given() -> None:
    plan = planned(config("sft", roles={"policy": {"memory_gib": 2, "resources": {"fast_disk": 1}}}))
    assert plan.gang[0].resources == {"CPU": 1.0, "memory": 2.0 * 2**30, "fast_disk": 1.0}


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
