"""Rewards, advantages and returns per token, and the losses of policy and critic that learn from them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from actors.backends.single import SoloWorld
from actors.batch import Batch
from actors.errors import ConfigError
from actors.objective import MicroBatch
from orchestrator.batches.row_table import RowTable
from orchestrator.credit.returns import (
    gae,
    generalised_advantages,
    group_zscores_of_steps,
    kl_in_reward,
    only_scored,
    returns_to_go,
    reward_at_the_end,
    reward_less_kl,
    whitened,
    whitened_advantages,
    whitened_rewards,
    without_eos,
)
from orchestrator.losses.objective import LossObjective
from orchestrator.methods import build
from tests.unit.trainer_stub import Rows, ThreadWorld, optimise

ALONE = SoloWorld()
GAMMA, LAM = 0.9, 0.8


def episodes(seed: int = 0, rows: int = 8) -> Batch:
    """Rows with a prompt and a gap that is not trained, and all that a critic and a reward say of them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 11, rows)
    place = np.concatenate([np.arange(length) for length in lengths])
    total = int(lengths.sum())
    columns = {name: rng.normal(-1, 0.5, total).astype(np.float32) for name in ("old_logps", "ref_logps", "values")}
    return Batch.build(lengths, mask=(place > 0) & (place != 3), reward=rng.normal(size=rows), **columns)


