"""Policy gradients: ratios, corrections, estimates of the KL, clipping and the entropy bonus."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from actors.objective import MicroBatch
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.policy_gradient import kl_of_samples, policy_gradient
from orchestrator.losses.reduce import token_mean
from orchestrator.losses.surrogates import clipped
from tests.unit.loss_rows import objective_of, random_rows
from tests.unit.trainer_stub import Result, Rows, optimise


def test_with_one_update_the_gradient_is_the_policy_gradient() -> None:
    rows = random_rows("grpo", {"loss_type": "dapo"}, seed=8)
    result = optimise(objective_of("grpo", {"loss_type": "dapo"}), rows)
    mask, advantages = rows.micro["mask"], rows.micro["advantages"]
    torch.testing.assert_close(result.gradient, -advantages * mask / mask.sum())


def test_tokens_that_the_sampler_reports_as_nan_are_not_corrected() -> None:
    rows = random_rows("grpo", {"correction": "token_truncate"}, seed=9)
    sample = rows.micro["sample_logps"].clone()
    sample[::2] = torch.nan
    micro = MicroBatch(rows.micro.lengths, {**rows.micro.columns, "sample_logps": sample})
    result = optimise(objective_of("grpo", {"correction": "token_truncate"}), Rows(micro, rows.logps))
    plain = -(rows.micro["advantages"] * rows.micro["mask"] / rows.micro["mask"].sum())
    assert torch.isfinite(result.gradient).all()
    torch.testing.assert_close(result.gradient[::2], plain[::2])


def test_the_ratio_of_a_whole_completion_is_the_product_of_its_tokens_ratios() -> None:
    rows = random_rows("rloo", {"updates_per_batch": 2}, seed=13)
    mask, advantages = rows.micro["mask"], rows.micro["advantages"]
    ratio = rows.micro.sum_by_row((rows.logps - rows.micro["old_logps"]) * mask).exp()
    of_row = advantages[rows.micro.offsets[:-1]]
    expected = -torch.minimum(ratio * of_row, ratio.clamp(0.8, 1.2) * of_row).mean()
    assert optimise(objective_of("rloo", {"updates_per_batch": 2}), rows).value == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [("k1", 0.5, 1.0), ("k2", 0.125, 0.5), ("k3", np.exp(-0.5) - 0.5, 1 - np.exp(-0.5))],
)
def test_an_estimate_of_the_kl_and_its_slope_are_what_its_formula_says(
    estimator: Any, value: float, slope: float
) -> None:
    logps = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    found = kl_of_samples(logps, torch.tensor([-1.5], dtype=torch.float64), estimator)
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(value)
    assert logps.grad is not None and float(logps.grad) == pytest.approx(slope)


def test_clip_metrics_count_the_tokens_that_were_clipped() -> None:
    lengths = torch.tensor([5])
    log_ratio = torch.tensor([0.0, 0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    columns = {
        "mask": torch.tensor([0, 1, 1, 1, 1]).bool(),
        "advantages": torch.tensor([1.0, 1, -1, -1, 1], dtype=torch.float64),
        "old_logps": torch.zeros(5, dtype=torch.float64),
    }
    options = {"surrogate": partial(clipped, epsilon=0.2, delta=1.1), "old": "recorded"}
    metrics = optimise(
        LossObjective(policy_gradient, token_mean, options), Rows(MicroBatch(lengths, columns), log_ratio)
    ).metrics
    assert metrics["clip_ratio/high_mean"] == 0.25  # δ below 1 + ε hides none of them
    assert metrics["clip_ratio/low_mean"] == 0.25
    assert metrics["clip_ratio/region_mean"] == 0.5


def test_the_entropy_bonus_is_the_mean_over_the_tokens_that_the_entropy_quantile_keeps() -> None:
    lengths = torch.tensor([4, 3])
    columns = {
        "mask": torch.tensor([0, 1, 1, 1, 0, 1, 1]).bool(),
        "advantages": torch.zeros(7, dtype=torch.float64),
    }
    entropy = torch.tensor([9.0, 0.1, 0.5, 2.0, 9.0, 0.2, 1.0], dtype=torch.float64)
    rows = Rows(MicroBatch(lengths, columns), torch.zeros(7, dtype=torch.float64), {"entropy": entropy})
    objective = objective_of("grpo", {"entropy_coef": 0.1, "top_entropy_quantile": 0.5})
    whole = optimise(objective, rows)  # the quantile is 0.5: three of five reach it
    assert whole.value == pytest.approx(-0.1 * (0.5 + 2.0 + 1.0) / 3)
    expected = torch.tensor([0, 0, 1, 1, 0, 0, 1]) * (-0.1 / 3)
    torch.testing.assert_close(whole.extra_gradients["entropy"], expected.double())
    assert optimise(objective, rows, [[[0]], [[1]]]).value == pytest.approx(whole.value)


def test_an_adaptive_entropy_bonus_acts_below_its_target_alone_and_its_coefficient_is_kept_and_bounded() -> None:
    options: dict[str, Any] = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_coef_delta": 0.03}
    objective = objective_of("grpo", {**options, "entropy_target": 1.0, "entropy_coef_max": 0.12})
    rows = random_rows("grpo", {**options, "entropy_target": 1.0}, seed=14)
    mask, states = rows.micro["mask"], [{}]

    def at(entropy: float) -> Result:
        return optimise(
            objective, replace(rows, extra={"entropy": torch.full_like(rows.logps, entropy)}), states=states
        )

    plain = optimise(objective_of("grpo", {}), Rows(rows.micro, rows.logps)).value
    low = at(0.5)
    assert low.metrics["entropy_coef"] == pytest.approx(0.1)
    assert low.value - plain == pytest.approx(-0.1 * 0.5)
    torch.testing.assert_close(low.extra_gradients["entropy"], -0.1 * mask.double() / mask.sum())
    high = at(1.5)
    assert (high.metrics["entropy_coef"], high.value) == (0.0, pytest.approx(plain))
    assert not high.extra_gradients["entropy"].any()
    assert at(0.5).metrics["entropy_coef"] == pytest.approx(0.12 - 0.03)  # up to its bound, then down
    assert states[0]["1"]["coefficient"] == pytest.approx(0.12)
