"""Starting, continuing and ending runs. What was submitted is in the run's folder before its process is started.

submit ──► RUNS/ID/recipe.json ──► jobs ──► troupe run recipe.json --id ID ──► RUNS/ID/config.json, events.jsonl ...
resume ──────────────────────────► jobs ──► troupe resume RUNS/ID
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from orchestrator.api import NoAnswerInTime
from orchestrator.config.loading import SAVED, SUBMITTED, load_config
from orchestrator.config.schema import RunConfig
from orchestrator.console_copy import CONSOLE_FILE
from orchestrator.restarts import COMMAND
from orchestrator.service import run_contents
from orchestrator.service.errors import Problem
from orchestrator.service.jobs import Jobs, JobState
from orchestrator.service.run_folders import RunFolders, write_submitted

END_TIMEOUT_S, POLL_S = 30.0, 0.2
KILL_AFTER_S = 30.0  # beyond a run's own `checkpoint.grace_s`


class Submissions:
    """`local`: runs are one process each, without Ray."""

    def __init__(self, runs: RunFolders, jobs: Jobs, *, local: bool) -> None:
        self._runs, self._jobs, self._flags = runs, jobs, ["--local"] if local else []
        self._one = threading.Lock()  # of two submissions of one name the second must see the first

    def submit(self, name: str | None, config: RunConfig) -> tuple[str, bool]:
        """(id, whether it is new). The same under the same name is the same run; one whose job could not be started is
        started now. Raises Problem 409 if another run has the name, 502 or 503 if no job could be started."""
        run = name or f"{config.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder, recipe = self._runs.root / run, config.model_dump_json(indent=2)
        with self._one:
            new = self._reserve(folder, recipe)
            if new or not self._was_started(run, folder):
                write_submitted(folder)
                try:
                    self._start(run, folder, ["run", str(folder / SUBMITTED), "--id", run], config)
                except BaseException:
                    if new:
                        shutil.rmtree(folder)
                    raise
        return run, new

    def resume(self, run: str, overrides: Sequence[str]) -> None:
        """Raises Problem 409 for a run that is in progress, or has no checkpoint."""
        folder = self._runs.folder(run)
        with self._one:
            state = self._runs.summary(run).state
            if not state.over:
                raise Problem(409, f"run {run} is {state}; only one that has ended can be resumed")
            if not run_contents.checkpoints(folder):
                raise Problem(409, f"run {run} has no checkpoint to go on from; submit it again under another name")
            self._await_end(run, folder)
            write_submitted(folder)
            self._start(run, folder, ["resume", str(folder), *overrides], load_config(folder / SAVED))

    def stop(self, run: str, *, now: bool, wait_s: float) -> None:
        """End a run after its step and a checkpoint; `now`: by a signal, within its `checkpoint.grace_s`. Returns when
        it has ended, or after `wait_s`. One that has ended is left as it is."""
        handle, folder = self._runs.handle(run), self._runs.folder(run)
        if now or not handle.reachable:
            job = self._jobs.states({run: folder}).get(run)
            if job in (JobState.PENDING, JobState.RUNNING):
                self._jobs.kill(run, folder)
            elif handle.running:
                raise Problem(409, f"run {run} is not a job of this service: end it where it was started")
            deadline = time.monotonic() + wait_s
            while not self._runs.summary(run).state.over and time.monotonic() < deadline:
                time.sleep(POLL_S)
            return
        try:
            handle.stop(timeout_s=wait_s)
        except NoAnswerInTime:
            return  # the answer says how it stands

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

    def _await_end(self, run: str, folder: Path) -> None:
        """A driver that has given its run back still has to end."""
        deadline = time.monotonic() + END_TIMEOUT_S
        while self._jobs.states({run: folder}).get(run) in (JobState.PENDING, JobState.RUNNING):
            if time.monotonic() > deadline:
                raise Problem(409, f"the process of run {run} has not ended for {END_TIMEOUT_S:g} s")
            time.sleep(POLL_S)

    def _was_started(self, run: str, folder: Path) -> bool:
        return (folder / SAVED).exists() or run in self._jobs.states({run: folder})

    def _start(self, run: str, folder: Path, command: Sequence[str], config: RunConfig) -> None:
        log = ["--log", str(folder / CONSOLE_FILE)]
        whole = [*COMMAND, *command, *log, *self._flags]
        self._jobs.submit(run, folder, whole, stop_wait_s=config.checkpoint.grace_s + KILL_AFTER_S)
