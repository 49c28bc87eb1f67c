"""Which call of a pool has which slot: the queue for slots of serving members, and members that a call has to itself.

    take ──► queue, oldest first ──► `_hand_out` ◄── notify: a slot is given back, a member joins, the pool ends
    take_alone ──► a member is reserved ──► it finishes what it carries ──► the call has it

There is no deadline here: a wait ends when one of the calls before it does, when too many workers were lost (`fail`),
or, in a pool that was resized to nothing, when it is resized again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from orchestrator.cluster.fleet import Fleet


class Slots:
    """`per_member`: calls that one member carries at the same time; `freed` is called with the member of a slot that
    was given back. Used from one event loop."""

    def __init__(self, fleet: Fleet, per_member: int, *, freed: Callable[[int], None]) -> None:
        self.failure: BaseException | None = None
        self._fleet, self._per_member, self._freed = fleet, per_member, freed
        self._queue: deque[tuple[asyncio.Future[int], frozenset[int]]] = deque()  # calls without a slot, oldest first
        self._changed = asyncio.Event()

    async def take(self, avoid: frozenset[int]) -> int:
        """A serving member with a free slot, which is taken. Calls get slots in the order in which they came;
        `_hand_out` ends the wait."""
        while True:
            slot: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._queue.append((slot, avoid))
            self._hand_out()
            try:
                index = await slot
            except asyncio.CancelledError:
                if slot.done() and not slot.cancelled() and slot.exception() is None:  # cancelled after it got one
                    self.give_back(slot.result(), alone=False)
                raise
            if index in self._fleet.members:  # else it was evicted before this call heard of its slot
                return index

    async def take_alone(self, avoid: frozenset[int]) -> int:
        """A member that carries nothing else until it is given back."""
        while True:
            while (index := self._fleet.reserve(avoid)) is None:
                await self.change()
            try:
                while not self._fleet.emptied(index):
                    await self.change()
            except BaseException:
                self._fleet.free(index)
                self.notify()
                raise
            if self._fleet.serves(index):
                self._fleet.add_load(index, 1)
                return index

    def give_back(self, index: int, alone: bool) -> None:
        self._fleet.add_load(index, -1)
        if alone:
            self._fleet.free(index)
        self.notify()
        self._freed(index)

    def fail(self, error: BaseException) -> None:
        """The pool ends: every call that waits, or comes later, raises `error`."""
        self.failure = error
        self.notify()

    async def change(self) -> None:
        """Waits until the pool's state has changed: ended by `notify`. Raises the pool's failure."""
        if self.failure is not None:
            raise self.failure
        await self._changed.wait()

    def notify(self) -> None:
        """Hand out what is free, and let those who wait for another change look again (each waits on the event that was
        current when it looked last)."""
        self._hand_out()
        self._changed.set()
        self._changed = asyncio.Event()

    def _hand_out(self) -> None:
        """Give free slots to the calls that have waited longest, or the pool's failure to all of them. What a release
        costs thus does not grow with the number of calls that wait."""
        while self._queue:
            slot, avoid = self._queue[0]
            if not slot.done():
                if self.failure is not None:
                    slot.set_exception(self.failure)
                elif (index := self._fleet.pick(self._per_member, avoid)) is not None:
                    self._fleet.add_load(index, 1)
                    slot.set_result(index)
                else:
                    return
            self._queue.popleft()
