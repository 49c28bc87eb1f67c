"""Returns, advantages, losses and metrics of PPO against the numbers of another implementation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from actors.backends.single import SoloWorld
from actors.batch import Batch
from actors.objective import MicroBatch
from orchestrator.credit.returns import whitened
from orchestrator.losses.objective import LossObjective
from orchestrator.methods import build
from tests.golden.cases import cases
from tests.golden.peer import ours
from tests.unit.trainer_stub import Result, Rows, optimise


def peers_rows(case: dict[str, Any]) -> tuple[Batch, np.ndarray]:
    """A peer's rows end one token after their last real one, unless they are cut there: that is where it puts the
    score, with a value and without a KL. So these are ours, every token trained; and [R, C] bool: where they stand."""
    inputs, last = case["inputs"], np.array(case["outputs"]["sequence_lengths"])
    place = np.arange(len(inputs["logprobs"][0]))
    real, lasting = place <= last[:, None], place <= last[:, None] + 1
    old, ref = np.array(inputs["logprobs"]), np.array(inputs["ref_logprobs"])
    batch = Batch.build(
        lasting.sum(1),
        mask=np.ones(int(lasting.sum()), bool),
        old_logps=old[lasting],
        ref_logps=np.where(real, ref, old)[lasting],
        values=np.array(inputs["values"])[lasting],
        reward=inputs["scores_after_eos_penalty"],
    )
    return batch, lasting


@cases("ppo/run")
def test_returns_advantages_and_metrics_equal_the_peer(case: dict[str, Any]) -> None:
    config, outputs = case["config"], case["outputs"]
    name, options = ours(case)
    credits = {getattr(stage.call, "__name__", ""): stage for stage in build(name, options) if stage.verb == "credit"}
    batch, lasting = peers_rows(case)
    for wanted in ("kl_in_reward", "generalised_advantages"):
        stage = credits[wanted]
        assert stage.call is not None
        columns, metrics = stage.call(batch, SoloWorld(), {}, **{**stage.options, **WITHOUT_WHITENING.get(wanted, {})})
        batch = batch.with_columns(**columns)
        for metric in metrics.keys() & outputs["logs"].keys() - {"objective/entropy"}:  # of the token past the end, too
            found = float(metrics[metric].total) / float(metrics[metric].weight)
            assert found == pytest.approx(outputs["logs"][metric], abs=1e-6)
    np.testing.assert_allclose(batch["advantages"], np.array(outputs["raw_advantages"])[lasting], atol=1e-5)
    np.testing.assert_allclose(batch["returns"], np.array(outputs["returns"])[lasting], atol=1e-5)
    real = np.array(outputs["whitened_advantages"]) != 0
    whitened_by_peer = whitened(np.array(outputs["raw_advantages"])[real], SoloWorld())
    np.testing.assert_allclose(whitened_by_peer, np.array(outputs["whitened_advantages"])[real], atol=1e-5)
    assert config["whiten_rewards"] is False


WITHOUT_WHITENING: dict[str, dict[str, Any]] = {"generalised_advantages": {"whiten": False}}


@cases("ppo/run")
def test_the_losses_of_policy_and_value_equal_the_peer(case: dict[str, Any]) -> None:
    outputs, logs = case["outputs"], case["outputs"]["logs"]
    batch, lasting = peers_rows(case)
    batch = batch.with_columns(returns=np.array(outputs["returns"])[lasting].astype(np.float32))
    value = updated_by(case, "value", batch, batch["values"])
    assert value.value == pytest.approx(outputs["value_loss"], abs=1e-4)
    assert value.metrics["val/clipfrac_avg"] == logs["val/clipfrac_avg"]
    advantages = np.array(outputs["whitened_advantages"])[lasting].astype(np.float32)
    batch = batch.with_columns(advantages=advantages, mask=advantages != 0)  # the token past the end is no policy's
    policy = updated_by(case, "policy", batch, batch["old_logps"])
    assert policy.value == pytest.approx(outputs["policy_loss"], abs=1e-6)
    assert policy.metrics["policy/ratio_avg"] == logs["val/ratio"]
    for metric in ("policy/approxkl_avg", "policy/clipfrac_avg"):
        assert policy.metrics[metric] == logs[metric]


def updated_by(case: dict[str, Any], role: str, batch: Batch, said: np.ndarray) -> Result:
    """The loss of a role's update, whose model says of every token what it said before."""
    (stage,) = (stage for stage in build(*ours(case)).updates if stage.role == role)
    return optimise(LossObjective.of(stage), Rows(MicroBatch.of(batch), torch.tensor(said, dtype=torch.float64)))


@cases("ppo/masked_whiten")
def test_whitening_equals_the_peer(case: dict[str, Any]) -> None:
    mask = np.array(case["inputs"]["mask"])
    found = whitened(np.array(case["inputs"]["values"])[mask], SoloWorld(), shift_mean=case["id"].endswith("True"))
    np.testing.assert_allclose(found, np.array(case["outputs"]["out"])[mask], atol=1e-6)
