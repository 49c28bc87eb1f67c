"""What a service knows of a run that it was asked for, kept in the run's folder.

    submit ──► WAITING ──► STARTED ──► OVER          it finished, was stopped, was refused, or has failed too often
                 ▲           │  │
                 ├─ failed ──┘  ├──► PREEMPTING ──► WAITING      it saves a checkpoint and ends
                 └── resume     └──► STOPPING ────► OVER

The file is the truth: a service that is killed and started again, on the same Ray or another one, reads it and goes on.
Several processes may change it (services, `troupe stop`), so each change is made under a lock of the file.
"""

from __future__ import annotations

import fcntl
import json
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.planning.bundles import Bundle

ENTRY_FILE = "queue.json"  # in a run's folder
LOCK_FILE = ".queue.lock"


class Stage(StrEnum):
    WAITING = "waiting"  # for room, or for the end of a back-off
    STARTED = "started"  # a process was started for it
    PREEMPTING = "preempting"  # it was told to save a checkpoint and to end, for another run's sake
    STOPPING = "stopping"  # somebody has asked for its end
    OVER = "over"  # it is not started again, unless somebody asks for it


@dataclass(frozen=True)
class Entry:
    """A run's place in the queue. Times are seconds since the epoch.

    `submitted`: its place among runs of the same priority; kept when it is preempted or has failed. `bundles`: what it
    reserves. `reason`: why it waits, or makes room; once it is over, what it was given up for. `overrides`: of its next
    resumption. `preempted`: whether it waits because it was preempted. `failures`: since it saved a checkpoint of a
    later step than `saved_step`. `not_before`: the end of the back-off. `stopped`: it is over because somebody asked
    for that. `asked`: when it was told to make room. `events_from`, `console_from`: how long its files were when its
    process was started, in bytes: what is behind that is of this process, whatever the clocks of the machines say.
    `resumed`: somebody has asked that it go on, or begin again, after it had ended.
    """

    priority: int
    submitted: float
    bundles: tuple[Bundle, ...]
    stage: Stage = Stage.WAITING
    reason: str = ""
    overrides: tuple[str, ...] = ()
    started: float = 0.0
    preempted: bool = False
    failures: int = 0
    saved_step: int = 0
    not_before: float = 0.0
    stopped: bool = False
    asked: float = 0.0
    events_from: int = 0
    console_from: int = 0
    resumed: bool = False

    @property
    def active(self) -> bool:
        """Whether a process was started for it, whose end nobody has seen."""
        return self.stage in (Stage.STARTED, Stage.PREEMPTING, Stage.STOPPING)

    def over(self, reason: str = "", *, stopped: bool = False) -> Entry:
        return replace(self, stage=Stage.OVER, reason=reason, stopped=stopped)

    def withdrawn(self) -> Entry:
        """The entry once the end of the run has been asked for."""
        if self.stage is Stage.WAITING:
            return self.over("it was stopped while it waited", stopped=True)
        return self if self.stage is Stage.OVER else replace(self, stage=Stage.STOPPING, reason="it is to end")


def read(folder: Path) -> Entry | None:
    """None for a run that no service was asked for."""
    try:
        found: dict[str, Any] = json.loads((folder / ENTRY_FILE).read_text())
        bundles = tuple(
            Bundle(tuple(each["roles"]), each["resources"], tuple(each["selectors"])) for each in found.pop("bundles")
        )
        overrides = tuple(found.pop("overrides"))
        stage = Stage(found.pop("stage"))
        return Entry(**found, stage=stage, bundles=bundles, overrides=overrides)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(folder: Path, entry: Entry) -> None:
    """Whole, or as it was before. For a run that has none yet; `change` is for the others."""
    temporary = folder / f".{ENTRY_FILE}-{uuid.uuid4().hex[:8]}"
    temporary.write_text(json.dumps(asdict(entry), indent=1))
    temporary.replace(folder / ENTRY_FILE)


def change(folder: Path, made: Callable[[Entry], Entry]) -> Entry | None:
    """The entry after the change; nobody else changes it meanwhile. None if the run has none. The lock is held for as
    long as `made` takes, which must not wait for anything."""
    if not (folder / ENTRY_FILE).exists():
        return None
    with (folder / LOCK_FILE).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = read(folder)
        if before is None:
            return None
        after = made(before)
        if after != before:
            write(folder, after)
        return after
