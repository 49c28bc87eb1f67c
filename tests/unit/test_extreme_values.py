"""Losses where a probability has all but vanished: value and gradient stay finite, and what is left out stays out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from actors.objective import MicroBatch
from orchestrator.losses.divergences import alpha_divergence, forward_kl
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.pairwise import PairScores, discopop, ipo, log_odds, shaped
from orchestrator.losses.policy_gradient import engine_correction, policy_gradient
from orchestrator.losses.reduce import token_mean
from orchestrator.losses.surrogates import (
    Surrogate,
    capped,
    clipped,
    geometric,
    smooth_weighted,
    soft_gated,
    trust_region,
)
from orchestrator.losses.views import PolicyTokens
from tests.unit.trainer_stub import Rows, optimise

SURROGATES: dict[str, Surrogate] = {
    "clipped": partial(clipped, epsilon=0.2),
    "clipped with delta": partial(clipped, epsilon=0.2, delta=2.0),
    "capped": partial(capped, cap=5.0),
    "soft_gated": soft_gated,
    "geometric": partial(geometric, epsilon=0.2),
    "smooth_weighted": smooth_weighted,
    "trust_region, total variation": partial(trust_region, distance="binary_tv", threshold=0.15),
    "trust_region, KL": partial(trust_region, distance="binary_kl", threshold=0.15),
}


def far_apart(advantage: float, gap: float) -> Rows:
    """Two rows of three tokens, the first of each a prompt. At one token of the first row the policy is `gap` nats
    above what it is compared with."""
    logps = torch.tensor([0.0, -0.5, -1.0, 0.0, -0.7, -0.2])
    other = logps.clone()
    other[1] -= gap
    columns = {
        "mask": torch.tensor([0, 1, 1, 0, 1, 1]).bool(),
        "advantages": torch.full((6,), advantage),
        **dict.fromkeys(("old_logps", "sample_logps", "ref_logps"), other),
    }
    return Rows(MicroBatch(torch.tensor([3, 3]), columns), logps)


@pytest.mark.parametrize("gap", [500.0, -500.0])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("name", SURROGATES)
def test_a_ratio_that_overflows_leaves_loss_and_gradient_finite(name: str, advantage: float, gap: float) -> None:
    options = {"surrogate": SURROGATES[name], "old": "recorded", "beta": 0.1}
    found = optimise(LossObjective(policy_gradient, token_mean, options), far_apart(advantage, gap))
    assert torch.isfinite(found.gradient).all()
    assert torch.isfinite(torch.tensor(found.value))
    assert bool(found.gradient[[2, 4, 5]].any()) is bool(advantage), "the other tokens are learned from as ever"


@pytest.mark.parametrize("mode", ["token_mask", "sequence_mask"])
@pytest.mark.parametrize("gap", [500.0, -500.0])
def test_what_a_correction_masks_has_weight_zero_however_far_it_is_from_the_sampler(mode: Any, gap: float) -> None:
    rows = far_apart(1.0, gap)
    options = {"surrogate": SURROGATES["clipped"], "correction": mode, "correction_min": 0.5, "correction_max": 2.0}
    found = optimise(LossObjective(policy_gradient, token_mean, options), rows)
    expected = torch.tensor([0.0, 0.0, -0.25, 0.0, -0.25, -0.25])
    if mode == "sequence_mask":
        expected[2] = 0.0
    torch.testing.assert_close(found.gradient, expected)


def test_a_masked_token_is_not_multiplied_by_an_infinite_ratio() -> None:
    """The weight alone, as another loss would use it."""
    rows = far_apart(1.0, 500.0)
    view = PolicyTokens(
        micro=rows.micro,
        logps=rows.logps,
        mask=rows.micro["mask"],
        shared={},
        advantages=rows.micro["advantages"],
        sample_logps=rows.micro["sample_logps"],
    )
    weight, metrics = engine_correction(view, rows.logps, "sequence_mask", None, 3.0)
    assert weight.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.isfinite(torch.as_tensor(metrics["sampling/importance_sampling_ratio/mean"].total))


def test_a_token_that_the_sampler_did_not_report_has_ratio_one_where_the_ratio_is_to_the_sampler() -> None:
    rows = far_apart(1.0, 0.0)
    rows.micro["sample_logps"][1] = torch.nan
    objective = LossObjective(policy_gradient, token_mean, {"surrogate": SURROGATES["clipped"], "old": "sampler"})
    torch.testing.assert_close(optimise(objective, rows).gradient, torch.tensor([0.0, -0.25, -0.25, 0.0, -0.25, -0.25]))


def scores(chosen: float, rejected: float) -> PairScores:
    ones = torch.ones(1)
    return PairScores(_leaf(chosen), _leaf(rejected), ones, ones)


def _leaf(value: float) -> Tensor:
    return torch.tensor([value], requires_grad=True)


@pytest.mark.parametrize("difference", [3000.0, -3000.0])
@pytest.mark.parametrize("tau", [0.05, 1.0, 4.0])
def test_a_pair_that_is_far_apart_has_a_finite_modulated_loss(difference: float, tau: float) -> None:
    pair = scores(difference, 0.0)
    value = discopop(pair, 0.1, discopop_tau=tau)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert pair.chosen.grad is not None and torch.isfinite(pair.chosen.grad).all()


def test_the_modulated_loss_is_the_formula_where_nothing_overflows() -> None:
    z, tau = torch.tensor([-3.0, -0.1, 0.0, 0.2, 5.0]), 0.5
    pair = PairScores(z / 0.1, torch.zeros(5), torch.ones(5), torch.ones(5))
    gate = torch.sigmoid(z / tau)
    expected = -(1 - gate) * torch.nn.functional.logsigmoid(z) + gate * torch.exp(-z)
    torch.testing.assert_close(discopop(pair, 0.1, discopop_tau=tau), expected)


@pytest.mark.parametrize("divergence", [forward_kl, partial(alpha_divergence, coefficient=0.5)])
@pytest.mark.parametrize("ratio", [2000.0, -2000.0])
def test_the_square_of_a_divergence_is_finite(divergence: Any, ratio: float) -> None:
    chosen = _leaf(ratio)
    ones = torch.ones(1)
    value = ipo(PairScores(divergence(chosen), divergence(torch.zeros(1)), ones, ones), 0.1)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert chosen.grad is not None and torch.isfinite(chosen.grad).all()


def test_a_completion_of_probability_one_has_finite_odds_and_a_vanished_one_a_finite_reward() -> None:
    certain = _leaf(0.0)
    odds = log_odds(certain)
    odds.sum().backward()
    assert 10 < odds.item() < 100
    assert certain.grad is not None and torch.isfinite(certain.grad).all()
    vanished = _leaf(-1000.0)
    reward = shaped(vanished, 0.25)
    reward.sum().backward()
    assert torch.isfinite(reward).all() and reward.item() < -1e10
    assert vanished.grad is not None and torch.isfinite(vanished.grad).all()
