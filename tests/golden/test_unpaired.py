"""KTO and BCO against the numbers of another implementation: their losses, and what they make of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actors.batch import Batch
from orchestrator.data.density_ratio import density_ratio_weights
from orchestrator.data.mismatched_rows import with_mismatches
from tests.golden.cases import cases, objective_for, padded, rows_of, the, unpadded
from tests.unit.trainer_stub import optimise


@cases("kto/", without=("kto/kl_pairs",))
def test_kto_equals_the_peer(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    real, other = inputs["per_token_logps"], inputs["KL_per_token_logps"]
    width = max(len(real[0]), len(other[0]))
    logps = [row + [0.0] * (width - len(row)) for row in [*real, *other]]
    mask = [[int(value != 0) for value in row] for row in logps]
    ref = torch.zeros(len(logps), width + 1, dtype=torch.float64)
    ref[:, 2] = torch.tensor([*inputs["ref_logps"], *inputs["ref_KL_logps"]])  # the first token of every completion
    is_real = torch.arange(len(logps)) < len(real)
    rows = rows_of(
        logps,
        mask,
        ref_logps=ref.flatten(),
        label=torch.tensor(inputs["label"] * 2),
        mismatched=~is_real,
        group=torch.arange(len(real)).repeat(2),
    )
    if case["config"]["loss_type"] != "kto":  # the other loss takes no mismatched rows
        rows = rows.select(range(len(real)))
    result = optimise(objective_for(case), rows)
    assert result.value == pytest.approx(case["outputs"]["loss"], abs=1e-6)
    gradient = unpadded(result.gradient, len(rows))
    expected = (
        torch.tensor(case["outputs"]["grad_per_token_logps"]) * torch.tensor(mask[: len(real)])[:, : len(real[0])]
    )
    torch.testing.assert_close(gradient[: len(real), : len(real[0])], expected.double(), atol=1e-6, rtol=1e-6)
    assert not gradient[len(real) :].any()
    assert result.metrics.get("kl", 0.0) == pytest.approx(case["outputs"]["kl"], abs=1e-6)


@cases("kto/kl_pairs")
def test_mismatched_rows_pair_prompts_with_the_completions_that_the_peer_pairs_them_with(case: dict[str, Any]) -> None:
    completions = case["outputs"]["completion_ids"]
    rows = [[20 + row, *completion] for row, completion in enumerate(completions)]
    batch = Batch.build(
        [len(row) for row in rows],
        tokens=np.concatenate(rows),
        mask=np.concatenate([np.arange(len(row)) > 0 for row in rows]),
        label=[True, False, True, False],
    )
    doubled = with_mismatches(batch)
    found = [doubled.row("tokens", row).tolist() for row in np.flatnonzero(doubled["mismatched"])]
    assert found == [[20 + row, *other] for row, other in enumerate(case["outputs"]["KL_completion_ids"])]


BCO = [the(name) for name in ("bco/step0", "bco/step1")]


def test_bco_equals_the_peer_over_two_steps_with_one_running_mean() -> None:
    objective, states = objective_for(BCO[0]), [{}]
    for case in BCO:
        inputs, outputs = case["inputs"], case["outputs"]
        logps = [*inputs["policy_chosen_logps"], *inputs["policy_rejected_logps"]]
        ref = [*inputs["ref_chosen"], *inputs["ref_rejected"]]
        rows = rows_of(
            [[value] for value in logps],
            [[1]] * len(logps),
            ref_logps=padded([[value] for value in ref]),
            label=torch.arange(len(logps)) < len(inputs["policy_chosen_logps"]),
        )
        result = optimise(objective, rows, states=states)
        assert result.metrics["delta"] == pytest.approx(outputs["delta"], abs=1e-6)
        assert result.value == pytest.approx(np.mean(outputs["losses"]), abs=1e-6)
        expected = torch.tensor(
            [[g] for g in [*outputs["grad_chosen"], *outputs["grad_rejected"]]], dtype=torch.float64
        )
        torch.testing.assert_close(unpadded(result.gradient, len(logps)), expected, atol=1e-6, rtol=1e-6)


@cases("bco/udm_weight")
def test_density_ratio_weights_equal_the_peer(case: dict[str, Any]) -> None:
    weights = density_ratio_weights(np.array(case["inputs"]["prob_desirable"]))
    np.testing.assert_allclose(weights, case["outputs"]["weight"], atol=1e-6)
