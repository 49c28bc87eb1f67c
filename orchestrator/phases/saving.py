"""The checkpoints of a phase, written while its training goes on; at most one is on its way.

step ends ──► begin: every rank begins to copy ──► the next step; a rank waits in it, before its weights
                │    (the driver's parts are taken)               change, until its copy is ready
                └──► ranks write and hash ──► manifest, rename (`orchestrator/checkpoint.py`) ──► event, answers
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from actors.errors import TroupeError
from actors.saved_state import Seal
from orchestrator.checkpoint import RunState
from orchestrator.phases.run_context import RunContext

SETTLE_S = 30.0  # for a checkpoint that is being written when the run fails

Sealed = dict[str, Seal]
Write = Callable[[Path, Callable[[], None]], Awaitable[Sealed]]


class Saving:
    """`write(folder, taken)` fills a folder, and calls `taken` when everything that the checkpoint holds is copied, or
    will be before it changes."""

    def __init__(self, context: RunContext, write: Write) -> None:
        self._context, self._write = context, write
        self._task: asyncio.Task[None] | None = None
        self._total_step = -1  # of the checkpoint that is being written
        self._tickets: list[str] = []  # requests that it answers

    @property
    def asked(self) -> list[str]:
        """Requests for a checkpoint that no save has been begun for."""
        return [ticket for ticket in self._context.requests.checkpoints if ticket not in self._tickets]

    async def begin(self, state: RunState) -> None:
        """Begin to save this step, unless there is a checkpoint of it. Waits for the one before. Raises its error, or
        this one's if it fails at once."""
        context = self._context
        if self._task is None or self._total_step != state.total_step:
            await self.ended()
        self._tickets += self.asked
        last = context.last_checkpoint
        if last is not None and last.state.total_step == state.total_step:  # it was resumed from, or has ended
            self._report(time.monotonic(), 0.0)
            return
        if self._total_step == state.total_step:  # its end answers
            return
        taken = asyncio.Event()
        self._total_step = state.total_step
        self._task = asyncio.ensure_future(self._save(state, taken))
        waiting = asyncio.ensure_future(taken.wait())
        try:
            await asyncio.wait({self._task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        await self.raise_error()

    async def ended(self) -> None:
        """Returns when no checkpoint is being written. Raises what went wrong with the last one."""
        if self._task is not None:
            task = self._task
            try:
                await task
            finally:
                if task.done():
                    self._task = None

    async def raise_error(self) -> None:
        """If the last one has failed."""
        if self._task is not None and self._task.done():
            await self.ended()

    async def settle(self) -> None:
        """For a run that fails: waits a while for the checkpoint that is being written. Errors of that are ignored: the
        error that ended the run is the one to report."""
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=SETTLE_S)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError, TroupeError, OSError):
                await self._task
            self._task = None

    async def _save(self, state: RunState, taken: asyncio.Event) -> None:
        began, stood_still = time.monotonic(), list[float]()

        def all_taken() -> None:
            stood_still.append(time.monotonic() - began)
            taken.set()

        async def fill(folder: Path) -> Sealed:
            return await self._write(folder, all_taken)

        self._context.last_checkpoint = await self._context.store.write(fill, state)
        self._report(began, stood_still[0])

    def _report(self, began: float, stood_still_s: float) -> None:
        context, tickets = self._context, self._tickets
        self._tickets = []
        assert context.last_checkpoint is not None
        context.requests.answered(tickets)
        detail: dict[str, Any] = {
            "step": context.last_checkpoint.state.total_step,
            "seconds": round(time.monotonic() - began, 3),
            "stood_still_s": round(stood_still_s, 4),  # the driver; what a rank waits for its copy is in `time/step`
            "path": str(context.last_checkpoint.path.resolve()),  # readers have other working directories
            "asked": tickets,
        }
        context.event("checkpoint", detail)
