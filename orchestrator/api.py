"""Runs from Python, in a script or a notebook: start a run, follow it, control it, get its result.

    start() ──► `troupe run` in a process of its own ──► RUN/events.jsonl, metrics.jsonl ──► events(), metrics()
                       ▲                                                                     result(): exit code
                       └── control actor, or RUN/requests with `local` ◄── scale, pause, resume, checkpoint, stop

A process of its own, not a thread of this one: a run ends by signals and, when its Ray dies, by killing its process;
it owns its process' connection to Ray and its main thread. A notebook's kernel survives all that, is not slowed down by
the run, and may be restarted while the run goes on: `attach(folder)` finds it again.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from actors.errors import ConfigError, Interrupted, RunError
from orchestrator.cluster import control_actor as control
from orchestrator.cluster.run_lock import driver_of
from orchestrator.config.loading import find_recipe, load_config, load_run
from orchestrator.config.schema import RunConfig
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.restarts import COMMAND, REFUSED, folder_of
from orchestrator.run import RunResult

CONSOLE_FILE = "console.log"  # in the folder of a run that `start` started: what it printed
START_TIMEOUT_S = 600.0  # until a run has its folder: reading the data, the first time perhaps from the Hub
ANSWER_TIMEOUT_S = 600.0  # until a run is between two steps
END_TIMEOUT_S = 24 * 3600.0
SILENCE_S = 3600.0
POLL_S = 0.1
SHOWN_LINES = 30  # of the console of a run that failed

T = TypeVar("T")


def start(
    config: RunConfig | str | Path,
    overrides: Sequence[str] = (),
    *,
    local: bool = False,
    timeout_s: float = START_TIMEOUT_S,
    **settings: Any,
) -> RunHandle:
    """Start a run in a process of its own. `config`: a configuration, the name of a recipe, or a YAML file.

    `overrides` are as on the command line, `"train.steps=20"`; `settings` are the same as keyword arguments, with two
    underscores for a dot: `train__steps=20`. `local`: without Ray. What the run prints goes to `console.log` in its
    folder.

    Returns once the run is accepted: it has read its data and has a folder. Raises ConfigError if it is refused, and
    RunError if it does not come so far within `timeout_s`; its process is ended then.
    """
    given = [*overrides, *(f"{key.replace('__', '.')}={_yaml(value)}" for key, value in settings.items())]
    with tempfile.TemporaryDirectory(prefix="troupe-") as scratch:
        if isinstance(config, RunConfig):
            recipe = Path(scratch) / "config.json"
            recipe.write_text(config.model_dump_json())
        else:
            recipe = find_recipe(config)
        output = load_config(recipe, given).output
        output.mkdir(parents=True, exist_ok=True)
        console = output / f".console-{uuid.uuid4().hex[:8]}.log"
        with console.open("wb") as stream:
            command = [*COMMAND, "run", str(recipe), *given, *(["--local"] if local else [])]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            folder = _wait(
                lambda: folder_of(output, process.pid) or (process.poll() is not None and _failure(process, console)),
                timeout_s,
                "the run to be accepted",
            )
        except BaseException:  # Ctrl-C, too: the caller gets no handle to end it
            process.terminate()
            raise
        if isinstance(folder, Exception):
            console.unlink()
            raise folder
        assert isinstance(folder, Path)
        console.rename(folder / CONSOLE_FILE)
    return RunHandle(folder, process)


def attach(folder: str | Path) -> RunHandle:
    """The handle of a run that another process started, or this notebook before its kernel was restarted. Raises
    ConfigError if the folder is no run's."""
    load_run(Path(folder))
    return RunHandle(Path(folder), None)