def on_ranks(call: Any, parts: list[Batch], states: list[dict[str, Any]], **options: Any) -> list[Any]:
    """What a credit call makes of each rank's rows."""
    found: list[Any] = [None] * len(parts)
    board, barrier = [None] * len(parts), threading.Barrier(len(parts), timeout=20)

    def work(rank: int) -> None:
        found[rank] = call(parts[rank], ThreadWorld(rank, len(parts), board, barrier), states[rank], **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def metric(found: dict[str, Any], name: str) -> float:
    return float(found[name].total) / float(found[name].weight)


def test_tokens_that_are_not_trained_take_no_time_and_the_reward_is_earned_at_the_last_trained_one() -> None:
    batch = Batch.build([6], mask=[True, True, False, False, True, False], reward=[1.0], values=np.zeros(6, np.float32))
    columns, _ = reward_at_the_end(batch, ALONE, {})
    assert columns["step_reward"].tolist() == [0, 0, 0, 0, 1, 0]
    options = {"gamma": GAMMA, "lam": LAM, "whiten": False}
    found, _ = generalised_advantages(batch.with_columns(**columns), ALONE, {}, **options)
    decay = GAMMA * LAM
    np.testing.assert_allclose(found["returns"], [decay**2, decay, 0, 0, 1, 0], rtol=1e-6)


def test_what_an_environment_gave_for_a_turn_is_earned_at_the_last_token_of_that_turn() -> None:
    """The row's last token has the rest; a row that is not learned from has nothing."""
    mask = [False, True, True, False, False, True, *[False] * 6]
    turns = [0, 0, 0.5, 0, 0, 0.25] * 2
    batch = Batch.build([6, 6], mask=mask, reward=[1.75, 1.75], turn_reward=turns, old_logps=[0.0] * 12)
    columns, _ = reward_at_the_end(batch, ALONE, {})
    assert columns["step_reward"].tolist() == [0, 0, 0.5, 0, 0, 1.25, *[0] * 6]
    penalised = batch.with_columns(ref_logps=np.full(12, 1.0, np.float32))
    columns, _ = kl_in_reward(penalised, ALONE, {}, coefficient=0.1)
    np.testing.assert_allclose(columns["step_reward"], [0, 0.1, 0.6, 0, 0, 1.35, *[0] * 6], rtol=1e-6)
    found, _ = returns_to_go(batch.with_columns(step_reward=turns), ALONE, {}, gamma=GAMMA, whiten=False)
    np.testing.assert_allclose(
        found["advantages"][:6], [0, GAMMA * (0.5 + GAMMA * 0.25), 0.5 + GAMMA * 0.25, 0, 0, 0.25]
    )


NONE = np.nan


def test_the_reward_of_a_step_is_earned_at_its_last_token_and_the_rest_at_the_end() -> None:
    """Beside what an environment gave for a turn; a row that is not learned from has nothing."""
    mask = [False, True, True, False, False, True, *[False] * 6]
    steps = [NONE, NONE, 0.5, NONE, NONE, 0.25] * 2
    given = {"process_reward": steps, "process_weight": [2.0, 2.0], "outcome_reward": [1.0, 1.0]}
    batch = Batch.build([6, 6], mask=mask, reward=[2.5, 2.5], old_logps=[0.0] * 12, **given)
    columns, _ = reward_at_the_end(batch, ALONE, {})
    assert columns["step_reward"].tolist() == [0, 0, 1, 0, 0, 1.5, *[0] * 6]
    penalised = batch.with_columns(ref_logps=np.full(12, 1.0, np.float32))
    columns, _ = kl_in_reward(penalised, ALONE, {}, coefficient=0.1)
    np.testing.assert_allclose(columns["step_reward"], [0, 0.1, 1.1, 0, 0, 1.6, *[0] * 6], rtol=1e-6)
    turned = batch.with_columns(turn_reward=np.tile([0, 0.25, 0, 0, 0, 0], 2))
    assert reward_at_the_end(turned, ALONE, {})[0]["step_reward"].tolist() == [0, 0.25, 1, 0, 0, 1.25, *[0] * 6]
    found, _ = returns_to_go(
        batch.with_columns(**reward_at_the_end(batch, ALONE, {})[0]), ALONE, {}, gamma=1.0, whiten=False
    )
    assert found["advantages"][:6].tolist() == [0, 2.5, 2.5, 0, 0, 1.5]


@pytest.mark.parametrize("method", ["ppo", "reinforce_pp"])
@pytest.mark.parametrize("penalised", [True, False])
def test_methods_with_returns_read_the_rewards_of_steps_where_a_run_has_them(method: str, penalised: bool) -> None:
    pipeline = build(method, {} if penalised else {"kl_coef" if method == "ppo" else "beta": 0.0})
    assert not any("process_reward" in stage.reads for stage in pipeline)
    (credit,) = (stage for stage in pipeline.with_step_rewards() if "process_reward" in stage.reads)
    assert credit.call is (kl_in_reward if penalised else reward_at_the_end)
    other = build("rloo", {})
    assert other.with_step_rewards() is other, "which has one advantage per answer"


def stepwise(outcomes: list[float]) -> Batch:
    """Two groups of two answers. Of the first: steps of .9 and .5, and one of .1; of the second: one of .4 that is
    followed by text, and none."""
    steps = [NONE, NONE, 0.9, 0.5, NONE, NONE, 0.1, NONE, 0.4, NONE, NONE, NONE]
    mask = np.array([0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1], np.bool_)
    weights = np.full(4, 0.5)
    columns = {"process_reward": steps, "process_weight": weights, "outcome_reward": outcomes}
    return Batch.build([4, 3, 3, 2], mask=mask, group=[7, 7, 3, 3], **columns)


def test_an_advantage_is_the_sum_of_the_normalised_rewards_of_the_steps_that_are_not_over() -> None:
    found, metrics = group_zscores_of_steps(stepwise([NONE] * 4), ALONE, {})
    values = np.array([0.9, 0.5, 0.1])
    first, second, third = 0.5 * (values - values.mean()) / (values.std(ddof=1) + 1e-4)
    expected = [0, first + second, first + second, second, 0, third, third, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(found["advantages"], expected, atol=1e-6)
    assert metric(metrics, "steps/mean_reward") == pytest.approx(1.9 / 4)
    assert metric(metrics, "steps/per_answer") == 1.0


def test_other_rewards_are_compared_with_those_of_the_siblings_and_added_at_every_token() -> None:
    alone = group_zscores_of_steps(stepwise([NONE] * 4), ALONE, {})[0]["advantages"]
    both = group_zscores_of_steps(stepwise([1.0, 0.0, NONE, 5.0]), ALONE, {})[0]["advantages"]
    z = 0.5 / (np.std([1.0, 0.0], ddof=1) + 1e-4)
    np.testing.assert_allclose(both - alone, [0, z, z, z, 0, -z, -z, 0, 0, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_steps_are_the_same_on_several_ranks_one_of_which_may_have_no_rows(scale: Any) -> None:
    whole = stepwise([1.0, 0.0, 2.0, 5.0])
    expected = group_zscores_of_steps(whole, ALONE, {}, scale=scale)[0]["advantages"]
    parts = [whole.select([0, 1]), whole.select([2, 3]), whole.select([])]
    found = on_ranks(group_zscores_of_steps, parts, [{}, {}, {}], scale=scale)
    np.testing.assert_allclose(np.concatenate([columns["advantages"] for columns, _ in found]), expected, atol=1e-6)
    other = group_zscores_of_steps(whole, ALONE, {}, scale="none" if scale == "batch" else "batch")[0]["advantages"]
    assert np.abs(other - expected).max() > 0.1


def test_advantages_are_the_discounted_sum_of_what_each_step_brought_beyond_its_value() -> None:
    rewards, values = np.array([0.0, 0.5, 1.0, 2.0]), np.array([0.3, -0.2, 0.7, 0.1])
    delta = [0.0 + GAMMA * -0.2 - 0.3, 0.5 + GAMMA * 0.7 + 0.2, 1.0 - 0.7, 2.0 - 0.1]  # the last is another episode's
    decay = GAMMA * LAM
    expected = [delta[0] + decay * (delta[1] + decay * delta[2]), delta[1] + decay * delta[2], delta[2], delta[3]]
    np.testing.assert_allclose(gae(rewards, values, np.array([4, 4, 4, 9]), GAMMA, LAM), expected)


def test_with_lambda_and_gamma_1_a_return_is_what_is_still_to_be_earned() -> None:
    batch = episodes()
    rewarded = batch.with_columns(**kl_in_reward(batch, ALONE, {}, coefficient=0.1)[0])
    found, _ = generalised_advantages(rewarded, ALONE, {}, gamma=1.0, lam=1.0, whiten=False)
    for row in range(len(batch)):
        mask = batch.row("mask", row)
        earned = rewarded.row("step_reward", row)[mask]
        start = batch.offsets[row]
        returns = found["returns"][start : start + batch.lengths[row]]
        np.testing.assert_allclose(returns[mask], earned[::-1].cumsum()[::-1], atol=1e-5)
        assert not returns[~mask].any()


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.25), ("k3", np.exp(-0.25) - 1 + 0.25)])
def test_the_kl_penalty_is_subtracted_at_each_token(estimator: Any, expected: float) -> None:
    old, ref = np.array([-9, -1, -0.5, -1], np.float32), np.array([0, -1, -0.75, -1], np.float32)
    batch = Batch.build([4], mask=[False, True, True, True], old_logps=old, ref_logps=ref, reward=[2.0])
    columns, metrics = kl_in_reward(batch, ALONE, {}, coefficient=0.1, estimator=estimator)
    np.testing.assert_allclose(columns["step_reward"], [0, 0, -0.1 * expected, 2.0], atol=1e-6)
    assert metric(metrics, "objective/kl") == pytest.approx(expected)
    assert metric(metrics, "objective/rlhf_reward") == pytest.approx(2.0 - 0.1 * expected)
    assert metric(metrics, "objective/scores") == 2.0
    assert metric(metrics, "objective/entropy") == 2.5


def test_a_whole_rows_kl_is_taken_off_its_reward() -> None:
    old, ref = np.array([-9, -1, -0.5, -7, -1], np.float32), np.array([0, -1.5, -0.75, 0, -2], np.float32)
    mask = [False, True, True, False, True]
    batch = Batch.build([3, 2], mask=mask, old_logps=old, ref_logps=ref, reward=[2.0, np.nan])
    columns, metrics = reward_less_kl(batch, ALONE, {}, coefficient=0.1)
    np.testing.assert_allclose(columns["reward"], [2.0 - 0.1 * 0.75, np.nan], rtol=1e-6)
    assert metric(metrics, "kl") == pytest.approx((0.5 + 0.25 + 1.0) / 3)


def test_what_is_still_to_be_earned_is_discounted_over_trained_tokens_and_whitened_over_all_of_them() -> None:
    mask = [False, True, False, True, False, True]
    earned = np.array([9, 1, 9, 2, 9, 4], np.float32)
    batch = Batch.build([4, 2], mask=mask, step_reward=earned)
    plain, metrics = returns_to_go(batch, ALONE, {}, gamma=0.5, whiten=False)
    np.testing.assert_allclose(plain["advantages"], [0, 2, 0, 2, 0, 4])
    assert metric(metrics, "objective/returns") == pytest.approx(8 / 3)
    found, _ = returns_to_go(batch, ALONE, {}, gamma=0.5)
    np.testing.assert_allclose(found["advantages"][mask], whitened(np.array([2.0, 2.0, 4.0]), ALONE), rtol=1e-6)
    assert not found["advantages"][~np.array(mask)].any()


def test_advantages_are_whitened_over_the_trained_tokens_of_all_ranks() -> None:
    batch = episodes()
    batch = batch.with_columns(advantages=np.repeat(batch["reward"], batch.lengths).astype(np.float32))
    (whole, _), parts = whitened_advantages(batch, ALONE, {}), [batch.select([0, 1, 2]), batch.select([3, 4, 5, 6, 7])]
    mask = batch["mask"]
    assert whole["advantages"][mask].mean() == pytest.approx(0, abs=1e-6)
    assert whole["advantages"][mask].std(ddof=1) == pytest.approx(1, abs=1e-5)
    found = on_ranks(whitened_advantages, parts, [{}, {}])
    np.testing.assert_allclose(
        np.concatenate([each[0]["advantages"] for each in found]), whole["advantages"], atol=1e-6
    )


def test_a_coefficient_with_a_target_follows_the_kl_and_is_remembered_in_the_state() -> None:
    batch = episodes()
    batch = batch.with_columns(ref_logps=batch["old_logps"] - np.float32(0.1))
    kl = 0.1 * batch["mask"].sum() / len(batch)
    options: dict[str, Any] = {"coefficient": 0.2, "horizon": 100}
    for target, error in ((kl / 1.1, 0.1), (kl / 3, 0.2), (kl * 3, -0.2)):
        state: dict[str, Any] = {}
        _, before = kl_in_reward(batch, ALONE, state, target=target, **options)
        _, after = kl_in_reward(batch, ALONE, state, target=1.0, **options)
        assert metric(before, "objective/kl_coef") == 0.2
        assert metric(after, "objective/kl_coef") == pytest.approx(0.2 * (1 + error * len(batch) / 100))
    fixed: dict[str, Any] = {}
    kl_in_reward(batch, ALONE, fixed, coefficient=0.2)
    assert fixed == {}


def test_a_penalty_is_for_completions_that_hit_their_limit_and_what_has_no_score_is_not_learned_from() -> None:
    rows = RowTable(Batch.build([2, 2, 2], reward=[1.0, 2.0, np.nan], truncated=[False, True, True]))
    np.testing.assert_array_equal(without_eos(rows, penalty=1.5)["reward"], [1.0, 0.5, np.nan])
    assert only_scored(rows)["learned"].tolist() == [True, True, False]
    rows = rows.with_values(learned=np.array([False, True, True]))
    assert only_scored(rows)["learned"].tolist() == [False, True, False]


def test_a_row_without_a_trained_token_earns_nothing_and_is_in_no_mean() -> None:
    mask = [False, True, False, False]
    batch = Batch.build([2, 2], mask=mask, reward=[3.0, np.nan], values=np.ones(4, np.float32))
    columns, metrics = reward_at_the_end(batch, ALONE, {})
    assert columns["step_reward"].tolist() == [0, 3, 0, 0]
    assert metric(metrics, "objective/scores") == 3
    found, _ = generalised_advantages(batch.with_columns(**columns), ALONE, {}, gamma=1.0, lam=1.0)
    assert all(np.isfinite(values).all() for values in found.values())


def test_whitened_values_have_mean_0_and_unbiased_variance_1_and_rewards_keep_their_mean() -> None:
    values = np.random.default_rng(0).normal(3, 5, 50)
    assert whitened(values, ALONE).mean() == pytest.approx(0, abs=1e-9)
    assert whitened(values, ALONE).var(ddof=1) == pytest.approx(1)
    assert whitened(values, ALONE, shift_mean=False).mean() == pytest.approx(values.mean())
    batch = episodes().with_columns(step_reward=np.arange(episodes().num_tokens))
    found = whitened_rewards(batch, ALONE, {})[0]["step_reward"]
    trained = batch["step_reward"][batch["mask"]].astype(float)
    np.testing.assert_allclose(
        found[batch["mask"]], (trained - trained.mean()) / trained.std(ddof=1) + trained.mean(), rtol=1e-5
    )
    assert not found[~batch["mask"]].any()


def test_ranks_whiten_adapt_and_explain_as_one_of_them_with_all_rows_would() -> None:
    batch = episodes()
    parts = [batch.select([0, 3, 4, 5]), batch.select([1, 2, 6, 7]), batch.select([])]
    options: dict[str, Any] = {"coefficient": 0.3, "target": 0.5, "horizon": 50}
    alone: dict[str, Any] = {}
    states: list[dict[str, Any]] = [{}, {}, {}]
    whole = batch.with_columns(**kl_in_reward(batch, ALONE, alone, **options)[0])
    shares = [
        part.with_columns(**columns)
        for part, (columns, _) in zip(parts, on_ranks(kl_in_reward, parts, states, **options), strict=True)
    ]
    assert states == [pytest.approx(alone)] * 3
    expected, metrics = generalised_advantages(whole, ALONE, {}, gamma=GAMMA, lam=LAM)
    found = on_ranks(generalised_advantages, shares, states, gamma=GAMMA, lam=LAM)
    order = batch.token_index(np.array([0, 3, 4, 5, 1, 2, 6, 7]))
    for name in ("advantages", "returns"):
        np.testing.assert_allclose(np.concatenate([f[0][name] for f in found]), expected[name][order], atol=1e-5)
    for _, each in found:
        assert metric(each, "val/explained_variance") == pytest.approx(metric(metrics, "val/explained_variance"))


@pytest.mark.parametrize(("values", "explained"), [([1.0, 2, 3, 4], 1.0), ([2.5] * 4, 0.0), ([4.0, 3, 2, 1], -3.0)])
def test_explained_variance_is_1_of_values_that_are_the_returns_and_0_of_a_constant(
    values: list[float], explained: float
) -> None:
    batch = Batch.build([1] * 4, mask=[True] * 4, step_reward=np.arange(1.0, 5), values=np.array(values))
    _, metrics = generalised_advantages(batch, ALONE, {}, gamma=1.0, lam=1.0)
    assert metric(metrics, "val/explained_variance") == pytest.approx(explained)


# The losses


def value_rows(seed: int = 3) -> Rows:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 7, (6,), generator=rng)
    total = int(lengths.sum())
    old, returns, now = torch.randn(3, total, generator=rng, dtype=torch.float64)
    mask = torch.rand(total, generator=rng) < 0.7
    return Rows(MicroBatch(lengths, {"mask": mask, "values": old, "returns": returns}), old + 0.3 * now)


