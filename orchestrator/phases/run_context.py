"""The parts of a run that all of its phases use: the plan, the log, the checkpoints, the requests from outside."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.errors import InfraFailure
from orchestrator.checkpoint import Checkpoint, CheckpointStore
from orchestrator.cluster.autoscaler import Autoscaler
from orchestrator.cluster.control import EVENTS_FILE
from orchestrator.cluster.failures import Ledger, Watchdog
from orchestrator.cluster.requests import Requests
from orchestrator.cluster.shutdown import Ending
from orchestrator.collection.evaluation import Evaluations
from orchestrator.config.overrides import leaves
from orchestrator.planning.plan import Plan
from orchestrator.planning.prepared import Prepared
from orchestrator.reporting.account import Account
from orchestrator.reporting.console import Console
from orchestrator.reporting.metrics import MetricsLog, RayGauges, Sink
from orchestrator.reporting.trackers.table import queued
from orchestrator.reporting.trackers.tracker import TrackedRun


@dataclass
class RunContext:
    """Made once per run, before anything is launched."""

    prepared: Prepared
    plan: Plan
    folder: Path
    local: bool
    last_checkpoint: Checkpoint | None = None
    ending_or_none: Ending | None = None  # None until the run has a cluster
    output_closed: bool = False  # nobody reads standard output any more

    def __post_init__(self) -> None:
        config = self.prepared.config
        self.config = config
        steps = {phase.name: phase.steps for phase in self.prepared.phases}
        self.console = Console(steps, closed=self._output_closed)
        self.store = CheckpointStore(self.folder / "checkpoints", keep=config.checkpoint.keep)
        self.watchdog = Watchdog(report_after_s=config.cluster.watchdog_s)
        self.log = MetricsLog(self.folder, tuple(self._sinks()))
        self.account = Account()
        self.evaluations = Evaluations(
            self.folder, self.log, self.console, self.watchdog, self.event, self.config.roles
        )
        limits = {role.name: role.autoscale for role in self.plan.elastic if role.autoscale is not None}
        self.autoscaler = Autoscaler(limits, self.event)
        self.requests = Requests(lambda: self.ending.asked())
        self.ledger = Ledger(allowed_in_a_row=max(64, 4 * max(p.config.train.batch_size for p in self.prepared.phases)))

    @property
    def ending(self) -> Ending:
        assert self.ending_or_none is not None, "the run has no cluster yet"
        return self.ending_or_none

    def event(self, kind: str, detail: dict[str, Any]) -> None:
        """One line in `events.jsonl`: parts of the start, joins, deaths, retries, resizes, checkpoints."""
        line = {"time": round(time.time(), 3), "event": kind, **detail}
        with self.write_errors_as_warnings(f"event {kind}"), (self.folder / EVENTS_FILE).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        if kind in ("evicted", "resized", "sync_failed", "loss_not_reported"):
            self.console.warn(f"{kind}: " + ", ".join(f"{name}={value}" for name, value in detail.items()))

    @contextlib.contextmanager
    def write_errors_as_warnings(self, what: str) -> Iterator[None]:
        """A full disk must not end the training because of a metric or an event: the error becomes a warning."""
        try:
            yield
        except (OSError, InfraFailure) as error:
            self.console.warn(f"{what} not written: {error}")

    def how_to_continue(self) -> str:
        """The last line for the user: the last checkpoint, and the command that continues from it."""
        if self.last_checkpoint is None:
            return (
                f"no checkpoint yet; `troupe resume {self.folder}` begins it again, and checkpoint.every=N writes one "
                "every N steps"
            )
        return f"last checkpoint {self.last_checkpoint.path}; continue with `troupe resume {self.folder}`"

    def _sinks(self) -> Iterator[Sink]:
        """Where metrics go besides the run's file."""
        logging = self.config.logging
        if logging.ray_metrics and not self.local:
            yield RayGauges(self.folder.name)
        settings = dict(leaves(self.config.model_dump(mode="json")))
        tracked = TrackedRun(self.folder.name, self.folder, logging.project, settings)
        for name in logging.trackers:
            yield queued(name, tracked, self._tracker_said)

    def _tracker_said(self, line: str) -> None:
        self.event("tracker", {"said": line})
        self.console.note(line)

    def _output_closed(self) -> None:
        self.output_closed = True
        if self.ending_or_none is not None:
            self.ending_or_none.output_closed()
