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
from functools import lru_cache
from pathlib import Path
from typing import Any

from orchestrator.cluster.control import EVENTS_FILE, RUN_FILE, events
from orchestrator.cluster.run_lock import LOCK
from orchestrator.config.loading import SAVED, SUBMITTED
from orchestrator.config.section import RUN_ID
from orchestrator.console_copy import CONSOLE_FILE
from orchestrator.queueing import entry as entries
from orchestrator.queueing.entry import ENTRY_FILE
from orchestrator.reporting.metrics import METRICS_FILE
from orchestrator.run_handle import RunHandle
from orchestrator.service.errors import Problem
from orchestrator.service.schemas import RunDetail, RunSummary
from orchestrator.status import Status

ID = re.compile(RUN_ID)
WATCHED = (
    EVENTS_FILE,
    METRICS_FILE,
    LOCK,
    RUN_FILE,
    SAVED,
    ENTRY_FILE,
    CONSOLE_FILE,
)  # a run that is over stands as they say

Seen = tuple[tuple[int, int], ...]  # size and time of each of them


class RunFolders:
    """The runs below one folder. Its calls read files: not for an event loop."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
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
        try:
            summary = _summary(folder, _status(folder))
        except FileNotFoundError:  # it was removed meanwhile: its job could not be started
            if _is_run(folder):
                raise
            return None
        if summary.state.over:
            self._over[folder.name] = seen, summary
        return summary

    def detail(self, run: str) -> RunDetail:
        folder = self.folder(run)
        status = _status(folder)
        return RunDetail(
            **_summary(folder, status).model_dump(),
            workers={role: dict(count) for role, count in status.workers.items()},  # pyright: ignore[reportArgumentType]
            members={role: [dict(member) for member in members] for role, members in status.members.items()},
            ranks={role: [dict(rank) for rank in ranks] for role, ranks in status.ranks.items()},
            pipelines=RunHandle(folder, None).pipelines(),  # pyright: ignore[reportArgumentType]
            phase=status.phase,
            at_work=status.at_work,  # pyright: ignore[reportArgumentType]
            waits=status.waits,  # pyright: ignore[reportArgumentType]
            autoscale={role: dict(scaled) for role, scaled in status.autoscale.items()},
            metrics=dict(status.metrics),
            config=_config(folder),
        )


def _is_run(folder: Path) -> bool:
    return (folder / SAVED).is_file() or (folder / SUBMITTED).is_file()


def _status(folder: Path) -> Status:
    return RunHandle(folder, None).status()


def _summary(folder: Path, status: Status) -> RunSummary:
    phases: dict[str, Any] = _config(folder).get("phases", {})
    entry = entries.read(folder)
    return RunSummary(
        id=folder.name,
        state=status.kind,
        detail=status.state.replace(f"{folder.parent}/", ""),  # where the runs lie is the service's business
        step=status.step,
        methods=[str(phase.get("method", "")) for phase in phases.values()],
        created=_created(folder),
        priority=entry.priority if entry is not None else None,
        failures=entry.failures if entry is not None else 0,
    )


def _config(folder: Path) -> dict[str, Any]:
    """As the run saved it; before that, as it was submitted."""
    for name in (SAVED, SUBMITTED):
        with contextlib.suppress(FileNotFoundError, ValueError):  # it is being written
            return _parsed(folder / name, _stamp(f"{folder}/{name}"))
    return {}


@lru_cache(maxsize=64)
def _parsed(file: Path, stamp: tuple[int, int]) -> dict[str, Any]:
    """Not to be changed. `stamp`: tells a file that was written anew."""
    return json.loads(file.read_text())


def _created(folder: Path) -> float:
    """When it was submitted, or else began. Not by its place in the queue, which is another one once it is resumed."""
    known = [float(event["time"]) for event in events(folder)[:1] if "time" in event]
    with contextlib.suppress(FileNotFoundError):
        known.append((folder / SUBMITTED).stat().st_mtime)  # written once
    return min(known, default=folder.stat().st_ctime)


def _stamp(file: str) -> tuple[int, int]:
    try:
        found = os.stat(file)
        return found.st_size, found.st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return -1, 0
