"""What a reduction divides by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from actors.objective import MicroBatch
from orchestrator.losses.reduce import item_mean, row_mean_of_token_means, token_mean, token_sum_over
from orchestrator.losses.views import Tokens
from tests.unit.loss_rows import objective_of, random_rows
from tests.unit.trainer_stub import Rows, optimise


def two_rows() -> Tokens:
    micro = MicroBatch(torch.tensor([3, 5]), {})
    mask = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0]).bool()
    return Tokens(micro=micro, logps=torch.zeros(8), mask=mask, shared={})


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        (token_mean, (2 + 4 + 9) / 3),
        (row_mean_of_token_means, (3 + 9) / 2),
        (token_sum_over(10), (2 + 4 + 9) / 20),
    ],
    ids=["token_mean", "row_mean_of_token_means", "token_sum_over"],
)
def test_a_reduction_divides_by_its_documented_count(reduce: Any, expected: float) -> None:
    view, values = two_rows(), torch.tensor([100.0, 2, 4, 100, 100, 9, 100, 100])
    micro = MicroBatch(view.micro.lengths, {"mask": view.mask})
    assert float(reduce(values, view, reduce.count(Tokens, micro))) == pytest.approx(expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo", "sapo", "gmpo", "bnpo"])
def test_a_row_without_trained_tokens_has_no_weight(loss_type: str) -> None:
    options: dict[str, Any] = {"loss_type": loss_type, "updates_per_batch": 2}
    options |= {"max_completion_length": 8} if loss_type == "dr_grpo" else {}
    rows = random_rows("grpo", options, seed=12)
    left_out = rows.micro.per_token(torch.arange(len(rows)) % 4 == 1)
    columns = {**rows.micro.columns, "mask": rows.micro["mask"] & ~left_out}
    masked = replace(rows, micro=MicroBatch(rows.micro.lengths, columns))
    others = [row for row in range(len(rows)) if row % 4 != 1]
    objective = objective_of("grpo", options)
    found, without = optimise(objective, masked), optimise(objective, rows.select(others))
    assert found.value == pytest.approx(without.value) and found.value != 0
    torch.testing.assert_close(found.gradient[~left_out], without.gradient)


def test_a_fully_masked_batch_has_loss_zero_and_gradient_zero() -> None:
    rows = random_rows("grpo", {}, seed=4)
    micro = MicroBatch(rows.micro.lengths, {**rows.micro.columns, "mask": torch.zeros_like(rows.micro["mask"])})
    result = optimise(objective_of("grpo", {}), Rows(micro, rows.logps))
    assert result.value == 0.0
    assert not result.gradient.any()


def test_row_and_pair_means_count_items() -> None:
    rows = random_rows("dpo", {}, seed=6)
    objective = objective_of("dpo", {})
    assert item_mean.count(objective.terms[0].view, rows.micro) == len(rows) / 2
