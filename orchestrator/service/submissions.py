"""Submitting, continuing and ending runs. What was submitted is in the run's folder before anything is started.

submit ──► RUNS/ID/recipe.json, queue.json ──► the queue ──► troupe run recipe.json --id ID ──► RUNS/ID/config.json ...
resume ──► RUNS/ID/queue.json ───────────────► the queue ──► troupe resume RUNS/ID

Each ends with a look at the queue, so that a run for which there is room has been started when it returns.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.config.loading import SAVED, SUBMITTED, resumable_config
from orchestrator.config.schema import RunConfig
from orchestrator.queueing import entry as entries
from orchestrator.queueing.entry import Entry, Stage
from orchestrator.run_handle import NoAnswerInTime
from orchestrator.service import run_contents
from orchestrator.service.errors import Problem
from orchestrator.service.jobs import Jobs, JobState
from orchestrator.service.needs import bundles_of
from orchestrator.service.recipes import resumed_config
from orchestrator.service.run_folders import RunFolders
from orchestrator.service.run_queue import RunQueue
from orchestrator.status import has_saved

END_TIMEOUT_S, POLL_S = 30.0, 0.2

log = logging.getLogger(__name__)


class Submissions:
    def __init__(self, runs: RunFolders, jobs: Jobs, queue: RunQueue) -> None:
        self._runs, self._jobs, self._queue = runs, jobs, queue
        self._one = threading.Lock()  # of two submissions of one name the second must see the first
        self._sole: set[str] = set()  # new runs whose submission goes on, and that no second client has submitted

    def submit(self, name: str | None, config: RunConfig, priority: int = 0) -> tuple[str, bool]:
        """(id, whether it is new). The same under the same name is the same run, whatever its priority. Raises Problem
        409 if another run has the name, 422 if it is refused, 502 or 503 if no job could be started: then no run is
        left. One that a second client has submitted meanwhile is left, and waits to be started."""
        run = name or f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder, recipe = self._runs.root / run, config.model_dump_json(indent=2)
        entry = Entry(priority, time.time(), bundles_of(config))
        with self._one:
            new = self._reserve(folder, recipe)
            (self._sole.add if new else self._sole.discard)(run)
            if entries.read(folder) is None:
                entries.write(folder, entry)
        problem = self._looked(run)
        with self._one:
            alone = new and run in self._sole
            self._sole.discard(run)
            if problem is not None and alone and self._gave_up(folder):
                _remove(folder)
                raise problem
        return run, new

    def resume(self, run: str, overrides: Sequence[str]) -> int:
        """Let a run that has ended go on from its newest checkpoint; from the start if it never saved one. Returns the
        step. Raises Problem 409 for a run that is not over, or whose checkpoints are gone; 502 or 503 if no job could
        be started: then it is as it was."""
        folder = self._runs.folder(run)
        with self._one:
            state = self._runs.summary(run).state
            if not state.over:
                raise Problem(409, f"run {run} is {state}; only one that has ended can be resumed")
            saved = run_contents.checkpoints(folder)
            if not saved and has_saved(folder):
                raise Problem(409, f"run {run} has saved checkpoints, and none of them is left whole to go on from")
            self._await_end(run, folder)
            before = entries.read(folder)
            known = before or Entry(0, 0.0, ())
            wanted = (*_pending_overrides(known), *overrides)
            bundles = bundles_of(resumed_config(resumable_config(folder), wanted))
            # With the whole budget of failures, and the priority that it had.
            entries.write(folder, Entry(known.priority, time.time(), bundles, overrides=wanted, resumed=True))
        if (problem := self._looked(run)) is not None and self._gave_up(folder):
            if before is not None:
                entries.write(folder, before)
            raise problem
        return saved[-1].step if saved else 0

    def stop(self, run: str, *, now: bool, wait_s: float) -> None:
        """End a run after its step and a checkpoint; `now`: by a signal, within its `checkpoint.grace_s`. Returns when
        it has ended, or after `wait_s`. One that has ended is left as it is; one that waits is taken from the queue."""
        handle, folder = self._runs.handle(run), self._runs.folder(run)
        entry = entries.change(folder, Entry.withdrawn) if not self._runs.summary(run).state.over else None
        if entry is not None and entry.stage is Stage.OVER:
            return
        if now or not handle.reachable:
            self._signal(run, folder, running=handle.running)
            deadline = time.monotonic() + wait_s
            while not self._runs.summary(run).state.over and time.monotonic() < deadline:
                self._looked(run)
                time.sleep(POLL_S)
            return
        try:
            handle.stop(timeout_s=wait_s)
        except NoAnswerInTime:
            return  # the answer says how it stands

    def prioritise(self, run: str, priority: int) -> None:
        """Change its place in the queue. Raises ConfigError for a run that no service was asked for."""
        self._runs.handle(run).prioritise(priority)
        self._looked(run)

    def _signal(self, run: str, folder: Path, *, running: bool) -> None:
        job = self._jobs.states({run: folder}).get(run)
        if job in (JobState.PENDING, JobState.RUNNING):
            self._jobs.kill(run, folder)
        elif running:
            raise Problem(409, f"run {run} is not a job of this service: end it where it was started")

    def _reserve(self, folder: Path, recipe: str) -> bool:
        """Whether the run is new. From then on its recipe is there, whole."""
        if folder.is_symlink() or ((folder / SAVED).exists() and not (folder / SUBMITTED).exists()):
            raise Problem(409, f"there is another run {folder.name}, which was not submitted here", "name")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = folder / f".recipe-{secrets.token_hex(4)}"
        temporary.write_text(recipe)
        try:
            os.link(temporary, folder / SUBMITTED)
            return True
        except FileExistsError:
            if (folder / SUBMITTED).read_text() != recipe:
                raise Problem(409, f"there is a run {folder.name} with another recipe", "name") from None
            return False
        finally:
            temporary.unlink()

    def _looked(self, run: str) -> Problem | None:
        """Why the run could not be started, if it was to be. A look that cannot be had now is made by the queue later:
        the run waits for it."""
        try:
            return self._queue.look().get(run)
        except Problem as problem:
            log.warning("%s", problem)
        except Exception:  # the run is in the queue: what a client asked for is done
            log.exception("the queue could not be looked at")
        return None

    def _gave_up(self, folder: Path) -> bool:
        """Take a run out of the queue whose job could not be started; False if it was started meanwhile."""

        def out(entry: Entry) -> Entry:
            return entry.over("its job could not be started") if entry.stage is Stage.WAITING else entry

        entry = entries.change(folder, out)
        return entry is not None and entry.stage is Stage.OVER

    def _await_end(self, run: str, folder: Path) -> None:
        """A driver that has given its run back still has to end."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while self._jobs.states({run: folder}).get(run) in (JobState.PENDING, JobState.RUNNING):
            if time.monotonic() > deadline:
                raise Problem(409, f"the process of run {run} has not ended for {END_TIMEOUT_S:g} s")
            time.sleep(POLL_S)


def _pending_overrides(entry: Entry) -> tuple[str, ...]:
    """Those of an earlier resumption that was stopped before it could show whether the run takes them. Others are in
    the run's configuration, if it has gone on with them, or it was refused or failed with them."""
    return entry.overrides if entry.stopped and not entry.failures else ()


def _remove(folder: Path) -> None:
    """A run that nobody has heard of. Its folder is no run's any more before it is emptied: the queue, and whoever
    lists the runs, may be reading it."""
    removed = folder.parent / f".removed-{secrets.token_hex(8)}"
    folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
