"""What the service sees of a run that it has started: its process, and what that wrote since."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, Literal

from orchestrator.checkpoint import MANIFEST, NAME
from orchestrator.cluster.ray_address import NO_RAY
from orchestrator.cluster.run_lock import driver_of
from orchestrator.planning.bundles import NO_ROOM
from orchestrator.queueing.entry import Entry
from orchestrator.queueing.progress import Process, Seen
from orchestrator.service.jobs import JobState
from orchestrator.status import FAILED, REFUSED, last_words, said_since

PASSING = (NO_ROOM, NO_RAY)  # a refusal that another attempt need not meet
ENDS = ("finished", "interrupted")


def is_driven_here(folder: Path) -> bool:
    """Whether a process of this machine drives the run, which is certain without asking anybody else."""
    driver = driver_of(folder)
    return driver is not None and driver.host == platform.node() and driver.may_live


def seen(folder: Path, entry: Entry, job: JobState | None, *, answers: bool) -> Seen:
    """`job`: how the run's job stands; None: it has none, or that is not known. `answers`: whether it is known."""
    process = _process(folder, job, answers=answers)
    if process in (Process.ALIVE, Process.UNKNOWN):
        return Seen(process)
    said = said_since(folder, entry)
    line = last_words(folder, entry.console_from, marked=True)
    words = line.removeprefix(REFUSED).removeprefix(FAILED)
    refused = line.startswith(REFUSED) and not any(each in words for each in PASSING)
    return Seen(
        process,
        ended_as(said),
        spoke=bool(said),
        stopped=job is JobState.STOPPED,
        refused=words if refused else None,
        said=words,
        saved_step=saved_step(folder),
    )


def _process(folder: Path, job: JobState | None, *, answers: bool) -> Process:
    if is_driven_here(folder) or job in (JobState.PENDING, JobState.RUNNING):
        return Process.ALIVE
    if not answers:
        return Process.UNKNOWN
    return Process.LOST if job is None else Process.GONE


def ended_as(events: list[dict[str, Any]]) -> Literal["finished", "interrupted"] | None:
    said = [event["event"] for event in events if event.get("event") in ENDS]
    return said[-1] if said else None


def has_reserved(folder: Path, entry: Entry) -> bool:
    return any(event.get("event") == "reserved" for event in said_since(folder, entry))


def saved_step(folder: Path) -> int:
    """Of the newest checkpoint that is complete; 0 for none."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if (path / MANIFEST).exists()]
    return max((int(match[1]) for path in found if (match := NAME.fullmatch(path.name))), default=0)