@dataclass(frozen=True)
class Status:
    """How a run stands. `state`: `running`, `paused`, `finished`, or a sentence that says how it ended. `workers`: of
    its elastic roles, by role. `metrics`: the last value of each."""

    state: str
    step: int
    workers: Mapping[str, Any]
    metrics: Mapping[str, Any]


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

    def events(self, *, timeout_s: float = SILENCE_S) -> Iterator[dict[str, Any]]:
        """The lines of the run's `events.jsonl`, from the first, each as soon as it is there, until the run ends.
        Raises RunError if nothing comes for `timeout_s`."""
        return self._follow(self.folder / "events.jsonl", timeout_s)

    def metrics(self, *, timeout_s: float = SILENCE_S) -> Iterator[dict[str, Any]]:
        """The same of `metrics.jsonl`: one mapping for each logged step and evaluation, with `step` and `phase`."""
        return self._follow(self.folder / METRICS_FILE, timeout_s)

    def status(self) -> Status:
        """Answers within seconds, whatever has become of the run."""
        standing = control.standing(self.folder)
        last: dict[str, Any] = {}
        for line in read(self.folder / METRICS_FILE):
            last.update(line)
        state = standing.state
        if self.running:
            state = "paused" if self._paused() else "running"
        return Status(state, int(last.get("step", 0)), standing.workers or {}, last)

    def scale(self, role: str, count: int) -> None:
        """Ask for `count` workers of an elastic role; they come and go while the run goes on. Returns once the run has
        been told. Raises UserError for a role that has no workers of its own, and for a run with `local`."""
        self._until_reachable(ANSWER_TIMEOUT_S)
        control.scale(self.folder, role, count)

    def pause(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
        """Hold the run before its next step; its processes and their memory stay. Returns, once it holds, the number
        of steps that are done."""
        return self._set_paused(True, timeout_s)

    def resume(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> int:
        """Let a paused run go on. (A run that has stopped is continued by `troupe resume` or `troupe.run`.)"""
        return self._set_paused(False, timeout_s)

    def checkpoint(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Path:
        """Write a checkpoint between two steps, also while the run is paused; its folder. A run that finishes first
        has written one after its last step: that is the answer then."""
        ticket = uuid.uuid4().hex
        self._until_reachable(timeout_s)
        self._ask("checkpoint", ticket)

        def written() -> Path | None:
            found = [event for event in self._events() if event["event"] == "checkpoint" and event.get("path")]
            answers = [event for event in found if ticket in event["asked"]]
            if not answers and not self.running and self._finished():
                answers = found
            return Path(answers[-1]["path"]) if answers else None

        return self._await(written, timeout_s, "a checkpoint that was asked for")

    def stop(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Path | None:
        """End the run in order: after its step and a checkpoint, within `checkpoint.grace_s`. Returns its newest
        checkpoint, with which `troupe resume` goes on. A run that has ended already is left as it is."""
        if self.running:
            if self._process is not None:
                self._process.terminate()
            else:
                self._until_reachable(timeout_s)
                with contextlib.suppress(control.AlreadyEnded):
                    self._ask("stop")
        _wait(lambda: not self.running, timeout_s, f"run {self.folder.name} to stop")
        found = sorted((self.folder / "checkpoints").glob("step-*"))
        return found[-1] if found else None

    def result(self, *, timeout_s: float = END_TIMEOUT_S) -> RunResult:
        """What the run leaves, once it has finished. Raises what ended it otherwise: Interrupted after a signal or
        `stop`, ConfigError if it was refused, RunError with the last lines that it printed."""
        _wait(lambda: not self.running, timeout_s, f"run {self.folder.name} to end")
        if (finished := self._finished()) is not None:
            return RunResult.from_json(self.folder, finished)
        signals = [event["signal"] for event in self._events() if event["event"] == "interrupted"]
        if signals:
            raise Interrupted(signal.Signals[signals[-1]])
        raise _failure(self._process, self.folder / CONSOLE_FILE)

    def _set_paused(self, paused: bool, timeout_s: float) -> int:
        self._until_reachable(timeout_s)
        self._ask("pause", paused)

        def done() -> tuple[int] | None:
            last = self._last_pause()
            holds = last is not None and last["event"] == "paused"
            return (last["step"] if last else 0,) if holds is paused else None

        return self._await(done, timeout_s, "the run to pause" if paused else "the run to go on")[0]

    def _paused(self) -> bool:
        last = self._last_pause()
        return last is not None and last["event"] == "paused"

    def _last_pause(self) -> dict[str, Any] | None:
        """The last word about pausing of the driver that drives the run now."""
        last = None
        for event in self._events():
            if event["event"] == "prepared":
                last = None
            elif event["event"] in ("paused", "unpaused"):
                last = event
        return last

    def _finished(self) -> dict[str, Any] | None:
        """The event `finished`, if the run has not been started again since."""
        last = None
        for event in self._events():
            if event["event"] == "prepared":
                last = None
            elif event["event"] == "finished":
                last = event
        return last

    def _events(self) -> list[dict[str, Any]]:
        return control.events(self.folder)

    def _ask(self, method: str, *args: Any) -> None:
        control.ask(self.folder, method, *args)

    def _until_reachable(self, timeout_s: float) -> None:
        """Until the run can be told something: its roles are being started meanwhile. One that has ended says so when
        it is asked."""
        if not self.running:
            return

        def reachable() -> bool:
            driver = driver_of(self.folder)
            with contextlib.suppress(ConfigError):
                return driver is not None and control.RunFile.read(self.folder).pid == driver.pid
            return False

        self._await(reachable, timeout_s, "the run to start")

    def _await(self, found: Callable[[], T | None], timeout_s: float, what: str) -> T:
        """The first true answer. Raises RunError if the run ends before it, or after `timeout_s`."""

        def look() -> T | RunError | None:
            running = self.running  # before looking: what the run wrote last must be seen
            if answer := found():
                return answer
            return None if running else RunError(f"run {self.folder.name} ended before {what}: {self.status().state}")

        answer = _wait(look, timeout_s, f"{what} ({self.folder.name})")
        if isinstance(answer, RunError):
            raise answer
        return answer

    def _follow(self, file: Path, timeout_s: float) -> Iterator[dict[str, Any]]:
        offset, heard = 0, time.monotonic()
        while True:
            running = self.running  # before reading: what the run wrote last must be read
            with contextlib.suppress(FileNotFoundError), file.open("rb") as stream:
                stream.seek(offset)
                text = stream.read()
                whole = text[: text.rfind(b"\n") + 1]
                offset += len(whole)
                for line in whole.splitlines():
                    yield json.loads(line)
                    heard = time.monotonic()
            if not running:
                return
            if time.monotonic() - heard > timeout_s:
                raise RunError(f"{file} has had no new line for {timeout_s:g} s, and the run has not ended")
            time.sleep(POLL_S)


def _wait(found: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """The first true answer, by asking again and again. Raises RunError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        if answer := found():
            return answer
        if time.monotonic() > deadline:
            raise RunError(f"waited {timeout_s:g} s for {what}; a longer wait is timeout_s=SECONDS")
        time.sleep(POLL_S)


def _failure(process: subprocess.Popen[bytes] | None, console: Path) -> ConfigError | RunError:
    """What ended a run, in the words that it printed."""
    printed = console.read_text(errors="replace").strip().splitlines() if console.exists() else []
    said = [number for number, line in enumerate(printed) if line.startswith("troupe: ")]
    lines = printed[said[0] :] if said else printed
    words = "\n".join(lines[-SHOWN_LINES:]) or f"it printed nothing in {console}"
    if process is not None and process.poll() == REFUSED:
        return ConfigError(words.removeprefix("troupe: refused: "))
    code = "" if process is None else f" with exit code {process.poll()}"
    return RunError(f"the run ended{code}: {words}")


def _yaml(value: Any) -> str:
    """A value as an override's text has it."""
    return json.dumps(value, default=str)
