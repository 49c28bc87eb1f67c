"""The processes of a tensor-parallel vLLM engine: which of them ended, if one did.

    process 1 is killed ─► watching thread: its rank, its pid, how it ended
                       └─► vLLM's own monitor: ends the other processes ─► the call in flight raises "cancelled"

vLLM says in its log alone which one it was. The thread ends with the first process that does: all of them end with the
engine."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from actors.errors import InfraFailure
from rollout.weights.protocol import TransferFailed

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

NOTICE_S = 1.0  # between the error that the end of a process causes in another one, and the notice of that end


class EngineProcesses:
    """Of an engine that was started with several; one alone is the engine's own, and has nobody to report its end."""

    def __init__(self, llm: LLMEngine) -> None:
        executor: Any = llm.model_executor
        self._workers: list[Any] = getattr(executor, "workers", [])  # `WorkerProcHandle` of vLLM
        self._ended: list[Any] = []  # which had, when the first did
        self._noticed = threading.Event()
        if self._workers:
            threading.Thread(target=self._watch, name="ends of engine processes", daemon=True).start()

    def _watch(self) -> None:
        ended = wait([worker.proc.sentinel for worker in self._workers])
        self._ended = [worker for worker in self._workers if worker.proc.sentinel in ended]
        self._noticed.set()

    @contextmanager
    def named(self) -> Iterator[None]:
        """An error in here raises InfraFailure that says which process has ended, if one has."""
        try:
            yield
        except TransferFailed:  # all processes have answered
            raise
        except Exception as error:
            if self._workers and self._noticed.wait(NOTICE_S):
                raise InfraFailure("; ".join(map(self._end_of, self._ended))) from error
            raise

    def _end_of(self, worker: Any) -> str:
        code = worker.proc.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return f"process {worker.rank} of the engine's {len(self._workers)} (pid {worker.proc.pid}) ended with {how}"
