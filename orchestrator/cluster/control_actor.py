"""How a running job is reached from outside: a named actor that holds what is desired, and the folder that names it.

troupe scale RUN rollout=4 ──► Board (actor troupe/RUN/control) ◄── the driver looks every second
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from actors.errors import ConfigError, RunError, UserError
from actors.worker import WorkerInfo

NAMESPACE = "troupe"
ELASTIC = ("rollout", "reward")
CALL_TIMEOUT_S = 20.0
AUTH_MODE = "RAY_AUTH_MODE"


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
        temporary.replace(folder / "run.json")

    @classmethod
    def read(cls, folder: Path) -> RunFile:
        try:
            return cls(**json.loads((folder / "run.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{folder} is not a run's folder ({error}); give the folder that `troupe run` printed"
            ) from None


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


def scale(folder: Path, role: str, count: int) -> None:
    """Ask a running job for `count` workers of an elastic role. Returns once the job's board has it."""
    _board_call(folder, "desire", role, count)


def status(folder: Path) -> dict[str, Any]:
    """What the job's driver reported last."""
    return _board_call(folder, "status")


def _board_call(folder: Path, method: str, *args: Any) -> Any:
    run = RunFile.read(folder)
    if run.address is None:
        raise UserError(f"{run.name} runs in one process (--local): it has no workers to scale and no board to ask")
    if run.auth_mode is not None:
        os.environ.setdefault(AUTH_MODE, run.auth_mode)  # before Ray is imported: it is read only then
    import ray

    try:
        ray.init(address=run.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError) as error:
        raise RunError(
            f"the Ray of run {run.name} at {run.address} does not answer; has the run ended? ({error})"
        ) from None
    try:
        board = ray.get_actor(run.actor, namespace=NAMESPACE)
        return ray.get(getattr(board, method).remote(*args), timeout=CALL_TIMEOUT_S)
    except ValueError:
        raise RunError(f"run {run.name} has no control actor any more: it has ended") from None
    finally:
        ray.shutdown()
