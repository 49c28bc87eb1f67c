"""A `Worker` in a process of its own, without Ray: it can hang, be killed, and take down what is in it."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import multiprocessing
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from actors.errors import NoAnswer, WorkerDied
from actors.worker import Ref, consume_exception

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["rewards.environment_worker", "transformers.utils.chat_template_utils", "torch"])


class ProcessWorker:
    """Calls go through a pipe. Async methods run on one loop, `ping` on a thread of its own."""

    def __init__(self, name: str, target: type, kwargs: Mapping[str, Any]) -> None:
        self.name = name
        self._pipe, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=_serve, args=(theirs, target, dict(kwargs)), daemon=True)
        self.process.start()
        theirs.close()
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def where(self) -> str:
        return f"pid {self.process.pid}"

    @property
    def place(self) -> None:
        return None

    async def call(self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, **kwargs: Any) -> Any:
        number, future = next(self._numbers), self._loop.create_future()
        future.add_done_callback(consume_exception)
        self._waiting[number] = future
        try:
            self._pipe.send((number, method, args, kwargs))
        except OSError:
            raise WorkerDied(f"{self.name}.{method}: the worker died") from None
        done, _ = await asyncio.wait({future}, timeout=timeout_s)
        if not done:
            raise NoAnswer(f"{self.name}.{method}: no answer within {timeout_s:g} s")
        return future.result()

    async def call_split(
        self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, refs: int = 1
    ) -> tuple[Any, *tuple[Ref, ...]]:
        first, *others = await self.call(method, *args, timeout_s=timeout_s)
        return first, *map(Ref, others)

    async def kill(self) -> None:
        self.process.kill()
        await asyncio.to_thread(self.process.join, 10.0)

    def _listen(self) -> None:
        """Ends when the process does."""
        try:
            while True:
                number, result, error = self._pipe.recv()
                self._loop.call_soon_threadsafe(self._settle, number, result, error)
        except (EOFError, OSError):
            died = WorkerDied(f"{self.name}: the worker died")
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(lambda: [self._settle(n, None, died) for n in list(self._waiting)])

    def _settle(self, number: int, result: Any, error: BaseException | None) -> None:
        future = self._waiting.pop(number)
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _serve(pipe: Connection, target: type, kwargs: dict[str, Any]) -> None:
    instance, sending = target(**kwargs), threading.Lock()

    async def answer(number: int, method: str, args: Any, given: Any) -> None:
        result, error = None, None
        try:
            called = getattr(instance, method)
            result = called(*args, **given)
            if inspect.isawaitable(result):
                result = await result
        except Exception as raised:
            result, error = None, raised
        with sending:
            pipe.send((number, result, error))

    async def serve() -> None:
        tasks: set[asyncio.Task[None]] = set()
        while True:
            try:
                message = await asyncio.to_thread(pipe.recv)
            except EOFError:
                return
            task = asyncio.ensure_future(answer(*message))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    asyncio.run(serve())
