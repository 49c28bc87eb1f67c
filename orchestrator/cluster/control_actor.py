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
import sys
import threading
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from actors.errors import ConfigError, RunError, UserError, first_lines
from actors.worker import NAMESPACE, WorkerInfo
from orchestrator.cluster.ray_address import AUTH_MODE, Unreachable, refuse_unreachable
from orchestrator.cluster.run_lock import Driver

CALL_TIMEOUT_S = 5.0
RUN_FILE = "run.json"
REQUESTS = "requests"  # a folder in the run's, of a run in one process
_one_connection = threading.Lock()  # Ray's client is one per process


@dataclass
class Desired:
    """What was asked of a run since its driver started."""

    workers: dict[str, int] = field(default_factory=dict[str, int])  # by elastic role
    pauses: dict[str, bool] = field(default_factory=dict[str, bool])  # ticket -> whether to hold; the last one counts
    checkpoints: list[str] = field(default_factory=list[str])  # tickets, all that were ever asked for
    stop: bool = False


class Board:
    """Runs as an actor without resources. What is desired of the run, and the last status that the driver put up. All
    of it is desired state, so that a request may arrive twice. A ticket is any name that no other request has: the
    event that answers a request has it in its `asked`. `elastic`: the roles that the run can scale."""

    def __init__(self, name: str, elastic: Sequence[str]) -> None:
        self._name, self._elastic = name, tuple(elastic)
        self._desired = Desired()
        self._workers: dict[str, Any] = {}

    def ready(self) -> WorkerInfo:
        import actors

        return WorkerInfo(self._name, os.getpid(), "", os.path.dirname(actors.__file__), {})

    def ping(self) -> dict[str, Any]:
        return {"alive": True}

    def desire(self, role: str, count: int) -> None:
        """Raises ConfigError for a role that the run cannot scale."""
        if role not in self._elastic:
            can = f"it can scale {', '.join(sorted(self._elastic))}" if self._elastic else "it has none at all"
            raise ConfigError(f"this run has no role {role} whose workers come and go; {can}")
        self._desired.workers[role] = count

    def pause(self, paused: bool, ticket: str) -> None:
        self._desired.pauses.setdefault(ticket, paused)

    def checkpoint(self, ticket: str) -> None:
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
    driver: Driver
    auth_mode: str | None = None  # of Ray: one that the driver started wants to see a token

    def write(self, folder: Path) -> None:
        temporary = folder / ".run.json.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=2))
        temporary.replace(folder / RUN_FILE)

    @classmethod
    def read(cls, folder: Path) -> RunFile:
        try:
            read: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())
            driver = Driver(**read.pop("driver"))
            return cls(driver=driver, **read)
        except (OSError, ValueError, TypeError, KeyError) as error:
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


class Silent(RunError):
    """A run's board cannot be asked; the message says why. As a rule the run is ending, or its Ray is gone."""


def board(folder: Path, method: str, *args: Any) -> Any:
    """A call of the board of a run on Ray. Returns once the board has it, with its answer. Raises Silent, InOneProcess
    for a run without Ray, or UserError if the run's Ray does not take the token of this process."""
    run = RunFile.read(folder)
    if run.address is None:
        raise InOneProcess(
            f"{run.name} runs in one process (--local), {run.driver.pid}: it has no workers that come and go"
        )
    return _board_call(run, run.address, method, *args)


def ask(folder: Path, method: str, *args: Any) -> None:
    """Ask a running job for something that a run in one process can do as well: `pause`, `checkpoint`, `stop` of its
    board. Returns once the request is where the driver looks."""
    if RunFile.read(folder).address is not None:
        board(folder, method, *args)
        return
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


def _board_call(run: RunFile, address: str, method: str, *args: Any) -> Any:
    if run.auth_mode is not None and AUTH_MODE not in os.environ:  # which Ray reads when it is imported, and only then
        if "ray" in sys.modules:
            raise Silent(
                f"its Ray wants a token, and this process imported Ray without {AUTH_MODE}={run.auth_mode}: set that "
                "variable before Ray is imported, or use the command `troupe`"
            )
        os.environ[AUTH_MODE] = run.auth_mode
    try:
        refuse_unreachable(address, "address")
    except Unreachable as error:
        raise Silent(f"its Ray cannot be reached from here ({error})") from None
    import ray
    from ray.exceptions import RayError, RayTaskError

    with _one_connection, _connected(run.name, address):
        try:
            actor = ray.get_actor(run.actor, namespace=NAMESPACE)
            return ray.get(getattr(actor, method).remote(*args), timeout=CALL_TIMEOUT_S)
        except RayTaskError as error:  # what the board raised: it refuses the request
            raise error.cause from None
        except (ValueError, RayError) as error:
            reason = "its control actor is gone" if isinstance(error, ValueError) else first_lines(error)
            raise Silent(reason) from None


@contextlib.contextmanager
def _connected(name: str, address: str) -> Generator[None]:
    """A connection to a run's Ray: the one that this process has (a notebook that uses Ray itself), or one for the
    block. Raises RunError if the process is connected to another Ray: it can have one at a time."""
    import ray

    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if here != address:
            raise RunError(
                f"this process is connected to another Ray ({here}) than run {name} ({address}): call ray.shutdown() "
                "first, or use the command `troupe`"
            )
        yield
        return
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise RunError(f"cannot connect to the Ray of run {name} at {address}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()
