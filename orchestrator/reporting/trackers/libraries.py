"""The trackers, each an adapter to its library. A library is imported in the tracker's own thread.

Where a library keeps a run's data, and under which account, is its own matter (`WANDB_MODE`, `MLFLOW_TRACKING_URI`,
`TRACKIO_DIR` ...); only where it would write into the working directory, which for a job is a copy that is
deleted, the run's folder is used.
"""

# pyright: basic, reportMissingImports=false
# (of these libraries some have no types, and none need be installed where types are checked)

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from orchestrator.reporting.trackers.tracker import Ended, TrackedRun

T = TypeVar("T")

STEP = "step"  # the metric that W&B draws the others against


class TensorBoardFiles:
    """TensorBoard's event files in the run's folder, by TensorBoard's own writer: torch's would import torch in the
    driver."""

    place = None  # the end of a run names the command that shows them

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events: Any = event_pb2  # generated modules, whose names exist only at run time
        self._summaries: Any = summary_pb2
        self._writer = EventFileWriter(str(run.folder / "tensorboard"), flush_secs=5)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        value = self._summaries.Summary.Value
        scalars = [value(tag=tag, simple_value=number) for tag, number in values.items()]
        self._add(step, summary=self._summaries.Summary(value=scalars))

    def rewind(self, step: int) -> None:
        """At a session's start TensorBoard discards what it has read for later steps."""
        self._add(step + 1, session_log=self._events.SessionLog(status=self._events.SessionLog.START))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, **content))

    def close(self, ended: Ended) -> None:
        self._writer.close()


class WeightsAndBiases:
    """W&B's own step only grows, so a resumed run could not write a step again: curves are drawn against a metric of
    that name instead."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no account of W&B is known here: `wandb login`, WANDB_API_KEY or WANDB_MODE=offline")
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=hashlib.sha256(run.name.encode()).hexdigest()[:32],  # a name may be longer than an id
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            allow_val_change=True,  # a resumed run may have other settings
            # Its output is the run's, and the machine of the driver is one of many, which Ray's dashboard shows.
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    @property
    def place(self) -> str:
        if self._run.offline:
            return f"offline, in {self._run.settings.sync_dir}; `wandb sync` uploads it"
        return str(self._run.url)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({STEP: step, **values})

    def rewind(self, step: int) -> None:
        """Steps that are written again have both values."""

    def close(self, ended: Ended) -> None:
        self._run.finish(exit_code=0 if ended == "finished" else 1)


class MLflow:
    """By default in a SQLite file beside the folders of the runs: one for all of them."""

    ENDED: Mapping[Ended, str] = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
    PARAMS, METRICS, LONGEST = 100, 1_000, 6_000  # a request's limits, and the characters of a parameter

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        beside = f"sqlite:///{run.folder.absolute().parent / 'mlflow.db'}"
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or beside
        self._client, self._metric = MlflowClient(self._uri), Metric
        experiment = self._client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        known = self._client.search_runs([number], f"attributes.run_name = '{run.name}'", max_results=1)
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return  # parameters cannot be changed there
        self._id = self._client.create_run(number, run_name=run.name).info.run_id
        params = [Param(key, str(value)[: self.LONGEST]) for key, value in run.settings.items()]
        for some in _portions(params, self.PARAMS):
            self._client.log_batch(self._id, params=some)

    @property
    def place(self) -> str:
        return f"run {self._id} in {self._uri}"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_mlflow_name(tag), value, now, step) for tag, value in values.items()]
        for some in _portions(metrics, self.METRICS):
            self._client.log_batch(self._id, metrics=some)

    def rewind(self, step: int) -> None:
        """Steps that are written again have both values."""

    def close(self, ended: Ended) -> None:
        self._client.set_terminated(self._id, self.ENDED[ended])


def _mlflow_name(tag: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", tag)


def _portions(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (values[start : start + size] for start in range(0, len(values), size))


class Trackio:
    """Locally in Trackio's own folder, unless its environment variables name a server or a Space."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.place = f"`trackio show --project {run.project}`, run {run.name}"
        self._run = trackio.init(
            project=run.project,
            name=run.name,
            resume="allow",
            config=dict(run.settings),
            embed=False,
            auto_log_gpu=False,  # of the driver's machine; Ray's dashboard shows every machine
            auto_log_cpu=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def rewind(self, step: int) -> None:
        """Steps that are written again have both values."""

    def close(self, ended: Ended) -> None:
        self._run.finish()
