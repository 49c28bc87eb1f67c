"""The queue at work: looks at the runs every second, and does what `orchestrator/queueing` decides.

    a thread, every LOOK_S ──┐                     ┌─ followed: how has each process ended?      (progress.after)
    a submission, a stop ────┴─► look(): one at ───┼─ told: who makes room saves and ends        (control.ask)
                                 a time            └─ decided: who starts, who makes room, why not     (decide)

Between two looks nothing is remembered that matters: each reads the entries in the runs' folders. So a service that is
killed is replaced by one that goes on where it was. What fails in one run's handling is logged, and the others go on.
Every call that a look makes has a deadline; a look that does not begin in time is a Problem for who wanted it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.cluster import control
from orchestrator.cluster.control import EVENTS_FILE
from orchestrator.cluster.run_lock import release
from orchestrator.config.loading import SAVED, SUBMITTED
from orchestrator.config.schema import CheckpointConfig
from orchestrator.console_copy import CONSOLE_FILE
from orchestrator.queueing import entry as entries
from orchestrator.queueing.decisions import Waiting, decide
from orchestrator.queueing.entry import ENTRY_FILE, Entry, Stage
from orchestrator.queueing.progress import after
from orchestrator.restarts import COMMAND
from orchestrator.run_handle import RunHandle
from orchestrator.service import observation
from orchestrator.service.errors import Problem
from orchestrator.service.jobs import AnswerLost, Jobs, JobState
from orchestrator.service.room import active_runs, bundles_to_place, room_of
from orchestrator.service.settings import Settings
from orchestrator.status import said_since

LOOK_S = 1.0
TURN_TIMEOUT_S = 100.0  # until another look has ended
MAKE_ROOM_TIMEOUT_S = 600.0  # for the step of a run that is preempted, and its checkpoint; then it gets a signal
START_AGAIN_S = 5.0  # after a job that could not be started
KILL_AFTER_S = 30.0  # beyond a run's own `checkpoint.grace_s`

log = logging.getLogger(__name__)


class RunQueue:
    """The queue of the runs below one folder. Its calls block: not for an event loop."""

    def __init__(self, root: Path, jobs: Jobs, settings: Settings) -> None:
        self._root, self._jobs, self._settings = root.resolve(), jobs, settings
        self._flags = ["--local"] if settings.local else []
        self._turn = threading.Lock()
        self._told: set[tuple[str, float, str]] = set()  # what a process was told: once is enough, twice does no harm
        self._silent = False  # nobody answers how the jobs stand
        self._over: dict[str, int] = {}  # run -> when its entry, which is over, was written

    def look(self) -> Mapping[str, Problem]:
        """Look at all runs and do what is to be done. Returns the runs that were to be started and could not be. Raises
        Problem 503 if other looks take too long."""
        if not self._root.is_dir():  # nothing was submitted yet
            return {}
        with self._one_at_a_time():
            found = self._entries()
            states = self._states(found)
            for run, entry in found.items():
                with self._logged(run):
                    found[run] = self._followed(run, entry, states)
                    self._tell(run, found[run])
            open_ones = {run: entry for run, entry in found.items() if entry.stage is not Stage.OVER}
            try:
                return self._decided(open_ones)
            except Exception as error:  # who waits must see why
                log.exception("the queue could not decide")
                words = f"waits: the queue failed with {type(error).__name__}: {error}; the service's log says where"
                for run in open_ones:
                    self._says(run, words)
                return {}

    @contextmanager
    def _one_at_a_time(self) -> Generator[None]:
        """A lock that one process holds at a time, of all that serve this folder."""
        deadline = time.monotonic() + TURN_TIMEOUT_S
        if not self._turn.acquire(timeout=TURN_TIMEOUT_S):
            raise Problem(503, f"the queue has been at work for {TURN_TIMEOUT_S:g} s; what was asked still holds")
        try:
            folder = os.open(self._root, os.O_RDONLY)
            try:
                _locked(folder, deadline)
                yield
            finally:
                os.close(folder)
        finally:
            self._turn.release()

    def _entries(self) -> dict[str, Entry]:
        """Of the runs that are not over."""
        found: dict[str, Entry] = {}
        for file in self._root.glob(f"*/{ENTRY_FILE}"):
            run = file.parent.name
            with contextlib.suppress(FileNotFoundError):
                written = file.stat().st_mtime_ns
                if self._over.get(run) == written or file.parent.is_symlink():
                    continue
                entry = entries.read(file.parent)
                if entry is not None and entry.stage is Stage.OVER:
                    self._over[run] = written
                elif entry is not None:
                    found[run] = entry
        return found

    def _states(self, found: Mapping[str, Entry]) -> Mapping[str, JobState | None]:
        """Of the runs that no process here drives: how the job stands, None if there is none. Those that were not asked
        about, or nobody answers for, are left out."""
        asked = {run: self._root / run for run, entry in found.items() if entry.active}
        asked = {run: folder for run, folder in asked.items() if not observation.is_driven_here(folder)}
        try:
            states = self._jobs.states(asked) if asked else {}
            self._silent = False
            return {run: states.get(run) for run in asked}
        except Problem as problem:
            if not self._silent:  # once, not every second
                log.warning("how the jobs stand cannot be asked: %s", problem)
            self._silent = True
            return {}

    def _followed(self, run: str, entry: Entry, states: Mapping[str, JobState | None]) -> Entry:
        if not entry.active:
            return entry
        # One whose driver has ended since `_states` was not asked about: the next look does that.
        found = observation.seen(self._root / run, entry, states.get(run), answers=run in states)

        def followed(now: Entry) -> Entry:  # somebody may have asked for its end since
            return after(now, found, self._settings.budget, time.time()) if now.started == entry.started else now

        changed = entries.change(self._root / run, followed) or entry
        if not changed.active:
            release(self._root / run)
        return changed

    def _tell(self, run: str, entry: Entry) -> None:
        """A run that is to end, or to make room, is told so once it can be reached."""
        if entry.stage not in (Stage.PREEMPTING, Stage.STOPPING):
            return
        folder, said = self._root / run, said_since(self._root / run, entry)
        if observation.ended_as(said):
            return
        handle = RunHandle(folder, None)
        late = entry.stage is Stage.PREEMPTING and time.time() > entry.asked + MAKE_ROOM_TIMEOUT_S
        if late or (entry.stage is Stage.STOPPING and not handle.reachable):
            self._once(run, entry, "signal", lambda: self._jobs.kill(run, folder))
        elif not handle.reachable:
            return
        elif entry.stage is Stage.STOPPING or _has_saved(said, _ticket(entry)):
            self._once(run, entry, "stop", lambda: control.ask(folder, "stop"))
        else:  # held before its next step, so that no step is lost between the checkpoint and the end
            self._once(run, entry, "pause", lambda: control.ask(folder, "pause", True, _ticket(entry)))
            self._once(run, entry, "save", lambda: control.ask(folder, "checkpoint", f"{_ticket(entry)}-saved"))

    def _once(self, run: str, entry: Entry, what: str, tell: Callable[[], Any]) -> None:
        key = (run, entry.started, what)
        if key not in self._told:
            tell()
            self._told.add(key)

    def _decided(self, found: Mapping[str, Entry]) -> dict[str, Problem]:
        waiting = {run: entry for run, entry in found.items() if entry.stage is Stage.WAITING}
        waiting = {  # without those that somebody has continued by hand
            run: entry for run, entry in waiting.items() if not observation.is_driven_here(self._root / run)
        }
        if not waiting:
            return {}
        settings = self._settings
        try:
            reserved = None if settings.autoscaling else self._jobs.reserved()
        except Problem as problem:
            for run in waiting:
                self._says(run, f"waits for Ray: {problem}")
            return dict.fromkeys(waiting, problem)
        active = active_runs(self._root, found, reserved, at_once=settings.at_once)
        wanted = {run: bundles_to_place(entry, reserved, settings.at_once) for run, entry in waiting.items()}
        room = room_of(reserved, active, at_once=settings.at_once)
        asking = [_waiting(run, entry, wanted[run]) for run, entry in waiting.items()]
        decision = decide(asking, active, room, time.time(), preempt=settings.preempt)
        for run, reason in decision.reasons.items():
            failures = waiting[run].failures
            counted = f" (failures: {failures} of {settings.budget.failures})" if failures else ""
            self._says(run, reason if "failures: " in reason else f"{reason}{counted}")
        for run, other in decision.preempt.items():
            with self._logged(run):
                self._preempt(run, other, found[other].priority)
        problems = {run: self._start(run) for run in decision.start}
        return {run: problem for run, problem in problems.items() if problem is not None}

    def _says(self, run: str, reason: str) -> None:
        def said(entry: Entry) -> Entry:
            return replace(entry, reason=reason) if entry.stage is Stage.WAITING else entry

        with self._logged(run):
            entries.change(self._root / run, said)

    def _preempt(self, run: str, other: str, priority: int) -> None:
        reason = f"saves a checkpoint and ends, to make room for run {other}, which has priority {priority}"

        def preempted(entry: Entry) -> Entry:
            if entry.stage is not Stage.STARTED:
                return entry
            return replace(entry, stage=Stage.PREEMPTING, asked=time.time(), reason=reason)

        changed = entries.change(self._root / run, preempted)
        if changed is not None:
            self._tell(run, changed)

    def _start(self, run: str) -> Problem | None:
        """Why it could not be started, if so."""
        folder = self._root / run
        try:
            self._jobs.clear(run, folder)
        except Exception as error:
            return self._not_started(run, folder, error)
        try:
            # First on the disk: if this process is killed here, the next one finds that no job was started, and no
            # earlier one either, whose end it would take for the end of this one.
            entry = entries.change(folder, _started(folder))
            if entry is None or entry.stage is not Stage.STARTED:
                return None
            self._jobs.submit(run, folder, self._command(run, folder, entry), stop_wait_s=_stop_wait_s(folder))
        except AnswerLost as problem:  # it stays STARTED: the next look finds its job, or that there is none
            log.warning("whether run %s was started is not known yet: %s", run, problem)
        except Exception as error:
            return self._not_started(run, folder, error)
        return None

    def _not_started(self, run: str, folder: Path, error: Exception) -> Problem | None:
        """It is tried again. None if its job is there all the same: one that was made although the answer was an error,
        now or at an earlier start."""
        failed = error
        if not isinstance(failed, Problem):  # the disk, or a recipe that was changed by hand
            log.error("run %s could not be started", run, exc_info=error)
            failed = Problem(500, f"{type(error).__name__}: {error}")
        is_there = failed.status in (409, 502) and self._has_job(run, folder)

        def waits(entry: Entry) -> Entry:
            if entry.stage not in (Stage.WAITING, Stage.STARTED):
                return entry.withdrawn()
            if is_there and entry.started:  # if this run was never started, the job is somebody else's
                return replace(entry, stage=Stage.STARTED, reason="", preempted=False)
            until, reason = time.time() + START_AGAIN_S, f"cannot be started, and is tried again: {failed}"
            return replace(entry, stage=Stage.WAITING, not_before=until, reason=reason)

        entry = entries.change(folder, waits)
        return None if entry is not None and entry.stage is Stage.STARTED else failed

    def _has_job(self, run: str, folder: Path) -> bool:
        with contextlib.suppress(Problem):
            return self._jobs.states({run: folder}).get(run) in (JobState.PENDING, JobState.RUNNING)
        return False

    def _command(self, run: str, folder: Path, entry: Entry) -> list[str]:
        if (folder / SAVED).exists() or entry.resumed:
            command = ["resume", str(folder), *entry.overrides]
        else:
            command = ["run", str(folder / SUBMITTED), "--id", run]
        return [*COMMAND, *command, "--log", str(folder / CONSOLE_FILE), *self._flags]

    @contextmanager
    def _logged(self, run: str) -> Generator[None]:
        """What fails for one run must not stop the others."""
        try:
            yield
        except Exception:
            log.exception("run %s could not be looked after", run)


@contextmanager
def looking(queue: RunQueue, every_s: float = LOOK_S) -> Generator[None]:
    """In this block a thread looks at the runs again and again. It is a daemon: a look that waits for a Ray that does
    not answer does not hold up the end of the service."""
    ended = threading.Event()

    def looks() -> None:
        while not ended.is_set():
            try:
                queue.look()
            except Exception:
                log.exception("the queue could not be looked at")
            ended.wait(every_s)

    threading.Thread(target=looks, name="queue", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _started(folder: Path) -> Callable[[Entry], Entry]:
    """What an entry that waits becomes when a process is to be started: what that will write is behind what is there
    now."""
    events, console = _size(folder / EVENTS_FILE), _size(folder / CONSOLE_FILE)

    def started(entry: Entry) -> Entry:
        if entry.stage is not Stage.WAITING:
            return entry
        told = {"stage": Stage.STARTED, "started": time.time(), "reason": "", "preempted": False}
        return replace(entry, **told, events_from=events, console_from=console)

    return started


def _waiting(run: str, entry: Entry, bundles: Any) -> Waiting:
    return Waiting(run, entry.priority, entry.submitted, bundles, entry.not_before, entry.reason)


def _ticket(entry: Entry) -> str:
    return f"preempt-{entry.asked:.3f}"


def _has_saved(events: list[dict[str, Any]], ticket: str) -> bool:
    """Whether the checkpoint is written, or the run is held before its first step: there is nothing to save then."""
    held = [event for event in events if event.get("event") == "paused" and ticket in event.get("asked", ())]
    saved = any(f"{ticket}-saved" in event.get("asked", ()) for event in events)
    return saved or bool(held and held[-1].get("step") == 0)


def _stop_wait_s(folder: Path) -> float:
    """What a signal leaves the run before it is killed."""
    file = folder / SAVED if (folder / SAVED).exists() else folder / SUBMITTED
    saved = json.loads(file.read_text()).get("checkpoint", {})  # without it in a file that another version wrote
    return CheckpointConfig.model_validate(saved).grace_s + KILL_AFTER_S


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _locked(descriptor: int, deadline: float) -> None:
    """Raises Problem 503 at the deadline. A file system without such locks has none: one service for such a folder."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise Problem(503, "another service of this folder has been at work for too long") from None
            time.sleep(0.05)
        except OSError:
            return
