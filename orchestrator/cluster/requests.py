"""Requests to a running job from outside, kept until the loop is between two steps.

RUN/requests ──► update() ──► the loop, between two steps: a checkpoint that was asked for, then the pause

Each request has a ticket, and one event answers it, also where another client has asked for the opposite meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from orchestrator.cluster.control import Desired


class Requests:
    """Of one run. `stop` is called once, at the first request to stop."""

    def __init__(self, stop: Callable[[], None]) -> None:
        self._stop: Callable[[], None] | None = stop
        self._checkpoints: dict[str, None] = {}  # tickets, in order
        self._pauses: dict[str, bool] = {}  # ticket -> whether to hold, in order
        self._answered: set[str] = set()
        self._changed = asyncio.Event()

    @property
    def checkpoints(self) -> list[str]:
        """Tickets of the checkpoints that were asked for and are not written yet."""
        return [ticket for ticket in self._checkpoints if ticket not in self._answered]

    @property
    def pauses(self) -> list[str]:
        """Tickets of the requests to hold or to go on that are not answered yet."""
        return [ticket for ticket in self._pauses if ticket not in self._answered]

    @property
    def paused(self) -> bool:
        """What the last of them was."""
        return next(reversed(self._pauses.values()), False)

    def update(self, desired: Desired) -> None:
        before = len(self._pauses) + len(self._checkpoints)
        self._pauses.update(desired.pauses)
        self._checkpoints.update(dict.fromkeys(desired.checkpoints))
        if len(self._pauses) + len(self._checkpoints) > before:
            self._changed.set()
        if desired.stop and self._stop is not None:
            stop, self._stop = self._stop, None
            stop()

    def answered(self, tickets: list[str]) -> None:
        self._answered.update(tickets)

    async def changed(self) -> None:
        """Until something is asked that was not before the last call. `update` ends this wait, or the run's Stop, which
        cancels it."""
        await self._changed.wait()
        self._changed.clear()  # not before: something may have been asked since the caller looked
