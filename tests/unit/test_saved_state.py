"""A trainer's state on disk: what resumes from it, what is never saved, and what is never loaded."""

from __future__ import annotations

import math
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.errors import ConfigError, DiskError, RunError
from actors.objective import MicroBatch, Outputs, World
from actors.specs import LoraSpec
from tests.unit.test_model_worker import (
    OPTIM,
    VARIANTS,
    Nll,
    assert_equal_bits,
    differing,
    folder,
    train,
    trainable,
    weights,
)

__all__ = ["folder"]  # a fixture


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(folder: Path, tmp_path: Path, variant: str) -> None:
    straight = trainable(folder, **VARIANTS[variant])
    expected = train(straight, range(5), Nll(coupled=True))

    first = trainable(folder, **VARIANTS[variant])
    train(first, range(2), Nll(coupled=True))
    (state := tmp_path / "state").mkdir()
    first.save_state(str(state))
    resumed = trainable(folder, seed=99, **VARIANTS[variant])
    untrained = weights(resumed)
    resumed.load_state(str(state))
    at_resume = weights(resumed)
    found = train(resumed, range(2, 5), Nll(coupled=True))

    assert_equal_bits(weights(straight), weights(resumed))
    assert differing(untrained, at_resume), "the state moved no weight"
    assert differing(at_resume, weights(resumed)), "what was trained after the resume moved no weight"
    assert [report.metrics for report in found] == [report.metrics for report in expected[2:]]
    assert [report.learning_rate for report in found] == [report.learning_rate for report in expected[2:]]
    assert resumed.ping()["steps_done"] == 5


def test_a_state_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (state := tmp_path / "state").mkdir()
    trainable(folder).save_state(str(state))
    with pytest.raises(ConfigError, match="trained weights are not this one's"):
        trainable(folder, lora=LoraSpec(r=4)).load_state(str(state))


class Planted:
    """Runs when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("file", ["trainable-rank0.pt", "single.pt"])
def test_a_state_that_holds_code_is_refused_and_the_code_does_not_run(folder: Path, tmp_path: Path, file: str) -> None:
    (state := tmp_path / "state").mkdir()
    trainable(folder).save_state(str(state))
    content = torch.load(state / file, weights_only=True)
    torch.save({**content, "planted": Planted(tmp_path / "ran")}, state / file)
    with pytest.raises(RunError, match=r"is not data \(.*mkdir.*not loaded"):
        trainable(folder).load_state(str(state))
    assert not (tmp_path / "ran").exists()
    torch.load(state / file, weights_only=False)
    assert (tmp_path / "ran").exists(), "the planted code is none, so nothing was tested"


def test_a_state_that_could_not_be_loaded_again_is_refused_when_it_is_saved(folder: Path, tmp_path: Path) -> None:
    class Hoarder(Nll):
        def statistics(
            self, micros: list[MicroBatch], outputs: list[Outputs], world: World, state: dict[str, Any]
        ) -> dict[str, Any]:
            state["seen"] = [np.float64(1.0)]
            return super().statistics(micros, outputs, world, state)

    target = trainable(folder)
    train(target, range(1), Hoarder(coupled=True))
    with pytest.raises(RunError, match=r"\['objectives'\]\['policy.update'\]\['seen'\]\[0\] is a numpy.float64"):
        target.save_state(str(tmp_path))


def test_a_resumed_run_trains_as_it_is_configured_now(folder: Path, tmp_path: Path) -> None:
    """Rate, schedule, betas and decay of the state are those of its past: the next step takes the present ones."""
    first = trainable(folder, optim=replace(OPTIM, total_steps=2))
    train(first, range(2))
    first.save_state(str(tmp_path))
    now = replace(OPTIM, learning_rate=1e-3, total_steps=4, weight_decay=0.5, adam_betas=(0.5, 0.5))
    resumed, went_on = trainable(folder), trainable(folder)
    for target, optim in ((resumed, now), (went_on, replace(OPTIM, total_steps=4))):
        target.reset(optim)
        target.load_state(str(tmp_path))
    assert [report.learning_rate for report in train(resumed, range(2, 4))] == pytest.approx([5e-4, 2.5e-4])
    assert [report.learning_rate for report in train(went_on, range(2, 4))] == pytest.approx([1.5e-3, 7.5e-4])
    assert differing(weights(resumed), weights(went_on))


@pytest.mark.parametrize(
    ("dtype", "number"), [("float32", math.inf), ("float32", math.nan), ("bfloat16", math.inf), ("float16", 1e5)]
)
def test_weights_that_are_not_finite_are_never_saved(folder: Path, tmp_path: Path, dtype: str, number: float) -> None:
    target = trainable(folder, dtype="float32" if dtype == "float16" else dtype)
    train(target, range(1))
    target.save_state(str(tmp_path))
    before = (tmp_path / "single.pt").read_bytes()
    name, weight = list(target.backend.trained_weights())[-1]
    with torch.no_grad():
        weight.view(-1)[3] = number
    if dtype == "float16":  # trained by another backend: finite in float32, and not in what is computed with
        target._model_spec = replace(target._model_spec, dtype=dtype)
    with pytest.raises(RunError, match=rf"{re.escape(name)} holds numbers that are not finite in {dtype} after step 1"):
        target.save_state(str(tmp_path))
    assert (tmp_path / "single.pt").read_bytes() == before


def test_a_learning_rate_that_ruins_the_weights_leaves_no_state(folder: Path, tmp_path: Path) -> None:
    target = trainable(folder, optim=replace(OPTIM, learning_rate=1e38, scheduler="constant", weight_decay=100.0))
    train(target, range(1))
    with pytest.raises(RunError, match=r"Lower train\.learning_rate"):
        target.save_state(str(tmp_path))
    assert not list(tmp_path.glob("*.pt"))


@contextmanager
def disk_of(largest_file: int) -> Iterator[None]:
    """Files end at that many bytes, as on a disk that is full: torch, safetensors and tokenizers each say it in their
    own way. (Python ignores the signal that would come with it.)"""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("largest_file", [0, 5_000])
@pytest.mark.parametrize("verb", ["save_state", "save_model"])
def test_a_full_disk_is_an_error_of_its_own_whichever_library_meets_it(
    folder: Path, tmp_path: Path, verb: str, largest_file: int
) -> None:
    target = trainable(folder)
    train(target, range(1))
    (full := tmp_path / "full").mkdir()
    with disk_of(largest_file), pytest.raises(DiskError, match=f"{full}.*MiB free there"):
        getattr(target, verb)(str(full))
    getattr(target, verb)(str(full))  # and it is the disk's fault alone
