"""A trainer's state on disk: what resumes from it, what is never saved, and what is never loaded."""

from __future__ import annotations

import math
import os
import re
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.background_save import BackgroundSave
from actors.checkpoint_parts import Part
from actors.errors import ConfigError, DiskError, RunError
from actors.model_worker import ModelWorker
from actors.objective import MicroBatch, Outputs, World
from actors.saved_state import sealed
from actors.specs import LoraSpec
from tests.unit.model_worker_stage import (
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


class SlowCopy:
    """A part of a save that reads the weights a while after the next step's pass has begun, when nothing else holds the
    step up any more."""

    def __init__(self, target: ModelWorker, passing: threading.Event, file: Path) -> None:
        self.target, self.passing, self.file = target, passing, file
        self.found: dict[str, torch.Tensor] = {}

    def copy(self) -> None:
        assert self.passing.wait(60)
        time.sleep(0.3)
        self.found = {name: weight.clone() for name, weight in self.target.backend.trained_weights()}

    def write(self) -> list[Path]:
        torch.save(self.found, self.file)
        return [self.file]


class Passing(Nll):
    """Says that a pass has begun."""

    def __init__(self, began: threading.Event) -> None:
        super().__init__(coupled=True)
        object.__setattr__(self, "began", began)

    def statistics(
        self, micros: list[MicroBatch], outputs: list[Outputs], world: World, state: dict[str, Any]
    ) -> dict[str, Any]:
        self.began.set()  # type: ignore[attr-defined]
        return super().statistics(micros, outputs, world, state)


def test_a_step_during_a_save_passes_at_once_and_changes_the_weights_only_when_they_are_copied(
    folder: Path, tmp_path: Path
) -> None:
    target, passing = trainable(folder), threading.Event()
    train(target, range(1))
    before = {name: weight.clone() for name, weight in target.backend.trained_weights()}
    piece = SlowCopy(target, passing, tmp_path / "weights.pt")
    target._save = BackgroundSave("policy", tmp_path, [piece], target.backend.device)
    train(target, range(1, 2), Passing(passing))  # the copy would wait for it forever, if it waited for the copy first
    assert list(target.finish_save(60)) == ["weights.pt"]
    saved = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert_equal_bits(saved, before)
    assert differing(before, dict(target.backend.trained_weights())), "the step changed nothing"


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_during_later_steps_is_what_is_saved_at_once(folder: Path, tmp_path: Path, variant: str) -> None:
    parts = [Part("state", "policy"), Part("model", "model")]
    target = trainable(folder, **VARIANTS[variant])
    train(target, range(2), Nll(coupled=True))
    at_once, background = tmp_path / "at_once", tmp_path / "background"
    (at_once / "policy").mkdir(parents=True)
    (background / "policy").mkdir(parents=True)
    target.save_state(str(at_once / "policy"))
    target.save_model(str(at_once / "model"))
    target.begin_save(str(background), parts)
    train(target, range(2, 4), Nll(coupled=True))
    seals = target.finish_save(60)
    files = {str(file.relative_to(background)) for file in background.rglob("*") if file.is_file()}
    assert set(seals) == files == {str(f.relative_to(at_once)) for f in at_once.rglob("*") if f.is_file()}
    assert all(sealed(background / name) == seal for name, seal in seals.items())
    for name in ("model/model.safetensors", "policy/single.pt", "policy/trainable-rank0.pt"):
        assert (background / name).read_bytes() == (at_once / name).read_bytes(), name
    target.save_model(str(tmp_path / "later"))
    assert (tmp_path / "later/model.safetensors").read_bytes() != (at_once / "model/model.safetensors").read_bytes()


def test_a_failed_copy_is_raised_where_the_save_is_finished_and_training_goes_on(folder: Path, tmp_path: Path) -> None:
    target = trainable(folder)
    with torch.no_grad():
        next(target.backend.trained_weights())[1].view(-1)[0] = math.nan
    target.begin_save(str(tmp_path), [Part("state", "policy")])
    with pytest.raises(RunError, match="not finite"):
        target.finish_save(60)
    assert not list(tmp_path.rglob("*.pt"))
    target.reset(OPTIM)


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
