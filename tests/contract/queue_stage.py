"""A queue over folders that a test writes, and jobs that live and die as it says."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.planning.bundles import Bundle, Node
from orchestrator.queueing import entry as entries
from orchestrator.queueing.entry import Entry
from orchestrator.queueing.progress import Budget
from orchestrator.service.errors import Problem
from orchestrator.service.jobs import Held, Jobs, JobState, Reserved
from orchestrator.service.run_folders import RunFolders
from orchestrator.service.run_queue import RunQueue
from orchestrator.service.schemas import RunSummary
from orchestrator.service.settings import Settings
from tests.service_client import add_events, write_run


class ScriptedJobs(Jobs):
    """Jobs that live and die as a test says, on a cluster of one node with 8 CPUs."""

    def __init__(self) -> None:
        self.commands: list[tuple[str, Sequence[str]]] = []
        self.known: dict[str, JobState] = {}
        self.killed: list[str] = []
        self.broken: set[str] = set()
        self.answers = True

    def clear(self, run: str, folder: Path) -> None:
        state = self.known.get(run)
        if state is not None and not state.over:
            raise Problem(409, f"run {run} has a job, which is {state}")
        self.known.pop(run, None)

    def submit(self, run: str, folder: Path, command: Sequence[str], *, stop_wait_s: float) -> None:
        if run in self.broken:
            raise RuntimeError("a bug")
        self.commands.append((run, command))
        self.known[run] = JobState.RUNNING

    def states(self, folders: Mapping[str, Path]) -> dict[str, JobState]:
        self._refuse()
        return {run: state for run, state in self.known.items() if run in folders}

    def reserved(self) -> Reserved:
        """Nobody has reserved anything, but for who runs and has said so."""
        self._refuse()
        held = [Held(run, "a", {"CPU": 4.0}) for run, state in self.known.items() if state is JobState.RUNNING]
        return Reserved((Node("a", {"CPU": 8.0}),), tuple(held))

    def kill(self, run: str, folder: Path) -> None:
        self.killed.append(run)

    def ready(self) -> None:
        return

    def _refuse(self) -> None:
        if not self.answers:
            raise Problem(503, "Ray's Job API does not answer")

    @property
    def started(self) -> list[str]:
        return [run for run, _ in self.commands]


class Watched:
    """A queue over folders that a test writes, and the jobs that it starts."""

    def __init__(self, root: Path, jobs: Any = None, **settings: Any) -> None:
        self.root, self.jobs = root, ScriptedJobs() if jobs is None else jobs
        self.settings = Settings(root, token=None, budget=Budget(3, 0.0), **settings)
        self.queue = RunQueue(root, self.jobs, self.settings)

    def add(self, run: str, priority: int = 0, *, submitted: float = 0.0, cpus: float = 4.0) -> Path:
        folder = write_run(self.root, run)
        (folder / "config.json").write_text(json.dumps({"checkpoint": {"grace_s": 15}, "phases": {}}))
        entries.write(folder, Entry(priority, submitted, (Bundle(("policy",), {"CPU": cpus}),)))
        return folder

    def runs(self, run: str) -> None:
        """It has reserved what it is to have."""
        add_events(self.root / run, {"event": "reserved"})

    def dies(self, run: str, *console: str, state: JobState | None = JobState.ENDED) -> Entry:
        with (self.root / run / "console.log").open("a") as stream:
            stream.write("".join(f"{line}\n" for line in console))
        if state is None:
            del self.jobs.known[run]
        else:
            self.jobs.known[run] = state
        self.queue.look()
        return self.entry(run)

    def entry(self, run: str) -> Entry:
        found = entries.read(self.root / run)
        assert found is not None
        return found

    def summary(self, run: str) -> RunSummary:
        return RunFolders(self.root).summary(run)
