"""`RunHandle`: one run, followed and controlled from outside through its folder, whoever started it.

events(), metrics() ◄───────────── RUN/events.jsonl, metrics.jsonl ◄── the run's driver
scale, pause, checkpoint, stop ──► RUN/requests ──► the run's driver, between two steps
"""

from __future__ import annotations

import contextlib
import platform
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from actors.errors import ConfigError, Interrupted, NotDone, RunError
from orchestrator.cluster import control
from orchestrator.cluster.run_lock import Driver, driver_of
from orchestrator.config.loading import SAVED, SUBMITTED
from orchestrator.console_copy import CONSOLE_FILE
from orchestrator.json_lines import LineReader, last_lines
from orchestrator.queueing import entry as entries
from orchestrator.queueing.entry import Entry, Stage
from orchestrator.reporting.metrics import METRICS_FILE
from orchestrator.result import RunResult
from orchestrator.status import State, Status, failure_of, has_ended, in_one_line, last_words, queue_says

ANSWER_TIMEOUT_S = 600.0  # until a run is between two steps
END_TIMEOUT_S = 24 * 3600.0
SILENCE_S = 3600.0
POLL_S = 0.1

T = TypeVar("T")


class NoAnswerInTime(NotDone):
    """A deadline passed before a run did what was asked; the request itself stands."""


@dataclass(frozen=True)
class Request:
    """What was asked of a driver. `file`: gone once a driver has taken it, or forgotten what was asked of one before
    it."""

    file: Path
    driver: Driver


