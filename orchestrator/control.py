"""How a running job is reached from outside: a named actor that holds what is desired, and the folder that names it.

troupe scale RUN rollout=4 ──► Board (actor troupe/RUN/control) ◄── the driver looks every second
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.errors import ConfigError, RunError, UserError
from actors.worker import WorkerInfo
from orchestrator.ray_address import AUTH_MODE, Unreachable, refuse_unreachable

NAMESPACE = "troupe"
ELASTIC = ("rollout", "reward")
CALL_TIMEOUT_S = 5.0
RUN_FILE = "run.json"


class Board:
    """Runs as an actor without resources. Desired worker counts, and the last status that the driver put up."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._desired: dict[str, int] = {}
        self._status: dict[str, Any] = {}

    def ready(self) -> WorkerInfo:
        import actors

        return WorkerInfo(self._name, os.getpid(), "", os.path.dirname(actors.__file__), {})

    def ping(self) -> dict[str, Any]:
        return {"alive": True}

    def desire(self, role: str, count: int) -> None:
        self._desired[role] = count

    def exchange(self, status: dict[str, Any]) -> dict[str, int]:
        """The driver's call: puts up its status, takes what is desired."""
        self._status = status
        return dict(self._desired)

    def status(self) -> dict[str, Any]:
        return dict(self._status)


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
    if match is None or match[1] not in ELASTIC:
        raise ConfigError(
            f"cannot scale {text!r}; write ROLE=N with ROLE one of {', '.join(ELASTIC)} and N a number, e.g. rollout=4"
        )
    return match[1], int(match[2])


class InOneProcess(UserError):
    """A run without Ray (`--local`): nothing of it can be reached from outside."""


class Ended(RunError):
    """A run's driver is not there any more, or cannot be reached; the message says how that showed."""


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
        reason = "its control actor is gone" if isinstance(error, ValueError) else str(error).splitlines()[0]
        raise Ended(f"{gone} ({reason})") from None
    finally:
        ray.shutdown()
