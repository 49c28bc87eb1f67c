"""The losses of DPO against the numbers of another implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.errors import ConfigError
from actors.objective import MicroBatch
from orchestrator.methods import build
from tests.golden.cases import CASES, assert_equal, cases, objective_for, rows_of, unpadded
from tests.golden.peer import ours
from tests.unit.loss_rows import objective_of
from tests.unit.trainer_stub import Rows, optimise


def preference_rows(case: dict[str, Any]) -> tuple[Rows, list[list[int]]]:
    inputs = case["inputs"]
    mask = [row[1:] for row in inputs["completion_mask"]]
    pairs = len(mask) // 2
    ref = torch.zeros(len(mask), len(mask[0]) + 1, dtype=torch.float64)
    for row, total in enumerate([*inputs["ref_chosen_logps"], *inputs["ref_rejected_logps"]]):
        ref[row, 1 + mask[row].index(1)] = total  # on the first completion token, which no length weighs down
    extra = {"log_sum_sq_probs": inputs["log_sum_sq_probs"]} if "log_sum_sq_probs" in inputs else {}
    rows = rows_of(
        inputs["per_token_logps"],
        mask,
        extra,
        ref_logps=ref.flatten(),
        group=torch.arange(pairs).repeat(2),
        preferred=torch.arange(2 * pairs) < pairs,
    )
    return rows, mask


@cases("dpo/", without=("dpo/wpo_backward",))
def test_dpo_equals_the_peer(case: dict[str, Any]) -> None:
    rows, mask = preference_rows(case)
    assert_equal(optimise(objective_for(case), rows), case, "grad_per_token_logps", mask)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_a_robust_loss_of_the_peer_keeps_its_label_smoothing(smoothing: float) -> None:
    """Unbiased: the smoothed value of the same pairs, were a share of them turned round, is the plain one."""
    case = CASES["dpo/sigmoid"]
    robust = {**case, "config": {**case["config"], "loss_type": ["robust"], "label_smoothing": smoothing}}
    rows, _ = preference_rows(case)
    objective = objective_for(robust)
    right, turned = (optimise(objective, each).value for each in (rows, _swapped(rows)))
    assert right != pytest.approx(case["outputs"]["loss"], abs=1e-4)
    assert (1 - smoothing) * right + smoothing * turned == pytest.approx(case["outputs"]["loss"], abs=1e-6)


@cases("dpo/wpo_backward")
def test_weighted_pairs_have_a_gradient_or_are_refused_where_the_peer_has_none(case: dict[str, Any]) -> None:
    weighted = CASES["dpo/sigmoid_WPO"]
    loss = case["config"]["loss_type"]
    smoothing = 1e-3 if loss == "exo_pair" else 0.0
    config = {**weighted["config"], "loss_type": [loss], "label_smoothing": smoothing}
    rows, mask = preference_rows(weighted)
    if case["outputs"]["status"] != "ok":
        with pytest.raises(ConfigError, match="use_weighting"):
            build("dpo", {"loss_type": loss, "use_weighting": True})
        return
    plain, found = (
        optimise(objective_for({**weighted, "config": {**config, "use_weighting": on}}), rows) for on in (False, True)
    )
    gradient, unweighted = (unpadded(each.gradient, len(mask)) for each in (found, plain))
    pairs = len(mask) // 2
    share = (gradient / unweighted)[torch.tensor(mask).bool()]
    assert torch.isfinite(share).all() and (share > 0).all()
    first_of_row = (gradient / unweighted).nan_to_num(0).amax(1)  # one weight for both sides of a pair
    torch.testing.assert_close(first_of_row[:pairs], first_of_row[pairs:])


def test_label_smoothing_of_dpo_acts_where_the_peer_ignores_it() -> None:
    case = CASES["dpo/sigmoid_ls0.1_IGNORED"]
    rows, _ = preference_rows(case)
    assert case["outputs"]["loss"] == CASES["dpo/sigmoid"]["outputs"]["loss"]
    method, options = ours(case)
    assert "label_smoothing" not in options
    smoothed = optimise(objective_of(method, {**options, "label_smoothing": 0.1}), rows).value
    plain = case["outputs"]["loss"]
    assert smoothed != pytest.approx(plain, abs=1e-4)
    flipped = optimise(objective_of(method, options), _swapped(rows)).value
    assert smoothed == pytest.approx(0.9 * plain + 0.1 * flipped, abs=1e-9)


def _swapped(rows: Rows) -> Rows:
    columns = {**rows.micro.columns, "preferred": ~rows.micro["preferred"]}
    return Rows(MicroBatch(rows.micro.lengths, columns), rows.logps, rows.extra)
