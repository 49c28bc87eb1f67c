"""What a batch of sampled groups says: its numbers, and its table of completions."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from orchestrator.collection.collected import Collected
from orchestrator.collection.group_stages import PromptGroup
from orchestrator.reporting.rollout_metrics import completion_rows, episode_metrics, rollout_metrics
from rewards.attempts import CallStatistics
from rewards.worker import ScoredTexts, ScoreResult
from rollout.sampling import EpisodeFacts, Finish, GroupMeta

NONE = math.nan


def group(rewards: list[list[float]], *, columns: dict[str, Any] | None = None) -> PromptGroup:
    """A prompt `q` with one sample per row of `rewards`, under two functions of weight 1."""
    matrix = np.array(rewards, np.float32)
    total = np.where(np.isnan(matrix).all(axis=1), np.nan, np.nansum(matrix, axis=1))
    count = len(rewards)
    meta = GroupMeta("id", "rollout/0", (3,) * count, (Finish.STOP,) * count, 2, 2, 0.1)
    prompt = SimpleNamespace(id=7, prompt="q", columns=columns or {})
    score = ScoreResult(("a", "b"), matrix, total, weights=np.ones(2, np.float32))
    return PromptGroup("id", 4, prompt, 0, metas=(meta,), own=(True,) * count, oldest_version=2, score=score)


def test_a_row_of_the_table_has_what_the_data_set_and_the_rewards_say_beside_it():
    first, second = completion_rows(
        group([[0, 1], [1, 1]], columns={"answer": "4"}), ScoredTexts(("x", "y"), {"extracted": ("3", "4")})
    )
    assert first == {
        "prompt": "q",
        "completion": "x",
        "reward": 1.0,
        "rewards/a": 0.0,
        "rewards/b": 1.0,
        "length": 3,
        "version": 2,
        "worker": "rollout/0",
        "position": 4,
        "extracted": "3",
        "answer": "4",
    }
    assert (second["extracted"], second["answer"]) == ("4", "4")


def test_the_table_says_which_weights_wrote_a_completion_also_where_they_do_not_change():
    steady = replace(group([[0, 1]]), oldest_version=None)  # nothing of it grows old
    (row,) = completion_rows(steady, ScoredTexts(("x",), {}))
    assert row["version"] == 2


def test_of_episodes_turns_tools_and_where_the_time_went_are_told() -> None:
    episodes = [EpisodeFacts(1, 0, 0, 0, 1.0, 0.0, None), EpisodeFacts(3, 4, 1, 30, 2.0, 1.0, 0.5)]
    assert episode_metrics(episodes, [10, 20]) == {
        "tools/call_frequency": 2.0,
        "tools/failure_frequency": 0.25,
        "episodes/mean_turns": 2.0,
        "episodes/max_turns": 3.0,
        "episodes/model_token_share": 0.5,
        "episodes/engine_seconds": 1.5,
        "episodes/environment_seconds": 0.5,
    }
    assert episode_metrics([], []) == {}


def test_columns_of_one_name_are_all_in_the_table():
    columns = {"answer": "of the data", "completion": "gold", "step": 9}
    (row,) = completion_rows(
        group([[0, 1]], columns=columns), ScoredTexts(("x",), {"answer": ("extracted",), "reward": ("logged",)})
    )
    assert (row["answer"], row["data/answer"]) == ("extracted", "of the data")
    assert (row["completion"], row["data/completion"]) == ("x", "gold")
    assert (row["reward"], row["extra/reward"]) == (1.0, "logged")
    assert row["data/step"] == 9 and "step" not in row


def test_samples_without_an_opinion_are_counted_by_function_and_for_all():
    groups = (group([[0.0, NONE], [NONE, NONE]]), group([[2.0, NONE], [1.0, 3.0]]))
    metrics = rollout_metrics(Collected(None, (), groups), version=2)  # pyright: ignore[reportArgumentType]
    assert metrics["frac_reward_none"] == 0.25
    assert (metrics["rewards/a/frac_none"], metrics["rewards/b/frac_none"]) == (0.25, 0.75)
    assert metrics["rewards/a/mean"] == 1.0
    assert metrics["reward"] == 2.0


def test_latency_failures_by_kind_and_constants_are_told_of_each_reward_that_was_called():
    def called(*calls: CallStatistics) -> PromptGroup:
        plain = group([[1.0, 2.0]])
        assert plain.score is not None
        return replace(plain, score=replace(plain.score, names=("judge", "model"), calls=calls))

    groups = (
        called(CallStatistics(1.0, {"timeout": 2, "invalid": 1}, False)),
        called(),  # scored before the run was resumed
        called(CallStatistics(3.0, {"timeout": 1}, True)),
    )
    for order in (groups, groups[1:] + groups[:1]):
        metrics = rollout_metrics(Collected(None, (), order), version=2)  # pyright: ignore[reportArgumentType]
        assert (metrics["rewards/judge/seconds"], metrics["rewards/judge/seconds_max"]) == (2.0, 3.0)
    assert (metrics["rewards/judge/failed/timeout"], metrics["rewards/judge/failed/invalid"]) == (3.0, 1.0)
    assert metrics["rewards/judge/frac_constant"] == 0.5
    assert "rewards/model/seconds" not in metrics, "a model is not called so"


def test_rewards_and_lengths_are_of_the_policys_own_samples_and_those_of_others_have_a_mean_of_their_own():
    def sampled(own: tuple[bool, ...], lengths: tuple[int, ...]) -> PromptGroup:
        plain = group([[1.0, 3.0], [0.0, 1.0], [0.0, 0.0]])
        return replace(plain, own=own, metas=(replace(plain.metas[0], lengths=lengths),))

    def metrics(*groups: PromptGroup) -> dict[str, float]:
        return rollout_metrics(Collected(None, (), groups), version=2)  # pyright: ignore[reportArgumentType]

    beside = metrics(sampled((True, False, False), (3, 8, 9)))
    assert (beside["reward"], beside["rewards/a/mean"], beside["reward_of_others"]) == (4.0, 1.0, 0.5)
    assert beside["completions/max_length"] == 3
    for own in ((True,) * 3, (False,) * 3):  # all of them: there is nobody to be told from
        alike = metrics(sampled(own, (3, 8, 9)))
        assert (alike["reward"], alike["completions/max_length"]) == (5 / 3, 9)
        assert "reward_of_others" not in alike
