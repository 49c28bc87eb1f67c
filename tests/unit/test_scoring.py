"""The rewards of a prompt's samples from functions, models and judges together: what each says, and what follows if one
fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

from actors.batch import Batch
from actors.errors import BudgetExhausted, DataFailure, Dropped, InfraFailure, NoAnswer, RunError
from actors.worker import Ref
from orchestrator.batches.row_table import RowTable
from orchestrator.collection.collected import Collected
from orchestrator.collection.group_stages import PromptGroup
from orchestrator.collection.scoring import Scoring, ToScore
from orchestrator.credit.step_rewards import Steps
from orchestrator.planning.prepared import ModelReward
from orchestrator.reporting.rollout_metrics import rollout_metrics
from rewards.attempts import CallStatistics
from rewards.combine import Combine, of_ensemble
from rewards.engine_judge import Question
from rewards.judge import Judge, JudgeSpec
from rewards.reward import Handling
from rewards.worker import ScoreResult
from rollout.sampling import Finish, GroupMeta, Request

FUNCTIONS = ScoreResult(
    ("f",),
    np.array([[1.0], [np.nan]], np.float32),
    np.array([1.0, np.nan], np.float32),
    calls=(CallStatistics(0.125, {"raised": 2}),),
    weights=np.ones(1, np.float32),
)


class Functions:
    """A pool whose worker scores with one function."""

    role = "reward"
    policy = SimpleNamespace(call_timeout_s=60.0)

    def __init__(self) -> None:
        self.cancelled = False
        self.seconds = 0.0

    async def call(self, name: str, work: Any) -> Any:
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return FUNCTIONS, Ref(None)


class Model:
    """A role's model, or what it raises."""

    def __init__(self, says: list[float] | Exception) -> None:
        self._says = says

    async def score(self, rows: RowTable) -> RowTable:
        if isinstance(self._says, Exception):
            raise self._says
        return rows.with_values(reward=np.array(self._says, np.float32)).only({"reward"})


def samples() -> ToScore:
    block = Batch.build([2, 2], tokens=[7] * 4, mask=[True] * 4)
    rows = RowTable.of_block(Batch.build([2, 2], group=[0, 0]), Ref(block), {"tokens", "mask"})
    return ToScore("run/0", 3, SimpleNamespace(id=0, prompt="q", columns={}), rows)


async def scored(says: list[float] | Exception, on_failure: Any = "retry", pool: Any = None) -> ScoreResult:
    reward = ModelReward(("reward_model",), 2.0, "rm", on_failure)
    models: dict[ModelReward, Any] = {reward: [Model(says)]}
    scoring = Scoring({"reward": pool or Functions()}, models, (), _nobody)
    return (await scoring.score("reward", samples())).result


async def _nobody(*_: Any) -> Any:
    raise AssertionError("no judge is asked")


async def test_a_model_adds_to_what_functions_say_and_stands_alone_where_they_have_no_opinion() -> None:
    result = await scored([0.5, -1.0])
    assert result.names == ("f", "rm") and result.weights.tolist() == [1.0, 2.0]
    assert result.total.tolist() == [2.0, -2.0]
    np.testing.assert_array_equal(result.rewards, np.array([[1.0, 0.5], [np.nan, -1.0]], np.float32))


@pytest.mark.parametrize(
    ("fails", "kind", "for_the_pool"),
    [
        (InfraFailure("the ranks died"), "unreachable", InfraFailure),
        (NoAnswer("no answer within 9 s"), "timeout", NoAnswer),
        (DataFailure("too long"), "invalid", DataFailure),
        ([np.nan, 1.0], "invalid", DataFailure),
        ([np.inf, 1.0], "invalid", DataFailure),
    ],
)
async def test_on_failure_of_a_model_decides_what_follows_and_no_score_is_made_up(
    fails: Any, kind: str, for_the_pool: type[RunError]
) -> None:
    with pytest.raises(for_the_pool):
        await scored(fails)
    with pytest.raises(Dropped) as dropped:
        await scored(fails, "drop")
    assert dropped.value.reason == f"reward rm: {kind}"
    with pytest.raises(BudgetExhausted, match="of the reward rm, on_failure=fail ends the run"):
        await scored(fails, "fail")
    result = await scored(fails, -0.5)
    assert result.rewards[:, 1].tolist() == [-0.5, -0.5] and result.calls[-1].failures == {kind: 1}
    assert (await scored([1.0, 1.0], -0.5)).calls[-1].stood_in is False


