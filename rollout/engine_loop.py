"""The thread that owns an engine.

    any thread                              engine thread
    ──────────                              ─────────────
    start() ────────────────────────────►   build the engine
    generate, abort, load ... ── queue ─►   ┌─► drain the queue: add, abort, load, sleep ...
                                            │   one step, if the engine is busy and not paused
    futures ◄────────────────────────────   └── else sleep on the queue

Waits: the engine thread sleeps on the queue until a command wakes it, including `close`; callers wait for their future,
which the engine thread settles. If the engine breaks, the thread ends, and all pending and later futures fail with an
InfraFailure that gives the cause."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from actors.errors import InfraFailure, TroupeError
from rollout.engine import Engine, Finished
from rollout.sampling import Completion, Request
from rollout.weights.protocol import Part, TransferFailed

T = TypeVar("T")
log = logging.getLogger(__name__)

PENDING: Any = object()  # the result of a command whose future is settled later
RATE_WINDOW_S = 10.0


@dataclass(frozen=True)
class _Command:
    """A command for the engine thread. `breaks`: if it fails, the engine must not be used any more."""

    run: Callable[[Engine], Any]
    future: Future[Any]
    breaks: bool = False


class Rate:
    """A total and its recent rate. Written by one thread, read by any."""

    def __init__(self, window_s: float = RATE_WINDOW_S) -> None:
        self.total = 0
        self._window_s = window_s
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def add(self, amount: int) -> None:
        now = time.monotonic()
        self.total += amount
        self._marks.append((now, self.total))
        while len(self._marks) > 2 and self._marks[1][0] < now - self._window_s:
            self._marks.popleft()

    def per_second(self) -> float:
        then, total = self._marks[0]
        return (self.total - total) / max(time.monotonic() - then, 1e-3)


class EngineLoop:
    """A thread-safe interface to an engine, which is not thread-safe. Requests are identified by their id."""

    def __init__(self, name: str, build: Callable[[], Engine]) -> None:
        self.name = name
        self.tokens = Rate()  # of finished samples
        self.version = -1
        self.device: torch.device | None = None  # the engine's, once it is built
        self.paused = False
        self.kv_cache_use: float | None = None  # of the engine's last step
        self.mixed: set[Part] = set()  # parts of which new weights have arrived in part
        self.death: str | None = None  # why the engine has ended
        self._build = build
        self._built: Future[None] = Future()
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._pending: dict[str, Future[list[Completion]]] = {}
        self._dying = threading.Lock()  # so that no command is queued after the queue was drained for the last time
        self._turned = time.monotonic()  # when the last iteration of the loop began
        self._loading = False
        self._thread = threading.Thread(target=self._live, name=f"engine {name}", daemon=True)

    def start(self) -> Future[None]:
        """Begin to build the engine, once; the future is done when the engine is ready."""
        if not self._thread.ident:
            self._thread.start()
        return self._built

    @property
    def requests(self) -> int:
        """How many requests are running or queued."""
        return len(self._pending)

    @property
    def stuck_seconds(self) -> float:
        """For how long the engine thread has been inside one step or command while requests wait for it. New weights
        do not count: they come from other processes, and whoever orders them has a deadline for that."""
        return time.monotonic() - self._turned if self._pending and not (self._stands or self._loading) else 0.0

    @property
    def has_ended(self) -> bool:
        """Whether no engine is here: its thread was not started, or has closed it."""
        return not self._thread.is_alive()

    def generate(self, request: Request) -> Future[list[Completion]]:
        """The request's samples; the same future for an id that is being generated already."""
        future = self._pending.get(request.id)
        if future is None:
            if not self._pending:
                self._turned = time.monotonic()  # it was idle until now, not stuck
            future = self._pending[request.id] = Future()
            future.add_done_callback(lambda _: self._pending.pop(request.id, None))
            self._put(_Command(lambda engine: self._add(engine, request), future))
        return future

    def abort(self, request_ids: Iterable[str]) -> Future[int]:
        """Drop requests; their futures fail with an InfraFailure. Returns how many were being generated."""
        return self.submit(lambda engine: sum(self._abort(engine, request_id) for request_id in request_ids))

    def load(self, take: Callable[[Engine], str], part: Part = "own") -> Future[tuple[str, float]]:
        """Switch to new weights of that part of what the engine holds, between two steps: `take` gives them to the
        engine and returns their fingerprint. Returns it, and for how many seconds decoding paused. If they do not
        arrive whole, requests are kept as in a pause until a later `load` brings all of them; if the engine cannot use
        them, it is shut down."""

        def apply(engine: Engine) -> tuple[str, float]:
            began, self._loading = time.monotonic(), True
            try:
                fingerprint = take(engine)
            except TransferFailed as error:
                if error.begun:
                    self.mixed.add(part)
                raise
            finally:
                self._turned = time.monotonic()  # first: the step that follows counts from here
                self._loading = False
            self.mixed.discard(part)
            self.version = engine.version
            return fingerprint, time.monotonic() - began

        return self.submit(apply, breaks=True)

    def pause(self, paused: bool) -> Future[None]:
        """Stop stepping until `resume`; commands are still executed, and requests in flight are kept."""

        def set_paused(_: Engine) -> None:
            self._turned = time.monotonic()
            self.paused = paused

        return self.submit(set_paused)

    def submit(self, run: Callable[[Engine], T], *, breaks: bool = False) -> Future[T]:
        """Calls `run(engine)` on the engine thread between two steps."""
        future: Future[T] = Future()
        self._put(_Command(run, future, breaks))
        return future

    def close(self, timeout_s: float) -> None:
        """End the thread and the engine. Pending futures fail with an InfraFailure. An engine that does not close in
        time ends with the process."""
        self._commands.put(None)
        if self._thread.ident and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        self._end("closed")

    def _put(self, command: _Command) -> None:
        with self._dying:
            if self.death is None:
                self._commands.put(command)
                return
        _fail(command.future, InfraFailure(f"{self.name}: {self.death}"))

    def _live(self) -> None:
        """The main function of the engine thread."""
        engine: Engine | None = None
        why, cause = "closed", None
        try:
            engine = self._build()
            self.version, self.device = engine.version, engine.device
            self._built.set_result(None)
            self._work(engine)
        except Exception as error:
            why, cause = f"the engine broke: {type(error).__name__}: {error}", error
            log.exception("%s: %s", self.name, why)
        finally:
            self._end(why, cause)
            if engine is not None:
                engine.close()

    def _work(self, engine: Engine) -> None:
        """Alternates commands and steps until `close`."""
        while True:
            asleep = self._stands or not engine.busy
            while asleep or not self._commands.empty():
                command = self._commands.get()  # ended by any command
                if command is None:
                    return
                self._turned = time.monotonic()
                self._carry_out(command, engine)
                asleep = False
            if engine.busy and not self._stands:
                for finished in engine.step():
                    self._finish(finished)
                self.kv_cache_use = getattr(engine, "kv_cache_use", None)  # engines of users need not say
            self._turned = time.monotonic()

    @property
    def _stands(self) -> bool:
        return self.paused or bool(self.mixed)

    def _carry_out(self, command: _Command, engine: Engine) -> None:
        try:
            result = command.run(engine)
        except Exception as error:
            breaks = command.breaks and not isinstance(error, TransferFailed)
            known = isinstance(error, TroupeError) and not breaks
            _fail(command.future, error if known else InfraFailure(f"{self.name}: {type(error).__name__}: {error}"))
            if breaks:
                raise
        else:
            if result is not PENDING:
                _succeed(command.future, result)

    def _add(self, engine: Engine, request: Request) -> Any:
        if request.id in self._pending:  # otherwise it was aborted while it was queued
            engine.add(request)
        return PENDING

    def _abort(self, engine: Engine, request_id: str) -> bool:
        future = self._pending.get(request_id)
        if future is None:
            return False
        engine.abort(request_id)
        return _fail(future, InfraFailure(f"{self.name}: request {request_id} was aborted"))

    def _finish(self, finished: Finished) -> None:
        self.tokens.add(sum(len(completion.tokens) for completion in finished.completions))
        _succeed(self._pending[finished.request.id], finished.completions)

    def _end(self, why: str, cause: Exception | None = None) -> None:
        """Settle every future that is pending; from now on `_put` settles them at once."""
        with self._dying:
            if self.death is not None:
                return
            self.death = why
        error = InfraFailure(f"{self.name}: {why}")
        _fail(self._built, cause or error)  # unchanged: an invalid model folder is the user's error
        for future in list(self._pending.values()):
            _fail(future, error)
        while not self._commands.empty():
            if (command := self._commands.get()) is not None:
                _fail(command.future, error)


def _succeed(future: Future[Any], result: Any) -> None:
    with suppress(InvalidStateError):  # another thread settled it first
        future.set_result(result)


def _fail(future: Future[Any], error: Exception) -> bool:
    """True unless the future was already settled."""
    try:
        future.set_exception(error)
    except InvalidStateError:
        return False
    return True
