"""What a worker computes without learning: log-probabilities, evaluations, and the model without its adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.errors import RunError
from actors.sharding import Shard
from actors.specs import LoraSpec
from actors.train_step import infer
from tests.unit.model_worker_stage import (
    VARIANTS,
    Nll,
    assert_equal_bits,
    batch,
    folder,
    logps,
    part,
    train,
    trainable,
    weights,
)

__all__ = ["folder"]  # a fixture


def test_logps_come_back_in_the_rows_own_order_with_zeros_off_the_mask(folder: Path) -> None:
    data = batch()
    target = trainable(folder, optim=None)
    found = logps(target, Shard(data, ((5, 3), (0, 1, 2, 4), tuple(range(6, 12)))))
    whole = logps(target, Shard(data, (tuple(range(12)),)))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found != 0, data["mask"])


def test_logps_draw_no_noise_and_leave_the_random_state_alone(folder: Path) -> None:
    target = trainable(folder, neftune_noise_alpha=5.0)
    state = torch.get_rng_state()
    data = part(batch())
    np.testing.assert_array_equal(logps(target, data), logps(target, data))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_thread_computes_gradients_again_after_log_probabilities_whose_frame_is_held(
    folder: Path,
) -> None:
    """As a debugger or the traceback of an error does."""
    held: list[Any] = []
    target = trainable(folder)
    sys.setprofile(lambda frame, event, arg: held.append(frame) if frame.f_code is infer.__code__ else None)
    try:
        logps(target, part(batch()))
    finally:
        sys.setprofile(None)
    assert held and torch.is_grad_enabled()
    assert target.backend.model.training


@pytest.mark.parametrize("coupled", [False, True])
def test_an_evaluation_reports_what_an_update_would_without_noise_or_learning(folder: Path, coupled: bool) -> None:
    noisy: dict[str, Any] = {"lora": LoraSpec(r=4, dropout=0.5), "neftune_noise_alpha": 50.0}
    target, plain = trainable(folder, **noisy), trainable(folder, lora=LoraSpec(r=4))
    data, objective = part(batch()), Nll(coupled=coupled)
    found = [target.evaluate(data, objective, 1.0, "policy.update") for _ in range(2)]
    report = plain.update(data, objective, 1.0, "policy.update")
    assert found[0] == found[1]
    assert found[0] == pytest.approx({name: report.metrics[name] for name in found[0]}, rel=1e-5)
    assert set(report.metrics) - set(found[0]) == {"num_tokens", "padding_share"}


def test_an_evaluation_between_updates_changes_nothing(folder: Path) -> None:
    plain, evaluated = (trainable(folder, **VARIANTS["lora"]) for _ in range(2))
    objective = Nll(coupled=True)  # its state counts steps
    expected = train(plain, range(3), objective)
    found = train(evaluated, range(1), objective)
    evaluated.evaluate(part(batch(7)), objective, 1.0, "policy.update")
    found += train(evaluated, range(1, 3), objective)
    assert [report.metrics for report in found] == [report.metrics for report in expected]
    assert_equal_bits(weights(evaluated), weights(plain))


def test_a_frozen_role_evaluates_too_and_an_empty_batch_is_refused(folder: Path) -> None:
    frozen = trainable(folder, optim=None)
    assert frozen.evaluate(part(batch()), Nll(), 1.0, "u")["loss"] > 0
    with pytest.raises(RunError, match="empty batch"):
        frozen.evaluate(Shard(batch().select([]), ((),)), Nll(), 1.0, "u")


def test_adapters_off_is_the_base_model_exactly(folder: Path) -> None:
    adapted, base = trainable(folder, lora=LoraSpec(r=4)), trainable(folder, optim=None)
    data = part(batch())
    train(adapted, range(2))
    np.testing.assert_array_equal(logps(adapted, data, adapters=False), logps(base, data))
    assert not np.array_equal(logps(adapted, data), logps(base, data))
    with pytest.raises(RuntimeError, match="no LoRA adapters"):
        logps(base, data, adapters=False)


def test_adapters_still_train_after_they_were_off(folder: Path) -> None:
    target = trainable(folder, lora=LoraSpec(r=4))
    train(target, range(1))
    logps(target, part(batch()), adapters=False)
    before = weights(target)
    train(target, range(1, 2))
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(target).items())


def test_a_frozen_role_computes_but_does_not_train(folder: Path) -> None:
    frozen = trainable(folder, optim=None)
    assert not any(parameter.requires_grad for parameter in frozen.backend.model.parameters())
    with pytest.raises(RunError, match="frozen"):
        frozen.update(part(batch()), Nll(), 1.0, "policy.update")
