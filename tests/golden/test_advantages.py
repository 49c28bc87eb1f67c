"""Advantages, and the samples that have some, against the numbers of another implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.backends.single import SoloWorld
from actors.batch import Batch
from orchestrator.batches.replay_buffer import Kept, ReplayBuffer
from orchestrator.batches.row_table import RowTable
from orchestrator.credit.advantages import zscore_by_group
from orchestrator.methods import build
from orchestrator.pipeline import Pipeline, Verb
from rewards.combine import weighted_sum
from tests.golden.cases import cases
from tests.golden.peer import ours


@cases("replay_buffer/")
def test_a_buffer_of_groups_keeps_those_that_the_peer_keeps(case: dict[str, Any]) -> None:
    buffer = ReplayBuffer(case["inputs"]["max_size"])
    for score in case["inputs"]["scores"]:
        buffer.add(Kept(score, 0, RowTable(Batch.empty())))
    assert sorted(kept.score for kept in buffer.groups) == case["outputs"]["kept"]


@cases("data/nanstd")
def test_the_deviation_equals_the_peer_where_rewards_are_missing(case: dict[str, Any]) -> None:
    rewards = np.array(case["inputs"]["x"], dtype=np.float64)
    group = np.repeat(np.arange(2), rewards.shape[1])
    centred = zscore_by_group(rewards.flatten(), group, scale="none").reshape(rewards.shape)
    scaled = zscore_by_group(rewards.flatten(), group).reshape(rewards.shape)
    assert centred[0, 0] / scaled[0, 0] - 1e-4 == pytest.approx(case["outputs"]["std"][0], abs=1e-5)
    assert case["outputs"]["std"][1] == "nan"
    assert not scaled[1].any()


@cases("grpo_adv/")
def test_advantages_equal_the_peer(case: dict[str, Any]) -> None:
    inputs, config = case["inputs"], case["config"]
    rewards = np.array([[np.nan if r in (None, "nan") else r for r in row] for row in inputs["rewards_per_func"]])
    weights = np.array(inputs["weights"])
    table = RowTable(
        Batch.build(
            [1] * len(rewards),
            reward=weighted_sum(rewards, weights),
            reward_parts=rewards,
            reward_weights=np.tile(weights, (len(rewards), 1)),
            group=np.arange(len(rewards)) // inputs["num_generations"],
        )
    )
    aggregation = config.get("multi_objective_aggregation", "sum_then_normalize")
    scale = {} if aggregation == "normalize_then_sum" else {"scale_rewards": config["scale_rewards"]}
    found = credited(build("grpo", {"multi_objective_aggregation": aggregation, **scale}), table)
    np.testing.assert_allclose(found["advantages"], case["outputs"]["advantages"], atol=1e-4)
    assert found["learned"].tolist() == (~np.isnan(rewards).all(axis=1)).tolist()


@cases("rloo_adv/")
def test_leave_one_out_advantages_equal_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    old, ref = np.array(inputs["old_per_token_logps"]), np.array(inputs["ref_per_token_logps"])
    rows, width = old.shape
    rewards = np.array([np.nan if reward == "nan" else reward for reward in inputs["rewards"]])
    batch = Batch.build(
        [width] * rows,
        mask=np.ones(old.size, bool),
        reward=rewards,
        group=np.arange(rows) // inputs["num_generations"],
        old_logps=old.flatten(),
        ref_logps=ref.flatten(),
    )
    found = credited(build(*ours(case)), RowTable(batch))
    np.testing.assert_allclose(found["advantages"], case["outputs"]["advantages"], atol=1e-5)
    assert found["learned"].tolist() == (~np.isnan(rewards)).tolist()


def credited(pipeline: Pipeline, table: RowTable) -> RowTable:
    """What the credit stages make of rows, all of which one rank has."""
    for stage in pipeline:
        if stage.verb is Verb.CREDIT:
            assert stage.call is not None
            if stage.reads_tokens:
                columns, _ = stage.call(table.whole().shard.fetched([]).batch, SoloWorld(), {}, **stage.options)
            else:
                columns = stage.call(table, **stage.options)
            table = table.with_values(**columns)
    return table
