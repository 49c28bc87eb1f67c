"""A time limit for a call in this process, which may contain an endless loop: a chat template, for example.

    thread that works   begin ── work() ──────────── claim the attempt ── return
    thread that watches       └─ every poll: over the limit? claim the attempt, then raise Interrupt in the first

The first thread to claim an attempt decides it: a result is never lost to an interrupt that comes late, and no
interrupt is ever delivered outside the call that it was meant for.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from threading import Event, Thread, get_ident
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.1


class OverTime(Exception):
    """The call was stopped. `stopped_at`: the traceback of the place where it was."""

    def __init__(self, stopped_at: TracebackType | None) -> None:
        super().__init__("stopped")
        self.stopped_at = stopped_at


class _Interrupt(BaseException):
    """Raised in the thread that works. Not an Exception, so that no `except Exception` on the way stops it."""


class _Attempt:
    """One call of the work."""

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self._unclaimed = [True]

    def claim(self) -> bool:
        """True for the first thread that asks. (`list.pop` is atomic.)"""
        try:
            return self._unclaimed.pop()
        except IndexError:
            return False


class TimeLimit:
    """`with TimeLimit(seconds) as limit: limit.call(work)` stops a call that takes more than so many seconds of its
    thread's processor time: a machine that is busy, or a process that was suspended, does not count against the work.

    What can be stopped is Python code, loops of any depth included; a single operation of a C function (`9**9**9`) is
    not interrupted. For the thread that entered it alone.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ended = Event()
        self._attempt: _Attempt | None = None

    def __enter__(self) -> TimeLimit:
        # macOS has no clock of another thread's processor time; there, elapsed time counts.
        clock_of = getattr(time, "pthread_getcpuclockid", None)
        self._thread = get_ident()
        self._clock = clock_of(self._thread) if clock_of else time.CLOCK_MONOTONIC
        self._watcher = Thread(target=self._watch, name="time-limit", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._watcher.join()

    def call(self, work: Callable[[], T]) -> T:
        """Returns or raises what `work` does. Raises OverTime if it was stopped."""
        attempt = self._attempt = _Attempt(time.clock_gettime(self._clock))
        try:
            try:
                result = work()
            except _Interrupt:
                raise
            except BaseException:
                self._settle(attempt)
                raise
            self._settle(attempt)
            return result
        except _Interrupt as interrupt:
            raise OverTime(interrupt.__traceback__) from None

    def _settle(self, attempt: _Attempt) -> None:
        """Returns once no interrupt can follow; a pending one is raised in here."""
        if not attempt.claim():
            while True:
                time.sleep(0.01)  # the watching thread has claimed the attempt and raises the interrupt here next

    def _watch(self) -> None:
        while not self._ended.wait(min(POLL_S, self.seconds / 4)):
            attempt = self._attempt
            if attempt is None or time.clock_gettime(self._clock) - attempt.started_s < self.seconds:
                continue
            if attempt.claim():
                thread, interrupt = ctypes.c_ulong(self._thread), ctypes.py_object(_Interrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, interrupt)
