"""The runs in a folder: which there are, and how each stands. Nothing is kept but what a look at the disk confirms.

A run is there as soon as it was submitted (`recipe.json`), before its driver has saved its configuration.

A run's id is the name of its folder. An id that is none (with a separator, say) is refused before the disk is asked,
and what lies there counts only if it is a folder of its own, not a link to one elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.api import RunHandle, State, Status
from orchestrator.cluster.control import EVENTS_FILE, RUN_FILE, events
from orchestrator.cluster.run_lock import LOCK
from orchestrator.config.loading import SAVED, SUBMITTED
from orchestrator.config.section import RUN_ID
from orchestrator.console_copy import CONSOLE_FILE
from orchestrator.json_lines import last_lines
from orchestrator.reporting.metrics import METRICS_FILE
from orchestrator.service.errors import Problem
from orchestrator.service.jobs import Jobs, JobState
from orchestrator.service.schemas import RunDetail, RunSummary

ID = re.compile(RUN_ID)
SUBMISSION = "submission.json"  # when it was submitted last
WATCHED = (
    EVENTS_FILE,
    METRICS_FILE,
    LOCK,
    RUN_FILE,
    SAVED,
    SUBMISSION,
    CONSOLE_FILE,
)  # a run that is over stands as they say

TAIL_BYTES = 2**14

Seen = tuple[tuple[int, int], ...]  # size and time of each of them


class RunFolders:
    """The runs below one folder. Its calls read files: not for an event loop. `jobs`: asked about a run whose driver
    has not written anything yet."""

    def __init__(self, root: Path, jobs: Jobs) -> None:
        self.root, self._jobs = root.resolve(), jobs
        self._over: dict[str, tuple[Seen, RunSummary]] = {}

    def folder(self, run: str) -> Path:
        """Raises Problem 404 if there is no such run."""
        folder = self.root / run
        if ID.fullmatch(run) and not folder.is_symlink() and _is_run(folder):
            return folder
        raise Problem(404, f"there is no run {run[:200]!r}")

    def handle(self, run: str) -> RunHandle:
        return RunHandle(self.folder(run), None)

    def summaries(self) -> list[RunSummary]:
        """Of all runs, the newest first."""
        if not self.root.is_dir():
            return []
        with os.scandir(self.root) as entries:
            names = [each.name for each in entries if ID.fullmatch(each.name) and not each.is_symlink()]
        found = [summary for name in names if (summary := self._summary(self.root / name)) is not None]
        return sorted(found, key=lambda summary: summary.created, reverse=True)

    def summary(self, run: str) -> RunSummary:
        """Raises Problem 404 if there is no such run."""
        found = self._summary(self.folder(run))
        if found is None:
            raise Problem(404, f"there is no run {run[:200]!r}")
        return found

    def _summary(self, folder: Path) -> RunSummary | None:
        """None if it is no run's folder. Of many runs that are over, this is what a list costs."""
        seen = tuple(_stamp(f"{folder}/{name}") for name in WATCHED)
        known = self._over.get(folder.name)
        if known is not None and known[0] == seen:
            return known[1]
        if not _is_run(folder):
            return None
        status, waits = self._status(folder)
        summary = _summary(folder, status)
        if summary.state.over and not waits:
            self._over[folder.name] = seen, summary
        return summary

    def detail(self, run: str) -> RunDetail:
        folder = self.folder(run)
        status, _ = self._status(folder)
        return RunDetail(
            **_summary(folder, status).model_dump(),
            workers={role: dict(count) for role, count in status.workers.items()},  # pyright: ignore[reportArgumentType]
            members={role: [dict(member) for member in members] for role, members in status.members.items()},
            pipelines=RunHandle(folder, None).pipelines(),  # pyright: ignore[reportArgumentType]
            phase=status.phase,
            at_work=status.at_work,  # pyright: ignore[reportArgumentType]
            waits=status.waits,  # pyright: ignore[reportArgumentType]
            autoscale={role: dict(scaled) for role, scaled in status.autoscale.items()},
            metrics=dict(status.metrics),
            config=_config(folder),
        )

    def _status(self, folder: Path) -> tuple[Status, bool]:
        """How a run stands, and whether its last submission is still without a word of its driver."""
        status = RunHandle(folder, None).status()
        waits = status.kind.over and submitted(folder) > _last_word(folder)
        if waits:
            try:
                job = self._jobs.states({folder.name: folder}).get(folder.name)
            except Problem as problem:
                return replace(status, kind=State.STARTING, state=f"submitted; {problem}"), waits
            if job is not None and job is not JobState.ENDED:
                return replace(status, kind=State.STARTING, state=f"its job is {job}"), waits
        if status.kind is State.FAILED and (said := _refusal(folder)):
            status = replace(status, state=f"{status.state}: {said}")
        return status, waits


def write_submitted(folder: Path) -> None:
    """A driver is about to be started for the run."""
    (folder / SUBMISSION).write_text(json.dumps({"submitted": time.time()}))


def submitted(folder: Path) -> float:
    """When a driver was last started for the run by this service; 0.0 for never."""
    try:
        return float(json.loads((folder / SUBMISSION).read_text())["submitted"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _is_run(folder: Path) -> bool:
    return (folder / SAVED).is_file() or (folder / SUBMITTED).is_file()


def _last_word(folder: Path) -> float:
    last = last_lines(folder / EVENTS_FILE)
    return float(last[-1].get("time", 0.0)) if last else 0.0


def _refusal(folder: Path) -> str | None:
    """What the command `troupe` said last in the console: why it ended."""
    try:
        with (folder / CONSOLE_FILE).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - TAIL_BYTES))
            lines = stream.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    said = [line for line in lines if line.startswith("troupe: ")]
    return said[-1].removeprefix("troupe: ") if said else None


def _summary(folder: Path, status: Status) -> RunSummary:
    phases: dict[str, Any] = _config(folder).get("phases", {})
    return RunSummary(
        id=folder.name,
        state=status.kind,
        detail=status.state.replace(f"{folder.parent}/", ""),  # where the runs lie is the service's business
        step=status.step,
        methods=[str(phase.get("method", "")) for phase in phases.values()],
        created=_created(folder),
    )


def _config(folder: Path) -> dict[str, Any]:
    """As the run saved it; before that, as it was submitted."""
    for name in (SAVED, SUBMITTED):
        with contextlib.suppress(FileNotFoundError, ValueError):  # it is being written
            return json.loads((folder / name).read_text())
    return {}


def _created(folder: Path) -> float:
    first = next(iter(events(folder)), {})
    return float(first.get("time", folder.stat().st_ctime))


def _stamp(file: str) -> tuple[int, int]:
    try:
        found = os.stat(file)
        return found.st_size, found.st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return -1, 0