async def ensemble(
    *says: list[float] | Exception, combine: Combine = "mean", deviations: float = 1.0, on_failure: Any = "retry"
) -> ScoreResult:
    names = tuple(f"rm{index}" for index in range(len(says)))
    steps = Steps("min", ";")  # so that a model may have no opinion
    reward = ModelReward(names, 2.0, "rms", on_failure, steps, combine, deviations)
    models: dict[ModelReward, Any] = {reward: [Model(each) for each in says]}
    pool: Any = Functions()
    return (await Scoring({"reward": pool}, models, (), _nobody).score("reward", samples())).result


@pytest.mark.parametrize(
    ("combine", "deviations", "expected"),
    [
        ("mean", 1.0, [3.0, 1.0]),
        ("min", 1.0, [0.0, 1.0]),
        ("mean_minus_std", 1.0, [3.0 - np.std([0, 3, 6]), 1.0]),
        ("mean_minus_std", 2.0, [3.0 - 2 * np.std([0, 3, 6]), 1.0]),
    ],
)
async def test_the_scores_of_several_models_become_one_reward(
    combine: Combine, deviations: float, expected: list[float]
) -> None:
    result = await ensemble([0.0, 1.0], [3.0, 1.0], [6.0, 1.0], combine=combine, deviations=deviations)
    assert result.names == ("f", "rms")
    np.testing.assert_allclose(result.rewards[:, 1], expected, rtol=1e-6)
    np.testing.assert_allclose(result.total, [1.0 + 2 * expected[0], 2 * expected[1]], rtol=1e-6)
    assert result.metrics["rewards/rms/ensemble_std"] == pytest.approx(np.std([0, 3, 6]) / 2)


async def test_of_two_models_the_mean_less_one_deviation_is_the_lower_score() -> None:
    scores = np.array([[0.25, 4.0], [2.0, -1.0]], np.float32)
    np.testing.assert_allclose(of_ensemble(scores, "mean_minus_std", 1.0), [0.25, -1.0], rtol=1e-6)


async def test_where_one_model_has_no_opinion_the_ensemble_has_none() -> None:
    for combine in get_args(Combine):
        result = await ensemble([np.nan, 1.0], [3.0, 5.0], combine=combine)
        assert np.isnan(result.rewards[0, 1]) and not np.isnan(result.rewards[1, 1])
        assert result.metrics["rewards/rms/ensemble_std"] == 2.0, "of the answers that all have an opinion of"
    assert "rewards/rms/ensemble_std" not in (await ensemble([np.nan] * 2, [1.0] * 2)).metrics


async def test_an_ensemble_of_which_one_model_fails_has_no_score_of_the_others() -> None:
    with pytest.raises(InfraFailure, match="gone"):
        await ensemble([1.0, 2.0], InfraFailure("gone"))
    with pytest.raises(DataFailure, match="the model of rm1 gave"):
        await ensemble([1.0, 2.0], [np.inf, 1.0])
    with pytest.raises(Dropped):
        await ensemble([1.0, 2.0], InfraFailure("gone"), on_failure="drop")


class Stepwise(Model):
    """A model that rewards the steps of two answers of two tokens."""

    async def score(self, rows: RowTable) -> RowTable:
        block = Batch.build([2, 2], process_reward=[np.nan, 0.5, 0.25, 0.5])
        table = RowTable.of_block(Batch.build([2, 2]), Ref(block), {"process_reward"})
        return table.with_values(reward=[0.5, 0.75])


async def test_rewards_of_steps_are_beside_the_sum_of_the_others() -> None:
    reward = ModelReward(("prm",), 2.0, "prm", "retry", Steps("each", ";"))
    other = ModelReward(("rm",), 3.0, "rm")
    models: dict[ModelReward, Any] = {other: [Model([1.0, 2.0])], reward: [Stepwise([])]}
    pool: Any = Functions()
    scored = await Scoring({"reward": pool}, models, (), _nobody).score("reward", samples())
    assert scored.result.total.tolist() == [1.0 + 3.0 + 1.0, 6.0 + 1.5] and scored.steps is not None
    table = scored.steps.added_to(samples().rows)
    assert table["outcome_reward"].tolist() == [4.0, 6.0] and table["process_weight"].tolist() == [2.0, 2.0]
    blocks = [ref.target for ref in table.blocks]
    found = table.whole().shard.fetched(blocks).batch
    np.testing.assert_array_equal(found["process_reward"], np.array([np.nan, 0.5, 0.25, 0.5], np.float32))
    assert found["tokens"].tolist() == [7] * 4, "and the rows have what they had"


