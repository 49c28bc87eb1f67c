"""What the service sees of a run that it has started: its process, and what that wrote since."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, Literal

from orchestrator.checkpoint import MANIFEST, NAME
from orchestrator.cluster.ray_address import NO_RAY
from orchestrator.cluster.run_lock import driver_of
from orchestrator.console_copy import CONSOLE_FILE
from orchestrator.planning.bundles import NO_ROOM
from orchestrator.queueing.entry import Entry
from orchestrator.queueing.progress import Process, Seen
from orchestrator.service.jobs import JobState
from orchestrator.status import said_since

TAIL_BYTES = 2**14
REFUSED, FAILED = "troupe: refused: ", "troupe: the run failed: "
PASSING = (NO_ROOM, NO_RAY)  # a refusal that another attempt need not meet
ENDS = ("finished", "interrupted")


def is_driven_here(folder: Path) -> bool:
    """Whether a process of this machine drives the run, which is certain without asking anybody else."""
    driver = driver_of(folder)
    return driver is not None and driver.host == platform.node() and driver.may_live


def seen(folder: Path, entry: Entry, job: JobState | None, *, answers: bool) -> Seen:
    """`job`: how the run's job stands; None: it is not known. `answers`: whether that could be asked for."""
    process = _process(folder, job, answers=answers)
    if process in (Process.ALIVE, Process.UNKNOWN):
        return Seen(process)
    said = said_since(folder, entry)
    words = last_words(folder, entry.console_from)
    refused = words if words.startswith(REFUSED) and not any(each in words for each in PASSING) else None
    return Seen(
        process,
        ended_as(said),
        spoke=bool(said),
        stopped=job is JobState.STOPPED,
        refused=None if refused is None else refused.removeprefix(REFUSED),
        said=words.removeprefix(REFUSED).removeprefix(FAILED),
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


def last_words(folder: Path, since: int = 0) -> str:
    """The line in the console, from a position on, that says why the command `troupe` ended; else the last line of a
    traceback; else nothing."""
    try:
        with (folder / CONSOLE_FILE).open("rb") as stream:
            stream.seek(max(since, stream.seek(0, 2) - TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    for line in reversed(lines):
        if line.startswith((REFUSED, FAILED)):
            return line
    in_traceback = any(line.startswith("Traceback (most recent call last)") for line in lines)
    whole = [line.strip() for line in lines if line.strip() and not line.startswith("troupe: ")]
    return whole[-1] if in_traceback and whole else ""
