"""Control of a running job from outside: a named actor that holds the desired sizes, found through the run's folder.

    troupe scale RUN rollout=4 ──► Board (actor troupe/RUN/control) ◄── the driver looks every second
    RunHandle.pause() ...      ──►

A run in one process (`--local`) has no actor that others find: a request to it is a file in `RUN/requests`, which the
driver hands to its board.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from actors.errors import ConfigError, RunError, UserError, first_lines
from actors.worker import NAMESPACE, WorkerInfo
from orchestrator.cluster.ray_address import AUTH_MODE, Unreachable, refuse_unreachable
from orchestrator.cluster.run_lock import driver_of

CALL_TIMEOUT_S = 5.0
RUN_FILE = "run.json"
REQUESTS = "requests"  # a folder in the run's, of a run in one process


@dataclass
class Desired:
    """What was asked of a run since its driver started."""

    workers: dict[str, int] = field(default_factory=dict[str, int])  # by elastic role
    paused: bool = False
    checkpoints: list[str] = field(default_factory=list[str])  # tickets, all that were ever asked for
    stop: bool = False


class Board:
    """Runs as an actor without resources. What is desired of the run, and the last status that the driver put up. All
    of it is desired state, so that a request may arrive twice."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._desired = Desired()
        self._workers: dict[str, Any] = {}

    def ready(self) -> WorkerInfo:
        import actors

        return WorkerInfo(self._name, os.getpid(), "", os.path.dirname(actors.__file__), {})

    def ping(self) -> dict[str, Any]:
        return {"alive": True}

    def desire(self, role: str, count: int) -> None:
        """Raises ConfigError for a role that the run cannot scale."""
        if self._workers and role not in self._workers:
            raise ConfigError(
                f"this run has no role {role} whose workers come and go; it can scale "
                f"{', '.join(sorted(self._workers))}"
            )
        self._desired.workers[role] = count

    def pause(self, paused: bool) -> None:
        self._desired.paused = paused

    def checkpoint(self, ticket: str) -> None:
        """The event of the checkpoint that answers this has the ticket in its `asked`."""
        if ticket not in self._desired.checkpoints:
            self._desired.checkpoints.append(ticket)

    def stop(self) -> None:
        self._desired.stop = True

    def exchange(self, workers: dict[str, Any]) -> Desired:
        """The driver's call: puts up its status, takes what is desired."""
        self._workers = workers
        return self._desired

    def status(self) -> dict[str, Any]:
        return dict(self._workers)


