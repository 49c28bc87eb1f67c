"""The contract of a trainer backend, on every one: what a role computes must not depend on who computes it.

What is saved and resumed: `test_backend_states.py`. Adapters and averages: `test_backend_adapters.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.errors import ConfigError, InfraFailure
from actors.model import ModelSpec
from actors.specs import BackendSpec
from orchestrator.losses.objective import LossObjective
from orchestrator.losses.reduce import item_mean
from orchestrator.losses.unpaired import bco, kto
from orchestrator.publishing.transfer import mix_towards
from tests.contract.backend_stage import (
    BUDGET,
    OPTIM,
    SINGLE,
    VERB_S,
    ZERO3,
    Case,
    Role,
    Start,
    Train,
    assert_same_weights,
    base,
    batch,
    every_backend,
    expected_once,
    plain_logps,
    plain_model,
    start,
    train,
)
from tests.trainer_ranks import Gangs
from tests.unit.tiny import tiny_model_folder

__all__ = ["base", "batch", "start", "train"]  # fixtures


@every_backend
def test_the_loss_curve_is_that_of_single(train: Train, case: Case) -> None:
    run, expected = train(case), train(SINGLE)
    assert expected.losses[-1] < 0.9 * expected.losses[0], "four steps must move the loss, or nothing is compared"
    np.testing.assert_allclose(run.losses, expected.losses, rtol=1e-5)


@every_backend
def test_gradient_norms_and_learning_rates_are_those_of_single(train: Train, case: Case) -> None:
    run, expected = train(case), train(SINGLE)
    assert all(report.grad_norm > 0.7 for report in expected.reports[:2]), "clipping must be at work"
    np.testing.assert_allclose(
        [report.grad_norm for report in run.reports], [report.grad_norm for report in expected.reports], rtol=1e-4
    )
    rates = [report.learning_rate for report in run.reports]
    assert rates == [report.learning_rate for report in expected.reports]
    assert rates[0] == pytest.approx(0.5e-2), "the first of two warm-up steps"


@every_backend
def test_weights_leave_whole_under_the_same_names_and_in_the_same_order(train: Train, case: Case) -> None:
    assert_same_weights(train(case).weights, train(SINGLE).weights, tolerance=2e-6)


@every_backend
def test_a_saved_model_reopens_with_the_weights_that_were_trained(train: Train, case: Case) -> None:
    assert_same_weights(plain_model(train(case).model), train(case).weights)


@every_backend
def test_a_new_phase_has_fresh_moments_and_schedule_on_the_same_weights(start: Start, case: Case) -> None:
    second = replace(OPTIM, learning_rate=2e-3, scheduler="constant", warmup_steps=0, max_grad_norm=0.3)

    def two_phases(case: Case) -> list[float]:
        role = start(case)
        role.update(2)
        role.act("reset", second)
        reports = role.update(3)
        assert {report.learning_rate for report in reports} == {2e-3}
        return [report.metrics["loss"] for report in reports]

    np.testing.assert_allclose(two_phases(case), expected_once("phases", lambda: two_phases(SINGLE)), rtol=1e-5)


@every_backend
def test_an_evaluation_is_the_loss_of_the_next_step_and_changes_nothing(start: Start, train: Train, case: Case) -> None:
    role = start(case)
    losses: list[float] = []
    for _ in range(2):
        losses.append(role.evaluate()["loss"])
        role.update()
    np.testing.assert_allclose(losses, train(SINGLE).losses[:2], rtol=1e-5)


@every_backend
def test_bfloat16_trains_to_nearly_the_same_losses(start: Start, train: Train, case: Case) -> None:
    reports, exact = start(case, dtype="bfloat16").update(4), train(SINGLE)
    losses = [report.metrics["loss"] for report in reports]
    np.testing.assert_allclose(losses, exact.losses, rtol=0.02)
    assert losses != exact.losses
    norms = [report.grad_norm for report in reports]
    np.testing.assert_allclose(norms, [report.grad_norm for report in exact.reports], rtol=0.1)


@pytest.mark.parametrize("case", [SINGLE, Case("deepspeed", 1, 2), ZERO3], ids=str)
@pytest.mark.parametrize("budget", [35, 400])
def test_losses_do_not_depend_on_how_rows_are_cut_into_micro_batches(
    start: Start, train: Train, case: Case, budget: int
) -> None:
    losses = [report.metrics["loss"] for report in start(case).update(4, budget=budget)]
    np.testing.assert_allclose(losses, train(SINGLE).losses, rtol=1e-5)


@pytest.mark.parametrize("case", [SINGLE, Case("deepspeed", 2, 2), ZERO3], ids=str)
@pytest.mark.parametrize("budget", [BUDGET, 1000], ids=["several micro-batches", "one micro-batch"])
@pytest.mark.parametrize("loss", [kto, bco], ids=["over rows set aside", "over all rows"])
def test_losses_that_look_across_rows_are_those_of_single(
    start: Start, batch: Batch, case: Case, budget: int, loss: Callable[..., Any]
) -> None:
    every_other = np.arange(len(batch)) % 2 == 1
    columns = {"ref_logps": -4.0 * batch["mask"], "label": np.arange(len(batch)) % 4 < 2, "mismatched": every_other}
    objective = LossObjective(loss, item_mean, {"beta": 0.1})
    data = batch.with_columns(**columns)

    def losses(case: Case, budget: int) -> list[float]:
        reports = start(case).update(3, batch=data, budget=budget, objective=objective)
        return [x for r in reports for x in (r.metrics["loss"], r.grad_norm, r.metrics["rewards/chosen"])]

    expected = expected_once(f"coupled by {loss.__name__}", lambda: losses(SINGLE, 60))
    np.testing.assert_allclose(losses(case, budget), expected, rtol=1e-4)


@pytest.mark.parametrize("case", [SINGLE, Case("deepspeed", 2, 1), ZERO3], ids=str)
def test_gradient_checkpointing_changes_no_loss(start: Start, train: Train, case: Case) -> None:
    losses = [report.metrics["loss"] for report in start(case, gradient_checkpointing=True).update(4)]
    np.testing.assert_allclose(losses, train(SINGLE).losses, rtol=1e-5)


@pytest.mark.parametrize("case", [Case("deepspeed", stage, 2) for stage in range(4)], ids=str)
def test_a_rank_without_rows_takes_part(start: Start, batch: Batch, case: Case) -> None:
    row = batch.select([3])
    alone = expected_once("one row", lambda: [r.metrics["loss"] for r in start(SINGLE).update(2, batch=row)])
    np.testing.assert_allclose([r.metrics["loss"] for r in start(case).update(2, batch=row)], alone, rtol=1e-5)


@pytest.mark.parametrize("case", [SINGLE, *(Case("deepspeed", stage, 2) for stage in range(4))], ids=str)
def test_a_frozen_role_needs_no_optimizer(start: Start, base: ModelSpec, batch: Batch, case: Case) -> None:
    role = start(case, optim=None)
    np.testing.assert_allclose(role.logps(), plain_logps(base.path, batch), atol=1e-5)
    assert_same_weights(role.weights(), plain_model(base.path))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("source", "case"), [(SINGLE, Case("deepspeed", stage, 2)) for stage in range(4)] + [(ZERO3, SINGLE)], ids=str
)
def test_a_frozen_role_takes_in_a_share_of_the_trained_ones_weights(
    start: Start, tmp_path: Path, source: Case, case: Case, tied: bool
) -> None:
    folder = str(tiny_model_folder(tmp_path, hidden=32, tied=tied))
    policy, reference = start(source, path=folder), start(case, optim=None, path=folder)
    expected = reference.weights()
    for share in (0.25, 0.6):
        policy.update()
        asyncio.run(mix_towards(policy.gang, reference.gang, share, timeout_s=VERB_S, task_name="mix"))
        new = policy.weights()
        expected = {name: (1 - share) * own + share * new[name] for name, own in expected.items()}
        assert_same_weights(reference.weights(), expected, tolerance=3e-7)
    reference.act("save_model", str(tmp_path / "mixed"))
    np.testing.assert_allclose(plain_logps(str(tmp_path / "mixed"), reference.batch), reference.logps(), atol=1e-5)
    kept = reference.weights()
    reference.act("load_model", str(tmp_path / "mixed"))
    assert_same_weights(reference.weights(), kept)  # what a checkpoint does


@pytest.mark.parametrize("case", [SINGLE, Case("deepspeed", 0, 1), ZERO3], ids=str)
def test_an_untied_head_is_trained_and_leaves_too(start: Start, tmp_path: Path, case: Case) -> None:
    folder = tiny_model_folder(tmp_path, hidden=32, tied=False)

    def two_steps(case: Case) -> tuple[list[float], dict[str, np.ndarray]]:
        role = start(case, path=str(folder))
        return [report.metrics["loss"] for report in role.update(2)], role.weights()

    losses, weights = two_steps(case)
    expected_losses, expected = expected_once("untied", lambda: two_steps(SINGLE))
    assert "lm_head.weight" in weights
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert_same_weights(weights, expected, tolerance=2e-6)


@pytest.mark.parametrize("case", [SINGLE, Case("deepspeed", 0, 1), Case("deepspeed", 1, 2)], ids=str)
def test_the_world_sums_and_gathers_over_ranks(start: Start, case: Case) -> None:
    own = [[float(rank), 10.0][: rank + 1] for rank in range(case.ranks)]  # one value on rank 0, two on rank 1
    flat = [value for values in own for value in values]
    answers = start(case).call("combine", per_rank=own)
    assert answers == [([len(flat), sum(flat)], flat)] * case.ranks


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_the_shipped_deepspeed_configurations_train(start: Start, train: Train, name: str) -> None:
    path = Path(__file__).parents[2] / "deploy" / "deepspeed" / f"{name}.json"
    losses = [report.metrics["loss"] for report in start(ZERO3, config=path).update(2)]
    np.testing.assert_allclose(losses, train(SINGLE).losses[:2], rtol=1e-5)


def test_an_optimizer_of_deepspeeds_configuration_takes_its_settings_from_the_run(start: Start, train: Train) -> None:
    config = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": "auto"}}}
    losses = [report.metrics["loss"] for report in start(Case("deepspeed", 2, 2), config=config).update(4)]
    np.testing.assert_allclose(losses, train(SINGLE).losses, rtol=1e-5)


def test_single_refuses_more_than_one_rank(start: Start) -> None:
    with pytest.raises(ConfigError, match="deepspeed"):
        start(Case("single", 0, 2))


def test_the_death_of_a_rank_ends_the_update_with_an_infra_failure(gangs: Gangs, base: ModelSpec, batch: Batch) -> None:
    """The last test of all that share the gangs: it kills one."""
    role = Role(gangs.given_away(2), batch)
    role.call("start", base, BackendSpec("deepspeed", OPTIM, None, 2))
    role.update()
    os.kill(role.call("ready")[1].pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(InfraFailure, match=f"{role.gang.name}/1"):
        role.update()
    assert time.monotonic() - began < VERB_S / 2, "far from the deadline of the call"