def value_objective(**options: Any) -> LossObjective:
    return LossObjective.of(build("ppo", options).updates[1])


@pytest.mark.parametrize("options", [{}, {"cliprange_value": 0.05}, {"cliprange_value": None}])
def test_the_value_loss_has_its_slope_as_gradient_and_is_the_same_however_it_is_split(options: dict[str, Any]) -> None:
    rows, objective = value_rows(), value_objective(**options)
    result = optimise(objective, rows)
    for token in range(len(rows.logps)):
        nudge = torch.zeros_like(rows.logps)
        nudge[token] = 1e-6
        up, down = (optimise(objective, Rows(rows.micro, rows.logps + sign * nudge)).value for sign in (1, -1))
        assert float(result.gradient[token]) == pytest.approx((up - down) / 2e-6, abs=1e-6)
    split = optimise(objective, rows, [[[3], [0, 5], []], [[4, 1], [2], []]])
    assert split.value == pytest.approx(result.value)
    torch.testing.assert_close(split.gradient, result.gradient)
    assert split.metrics == pytest.approx(result.metrics)


def test_a_value_that_moved_further_than_the_clip_range_towards_its_return_has_no_gradient() -> None:
    columns = {"mask": torch.ones(4).bool(), "values": torch.zeros(4), "returns": torch.tensor([1.0, 1.0, 1.0, -1.0])}
    rows = Rows(MicroBatch(torch.tensor([4]), columns), torch.tensor([0.1, 0.5, -0.5, 0.5]))
    result = optimise(value_objective(cliprange_value=0.2), rows)
    assert result.gradient.tolist() == pytest.approx([-0.9 / 4, 0.0, -1.5 / 4, 1.5 / 4])
    expected = (0.9**2 + 0.8**2 + 1.5**2 + 1.5**2) / 8
    assert result.value == pytest.approx(expected)
    assert result.metrics["val/clipfrac_avg"] == 0.25
    assert optimise(value_objective(cliprange_value=None), rows).gradient[1] == pytest.approx(-0.5 / 4)


# The method


def test_options_that_would_do_nothing_are_refused_with_what_they_need() -> None:
    for options, said in (
        ({"kl_horizon": 5}, "options.kl_target"),
        ({"kl_coef": 0.0, "kl_target": 6.0}, "0 stays 0"),
        ({"kl_coef": 0.0, "kl_estimator": "k3"}, "options.kl_estimator='k3' does nothing"),
    ):
        with pytest.raises(ConfigError, match=said):
            build("ppo", options)


def test_without_a_kl_coefficient_no_reference_is_launched() -> None:
    assert "reference" in build("ppo", {}).roles
    assert "reference" not in build("ppo", {"kl_coef": 0.0}).roles
