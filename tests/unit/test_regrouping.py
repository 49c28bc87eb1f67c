"""Pairs made of samples: which two rows of a prompt's become one, and when there is none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.errors import ConfigError
from actors.worker import Ref
from orchestrator.batches.regrouping import (
    best_and_worst,
    highest,
    keep_highest,
    most_and_least_preferred,
    most_reward_per_token,
    penalise_missing_eos,
    preference_over_opponent,
    shortest,
    with_optimal_value,
)
from orchestrator.batches.row_table import RowTable
from orchestrator.credit.advantages import group_zscore_of_some
from orchestrator.methods import build
from orchestrator.pipeline import Verb

OWN_FILTER = """
import numpy as np


def even_lengths(table):
    return (table["completion_tokens"] % 2 == 0).astype(float)


def too_few(table):
    return np.zeros(1)
"""


def group(rewards: list[float], truncated: list[bool] | None = None) -> RowTable:
    """Samples of one prompt, of 3, 4, 5 ... tokens, which lie in a block; sample i is of the tokens i."""
    lengths = [3 + i for i in range(len(rewards))]
    rows = Batch.build(
        lengths,
        group=[7] * len(rewards),
        reward=rewards,
        truncated=truncated or [False] * len(rewards),
        completion_tokens=[length - 2 for length in lengths],
    )
    block = Batch.build(lengths, tokens=np.repeat(np.arange(len(rewards)), lengths))
    return RowTable.of_block(rows, Ref(block), {"tokens"})


def samples(table: RowTable) -> list[int]:
    """Which samples the rows are."""
    return (table["completion_tokens"] - 1).tolist()


def pair(table: RowTable | None) -> tuple[list[int], list[bool]]:
    """The samples of the rows, and which are preferred."""
    assert table is not None
    whole = table.whole()
    tokens = whole.shard.fetched([ref.target for ref in whole.blocks]).batch["tokens"]
    starts = np.cumsum([0, *table.lengths[:-1]])
    assert (table.lengths == 3 + tokens[starts]).all(), "rows and tokens are of the same samples"
    return tokens[starts].tolist(), table["preferred"].tolist()


@pytest.mark.parametrize(
    ("rewards", "rows"),
    [
        ([1.0, 0.0], [0, 1]),
        ([0.0, 1.0], [1, 0]),
        ([0.5, 2.0, -1.0, 1.0], [1, 2]),
        ([1.0, 0.0, 1.0, 0.0], [0, 3]),
        ([math.nan, 0.5, math.nan, 0.7], [3, 1]),
    ],
)
def test_the_best_sample_is_preferred_to_the_worst(rewards: list[float], rows: list[int]) -> None:
    assert pair(best_and_worst(group(rewards))) == (rows, [True, False])


@pytest.mark.parametrize("rewards", [[1.0, 1.0], [0.0, 0.0, 0.0], [math.nan, 2.0, 2.0]])
def test_equal_rewards_make_no_pair_unless_ties_are_kept(rewards: list[float]) -> None:
    assert best_and_worst(group(rewards)) is None
    scored = np.flatnonzero(~np.isnan(rewards))
    assert pair(best_and_worst(group(rewards), ties="keep")) == ([scored[0], scored[-1]], [True, False])


@pytest.mark.parametrize("ties", ["drop", "keep"])
@pytest.mark.parametrize("rewards", [[1.0], [1.0, math.nan], [math.nan, math.nan]])
def test_fewer_than_two_scored_samples_make_no_pair(rewards: list[float], ties: str) -> None:
    assert best_and_worst(group(rewards), ties=ties) is None  # pyright: ignore[reportArgumentType]


def test_a_truncated_completion_is_penalised_before_the_comparison() -> None:
    cut = group([1.0, 0.5, 0.4], truncated=[True, False, False])
    penalised = penalise_missing_eos(cut, penalty=0.8)
    np.testing.assert_allclose(penalised["reward"], [0.2, 0.5, 0.4], rtol=1e-6)
    assert pair(best_and_worst(cut))[0] == [0, 2]
    assert pair(best_and_worst(penalised))[0] == [1, 0]


def sampled_by_two(rewards: list[float]) -> RowTable:
    """The first two by the first sampler, the others by another."""
    table = group(rewards).with_values(sampler=np.array([0, 0, *([1] * (len(rewards) - 2))], np.int8))
    return table.with_values(win_rate=np.full(len(rewards), np.nan, np.float32))  # there is no judge


def test_the_policys_samples_have_the_probability_that_they_are_preferred_to_the_opponents() -> None:
    table = preference_over_opponent(sampled_by_two([1.0, 0.0, 1.0, math.nan, 3.0]))
    assert table is not None and samples(table) == [0, 1]
    expected = [(1 / (1 + np.exp(each))).mean() for each in (np.array([0.0, 2.0]), np.array([1.0, 3.0]))]
    np.testing.assert_allclose(table["preference"], expected, rtol=1e-6)
    extreme = preference_over_opponent(sampled_by_two([1e9, math.nan, -1e9]))
    assert extreme is not None and samples(extreme) == [0] and extreme["preference"] == [1.0]
    assert preference_over_opponent(sampled_by_two([1.0, 0.0, math.nan])) is None
    assert preference_over_opponent(sampled_by_two([math.nan, math.nan, 1.0])) is None


def test_a_prompts_optimal_value_is_that_of_the_other_samplers_rewards_at_each_sample_of_the_first() -> None:
    table = with_optimal_value(sampled_by_two([0.0, 1.0, 1.0, 0.0, math.nan, 0.0]), beta=0.5, drop_unsolved=True)
    assert table is not None and samples(table) == [0, 1]
    np.testing.assert_allclose(table["optimal_value"], [0.5 * np.log((np.exp(2) + 2) / 3)] * 2, rtol=1e-6)
    extreme = with_optimal_value(sampled_by_two([0.0, math.nan, 1e4, 0.0]), beta=1e-3, drop_unsolved=True)
    assert extreme is not None and samples(extreme) == [0]
    np.testing.assert_allclose(extreme["optimal_value"], [1e4], rtol=1e-6)


@pytest.mark.parametrize(
    ("rewards", "drop_unsolved", "remains"),
    [
        ([1.0, 1.0, 0.0, 0.0], True, False),
        ([1.0, 1.0, 0.0, 0.0], False, True),
        ([1.0, 1.0, math.nan, math.nan], False, False),
        ([math.nan, math.nan, 1.0, 0.0], False, False),
    ],
    ids=["unsolved", "unsolved and kept", "no value", "no sample"],
)
def test_a_prompt_without_a_value_or_a_sample_to_learn_from_is_replaced(
    rewards: list[float], drop_unsolved: bool, remains: bool
) -> None:
    found = with_optimal_value(sampled_by_two(rewards), beta=0.5, drop_unsolved=drop_unsolved)
    assert (found is not None) is remains


@pytest.mark.parametrize(
    ("scores", "rewards", "kept"),
    [
        (shortest, [0.0, 1.0, 0.0, 1.0], [0, 1]),
        (shortest, [math.nan, 1.0, 0.0, 1.0], [1, 2]),
        (most_reward_per_token, [0.2, 1.0, 3.0, 2.0], [1, 2]),  # 0.2, 0.5, 1.0 and 0.5: the first of equal ones
        (most_reward_per_token, [-1.0, -4.0, math.nan, -4.0], [0, 3]),
        (lambda table: np.array([math.nan, 1.0, math.nan, 0.0]), [1.0, 1.0, 1.0, 1.0], [1, 3]),
        (shortest, [math.nan, math.nan, 1.0, math.nan], [2]),
    ],
    ids=["short", "short of the scored", "efficient", "efficient when all cost", "no score is lowest", "too few"],
)
def test_the_samples_with_the_highest_scores_remain_in_their_order(
    scores: Any, rewards: list[float], kept: Any
) -> None:
    assert samples(keep_highest(group(rewards), scores=scores, count=2)) == kept


def test_a_filter_that_scores_another_number_of_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one score for each of 3 samples, got \(2,\)"):
        keep_highest(group([1.0, 0.0, 1.0]), scores=lambda table: np.zeros(2), count=2)


def test_samples_that_are_not_chosen_have_advantage_0_count_and_move_no_mean_of_their_own_group_alone() -> None:
    table = RowTable.concat([group([1.0, 0.0, 9.0]), group([5.0, math.nan, 3.0, 9.0])])
    table = table.with_values(group=np.array([4, 4, 4, 2, 2, 2, 2]))
    found = group_zscore_of_some(table, chosen=highest, scores=shortest, count=2, scale="none")
    np.testing.assert_allclose(found["advantages"], [0.5, -0.5, 0, 1, 0, -1, 0])
    assert found["learned"].tolist() == [True, True, True, True, False, True, True]


def test_a_judge_says_the_preference_over_an_opponent_itself_and_rewards_say_it_by_their_difference() -> None:
    table = group([1.0, 0.0]).with_values(sampler=np.array([0, 1], np.int8))
    scored = preference_over_opponent(table.with_values(win_rate=np.full(2, np.nan, np.float32)))
    assert scored is not None and scored["preference"] == pytest.approx([1 / (1 + math.exp(-1.0))])
    judged = preference_over_opponent(table.with_values(win_rate=np.array([1.0, 0.0], np.float32)))
    assert judged is not None and judged["preference"].tolist() == [1.0] and samples(judged) == [0]


def test_the_filter_of_a_users_own_file_says_which_samples_are_learned_from(tmp_path: Path) -> None:
    file = tmp_path / "filters.py"
    file.write_text(OWN_FILTER)

    def kept(name: str) -> list[int]:
        options = {"num_generations": 5, "num_remains_in_group": 2, "group_filter": name}
        (stage,) = (stage for stage in build("gfpo", options) if stage.verb is Verb.REGROUP)
        assert stage.call is not None and stage.options["rows"] == 2
        return samples(stage.call(group([0.0, 1.0, 0.5, 0.2, 0.1]), **stage.options["call"]))

    assert kept(f"{file}:even_lengths") == [1, 3], "samples of 1, 2, 3 ... tokens"
    assert kept("length") == [0, 1]
    with pytest.raises(ValueError, match=r"one score for each of 5 samples, got \(1,\)"):
        kept(f"{file}:too_few")
    with pytest.raises(ConfigError, match="no_such"):
        kept(f"{file}:no_such")


def preferred_of(rewards: list[float], win_rates: list[float] | None = None, **options: Any) -> RowTable | None:
    rates = np.full(len(rewards), np.nan) if win_rates is None else np.array(win_rates)
    columns = {"reward": np.array(rewards, np.float32), "win_rate": rates.astype(np.float32)}
    table = RowTable(Batch.build([2] * len(rewards), group=[0] * len(rewards), **columns))
    return most_and_least_preferred(table, **{"hard": False, **options})


def test_the_most_and_the_least_preferred_sample_have_their_mean_probability_of_beating_a_sibling() -> None:
    table = preferred_of([0.0, 2.0, 1.0, math.nan])
    assert table is not None and table["reward"].tolist() == [2.0, 0.0]
    best = (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-1))) / 2
    assert table["preference"].tolist() == pytest.approx([best, 1 - best])
    hard = preferred_of([0.0, 2.0, 1.0, math.nan], hard=True)
    assert hard is not None and hard["preference"].tolist() == [1.0, 0.0]


def test_what_a_judge_prefers_is_taken_in_the_place_of_rewards() -> None:
    table = preferred_of([1.0, 2.0, 3.0], [0.75, 0.5, 0.25])
    assert table is not None and table["reward"].tolist() == [1.0, 3.0]
    assert table["preference"].tolist() == [0.75, 0.25]


def test_samples_that_are_preferred_equally_give_no_pair_or_one_that_aims_at_no_change() -> None:
    assert preferred_of([1.0, 1.0, 1.0]) is None and preferred_of([1.0, math.nan]) is None
    kept = preferred_of([1.0, 1.0, 1.0], ties="keep", hard=True)
    assert kept is not None and kept["preference"].tolist() == [0.5, 0.5]
