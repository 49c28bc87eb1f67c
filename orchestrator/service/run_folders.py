"""The runs in a folder: which there are, and how each stands. Nothing is kept but what a look at the disk confirms.

A run's id is the name of its folder. An id that is none (with a separator, say) is refused before the disk is asked,
and what lies there counts only if it is a folder of its own, not a link to one elsewhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from orchestrator.api import RunHandle, Status
from orchestrator.cluster.control import EVENTS_FILE, RUN_FILE
from orchestrator.cluster.run_lock import LOCK
from orchestrator.config.loading import SAVED
from orchestrator.json_lines import LineReader
from orchestrator.reporting.metrics import METRICS_FILE
from orchestrator.service.errors import Problem
from orchestrator.service.schemas import RunDetail, RunSummary

ID = re.compile(r"\w[\w.+-]{0,139}")
WATCHED = (EVENTS_FILE, METRICS_FILE, LOCK, RUN_FILE, SAVED)  # a run that is over stands as they say

Seen = tuple[tuple[int, int], ...]  # size and time of each of them


class RunFolders:
    """The runs below one folder. Its calls read files: not for an event loop."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._over: dict[str, tuple[Seen, RunSummary]] = {}

    def folder(self, run: str) -> Path:
        """Raises Problem 404 if there is no such run."""
        folder = self.root / run
        if ID.fullmatch(run) and not folder.is_symlink() and (folder / SAVED).is_file():
            return folder
        raise Problem(404, f"there is no run {run[:200]!r}")

    def handle(self, run: str) -> RunHandle:
        return RunHandle(self.folder(run), None)

    def summaries(self) -> list[RunSummary]:
        """Of all runs, the newest first."""
        if not self.root.is_dir():
            return []
        names = [entry.name for entry in self.root.iterdir() if ID.fullmatch(entry.name) and not entry.is_symlink()]
        found = [self.summary(name) for name in names if (self.root / name / SAVED).is_file()]
        return sorted(found, key=lambda summary: summary.created, reverse=True)

    def summary(self, run: str) -> RunSummary:
        folder = self.folder(run)
        seen = tuple(_stamp(folder / name) for name in WATCHED)
        known = self._over.get(run)
        if known is not None and known[0] == seen:
            return known[1]
        summary = _summary(folder, self.handle(run).status())
        if summary.state.over:
            self._over[run] = seen, summary
        return summary

    def detail(self, run: str) -> RunDetail:
        folder = self.folder(run)
        status = RunHandle(folder, None).status()
        return RunDetail(
            **_summary(folder, status).model_dump(),
            workers={role: dict(count) for role, count in status.workers.items()},  # pyright: ignore[reportArgumentType]
            members={role: [dict(member) for member in members] for role, members in status.members.items()},
            metrics=dict(status.metrics),
            config=_config(folder),
        )


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
    try:
        return json.loads((folder / SAVED).read_text())
    except ValueError:  # it is being written
        return {}


def _created(folder: Path) -> float:
    first = next(iter(LineReader(folder / EVENTS_FILE).new()), {})
    return float(first.get("time", (folder / SAVED).stat().st_mtime))


def _stamp(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
        return found.st_size, found.st_mtime_ns
    except FileNotFoundError:
        return -1, 0
