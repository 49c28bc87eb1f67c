"""Trackers never stop or slow a run: what they do not take is counted and told; a missing library is refused."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from actors.errors import ConfigError
from orchestrator.config.schema import PhaseConfig, RunConfig, TrackerName
from orchestrator.planning.preconditions import refuse_surroundings
from orchestrator.reporting.metrics import METRICS_FILE, MetricsLog, read
from orchestrator.reporting.trackers import table
from orchestrator.reporting.trackers.queued import QueuedTracker
from orchestrator.reporting.trackers.tracker import Ended
from tests.test_house import ROOT, dependencies

DEADLINE_S = 20.0  # of a thread that has nothing to wait for


class Recording:
    """A tracker that keeps what it gets. It waits for `free` before each write, and fails on the steps of `bad`."""

    def __init__(self, *, free: threading.Event | None = None, bad: tuple[int, ...] = (), place: str | None = None):
        self.free, self.bad, self.place = free, bad, place
        self.waits = threading.Event()
        self.got: list[Any] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self.free is not None:
            self.waits.set()
            self.free.wait(DEADLINE_S)
        if step in self.bad:
            raise ConnectionError(f"step {step}: the server is gone\nand more")
        self.got.append((step, dict(values)))

    def rewind(self, step: int) -> None:
        self.got.append(("rewind", step))

    def close(self, ended: Ended) -> None:
        self.got.append(ended)


def test_a_tracker_gets_steps_rewinds_and_the_end_in_order_with_tags_by_phase_and_no_number_that_is_not_finite():
    tracker, told = Recording(place="https://a.example/run"), list[str]()
    sink = QueuedTracker("t", lambda: tracker, told.append)
    sink.write(1, "sft", {"loss": 2.0, "kl": math.nan})
    sink.rewind(0)
    sink.write(1, "grpo", {"loss": 1.0})
    sink.close("interrupted")
    assert tracker.got == [(1, {"sft/loss": 2.0}), ("rewind", 0), (1, {"grpo/loss": 1.0}), "interrupted"]
    assert told == ["tracker t: https://a.example/run"]


def test_what_a_tracker_fails_to_take_is_told_the_first_time_and_counted_at_the_end_and_the_rest_arrives():
    tracker, told = Recording(bad=(2, 3)), list[str]()
    sink = QueuedTracker("t", lambda: tracker, told.append)
    for step in (1, 2, 3, 4):
        sink.write(step, "a", {"x": 1.0})
    sink.close()
    assert [step for step, _ in tracker.got[:-1]] == [1, 4]
    first, last = told
    assert first == "tracker t failed; later failures are counted: ConnectionError: step 2: the server is gone"
    assert "of 4 lines of metrics: 2 calls failed, 0 entries were dropped. metrics.jsonl has all" in last


def test_a_tracker_that_hangs_holds_nobody_up_and_what_its_queue_cannot_hold_is_dropped_and_told_once():
    free, told = threading.Event(), list[str]()
    tracker = Recording(free=free)
    sink = QueuedTracker("t", lambda: tracker, told.append, capacity=2, close_s=0.01)
    sink.write(1, "a", {"x": 1.0})
    assert tracker.waits.wait(DEADLINE_S)  # it holds step 1, and its queue is empty
    for step in range(2, 7):  # two of these fit; none of these calls waits: nothing frees the tracker
        sink.write(step, "a", {"x": 1.0})
    assert len(told) == 1 and "2 entries behind" in told[0]
    sink.close()
    assert len(told) == 2 and "was left behind" in told[1] and "of 6 lines" in told[1] and "3 entries" in told[1]
    assert tracker.got == []
    free.set()


def test_a_tracker_that_cannot_start_is_told_once_and_takes_nothing():
    told, up = list[str](), threading.Event()

    def start() -> Recording:
        up.set()
        raise RuntimeError("no account")

    sink = QueuedTracker("t", start, told.append)
    assert up.wait(DEADLINE_S)
    sink._thread.join(DEADLINE_S)
    for step in range(5):
        sink.write(step, "a", {"x": 1.0})
    sink.close()
    sink.close()
    assert told[0] == "tracker t could not start and is left out: RuntimeError: no account"
    assert told[1:] == [f"tracker t: {sink._lost()}"] and "5 entries were dropped" in told[1]


def test_a_broken_tracker_takes_nothing_from_the_file_or_from_the_tracker_beside_it(tmp_path: Path):
    good, told = Recording(), list[str]()
    broken = QueuedTracker("broken", lambda: Recording(bad=(1, 2)), told.append)
    log = MetricsLog(tmp_path, [broken, QueuedTracker("good", lambda: good, told.append)])
    for step in (1, 2):
        log.write(step, "a", {"x": float(step)})
    log.close("failed")
    assert [line["x"] for line in read(tmp_path / METRICS_FILE)] == [1.0, 2.0]
    assert good.got == [(1, {"a/x": 1.0}), (2, {"a/x": 2.0}), "failed"]


def settings(*trackers: str) -> RunConfig:
    tree = {"phases": {"sft": PhaseConfig()}, "logging": {"trackers": trackers}}
    return RunConfig.model_validate(tree)


def test_a_tracker_without_its_library_is_refused_before_anything_starts_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    absent = table.Library("Absent", "no_such_module_anywhere", "troupe[absent]", Recording)  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(table.TRACKERS, "wandb", absent)
    monkeypatch.chdir(tmp_path)
    refuse_surroundings(settings("tensorboard"), local=True)
    with pytest.raises(ConfigError) as refused:
        refuse_surroundings(settings("tensorboard", "wandb"), local=True)
    assert str(refused.value) == (
        'logging.trackers: Absent is not installed here; `pip install "troupe[absent]"`, or leave it out'
    )


def test_a_tracker_that_is_listed_twice_or_does_not_exist_is_refused():
    assert settings("mlflow", "wandb").logging.trackers == ("mlflow", "wandb")
    with pytest.raises(ValidationError, match="wandb is listed twice"):
        settings("wandb", "wandb")
    with pytest.raises(ValidationError, match="tensorboard"):
        settings("weights")


def test_every_tracker_has_a_library_that_is_declared_in_pyproject():
    assert tuple(table.TRACKERS) == get_args(TrackerName)
    assert {library.module for library in table.TRACKERS.values()} <= {
        name.removesuffix("_skinny") for name in dependencies()
    }
    extras = (ROOT / "pyproject.toml").read_text()
    for library in table.TRACKERS.values():
        extra = library.needs.removeprefix("troupe[").removesuffix("]")
        assert extra == library.needs or f"\n{extra} = [" in extras
