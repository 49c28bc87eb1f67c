"""At most one driver per run folder: two would delete each other's unfinished checkpoints and write to one log.

    driver.lock    host, pid and start of the process that drives the run; empty once that has ended in order

A lock that a dead process left (`kill -9`) is taken over. That a process is dead can be told only on its own host: the
kernel has released its `flock` there, and no process has its pid, or one has that started at another time.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import psutil

from actors.errors import ConfigError

LOCK = "driver.lock"
SAME_START_S = 2.0  # a clock that is set moves the start of every process a little


@dataclass(frozen=True)
class Driver:
    """A process that drives a run."""

    host: str
    pid: int
    started: float  # seconds since the epoch

    @classmethod
    def here(cls) -> Driver:
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Driver:
        """A process of this host that lives."""
        return cls(platform.node(), pid, psutil.Process(pid).create_time())

    @property
    def may_live(self) -> bool:
        """False only if it is certainly gone."""
        if self.host != platform.node():
            return True
        try:
            process = psutil.Process(self.pid)
            zombie = process.status() == psutil.STATUS_ZOMBIE  # it has ended, and its parent has not asked how
            return not zombie and abs(process.create_time() - self.started) < SAME_START_S
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, which started at {since}"


@contextmanager
def driving(folder: Path) -> Generator[None]:
    """For as long as the block lasts this process is the only one that drives the run of that folder. Raises
    ConfigError at once if another one does."""
    with only_one(folder / LOCK, lambda other: _refusal(folder, other)):
        yield


@contextmanager
def only_one(file: Path, refusal: Callable[[Driver | None], str]) -> Generator[None]:
    """For as long as the block lasts this process is the only one in such a block of that file. Raises ConfigError at
    once, with what `refusal` says of the other process, if another one is; None: it has not signed the file yet."""
    stream = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), "r+")  # not inherited by what the process starts
    try:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(refusal(_read(stream.read()))) from None
        except OSError:  # a file system that has no such locks: what is written in the file decides
            pass
        other = _read(stream.read())
        if other is not None and other.may_live:
            raise ConfigError(refusal(other))
        _sign(stream, Driver.here())
        try:
            yield
        finally:
            _sign(stream, None)  # the file stays: a process that waits to lock it must not hold one that is gone
    finally:
        stream.close()


def driver_of(folder: Path) -> Driver | None:
    """The process that drives the run of that folder, or did when it died; None if there is none."""
    try:
        return _read((folder / LOCK).read_text())
    except OSError:
        return None


def release(folder: Path) -> None:
    """The process that drove the run of that folder is gone, as whoever started it says: one of another host, or in
    another container, where nobody could tell from here."""
    driver = driver_of(folder)
    if driver is not None and driver.host != platform.node():
        os.truncate(folder / LOCK, 0)


def _sign(stream: TextIO, driver: Driver | None) -> None:
    stream.seek(0)
    stream.truncate()
    if driver is not None:
        stream.write(json.dumps(asdict(driver)))
    stream.flush()


def _read(text: str) -> Driver | None:
    """None if no process has signed it: it died between making the file and writing into it."""
    try:
        return Driver(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _refusal(folder: Path, other: Driver | None) -> str:
    by = f"by {other}" if other else "by another process"
    advice = not_seen(folder / LOCK, other) or "stop it first (Ctrl-C, or kill it), or follow it with `troupe status`"
    return f"the run in {folder} is driven {by}, and two drivers would spoil each other's checkpoints; {advice}"


def not_seen(file: Path, other: Driver | None) -> str | None:
    """What to do about the lock of a process of another host; None for one of this host."""
    if other is None or other.host == platform.node():
        return None
    return f"whether it still lives cannot be seen from {platform.node()}: if it is gone, delete {file}"
