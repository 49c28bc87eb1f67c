"""How a run stands, and what its place in a queue says of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.cluster.control import EVENTS_FILE
from orchestrator.json_lines import LineReader
from orchestrator.queueing.entry import Entry, Stage


class State(StrEnum):
    """Of a run, as programs tell them apart."""

    QUEUED = "queued"  # it waits for room, or to be resumed after a failure
    PREEMPTED = "preempted"  # it makes room for a run of higher priority, and then waits to go on
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    SILENT = "silent"  # its driver seems to live, but puts up no status
    FINISHED = "finished"
    STOPPED = "stopped"  # on request or by a signal; `resume` continues it
    FAILED = "failed"

    @property
    def over(self) -> bool:
        """Whether no process drives the run any more."""
        return self in (State.FINISHED, State.STOPPED, State.FAILED)


@dataclass(frozen=True)
class Status:
    """How a run stands. `state`: `starting`, `running`, `paused`, `finished`, or a sentence that says why it waits, how
    it ended or why it does not answer; `kind`: the same as one of a few words. `step`, `metrics`: what was logged last,
    with the evaluation after that step. `workers`: of its elastic roles while it is running: role -> how many are
    `desired`, how many are `serving`. `members`: role -> each worker with its state and place. Of a run in progress:
    its `phase`, the stages `at_work` (`stage`, `writes`, `calls`, `share` of the last second), and what its driver
    `waits` for (`what`, `seconds`). `autoscale`: role -> `min`, `max`, whether it is `held` at a number that somebody
    asked for, and what was decided last (`said`)."""

    kind: State
    state: str
    step: int
    workers: Mapping[str, Mapping[str, int]]
    members: Mapping[str, Sequence[Mapping[str, Any]]]
    metrics: Mapping[str, Any]
    phase: str | None = None
    at_work: Sequence[Mapping[str, Any]] = ()
    waits: Sequence[Mapping[str, Any]] = ()
    autoscale: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


def queue_says(folder: Path, entry: Entry) -> tuple[State, str] | None:
    """Of a run that no process drives, in one word and in a sentence; None if the run itself has said how it ended."""
    if entry.stage is Stage.WAITING:
        return State.PREEMPTED if entry.preempted else State.QUEUED, entry.reason or "waits for its turn"
    if has_ended(folder, entry, "finished", "interrupted"):
        return None
    if entry.stage is Stage.OVER:
        return (State.STOPPED, "stopped") if entry.stopped else (State.FAILED, entry.reason)
    if said_since(folder, entry):
        return State.QUEUED, "its process has ended without a word; the service says what follows"
    return State.STARTING, "starting" if entry.stage is Stage.STARTED else entry.reason


def has_ended(folder: Path, entry: Entry, *kinds: str) -> bool:
    """Whether the process that a service has started last has said so."""
    return any(event.get("event") in kinds for event in said_since(folder, entry))


def said_since(folder: Path, entry: Entry) -> list[dict[str, Any]]:
    """What the process that a service has started last has written to the run's events."""
    return LineReader(folder / EVENTS_FILE, entry.events_from).new()