@dataclass(frozen=True)
class RunFile:
    """`run.json` in a run's folder: how to find its driver."""

    name: str
    address: str | None  # of Ray; None for a run in one process
    actor: str
    pid: int
    auth_mode: str | None = None  # of Ray: one that the driver started wants to see a token

    def write(self, folder: Path) -> None:
        temporary = folder / ".run.json.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=2))
        temporary.replace(folder / RUN_FILE)

    @classmethod
    def read(cls, folder: Path) -> RunFile:
        try:
            return cls(**json.loads((folder / RUN_FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{folder} is not a run's folder ({error}); give the folder that `troupe run` printed"
            ) from None


def events(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's `events.jsonl`."""
    file = folder / "events.jsonl"
    found: list[dict[str, Any]] = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill
            found.append(json.loads(line))
    return found


def board_name(run: str) -> str:
    return f"troupe/{run}/control"


def parse_scale(text: str) -> tuple[str, int]:
    """`rollout=4` -> ("rollout", 4)."""
    match = re.fullmatch(r"(\w+)=(\d+)", text)
    if match is None:
        raise ConfigError(
            f"cannot scale {text!r}; write ROLE=N with the name of a role and a number of workers, e.g. rollout=4"
        )
    return match[1], int(match[2])


class InOneProcess(UserError):
    """A run without Ray (`--local`): nothing of it can be reached from outside."""


class Ended(RunError):
    """A run's driver is not there any more, or cannot be reached; the message says how that showed."""


class AlreadyEnded(RunError):
    """What was asked of a run comes too late."""


@dataclass(frozen=True)
class Standing:
    """A run as it is seen from outside. `workers`: by elastic role, while the run goes on."""

    name: str
    state: str
    workers: dict[str, Any] | None = None


def scale(folder: Path, role: str, count: int) -> None:
    """Ask a running job for `count` workers of an elastic role. Returns once the job's board has it."""
    run = RunFile.read(folder)
    try:
        _board_call(run, "desire", role, count)
    except Ended as error:
        raise RunError(f"run {run.name} is {error}") from None


def ask(folder: Path, method: str, *args: Any) -> None:
    """Ask a running job for something that a run in one process can do as well: `pause`, `checkpoint`, `stop` of its
    board. Returns once the request is where the driver looks. Raises AlreadyEnded if the run has ended."""
    run = RunFile.read(folder)
    if run.address is not None:
        try:
            _board_call(run, method, *args)
        except Ended as error:
            raise AlreadyEnded(f"run {run.name} is {error}") from None
        return
    driver = driver_of(folder)
    if driver is None or not driver.may_live:
        raise AlreadyEnded(f"run {run.name} is {_last_word(folder) or 'not running: it ended or was killed'}")
    requests = folder / REQUESTS
    requests.mkdir(exist_ok=True)
    file = requests / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json"
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps([method, *args]))
    temporary.replace(file)


def take_requests(folder: Path) -> Iterator[list[Any]]:
    """The driver's side of a run in one process: `[method, *arguments]` for the board, in the order of their
    arrival; each is taken once."""
    for file in sorted((folder / REQUESTS).glob("*.json")):
        request = json.loads(file.read_text())
        file.unlink()
        yield request


def standing(folder: Path) -> Standing:
    """Whether the run in a folder goes on, and how it ended if it does not. Answers within seconds, also where the
    run's Ray is gone. Raises ConfigError if the folder is no run's."""
    if not (folder / RUN_FILE).exists() and (folder / "config.json").exists():
        return Standing(folder.name, "not running: its roles were never started, or are being started now")
    run = RunFile.read(folder)
    try:
        return Standing(run.name, "running", _board_call(run, "status"))
    except (Ended, InOneProcess) as silent:
        return Standing(run.name, _last_word(folder) or str(silent))


def _last_word(folder: Path) -> str | None:
    """How a run says that it ended, unless it was started again since."""
    word: str | None = None
    for event in events(folder):
        match event["event"]:
            case "prepared":
                word = None
            case "finished":
                word = "finished"
            case "interrupted":
                word = f"stopped by {event['signal']}; `troupe resume {folder}` continues it"
            case _:
                pass
    return word


def _board_call(run: RunFile, method: str, *args: Any) -> Any:
    """Raises Ended, InOneProcess, or UserError if the run's Ray does not take the token of this process."""
    if run.address is None:
        raise InOneProcess(
            f"{run.name} runs in one process (--local), {run.pid}: it has no workers, and no board to ask"
        )
    if run.auth_mode is not None:
        os.environ.setdefault(AUTH_MODE, run.auth_mode)  # before Ray is imported: it is read only then
    gone = "not running: it ended or was killed"
    try:
        refuse_unreachable(run.address, "address")
    except Unreachable as error:
        raise Ended(f"{gone}, or its Ray cannot be reached from here ({error})") from None
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(address=run.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise RunError(f"cannot connect to the Ray of run {run.name} at {run.address}: {error}") from None
    try:
        board = ray.get_actor(run.actor, namespace=NAMESPACE)
        return ray.get(getattr(board, method).remote(*args), timeout=CALL_TIMEOUT_S)
    except (ValueError, RayError) as error:
        reason = "its control actor is gone" if isinstance(error, ValueError) else first_lines(error)
        raise Ended(f"{gone} ({reason})") from None
    finally:
        ray.shutdown()