class RunHandle:
    """One run, seen from outside. Every wait has a deadline, and ends early if the run does."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes] | None) -> None:
        self.folder = folder.resolve()
        self._process = process  # None: not a child of this process

    def __repr__(self) -> str:
        return f"RunHandle({str(self.folder)!r})"

    @property
    def running(self) -> bool:
        """Whether the process that drives the run lives."""
        if self._process is not None:
            return self._process.poll() is None
        driver = driver_of(self.folder)
        return driver is not None and driver.may_live

    @property
    def over(self) -> bool:
        """Whether no process drives the run any more, and no service will start one by itself."""
        return not self.running and self._state()[0].over

    def events(self, *, timeout_s: float = SILENCE_S) -> Iterator[dict[str, Any]]:
        """The lines of the run's `events.jsonl`, from the first, each as soon as it is there, until the run ends.
        Raises RunError if nothing comes for `timeout_s`."""
        return self._follow(self.folder / control.EVENTS_FILE, timeout_s)

    def metrics(self, *, timeout_s: float = SILENCE_S) -> Iterator[dict[str, Any]]:
        """The same of `metrics.jsonl`: one mapping for each logged step and evaluation, with `step` and `phase`. If the
        run is resumed from an earlier step meanwhile, the steps after that one are computed again, and their lines come
        once more; they replace those that came before."""
        return self._follow(self.folder / METRICS_FILE, timeout_s)

    def status(self) -> Status:
        """State, step, workers and last metrics. Answers within seconds in any state of the run."""
        last: dict[str, Any] = {}
        for line in last_lines(self.folder / METRICS_FILE):  # training and evaluation have one each for the same step
            last = {**last, **line} if line["step"] == last.get("step") else line
        kind, state, put_up = self._state()
        roles = put_up.roles
        workers = {role: {"desired": seen["desired"], "serving": seen["serving"]} for role, seen in roles.items()}
        members = {role: seen["members"] for role, seen in roles.items()}
        autoscale = {role: seen["autoscale"] for role, seen in roles.items() if "autoscale" in seen}
        step, now = int(last.get("step", 0)), (put_up.phase, put_up.at_work, put_up.waits)
        return Status(kind, state, step, workers, members, last, *now, put_up.ranks, autoscale)

    def pipelines(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """For each phase its stages in order (`orchestrator.activity.drawn`); empty until the run has read its data."""
        said = (event for event in reversed(control.events(self.folder)) if event["event"] == "prepared")
        return next(said, {}).get("pipelines", {})

    def _state(self) -> tuple[State, str, control.Standing]:
        """(state, in words, what its driver says)."""
        entry = entries.read(self.folder)
        if entry is not None and entry.stage is Stage.PREEMPTING and not has_ended(self.folder, entry, "finished"):
            return State.PREEMPTED, entry.reason, control.Standing()
        if not self.running or self._has_released_run():
            if entry is None and not (self.folder / SAVED).exists() and (self.folder / SUBMITTED).exists():
                return State.QUEUED, "was submitted a moment ago", control.Standing()
            said = queue_says(self.folder, entry) if entry is not None else None
            return *(said or self._last_word()), control.Standing()
        if not self.reachable:
            return State.STARTING, "starting", control.Standing()
        state = State.PAUSED if self._pausing()["event"] == "paused" else State.RUNNING
        try:
            return state, state.value, control.status(self.folder)
        except control.Silent as silent:
            return State.SILENT, f"not answering: {silent}", control.Standing()

    def _last_word(self) -> tuple[State, str]:
        """How a run that is not running says that it ended."""
        ended = self._last("finished", "interrupted")
        if ended is None:
            return State.FAILED, self._why_it_failed()
        if ended["event"] == "finished":
            return State.FINISHED, "finished"
        return State.STOPPED, f"stopped by {ended['signal']}; `troupe resume {self.folder}` continues it"

    def _why_it_failed(self) -> str:
        """Why a run has ended that has not said that it finished or was stopped."""
        if said := self._last("failed"):
            return f"failed: {in_one_line(said['error'].splitlines())}"
        if words := last_words(self.folder):
            return f"failed: {words}"
        started = (self.folder / control.RUN_FILE).exists()
        return "was killed, or its machine was lost" if started else "ended before its roles were started"

    def scale(self, role: str, count: control.Workers, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Ask for `count` workers of an elastic role; they start and end while the run trains. A role with `autoscale`
        keeps that number until "auto" is asked for. Returns once the run has taken the request. Raises UserError for a
        role whose number of workers is fixed, for "auto" without `autoscale`, and for a run with `local`; RunError if
        the process that drives the run ends first."""
        self._await_taken(self._ask(timeout_s, "scale", role, count), timeout_s)

    def prioritise(self, priority: int) -> None:
        """Change the place in the queue of a run that was submitted to a service. Raises ConfigError for another."""
        if entries.change(self.folder, lambda entry: replace(entry, priority=priority)) is None:
            raise ConfigError(f"run {self.folder.name} was not submitted to a service: it is in no queue")

    def attach(self, address: str, token: str, *, role: str | None = None, timeout_s: float = ANSWER_TIMEOUT_S) -> str:
        """Let an engine that `troupe engine` started elsewhere join the run. `address`: HOST:PORT; `token`: the one
        that the engine was started with; `role`: an engine role, None for the only one. Returns the role once the
        engine has joined, with the run's weights. Raises UserError if the run takes in no engine, NotDone with the
        reason if this one did not join."""
        deadline = time.monotonic() + timeout_s
        answer = self._engine("attach", address, role, timeout_s, token)

        def settled() -> dict[str, Any] | None:
            of_it = {"role": answer["role"], "worker": answer["worker"]}.items()
            return next((each for each in self._now("joined", "evicted", "stopped") if of_it <= each.items()), None)

        found = self._await(settled, deadline - time.monotonic(), f"the engine at {address} to join")
        if found["event"] != "joined":
            raise NotDone(f"the engine at {address} did not join {answer['role']}: {found['why']}")
        return answer["role"]

    def detach(self, address: str, *, role: str | None = None, timeout_s: float = ANSWER_TIMEOUT_S) -> str:
        """Detach the engine that was attached by that address, once it has finished its requests. Returns the role once
        the run has taken the request. Raises NotDone if there is no such engine."""
        return self._engine("detach", address, role, timeout_s)["role"]

    def refuse(
        self,
        scale: Mapping[str, control.Workers],
        attach: Sequence[tuple[str, str, str | None]],
        detach: Sequence[str],
    ) -> None:
        """Raises what `scale`, `attach` (address, token, role) and `detach` would, and asks for nothing."""
        for role, count in scale.items():
            control.refuse(self.folder, "scale", role, count)
        for address, token, role in attach:
            control.refuse(self.folder, "attach", self._engine_role(role), control.address_of(address), token)
        for address in detach:
            control.refuse(self.folder, "detach", self._engine_role(None), control.address_of(address))

    def _engine(self, method: str, address: str, role: str | None, timeout_s: float, *token: str) -> dict[str, Any]:
        """The event that answers: it has the role, and the number of the worker. Raises NotDone if the run says no."""
        self._await(lambda: self.reachable, timeout_s, "the run to start")
        named, ticket = self._engine_role(role), uuid.uuid4().hex
        request = self._ask(timeout_s, method, named, control.address_of(address), *token, ticket)
        answer = self._await(lambda: self._answer(ticket), timeout_s, "the run to take the request", request)
        if answer["event"] == "refused":
            raise NotDone(answer["why"])
        return answer

    def _engine_role(self, role: str | None) -> str:
        """The role that an engine joins or leaves if `role` is named."""
        attachable = control.RunFile.read(self.folder).attachable if role is None else (role,)
        if len(attachable) > 1:
            raise ConfigError(f"engines can be attached to several roles: {', '.join(attachable)}; name one")
        return attachable[0] if attachable else "any of its roles"

    def pause(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
        """Hold the run before its next step; its processes and their memory stay. Returns the number of steps that are
        done, once the run holds. Raises RunError if another client let it continue meanwhile."""
        return self._set_paused(True, timeout_s)

    def resume(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
        """Let a paused run continue. (`troupe.resume(folder)` continues a run that has ended.)"""
        return self._set_paused(False, timeout_s)

    def checkpoint(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Path:
        """Write a checkpoint between two steps, also while the run is paused, and return its folder. If the run
        finishes first, this is the checkpoint of its last step. Raises RunError for a run that is paused before its
        first step, because there is nothing to save."""
        ticket = uuid.uuid4().hex
        request = self._ask(timeout_s, "checkpoint", ticket)

        def written() -> Path | None:
            answer = self._answer(ticket)
            if answer is None and not self.running and self._last("finished"):
                answer = self._last("checkpoint")
            if answer is None and self._pausing() == {"event": "paused", "step": 0}:
                raise NotDone(f"run {self.folder.name} is paused before its first step: there is nothing to save yet")
            return Path(answer["path"]) if answer else None

        return self._await(written, timeout_s, "a checkpoint that was asked for", request)

    def stop(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Path | None:
        """End the run after its step and a checkpoint, within `checkpoint.grace_s`. Returns its newest checkpoint, from
        which `troupe.resume` continues, or None. A run that has ended, or is ending, is left alone; one that waits in a
        queue leaves it."""
        if not self.over:
            entries.change(self.folder, Entry.withdrawn)
        if self.running and not self._last("interrupted"):  # a second signal would end it at once
            if self._process is not None:
                self._process.terminate()
            else:
                try:
                    self._ask(timeout_s, "stop")
                except NotDone:
                    if self.running:
                        raise
        wait_for(lambda: self.over, timeout_s, f"run {self.folder.name} to stop")
        found = sorted((self.folder / "checkpoints").glob("step-*"))
        return found[-1] if found else None

    def result(self, *, timeout_s: float = END_TIMEOUT_S) -> RunResult:
        """Wait until the run has finished, and return what it leaves. If it ended otherwise, raises what ended it:
        Interrupted after a signal or `stop`, ConfigError if it was refused, else RunError with the last lines that it
        printed."""
        wait_for(lambda: self.over, timeout_s, f"run {self.folder.name} to end")
        ended = self._last("finished", "interrupted")
        if ended is not None and ended["event"] == "finished":
            return RunResult.from_json(self.folder, ended)
        if ended is not None:
            raise Interrupted(signal.Signals[ended["signal"]])
        entry = entries.read(self.folder)
        if entry is not None:
            state, words = queue_says(self.folder, entry) or self._last_word()
            raise Interrupted(signal.SIGTERM) if state is State.STOPPED else RunError(f"the run ended: {words}")
        if self._process is not None and self._process.poll() == -signal.SIGTERM:  # before it had a handler
            raise Interrupted(signal.SIGTERM)
        raise failure_of(self._process, self.folder / CONSOLE_FILE)

    def _set_paused(self, hold: bool, timeout_s: float) -> int:
        ticket = uuid.uuid4().hex
        request = self._ask(timeout_s, "pause", hold, ticket)
        what = "the run to pause" if hold else "the run to go on"
        answer = self._await(lambda: self._answer(ticket), timeout_s, what, request)
        if (answer["event"] == "paused") is not hold:
            other = "let it go on" if hold else "paused it"
            raise NotDone(f"another client {other} before run {self.folder.name} could answer")
        return answer["step"]

    def _answer(self, ticket: str) -> dict[str, Any] | None:
        """The event that answers a request."""
        return next((event for event in control.events(self.folder) if ticket in event.get("asked", ())), None)

    def _pausing(self) -> dict[str, Any]:
        """The last word about pausing: event and step."""
        last = self._last("paused", "unpaused") or {"event": "unpaused", "step": 0}
        return {"event": last["event"], "step": last["step"]}

    def _last(self, *kinds: str) -> dict[str, Any] | None:
        """The last event of these kinds, of the driver that drives the run now or did last."""
        return next(iter(self._now(*kinds)[-1:]), None)

    def _now(self, *kinds: str) -> list[dict[str, Any]]:
        """All events of these kinds, of that driver."""
        found: list[dict[str, Any]] = []
        for event in control.events(self.folder):
            if event["event"] == "prepared":
                found = []
            elif event["event"] in kinds:
                found.append(event)
        return found

    def _ask(self, timeout_s: float, method: str, *arguments: Any) -> Request:
        """Make a request of the run, once it can be reached: its roles may be starting. Raises RunError if it has
        ended, or does not come so far."""
        self._await(lambda: self.reachable, timeout_s, "the run to start")
        driver = control.RunFile.read(self.folder).driver
        return Request(control.ask(self.folder, method, *arguments), driver)

    def _await_taken(self, request: Request, timeout_s: float) -> None:
        """A file that is gone was taken only if its driver lives: the next one forgets what that was asked."""

        def taken() -> bool:
            return not request.file.exists() and self._is_driven_by(request.driver)

        self._await(taken, timeout_s, "the run to take the request", request)

    @property
    def reachable(self) -> bool:
        """Whether the driver that drives the run now has said how it is reached, and lives, as far as can be seen."""
        with contextlib.suppress(ConfigError):
            return self._is_driven_by(control.RunFile.read(self.folder).driver)
        return False

    def _is_driven_by(self, driver: Driver) -> bool:
        return driver_of(self.folder) == driver and driver.may_live

    def _is_own(self, driver: Driver) -> bool:
        """Whether it is the process of this handle, and lives: it takes a second to exit after its run."""
        own = self._process
        return own is not None and (driver.host, driver.pid) == (platform.node(), own.pid) and driver.may_live

    def _has_released_run(self) -> bool:
        """Whether the process of this handle has said how its run ended, and only has to exit."""
        with contextlib.suppress(ConfigError):
            free = driver_of(self.folder) is None and self._is_own(control.RunFile.read(self.folder).driver)
            return free and self._last("finished", "interrupted", "failed") is not None
        return False

    def _withdrawn(self, request: Request) -> NotDone:
        """Of a driver that has ended: the client is told that nothing holds, so nothing may."""
        request.file.unlink(missing_ok=True)
        return NotDone(
            f"the process that drove run {self.folder.name} ended before it did what was asked, which holds no more; "
            f"ask again once the run goes on. Now: {self._state()[1]}"
        )

    def _ended(self) -> NotDone:
        return NotDone(f"run {self.folder.name} has ended: {self._state()[1]}")

    def _await(self, found: Callable[[], T | None], timeout_s: float, what: str, request: Request | None = None) -> T:
        """The first true answer. Raises RunError if the run ends before it, or the driver of whom it was requested
        does, or after `timeout_s`."""

        def look() -> T | NotDone | None:
            exits = request is not None and self._is_own(request.driver)
            over = self.over  # before looking: what the run wrote last must be seen
            lost = request is not None and not self._is_driven_by(request.driver)
            if answer := found():
                return answer
            if over or (lost and self.over):  # it may have ended between the two looks
                return self._ended()
            # While it exits, the driver does not count as lost; when it has exited, the run is over.
            return self._withdrawn(request) if lost and request is not None and not exits else None

        answer = wait_for(look, timeout_s, f"{what} ({self.folder.name})")
        if isinstance(answer, NotDone):
            raise answer
        return answer

    def _follow(self, file: Path, timeout_s: float) -> Iterator[dict[str, Any]]:
        lines, heard = LineReader(file), time.monotonic()
        while True:
            over = self.over  # before reading: what the run wrote last must be read
            for line in lines.new():
                yield line
                heard = time.monotonic()
            if over:
                return
            if time.monotonic() - heard > timeout_s:
                raise NotDone(f"{file} has had no new line for {timeout_s:g} s, and the run has not ended")
            time.sleep(POLL_S)


def wait_for(found: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """The first true answer, by asking again and again. Raises NoAnswerInTime after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        if answer := found():
            return answer
        if time.monotonic() > deadline:
            raise NoAnswerInTime(f"waited {timeout_s:g} s for {what}; a longer wait is timeout_s=SECONDS")
        time.sleep(POLL_S)
