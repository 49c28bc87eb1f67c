"""How a run stands, and what its place in a queue says of that."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import takewhile
from pathlib import Path
from typing import Any

from actors.errors import ConfigError, RunError
from orchestrator import restarts
from orchestrator.cluster.control import EVENTS_FILE, events
from orchestrator.console_copy import CONSOLE_FILE
from orchestrator.json_lines import LineReader
from orchestrator.queueing.entry import Entry, Stage

TAIL_BYTES = 2**14
REFUSED, FAILED = "troupe: refused: ", "troupe: the run failed: "  # as the command says it
SHOWN_LINES, SHOWN_OF_FAILURE = 10, 30


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
    `desired`, how many are `serving`. `members`: role -> each worker with its state and place; `ranks`: the same of the
    roles that hold a model (policy, value, reference ...). Of a run in progress: its `phase`, the stages `at_work`
    (`stage`, `writes`, `calls`, `share` of the last second), and what its driver `waits` for (`what`, `seconds`).
    `autoscale`: role -> `min`, `max`, whether it is `held` at a number that somebody asked for, and what was decided
    last (`said`)."""

    kind: State
    state: str
    step: int
    workers: Mapping[str, Mapping[str, int]]
    members: Mapping[str, Sequence[Mapping[str, Any]]]
    metrics: Mapping[str, Any]
    phase: str | None = None
    at_work: Sequence[Mapping[str, Any]] = ()
    waits: Sequence[Mapping[str, Any]] = ()
    ranks: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict[str, Sequence[Mapping[str, Any]]])
    autoscale: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])


def queue_says(folder: Path, entry: Entry) -> tuple[State, str] | None:
    """Of a run that no process drives, in one word and in a sentence; None if the run itself has said how it ended."""
    if entry.stage is Stage.WAITING:
        return State.PREEMPTED if entry.preempted else State.QUEUED, entry.reason or "waits for its turn"
    if has_ended(folder, entry, "finished", "interrupted"):
        return None
    if entry.stage is Stage.OVER:
        return (State.STOPPED, "stopped") if entry.stopped else (State.FAILED, entry.reason)
    if said := said_since(folder, entry):
        failed = [event["error"] for event in said if event.get("event") == "failed"]
        how = f"failed: {in_one_line(failed[-1].splitlines())}" if failed else "has ended without a word"
        return State.QUEUED, f"its process {how}; the service says what follows"
    return State.STARTING, "starting" if entry.stage is Stage.STARTED else entry.reason


def has_ended(folder: Path, entry: Entry, *kinds: str) -> bool:
    """Whether the process that a service has started last has said so."""
    return any(event.get("event") in kinds for event in said_since(folder, entry))


def has_saved(folder: Path) -> bool:
    """Whether a run has ever written a checkpoint, also where none is left: one that has is not begun anew, because
    that gives up what it measured."""
    return any((folder / "checkpoints").glob("step-*")) or any(
        event["event"] == "checkpoint" for event in events(folder)
    )


def said_since(folder: Path, entry: Entry) -> list[dict[str, Any]]:
    """What the process that a service has started last has written to the run's events."""
    return LineReader(folder / EVENTS_FILE, entry.events_from).new()


def last_words(folder: Path, since: int = 0, *, marked: bool = False) -> str:
    """What the console says, from a position on, of why the command `troupe` ended, in one line; else the last line of
    a traceback; else nothing. `marked`: with the words that tell a refusal from a failure before it."""
    try:
        with (folder / CONSOLE_FILE).open("rb") as stream:
            stream.seek(max(since, stream.seek(0, 2) - TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    for number in reversed(range(len(lines))):
        if lines[number].startswith((REFUSED, FAILED)):
            said = in_one_line(lines[number:])
            return said if marked else said.removeprefix(REFUSED).removeprefix(FAILED)
    in_traceback = any(line.startswith("Traceback (most recent call last)") for line in lines)
    whole = [line.strip() for line in lines if line.strip() and not line.startswith("troupe: ")]
    return whole[-1] if in_traceback and whole else ""


def in_one_line(lines: Sequence[str]) -> str:
    """The message that begins with the first of the lines, which may have several."""
    rest = list(takewhile(lambda line: line.strip() and not line.startswith("troupe: "), lines[1:SHOWN_LINES]))
    joined = lines[0].strip()
    for line in rest:
        joined += f"{' ' if joined.endswith((':', ',', ';')) else '; '}{line.strip()}"
    return joined


def failure_of(process: subprocess.Popen[bytes] | None, console: Path) -> ConfigError | RunError:
    """What ended a run, in the words that it printed."""
    printed = console.read_text(errors="replace").strip().splitlines() if console.exists() else []
    said = [number for number, line in enumerate(printed) if line.startswith("troupe: ")]
    lines = printed[said[0] :] if said else printed
    words = "\n".join(lines[-SHOWN_OF_FAILURE:]) or (
        f"it printed nothing in {console}" if console.exists() else "what it printed was not kept"
    )
    if process is not None and process.poll() == restarts.REFUSED:
        return ConfigError(words.removeprefix(REFUSED))
    code = "" if process is None else f" with exit code {process.poll()}"
    return RunError(f"the run ended{code}: {words}")
