"""How a signal ends a run: in order, within a deadline, and with a line that says where it can be continued.

    SIGINT, SIGTERM, SIGHUP, ──► during training: `stop` is set; the loop finishes its step and saves a checkpoint,
    a closed standard output     within `checkpoint.grace_s`; a second signal ends that
                             ──► then, and anywhere else at once: cancel the run's task; collector, pools, actors,
                                 placement groups go, one after the other
                             ──► a thread that watches: whatever hangs, the process is killed at the deadline

Ctrl-C in a terminal and SIGTERM to a process group also reach the daemons of a Ray of our own. They ignore SIGINT and
exit on SIGTERM; Ray's client then waits a minute for them, or ends this process in its own way. So as soon as one of
them is gone, for whatever reason, an orderly shutdown is impossible: the deadline counts as reached, and the remaining
processes are killed. Those daemons ignore SIGHUP, because they are started by a process that does (`hangups_ignored`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import psutil

from orchestrator.cluster.leftovers import watchers

GRACE_S = 10.0  # for an orderly shutdown
LOOK_EVERY_S = 0.02
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FAILED = 1  # exit code

T = TypeVar("T")


class Stopped(Exception):
    """The loop was asked to end; everything is as the last whole step left it."""


class Stop:
    """Whether the loop was asked to end before the last step of the run."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()

    def ask(self) -> None:
        self._asked.set()

    def raise_if_asked(self) -> None:
        """Raises Stopped if the loop was asked to end: between two phases, when the last step of one is saved."""
        if self._asked.is_set():
            raise Stopped

    async def before(self, work: Awaitable[T]) -> T:
        """The result of `work`. Raises Stopped, `work` cancelled, if the loop is asked to end first."""
        doing = asyncio.ensure_future(work)
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({doing, asked}, return_when=asyncio.FIRST_COMPLETED)
            if doing.done() and not self._asked.is_set():
                return doing.result()
            raise Stopped
        finally:
            for each in (doing, asked):
                each.cancel()
            await asyncio.gather(doing, asked, return_exceptions=True)


class Ending:
    """The end of one run, handled in the main thread. `alive`: whether the cluster still needs a shutdown. `where`: the
    last line for the user. `note` is called with the first signal. `stop`: checked by the loop between steps."""

    def __init__(
        self,
        alive: Callable[[], bool],
        where: Callable[[], str],
        note: Callable[[signal.Signals], None],
        *,
        save_within_s: float = 0.0,
    ) -> None:
        self.signal: signal.Signals | None = None  # the first that came
        self.stop = Stop()
        self._alive, self._where, self._note = alive, where, note
        self._save_within_s = save_within_s
        self._saves = self._shutting_down = False
        self._deadline = 0.0
        self._failure: str | None = None
        self._said = threading.Lock()
        self._task: asyncio.Task[object] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def install_handlers(self) -> None:
        """From here on the first signal ends the task that calls this. To be called after `ray.init`, which installs a
        handler of its own. A signal that this process ignores stays ignored. Outside the main thread no
        handler is installed."""
        self._task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            return
        for each in SIGNALS:
            if signal.getsignal(each) is not signal.SIG_IGN:
                self._loop.add_signal_handler(each, self._end, each)

    def output_closed(self) -> None:
        """Standard output was closed: end the run as a signal would. May be called from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end, signal.SIGPIPE)

    def asked(self) -> None:
        """End the run as SIGTERM would, on a request from outside; one that is ending already is not hurried. Called in
        the event loop."""
        if self.signal is None:
            self._end(signal.SIGTERM)

    def failed(self, what: str) -> None:
        """An orderly shutdown is impossible: end the process at once, with a line that says what failed."""
        if self.signal is None and self._failure is None:
            self._failure = what
            self._begin_to_watch(0.0)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """In this block the first signal only sets `stop`; the run is cancelled if the block has not ended
        `save_within_s` later."""
        self._saves = True
        try:
            yield
        finally:
            self._saves = False
            if self.signal is not None:
                self._shut_down()

    def say(self) -> None:
        """The last line for the user, once."""
        if (self.signal is None and self._failure is None) or not self._said.acquire(blocking=False):
            return
        what = f"stopped by {self.signal.name}" if self.signal else f"the run failed: {self._failure}"
        _print(f"troupe: {what}: {self._where()}")

    def _end(self, received: signal.Signals) -> None:
        if self.signal is None:
            self.signal = received
            self.stop.ask()
            self._note(received)
            if self._saves and self._alive():
                _print(
                    f"troupe: {received.name}: ends its step and saves a checkpoint first, within "
                    f"checkpoint.grace_s={self._save_within_s:g}; a second signal stops it at once"
                )
                self._begin_to_watch(self._save_within_s + GRACE_S)
                asyncio.get_running_loop().call_later(self._save_within_s, self._cancel)
                return
            self._begin_to_watch(GRACE_S)
        self._cancel()

    def _cancel(self) -> None:
        if not self._shutting_down and self._task is not None:
            self._shut_down()
            self._task.cancel()

    def _shut_down(self) -> None:
        """From here on nothing is cancelled, because that would interrupt the shutdown."""
        self._shutting_down = True
        self._deadline = min(self._deadline, time.monotonic() + GRACE_S)

    def _begin_to_watch(self, within_s: float) -> None:
        self._deadline = time.monotonic() + within_s
        threading.Thread(target=self._watch, name="ending", daemon=True).start()

    def _watch(self) -> None:
        """Kills the process and its descendants at the deadline, but for the one that ends what is left of Ray (agents
        of a raylet that died are no descendants any more). Normally all of them have ended before, and this thread
        with them."""
        # Listed now: a process whose parent has died is not found later.
        spared = watchers()
        family = [each for each in psutil.Process().children(recursive=True) if each.pid not in spared]
        while time.monotonic() < self._deadline and self._alive():
            time.sleep(LOOK_EVERY_S)
        self.say()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(128 + self.signal if self.signal else FAILED)


@contextlib.contextmanager
def hangups_ignored() -> Iterator[None]:
    """Processes that are started in this block ignore SIGHUP, so that a closed terminal does not end them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def _print(line: str) -> None:
    """To a terminal that may be gone."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
