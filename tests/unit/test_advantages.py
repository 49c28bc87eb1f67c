"""Advantages: from rewards per sample to values per token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.batch import Batch
from orchestrator.batches.row_table import RowTable
from orchestrator.credit.advantages import (
    clipped_rewards,
    group_zscore,
    has_signal,
    leave_one_out,
    mask_truncated,
    zscore_by_group,
)
from orchestrator.data.density_ratio import density_ratio_weights, desirable_probability

NAN = float("nan")


def on_a_rank(rows: RowTable) -> Batch:
    """What a rank that has all of the rows makes of them."""
    return rows.whole().shard.fetched([]).batch


def test_each_group_is_centred_and_scaled_by_its_unbiased_deviation() -> None:
    found = zscore_by_group(np.array([1.0, 3.0, 10.0, 10.0]), np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(found, [-1 / (np.sqrt(2) + 1e-4), 1 / (np.sqrt(2) + 1e-4), 0, 0], rtol=1e-6)


def test_members_of_a_group_need_not_be_adjacent() -> None:
    rewards, group = np.array([1.0, 10.0, 3.0, 30.0]), np.array([5, -2, 5, -2])
    shuffled = zscore_by_group(rewards, group)
    np.testing.assert_allclose(shuffled[[0, 2, 1, 3]], zscore_by_group(rewards[[0, 2, 1, 3]], group[[0, 2, 1, 3]]))


def test_scaling_by_batch_uses_one_deviation_and_none_uses_none() -> None:
    rewards, group = np.array([1.0, 3.0, 10.0, 14.0]), np.array([0, 0, 1, 1])
    np.testing.assert_allclose(zscore_by_group(rewards, group, scale="none"), [-1, 1, -2, 2])
    deviation = np.std(rewards, ddof=1) + 1e-4
    np.testing.assert_allclose(
        zscore_by_group(rewards, group, scale="batch"),
        [-1 / deviation, 1 / deviation, -2 / deviation, 2 / deviation],
        rtol=1e-6,
    )


def test_an_unscorable_sample_has_advantage_zero_and_does_not_affect_its_group() -> None:
    with_gap = zscore_by_group(np.array([1.0, NAN, 3.0]), np.zeros(3))
    without = zscore_by_group(np.array([1.0, 3.0]), np.zeros(2))
    assert with_gap[1] == 0
    np.testing.assert_array_equal(with_gap[[0, 2]], without)


@pytest.mark.parametrize(
    "rewards", [[NAN, NAN], [2.0, NAN], [2.0, 2.0]], ids=["none scored", "one scored", "all equal"]
)
def test_a_group_with_nothing_to_compare_gets_zeros(rewards: list[float]) -> None:
    assert zscore_by_group(np.array(rewards), np.zeros(2)).tolist() == [0, 0]


def test_leave_one_out_compares_each_sample_with_the_mean_of_the_others() -> None:
    rows = RowTable(Batch.build([2] * 6, reward=[1.0, 4.0, NAN, 2.0, 6.0, 6.0], group=[0, 1, 0, 0, 1, 2]))
    found = leave_one_out(rows)
    np.testing.assert_allclose(found["advantages"], [-1, -2, 0, 1, 2, 0])  # the last one has no sibling
    assert found["learned"].tolist() == [True, True, False, True, True, True]
    normalised = leave_one_out(rows, normalise=True)["advantages"]
    scored = found["advantages"][found["learned"]]
    expected = (scored - scored.mean()) / (scored.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(normalised[found["learned"]], expected, rtol=1e-5)
    assert normalised[2] == 0


def test_rewards_are_brought_within_their_range_and_what_has_none_stays_without() -> None:
    rows = RowTable(Batch.build([1] * 4, reward=[-3.0, 0.5, 9.0, NAN]))
    np.testing.assert_array_equal(clipped_rewards(rows, lowest=-1.0, highest=2.0)["reward"], [-1.0, 0.5, 2.0, NAN])


def test_an_empty_batch_has_no_advantages() -> None:
    assert zscore_by_group(np.zeros(0), np.zeros(0, int)).shape == (0,)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.floats(-5, 5), st.floats(0.5, 4))
def test_advantages_ignore_the_offset_of_rewards_and_only_their_scale_when_unscaled(
    rewards: list[float], offset: float, factor: float
) -> None:
    base = zscore_by_group(np.array(rewards), np.zeros(len(rewards)), scale="none")
    moved = zscore_by_group(np.array(rewards) * factor + offset, np.zeros(len(rewards)), scale="none")
    np.testing.assert_allclose(moved, base * factor, atol=1e-4)
    assert abs(float(base.sum())) < 1e-4


def test_the_credit_stage_writes_the_row_s_advantage_at_each_of_its_tokens() -> None:
    rows = RowTable(Batch.build([2, 3], reward=[0.0, 2.0], group=[4, 4], mask=[False, True, False, True, True]))
    written = on_a_rank(rows.with_values(**group_zscore(rows, scale="none")))
    assert written["advantages"].tolist() == [-1, -1, 1, 1, 1]
    assert written["mask"].tolist() == rows.rows["mask"].tolist()
    assert group_zscore.reads == {"reward", "group"}
    assert group_zscore.writes == {"advantages", "learned"}


def test_a_row_that_no_reward_could_score_is_masked_and_one_of_advantage_zero_is_not() -> None:
    rows = RowTable(Batch.build([2, 2, 2], reward=[1.0, NAN, 1.0], group=[0, 0, 0], mask=[False, True] * 3))
    written = on_a_rank(rows.with_values(**group_zscore(rows)))
    assert written["mask"].tolist() == [False, True, False, False, False, True]
    assert written["advantages"].tolist() == [0] * 6


def test_only_a_truncated_completion_loses_its_whole_mask() -> None:
    rows = RowTable(Batch.build([2, 3], mask=[False, True, False, True, True], truncated=[True, False]))
    written = rows.with_values(**mask_truncated(rows))
    assert on_a_rank(written)["mask"].tolist() == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0, 1], True),
        ([1, 1, 1], False),
        ([0, 0], False),
        ([NAN, 1], False),
        ([NAN, 1, 0.5], True),
        ([NAN, NAN], False),
    ],
)
def test_a_group_has_signal_if_two_scored_samples_differ(rewards: list[float], expected: bool) -> None:
    assert has_signal(np.array(rewards, np.float32)) is expected


# Density ratios


def test_undesirable_prompts_that_resemble_desirable_ones_have_larger_weights() -> None:
    rng = np.random.default_rng(0)
    label = np.arange(400) < 100
    embeddings = rng.normal(size=(400, 3)) + np.where(label, 1.0, 0.0)[:, None]
    embeddings[-1] = 1.5  # undesirable, among desirable prompts
    probability = desirable_probability(embeddings, label)
    weights = density_ratio_weights(probability)
    assert probability[label].mean() > 0.65 > 0.35 > probability[~label].mean()
    assert weights[-1] > 2 * np.median(weights[~label])
    assert 0.5 <= weights.min() <= weights.max() <= 10.0


def test_classes_of_different_size_are_balanced_so_that_the_odds_are_a_ratio_of_densities() -> None:
    rng = np.random.default_rng(1)
    embeddings = rng.normal(size=(1000, 2))  # the same density for both
    probability = desirable_probability(embeddings, np.arange(1000) < 50)
    assert abs(float(probability.mean()) - 0.5) < 0.02
