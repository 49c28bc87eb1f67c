"""Losses with statistics over the whole batch: a running mean, an estimate of the KL over rows set aside."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from actors.errors import ConfigError
from actors.objective import MicroBatch
from orchestrator.losses.declare import Sum
from orchestrator.losses.objective import LossObjective
from tests.unit.loss_rows import objective_of, random_rows
from tests.unit.trainer_stub import Rows, optimise


def test_the_running_mean_of_bco_continues_from_its_state_and_counts_each_row_once() -> None:
    objective, state = objective_of("bco", {"beta": 1.0}), [{}]
    first, second = (random_rows("bco", {}, seed=seed) for seed in (1, 2))
    optimise(objective, first, states=state)
    delta = optimise(objective, second, states=state).metrics["delta"]
    sums = [row_log_ratios(rows) for rows in (first, second)]
    assert delta == pytest.approx(float(torch.cat(sums).mean()))
    assert state[0]["0"]["count"] == len(first) + len(second)


def row_log_ratios(rows: Rows) -> Tensor:
    return rows.micro.sum_by_row((rows.logps - rows.micro["ref_logps"]) * rows.micro["mask"])


def test_the_kl_estimate_of_kto_is_clamped_after_averaging_over_everything() -> None:
    rows = random_rows("kto", {}, seed=1)
    low = MicroBatch(rows.micro.lengths, {**rows.micro.columns, "ref_logps": torch.zeros_like(rows.logps)})
    assert optimise(objective_of("kto", {}), Rows(low, rows.logps)).metrics["kl"] == 0.0
    high = MicroBatch(rows.micro.lengths, {**rows.micro.columns, "ref_logps": 5 * rows.logps})
    ratios = row_log_ratios(Rows(high, rows.logps))[rows.micro["mismatched"]]
    found = optimise(objective_of("kto", {}), Rows(high, rows.logps)).metrics["kl"]
    assert found == pytest.approx(float(ratios.mean()))


def test_losses_whose_statistics_are_over_different_rows_are_not_summed() -> None:
    kto, bco = (objective_of(name, {}).terms[0] for name in ("kto", "bco"))
    with pytest.raises(ConfigError, match=r"different rows \(all rows, mismatched\)"):
        LossObjective(Sum(kto, bco), None, {})


def test_mismatched_rows_move_the_estimate_and_have_no_gradient() -> None:
    rows = random_rows("kto", {}, seed=1)
    mismatched = rows.micro.per_token(rows.micro["mismatched"])
    nearer = Rows(rows.micro, torch.where(mismatched, 0.1 * rows.logps, rows.logps))
    found, moved = (optimise(objective_of("kto", {}), each) for each in (rows, nearer))
    assert moved.metrics["kl"] > found.metrics["kl"]
    assert moved.value != pytest.approx(found.value, rel=1e-6)
    gradient = found.gradient
    assert not gradient[mismatched].any()
    assert gradient[~mismatched & rows.micro["mask"]].all()


def test_the_loss_of_self_play_with_hard_win_rates_is_half_of_sppo_hard_of_pairs() -> None:
    """On the same pairs: chosen rows are preferred with probability 1, rejected ones with 0."""
    pairs = random_rows("dpo", {"loss_type": "sppo_hard", "beta": 0.3}, seed=3)
    columns = {**pairs.micro.columns, "preference": pairs.micro["preferred"].to(torch.float32)}
    columns |= {"reward": torch.zeros(len(pairs.micro))}
    rows = replace(pairs, micro=MicroBatch(pairs.micro.lengths, columns))
    of_pairs = optimise(objective_of("dpo", {"loss_type": "sppo_hard", "beta": 0.3}), pairs)
    of_rows = optimise(objective_of("sppo", {"win_rates": "hard", "beta": 0.3}), rows)
    assert of_rows.value == pytest.approx(of_pairs.value / 2, rel=1e-6) and of_pairs.value > 1
    assert torch.allclose(of_rows.gradient, of_pairs.gradient / 2)