async def test_when_one_reward_fails_for_good_the_others_are_given_up() -> None:
    slow = Functions()
    slow.seconds = 30.0
    with pytest.raises(Dropped):
        await asyncio.wait_for(scored(InfraFailure("gone"), "drop", slow), 20)
    await asyncio.sleep(0)
    assert slow.cancelled


async def test_seconds_and_failures_of_a_model_are_metrics_as_those_of_functions_are() -> None:
    result = await scored(InfraFailure("gone"), 0.25)
    meta = GroupMeta("id", "rollout/0", (1, 1), (Finish.STOP, Finish.STOP), 0, 0, 0.1)
    group = PromptGroup("id", 0, samples().prompt, 0, metas=(meta,), own=(True, True), oldest_version=0, score=result)
    metrics = rollout_metrics(Collected(RowTable(Batch.empty()), (0,), (group,), {}), version=0)
    assert metrics["rewards/rm/failed/unreachable"] == 1.0 and metrics["rewards/rm/frac_constant"] == 1.0
    assert metrics["rewards/rm/seconds"] >= 0.0 and metrics["rewards/f/seconds"] == 0.125
    assert metrics["rewards/f/failed/raised"] == 2.0 and "rewards/f/frac_constant" not in metrics


@pytest.mark.parametrize(
    ("weights", "preferring", "rates"),
    [
        ([1.0, 0.0], {"judge"}, [1.0, 0.0]),
        ([2.0, 0.0], {"judge"}, [1.0, 0.0]),
        ([1.0, 1.0], {"judge"}, [np.nan, np.nan]),
        ([0.0, 1.0], {"judge"}, [np.nan, np.nan]),
        ([1.0, 0.0], set[str](), [np.nan, np.nan]),
    ],
)
def test_win_rates_are_those_of_a_judge_that_is_the_only_reward_with_a_weight(
    weights: list[float], preferring: set[str], rates: list[float]
) -> None:
    rewards = np.array([[1.0, 5.0], [0.0, 6.0]], np.float32)
    total = (rewards * np.array(weights, np.float32)).sum(axis=1)
    weighed, names = np.array(weights, np.float32), frozenset(preferring)
    result = ScoreResult(("judge", "f"), rewards, total, weights=weighed, preferring=names)
    np.testing.assert_array_equal(result.win_rates, np.array(rates, np.float32))


class Questions(Functions):
    """A pool whose worker writes two questions, and reads the answers as it is told."""

    async def call(self, name: str, work: Any) -> Any:
        if name.startswith("questions"):
            return [Question("judge_rollout", (5, 6), 1, 9, 0.0), Question("judge_rollout", (6, 5), 1, 9, 0.0)]
        if name.startswith("judged"):
            return (np.array([1.0, 0.0], np.float32), {"rewards/j/frac_unparsable": 0.0}), Ref("said")
        return await super().call(name, work)


async def judged(answers: Callable[[Request], RowTable], on_failure: Any) -> tuple[ScoreResult, tuple[Ref, ...]]:
    async def sample(role: str, request: Request) -> RowTable:
        return answers(request)

    spec = JudgeSpec((Judge(role="judge_rollout"),), name="j", handling=Handling(on_failure=on_failure))
    pool: Any = Questions()
    scored = await Scoring({"reward": pool}, {}, [spec], sample).score("reward", samples())
    return scored.result, scored.texts


async def test_an_engine_role_is_asked_each_question_with_a_name_and_a_seed_of_its_own() -> None:
    asked: list[Request] = []

    def answer(request: Request) -> RowTable:
        asked.append(request)
        return samples().rows

    result, texts = await judged(answer, "retry")
    assert result.names == ("f", "j") and result.rewards[:, 1].tolist() == [1.0, 0.0]
    assert result.preferring == {"j"} and result.metrics == {"rewards/j/frac_unparsable": 0.0}
    assert [each.target for each in texts] == [None, "said"]
    assert [(each.id, each.prompt, each.n) for each in asked] == [("run/0/j/0", (5, 6), 1), ("run/0/j/1", (6, 5), 1)]
    assert len({each.seed for each in asked}) == 2


async def test_an_engine_role_that_cannot_answer_is_a_failure_of_the_judge_and_no_verdict() -> None:
    def fails(request: Request) -> RowTable:
        raise InfraFailure("no engine answers")

    with pytest.raises(InfraFailure, match="no engine answers"):
        await judged(fails, "retry")
    with pytest.raises(Dropped) as dropped:
        await judged(fails, "drop")
    assert dropped.value.reason == "reward j: unreachable"
    result, _ = await judged(fails, 0.5)
    assert result.rewards[:, 1].tolist() == [0.5, 0.5] and result.calls[-1].failures == {"unreachable": 1}
