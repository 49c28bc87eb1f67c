"""Every tracker with its own library, offline: the numbers of a run arrive, and a resumed run is the same run there.

A library that is not installed is skipped: `pip install "troupe[wandb,mlflow,trackio]"` brings all of them, and `make
test` installs those of requirements/trackers.txt.
"""

from __future__ import annotations

import json
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.schema import TrackerName
from orchestrator.reporting.trackers.table import TRACKERS
from orchestrator.reporting.trackers.tracker import Ended, TrackedRun

Curves = dict[str, list[tuple[int, float]]]  # tag -> (step, value), as they were written
DEADLINE_S = 200.0
NAME, PROJECT = "arithmetic-20261126-100000-77", "tracked"


class Stored(ABC):
    """What a library has of a run, read with the library."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing leaves the machine, and nothing is left on it."""
        self.folder = folder

    @abstractmethod
    def runs(self) -> list[str]:
        """Names of the project's runs."""

    @abstractmethod
    def curves(self) -> Curves: ...

    def settings(self) -> dict[str, str] | None:
        """As texts. None if the tracker has no place for them."""
        return None

    def state(self) -> str | None:
        """None if it has none."""
        return None


class InTensorBoard(Stored):
    def _events(self) -> Any:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.folder / "tensorboard"))
        events.Reload()
        return events

    def runs(self) -> list[str]:
        return [self.folder.name] if self._events().Tags()["scalars"] else []

    def curves(self) -> Curves:
        events = self._events()
        return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


class InWandb(Stored):
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch)
        monkeypatch.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            monkeypatch.setenv(name, str(folder.parent / name))

    def _records(self) -> list[Any]:
        """Of all parts of the run. W&B's own process writes the last ones after `finish` has returned."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            files = sorted(self.folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
            parts = [self._parsed(file) for file in files]
            if parts and all("exit" in map(kind_of, part) for part in parts):
                return [record for part in parts for record in part]
            assert time.monotonic() < deadline, f"no end of a run in {files}"
            time.sleep(0.05)

    def _parsed(self, file: Path) -> list[Any]:
        from wandb.proto import wandb_internal_pb2

        return [wandb_internal_pb2.Record.FromString(data) for data in log_records(file)]

    def runs(self) -> list[str]:
        """By id: what is uploaded later of the same id is the same run."""
        runs = [record.run for record in self._records() if kind_of(record) == "run"]
        assert {run.project for run in runs} == {PROJECT}
        return list({run.run_id: run.display_name for run in runs}.values())

    def curves(self) -> Curves:
        found: Curves = {}
        for record in self._records():
            if kind_of(record) != "history":
                continue
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for tag, value in row.items():
                if "/" in tag:
                    found.setdefault(tag, []).append((int(row["step"]), value))
        return found

    def settings(self) -> dict[str, str]:
        updates = [record.run.config.update for record in self._records() if record.HasField("run")]
        return {item.key: str(json.loads(item.value_json)) for update in updates for item in update}

    def state(self) -> str:
        codes = [record.exit.exit_code for record in self._records() if kind_of(record) == "exit"]
        return "finished" if codes[-1] == 0 else "failed"


class InMLflow(Stored):
    def _run(self) -> tuple[Any, list[Any]]:
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder.parent / 'mlflow.db'}")
        experiment = client.get_experiment_by_name(PROJECT)
        assert experiment is not None
        return client, list(client.search_runs([experiment.experiment_id]))

    def runs(self) -> list[str]:
        return [run.info.run_name for run in self._run()[1]]

    def curves(self) -> Curves:
        client, [run] = self._run()
        return {
            tag: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, tag)]
            for tag in run.data.metrics
        }

    def settings(self) -> dict[str, str]:
        return dict(self._run()[1][0].data.params)

    def state(self) -> str:
        return self._run()[1][0].info.status.lower()


class InTrackio(Stored):
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, monkeypatch)
        from trackio import utils

        monkeypatch.setattr(utils, "TRACKIO_DIR", folder.parent / "trackio")  # the library reads it once, at import
        for module in ("trackio", "trackio.sqlite_storage"):
            monkeypatch.setattr(f"{module}.TRACKIO_DIR", folder.parent / "trackio", raising=False)

    def _store(self) -> Any:
        from trackio.sqlite_storage import SQLiteStorage

        return SQLiteStorage

    def runs(self) -> list[str]:
        return self._store().get_runs(PROJECT)

    def curves(self) -> Curves:
        found: Curves = {}
        for row in self._store().get_logs(PROJECT, NAME):
            for tag, value in row.items():
                if "/" in tag:
                    found.setdefault(tag, []).append((row["step"], value))
        return found

    def settings(self) -> dict[str, str]:
        return {key: str(value) for key, value in (self._store().get_run_config(PROJECT, NAME) or {}).items()}


def kind_of(record: Any) -> str:
    return record.WhichOneof("record_type")


def log_records(file: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file, which W&B has no public reader for: after 7 bytes of its own LevelDB's log
    format, in which a record is split at the ends of blocks of 32 KiB."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little of the block is left for a header
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


STORED: dict[TrackerName, type[Stored]] = {
    "tensorboard": InTensorBoard,
    "wandb": InWandb,
    "mlflow": InMLflow,
    "trackio": InTrackio,
}


@pytest.fixture(params=TRACKERS)
def stored(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Stored]:
    name: TrackerName = request.param
    pytest.importorskip(TRACKERS[name].module, reason=f'needs `pip install "{TRACKERS[name].needs}"`')
    folder = tmp_path / "runs" / NAME
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return name, STORED[name](folder, monkeypatch)


def write(name: str, folder: Path, lines: list[tuple[int, dict[str, float]]], ended: Ended, **rest: Any) -> None:
    """One process's part of a run: the first, or one that was resumed from `resumed_from`."""
    settings = {"seed": rest.get("seed", 7), "phases.sft.train.steps": 3}
    tracker = TRACKERS[name].tracker(TrackedRun(NAME, folder, PROJECT, settings))  # pyright: ignore[reportArgumentType]
    if "resumed_from" in rest:
        tracker.rewind(rest["resumed_from"])
    for step, values in lines:
        tracker.write(step, values)
    tracker.close(ended)


