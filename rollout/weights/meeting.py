"""Where the two ends of a link meet, in the trainer's store, and how all learn that a receiver is lost.

    parent                                     child
    process/0, device/0        ─► the store ─►
                               ◄───────────    process/1, device/1
    joins: it joins this child ───────────►    joins

    lost/ORDER/RECEIVER: it will not get all of that order's weights. Set by itself, by its parent, or by the driver.

A child that waits for its parent, and a parent that waits for its child, look there all the time. So the end of a
process before it has joined its links holds up nobody for longer than the driver needs to notice it."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from actors.errors import first_lines
from rollout.weights.protocol import Link
from rollout.weights.same_gpu import describe_process, has_ended

PARENT, CHILD = 0, 1  # ranks of a link
POLL_S = 0.002


def left(deadline: float) -> timedelta:
    """Until that moment of the monotonic clock; a moment, if it has passed."""
    return timedelta(seconds=max(0.001, deadline - time.monotonic()))


@dataclass(frozen=True)
class Losses:
    """Of an order: who will not get all of its weights, so that nobody needs to wait for these."""

    store: TCPStore
    order_id: str

    def tell(self, receiver: str) -> None:
        with suppress(RuntimeError):  # the store is gone with the trainer: all are told
            self.store.set(self._key(receiver), "")

    def include(self, receiver: str) -> bool:
        return self.store.check([self._key(receiver)])

    def _key(self, receiver: str) -> str:
        return f"lost/{self.order_id}/{receiver}"


def report_losses(address: tuple[str, int], order_id: str, receivers: tuple[str, ...], timeout_s: float) -> str:
    """`Losses.tell` of the receivers, from a process that has no link. Returns why it could not; empty: it could. It
    does not return while the process of the store is stopped."""
    try:
        timeout = timedelta(seconds=timeout_s)
        store = TCPStore(*address, None, False, timeout, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        return first_lines(error)
    for receiver in receivers:
        Losses(store, order_id).tell(receiver)
    return ""


class Meeting:
    """Of the ends of a link. A link that its parent has dropped, although the child has all weights, is joined anew:
    what the ends have said before is out of date, so they meet at another place."""

    def __init__(self, store: TCPStore, link: Link) -> None:
        self.link = link
        self._store, self._drops = store, store.add(f"drops/{link.id}", 0)
        self.place = PrefixStore(f"{link.id}/{self._drops}", store)
        self._processes: dict[int, str] = {}  # of the ends, as they were read

    @property
    def is_over(self) -> bool:
        """The parent has dropped the link. It does that within an order, and the child looks before the next one."""
        return self._store.add(f"drops/{self.link.id}", 0) != self._drops

    def drop(self) -> None:
        with suppress(RuntimeError):  # the store is gone with the trainer, and the link with it
            self._store.add(f"drops/{self.link.id}", 1)

    def announce(self, rank: int, device: torch.device) -> None:
        """This end is there: its process and the device of its buckets, as `device_of` and `process_of` give them."""
        self.place.set(f"process/{rank}", describe_process())
        self.place.set(f"device/{rank}", describe(device))  # last: whoever has come has said both

    def has_come(self, rank: int) -> bool:
        return self.place.check([f"device/{rank}"])

    def device_of(self, rank: int) -> str:
        return self.place.get(f"device/{rank}").decode()

    def process_of(self, rank: int) -> str:
        if rank not in self._processes:
            self._processes[rank] = self.place.get(f"process/{rank}").decode()
        return self._processes[rank]

    def begin(self) -> None:
        """The parent joins the link now."""
        self.place.set("joins", "")

    def check_process(self, rank: int) -> None:
        """Raises RuntimeError if the process of that end, which has come, has ended since."""
        if has_ended(self.process_of(rank)):
            which = f"{self._parent}, which was to send them," if rank == PARENT else self.link.child
            raise RuntimeError(f"the process of {which} has ended")

    @property
    def _parent(self) -> str:
        return self.link.parent or "the trainer"

    def await_parent(self, losses: Losses, deadline: float, *, joins: bool = False) -> None:
        """Until the parent has come, or joins. Raises RuntimeError if it is lost or has ended, and at the deadline."""
        began = time.monotonic()
        while not self.place.check(["joins"] if joins else [f"device/{PARENT}"]):
            if losses.include(self.link.parent):
                raise RuntimeError(f"{self._parent}, which was to send them, is lost")
            if joins:
                self.check_process(PARENT)
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self._parent} did not come within {max(0.0, deadline - began):g} s")
            time.sleep(POLL_S)


def describe(device: torch.device) -> str:
    """`cpu`, or `cuda` and which GPU of the world it is."""
    return device.type if device.type == "cpu" else f"{device.type} {torch.cuda.get_device_properties(device).uuid}"
