"""The state of a trainer, of every backend: resumed to the bit, or refused; parked, and taken back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.errors import ConfigError, RunError
from actors.model_worker import UpdateReport
from actors.specs import OptimSpec
from tests.contract.backend_stage import (
    PARTITION_ALL,
    SINGLE,
    Case,
    Start,
    Train,
    assert_same_weights,
    base,
    batch,
    every_backend,
    expected_once,
    furthest,
    start,
    train,
)

__all__ = ["base", "batch", "start", "train"]  # fixtures


@every_backend
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(start: Start, train: Train, case: Case) -> None:
    run = train(case)
    role = start(case)
    untrained = role.weights()
    role.act("load_state", run.state)
    at_resume = role.weights()
    resumed = role.update(2)
    assert [report.metrics["loss"] for report in resumed] == run.losses[2:]
    assert [report.grad_norm for report in resumed] == [report.grad_norm for report in run.reports[2:]]
    assert_same_weights(role.weights(), run.weights)
    assert furthest(untrained, at_resume) > 1e-3 and furthest(at_resume, run.weights) > 1e-3


@every_backend
def test_a_resumed_run_trains_as_it_is_configured_now(start: Start, train: Train, case: Case) -> None:
    now = OptimSpec(2e-3, total_steps=8, weight_decay=0.5, adam_betas=(0.5, 0.9), max_grad_norm=0.1)

    def two_more(case: Case) -> tuple[list[UpdateReport], dict[str, np.ndarray]]:
        state = train(case).state  # before the role starts: it may be trained only now, by the same gang
        role = start(case)
        role.act("reset", now)
        role.act("load_state", state)
        return role.update(2), role.weights()

    reports, weights = two_more(case)
    assert [report.learning_rate for report in reports] == pytest.approx([2e-3 * 6 / 8, 2e-3 * 5 / 8])
    expected, single = expected_once("changed", lambda: two_more(SINGLE))
    assert [report.grad_norm for report in reports] == pytest.approx(
        [report.grad_norm for report in expected], rel=1e-5
    )
    assert_same_weights(weights, single, tolerance=5e-6)
    assert furthest(single, train(SINGLE).weights) > 1e-3, "the changed settings must show, or nothing is compared"


class Planted:
    """Runs when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("stage", range(4))
def test_a_state_of_deepspeed_that_holds_code_is_refused_and_the_code_does_not_run(
    start: Start, train: Train, tmp_path: Path, stage: int
) -> None:
    case = Case("deepspeed", stage, 1)
    files = sorted(Path(train(case).state).rglob("*states.pt"))
    assert len(files) == (1 if stage == 0 else 2)
    for number, file in enumerate(files):
        state = Path(shutil.copytree(train(case).state, tmp_path / str(number)))
        planted, trace = state / file.relative_to(train(case).state), tmp_path / f"ran-{number}"
        torch.save({**torch.load(planted, weights_only=False), "planted": Planted(trace)}, planted)
        with pytest.raises(RunError, match=r"is not data \(.*mkdir.*not loaded"):
            start(case).act("load_state", str(state))
        assert not trace.exists()


@every_backend
def test_what_is_parked_between_two_steps_comes_back_to_the_bit(start: Start, train: Train, case: Case) -> None:
    small = {"zero_optimization": {**PARTITION_ALL["zero_optimization"], "reduce_bucket_size": 100_000}}
    run = train(case)
    role = start(case, config=small)  # DeepSpeed's own buffers have half a billion numbers
    reports = role.update(2)
    held = sum(role.call("park_and_take_back"))
    reports += role.update(2)
    assert [report.metrics["loss"] for report in reports] == run.losses
    assert_same_weights(role.weights(), run.weights)
    numel = sum(weight.size for weight in run.weights.values())
    assert held > 0.99 * numel * (4 + 8), "weights and Adam's two moments, of all ranks together"


def test_a_state_of_another_gang_is_refused_with_what_to_do(start: Start, train: Train) -> None:
    state = train(Case("deepspeed", 2, 1)).state
    with pytest.raises(
        ConfigError, match=r"saved by 1 rank\(s\) in ZeRO stage 2.*resume with ranks=1 and zero_stage=2"
    ):
        start(Case("deepspeed", 2, 2)).act("load_state", state)


def test_a_state_of_another_backend_is_refused(start: Start, train: Train) -> None:
    deepspeed = Case("deepspeed", 2, 1)
    saved = {case: train(case).state for case in (SINGLE, deepspeed)}  # first: the ranks hold one worker at a time
    with pytest.raises(ConfigError, match="resume with the backend that saved it"):
        start(deepspeed).act("load_state", saved[SINGLE])
    with pytest.raises(ConfigError, match="no state of backend 'single'; resume with the backend that saved it"):
        start(SINGLE).act("load_state", saved[deepspeed])