def test_the_numbers_of_a_run_and_its_settings_arrive_under_their_tags_and_steps(stored: tuple[str, Stored]):
    name, found = stored
    write(name, found.folder, [(1, {"sft/loss": 2.0}), (2, {"sft/loss": 1.5, "sft/eval_loss": 1.0})], "finished")
    assert found.curves() == {"sft/loss": [(1, 2.0), (2, 1.5)], "sft/eval_loss": [(2, 1.0)]}
    assert found.runs() == [NAME]
    settings = found.settings()
    assert settings is None or {"seed": "7", "phases.sft.train.steps": "3"}.items() <= settings.items()
    assert found.state() in (None, "finished")


def test_a_resumed_run_goes_on_in_the_run_that_it_was_and_its_later_values_come_last(stored: tuple[str, Stored]):
    name, found = stored
    write(name, found.folder, [(1, {"sft/loss": 2.0}), (2, {"sft/loss": 1.5}), (3, {"sft/loss": 9.0})], "failed")
    assert found.state() in (None, "failed")
    write(name, found.folder, [(3, {"sft/loss": 1.0}), (4, {"sft/loss": 0.5})], "finished", resumed_from=2)
    assert found.runs() == [NAME]
    assert found.state() in (None, "finished")
    curve = found.curves()["sft/loss"]
    assert dict(curve) == {1: 2.0, 2: 1.5, 3: 1.0, 4: 0.5}, "of a step that was written twice, the later value"
    assert len(curve) == (4 if name == "tensorboard" else 5), "only TensorBoard drops what is written again"
