"""How a signal ends a run: in order, within seconds, and with a line that says where it can be continued.

    SIGINT, SIGTERM ──► cancel the run's task ──► collector, pools, actors, placement groups go, one after the other
                    └─► a thread that watches that: whatever hangs, the process is gone at the deadline

Ctrl-C in a terminal and SIGTERM to a process group also reach the daemons of a Ray of our own. They ignore the first
and obey the second, and then Ray's client waits a minute for them, or ends this process in its own way. So as soon as
one of them is gone the deadline has come: no order can be kept any more, and the processes that are left are killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil

GRACE_S = 10.0
LOOK_EVERY_S = 0.02
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Ending:
    """Of one run, in the process' main thread. `alive`: whether there is still something to put in order. `where`: the
    line for the user. `note` is told the signal when it comes."""

    def __init__(
        self, alive: Callable[[], bool], where: Callable[[], str], note: Callable[[signal.Signals], None]
    ) -> None:
        self.signal: signal.Signals | None = None  # the first that came
        self._alive, self._where, self._note = alive, where, note
        self._said = threading.Lock()

    def obey_signals(self) -> None:
        """From here on the first signal cancels the task that calls this; later ones change nothing. To be called after
        `ray.init`, which installs a handler of its own. A signal that this process was told to ignore stays so."""
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        for each in SIGNALS:
            if signal.getsignal(each) is not signal.SIG_IGN:
                loop.add_signal_handler(each, self._end, each, task)

    def say(self) -> None:
        """The line for the user, once."""
        if self.signal is not None and self._said.acquire(blocking=False):
            print(f"troupe: stopped by {self.signal.name}: {self._where()}", file=sys.stderr, flush=True)

    def _end(self, received: signal.Signals, task: asyncio.Task[object]) -> None:
        if self.signal is None:  # a second cancellation would interrupt what puts things in order
            self.signal = received
            threading.Thread(target=self._watch, name="ending", daemon=True).start()
            task.cancel()
            self._note(received)

    def _watch(self) -> None:
        """Ends the process and those below it at the deadline. In good time all of them have ended by themselves, and
        this thread with them."""
        assert self.signal is not None
        family = psutil.Process().children(recursive=True)  # now: those whose parent dies first are found no more
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and self._alive():
            time.sleep(LOOK_EVERY_S)
        self.say()
        sys.stdout.flush()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(128 + self.signal)
