"""A tracker behind a queue, so that training neither waits for it nor fails with it.

    driver: write, rewind ─► queue, at most CAPACITY entries ─► thread of this tracker ─► library
                │ full: the entry is dropped, and counted          │ an exception: counted
                └──────── the first time and at the end, one line for the user ────┘

The thread ends when `close` tells it to, or with the process.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Full, Queue

from actors.errors import first_lines
from orchestrator.reporting.trackers.tracker import Ended, Tracker

CAPACITY = 1_000  # entries; most runs write one a step
CLOSE_S = 20.0  # how long the end of a run waits for a tracker

Action = Callable[[Tracker], None]


class QueuedTracker:
    """A `Sink`. `start` makes the tracker, in its thread. `tell` gets a line for the user, from either thread."""

    def __init__(
        self,
        name: str,
        start: Callable[[], Tracker],
        tell: Callable[[str], None],
        *,
        capacity: int = CAPACITY,
        close_s: float = CLOSE_S,
    ) -> None:
        self.name = name
        self._start, self._tell, self._close_s = start, tell, close_s
        self._queue: Queue[Action | None] = Queue(capacity)
        self._given = self._dropped = self._failed = 0
        self._broken = self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, phase: str, metrics: Mapping[str, float]) -> None:
        """Returns at once. Numbers that are not finite are left out: a gap in a curve."""
        values = {f"{phase}/{name}": value for name, value in metrics.items() if math.isfinite(value)}
        self._given += 1
        self._put(lambda tracker: tracker.write(step, values))

    def rewind(self, step: int) -> None:
        self._put(lambda tracker: tracker.rewind(step))

    def close(self, ended: Ended = "finished") -> None:
        """Waits until the tracker has everything, at most `close_s`; says what it has not."""
        if self._closed:
            return
        self._closed, deadline = True, time.monotonic() + self._close_s
        if not self._broken:
            with suppress(Full):  # then the thread hangs, and is left behind
                self._queue.put(lambda tracker: tracker.close(ended), timeout=self._close_s)
                self._queue.put(None, timeout=max(0.0, deadline - time.monotonic()))
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._tell(
                f"tracker {self.name} did not take everything within {self._close_s:g} s and was left behind; "
                f"{self._lost()}"
            )
        elif self._dropped or self._failed:
            self._tell(f"tracker {self.name}: {self._lost()}")

    def _put(self, action: Action) -> None:
        try:
            if self._broken:
                raise Full
            self._queue.put_nowait(action)
        except Full:
            self._dropped += 1
            if self._dropped == 1 and not self._broken:
                self._tell(
                    f"tracker {self.name} is {self._queue.maxsize} entries behind; until it catches up, what it cannot "
                    "take is left out there"
                )

    def _work(self) -> None:
        """The thread. Its wait for the next entry is ended by `close`, or by the end of the process."""
        try:
            tracker = self._start()
        except Exception as error:
            self._broken = True
            self._tell(f"tracker {self.name} could not start and is left out: {_reason(error)}")
            return
        if tracker.place is not None:
            self._tell(f"tracker {self.name}: {tracker.place}")
        while (action := self._queue.get()) is not None:
            try:
                action(tracker)
            except Exception as error:
                self._failed += 1
                if self._failed == 1:
                    self._tell(f"tracker {self.name} failed; later failures are counted: {_reason(error)}")

    def _lost(self) -> str:
        lost = f"{self._failed} calls failed, {self._dropped} entries were dropped"
        return f"of {self._given} lines of metrics: {lost}. metrics.jsonl has all of them"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_lines(error)}"
