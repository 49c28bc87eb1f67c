"""Weights by broadcast: NCCL between GPUs, gloo between CPUs, the same code.

    trainer rank 0                                   member
    OpenCollective: a TCPStore on a free port  ◄──── (host, port) travels in the order
    send: fill bucket k+2 │ k, k+1 in flight ══════► k+1, k+2 into staging │ hash bucket k
          one process group per circle               the process group of its circle

A circle is the trainer and the members that one broadcast serves. By default every member has one of its own
(`topology="each"`), so one that dies fails its own transfer and holds up nobody; `"all"` makes a single one, whose
broadcast NCCL spreads over the members' links, and which breaks as a whole. Circles belong to an epoch, that is to a
set of members: both sides build them on the first order of an epoch and drop those of the epoch before. They are
private: independent of any default group of the process.

Who ends a wait: a broadcast ends when the other side joins it, when the other side's process dies (its sockets close),
when the other side gives up (it aborts its groups), or at a deadline. The sender's is a third of the rendezvous', so
that a member that hangs is dropped before the others, who wait for their next bucket, run into theirs.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from actors.errors import InfraFailure
from rollout.weights.buckets import Staged, bucket_bytes, fill, stage
from rollout.weights.fingerprint import Fingerprint
from rollout.weights.protocol import Rendezvous, SendReport, SyncOrder

SENDER = 0  # the trainer's rank in every circle; members follow in their order
AHEAD = 2  # buckets in flight: a side that fills or hashes one must not keep the other waiting
LOOK_EVERY_S = 0.002
Circle = tuple[str, ...]
Flight = dict[Circle, dist.Work]  # one bucket on its way


def circles(rendezvous: Rendezvous) -> list[Circle]:
    """Which members share a broadcast."""
    return [(member,) for member in rendezvous.members] if rendezvous.topology == "each" else [rendezvous.members]


@dataclass(frozen=True)
class Seat:
    """A process' place in a circle: its group, the device on which buckets are sent or arrive, and how long a broadcast
    may take."""

    group: dist.ProcessGroupGloo | dist.ProcessGroupNCCL
    device: torch.device
    patience: timedelta  # the group's own: it cannot be let go of while a broadcast is under way

    def broadcast(self, flat: Tensor) -> dist.Work:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = SENDER, 0
        return self.group.broadcast([flat], options)  # pyright: ignore[reportAttributeAccessIssue]: the stubs lack it

    def leave(self) -> None:
        """Whoever waits for a broadcast with this process, here or at the other side, is told that none will come."""
        self.group.abort()


def sit(room: PrefixStore, rank: int, size: int, device: torch.device, address: str, patience: timedelta) -> Seat:
    """Take a seat in a circle. Blocks until everybody has said what device they have and sits, or raises RuntimeError.

    NCCL where everybody has a GPU to themselves, else gloo: NCCL refuses two ranks on one GPU."""
    devices = {room.get(_device_of(other)) for other in range(size)}
    if device.type == "cpu" or len(devices) < size:
        return Seat(dist.ProcessGroupGloo(room, rank, size, _gloo_options(address, patience)), device, patience)
    with _blocking_waits():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = patience
        return Seat(dist.ProcessGroupNCCL(room, rank, size, options), device, patience)


def room_of(store: TCPStore, rendezvous: Rendezvous, circle: Circle) -> PrefixStore:
    """Where a circle exchanges what it needs to sit down, in this epoch."""
    return PrefixStore(f"{rendezvous.epoch}/{'+'.join(circle)}", store)


@dataclass
class CollectiveSender:
    """The trainer's side. One per process (`_sender`): store and groups outlive the orders that use them."""

    store: TCPStore | None = None
    epoch: str = ""
    seats: dict[Circle, Seat] = field(default_factory=dict)

    def open(self) -> tuple[str, int]:
        """(host, port) of a new store in this process; no port is guessed, none is raced for. A run begins with it:
        what an earlier one in this process left is closed."""
        self.close()
        self.store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, multi_tenant=True)
        return _own_address(), self.store.port  # it listens on every address of this host

    def send(self, order: SyncOrder, weights: Iterable[tuple[str, Tensor]]) -> SendReport:
        """Every bucket to every member that has not failed. If the weights end half-way, the members, who wait for the
        rest, learn it at once."""
        if order.rendezvous is None or self.store is None:
            raise ValueError(f"order {order.id} is collective: it needs a rendezvous, and `OpenCollective` before it")
        try:
            return self._send(order, order.rendezvous, weights)
        except BaseException:
            self._leave()
            raise

    def _send(self, order: SyncOrder, rendezvous: Rendezvous, weights: Iterable[tuple[str, Tensor]]) -> SendReport:
        """Up to `AHEAD` buckets are in flight while the next one is filled."""
        began, failed = time.perf_counter(), dict[str, str]()
        fingerprint, flights = Fingerprint(), deque[Flight]()
        for index, flat in enumerate(fill(order.manifest, weights, buffers=AHEAD + 1)):
            if index == 0:
                failed |= self._meet(rendezvous, flat.device)
            fingerprint.update(flat)
            if len(flights) == AHEAD:
                failed |= self._land(flights.popleft())
            flights.append({circle: seat.broadcast(flat) for circle, seat in self.seats.items()})
        for flight in flights:
            failed |= self._land(flight)
        delivered = tuple(member for member in rendezvous.members if member not in failed)
        return SendReport(order.version, fingerprint.digest(), delivered, failed, time.perf_counter() - began)

    def _meet(self, rendezvous: Rendezvous, device: torch.device) -> dict[str, str]:
        """A seat in every circle of the epoch. Returns who is in none, and why."""
        failed: dict[str, str] = {}
        if self.epoch != rendezvous.epoch:
            self._leave()
            self.epoch = rendezvous.epoch
            failed = self._sit_down(rendezvous, device, timedelta(seconds=rendezvous.timeout_s / 3))
        lost = [member for circle in circles(rendezvous) if circle not in self.seats for member in circle]
        return dict.fromkeys(lost, "was lost in this epoch") | failed

    def _sit_down(self, rendezvous: Rendezvous, device: torch.device, patience: timedelta) -> dict[str, str]:
        """Sits down with whoever has come, so that one who does not come costs the others nothing but the wait. One
        connection serves all, hence looking instead of waiting; the deadline ends it."""
        assert self.store is not None
        self.store.set_timeout(patience)
        failed: dict[str, str] = {}
        rooms = {circle: room_of(self.store, rendezvous, circle) for circle in circles(rendezvous)}
        for room in rooms.values():
            room.set(_device_of(SENDER), _describe(device))
        deadline = time.monotonic() + patience.total_seconds()
        while rooms and time.monotonic() < deadline:
            come = [c for c, room in rooms.items() if room.check([_device_of(rank + 1) for rank in range(len(c))])]
            for circle in come:
                try:
                    size = len(circle) + 1
                    self.seats[circle] = sit(rooms.pop(circle), SENDER, size, device, _own_address(), patience)
                except RuntimeError as error:
                    failed |= dict.fromkeys(circle, f"broke off in epoch {rendezvous.epoch}: {_first_line(error)}")
            if not come:
                time.sleep(LOOK_EVERY_S)
        absent = [member for circle in rooms for member in circle]
        why = f"did not come to epoch {rendezvous.epoch} within {patience.total_seconds():g} s"
        return failed | dict.fromkeys(absent, why)

    def _land(self, flight: Flight) -> dict[str, str]:
        """Wait for a bucket in flight; a circle that did not take it is dropped for the rest of the epoch."""
        failed: dict[str, str] = {}
        for circle, work in flight.items():
            if circle in self.seats:
                try:
                    work.wait(self.seats[circle].patience)
                except RuntimeError as error:
                    self.seats.pop(circle).leave()
                    failed |= dict.fromkeys(circle, _first_line(error))
        return failed

    def _leave(self) -> None:
        for seat in self.seats.values():
            seat.leave()
        self.seats, self.epoch = {}, ""

    def close(self) -> None:
        self._leave()
        self.store = None


_sender = CollectiveSender()  # of this process, if it is a trainer's rank 0


@dataclass(frozen=True)
class OpenCollective:
    """To be run in the trainer's process, once per run: binds the store. Returns (host, port)."""

    def __call__(self) -> tuple[str, int]:
        return _sender.open()


@dataclass(frozen=True)
class CollectiveSend:
    """An export consumer: broadcasts the weights to the members of the order. Returns a SendReport."""

    order: SyncOrder

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> SendReport:
        return _sender.send(self.order, weights)


class CollectiveReceiver:
    """A member's side. Staging buffers are kept between syncs, so that no sync waits for memory: what `receive` returns
    is valid until the next one. So is the connection to the trainer's store: to make one, torch looks up the names of
    both ends, which takes seconds where nobody answers."""

    def __init__(self, member: str, device: torch.device) -> None:
        self._member, self._device = member, device
        self._store: TCPStore | None = None
        self._address: tuple[str, int] | None = None  # of the store
        self._seat: Seat | None = None
        self._epoch = ""
        self._staging: list[Tensor] = []

    def receive(self, order: SyncOrder, payload: object = None) -> tuple[Staged, str]:
        if order.rendezvous is None:
            raise ValueError(f"order {order.id} is collective and has no rendezvous")
        try:
            return stage(order.manifest, self._arrivals(order, self._meet(order.rendezvous)), self._device)
        except RuntimeError as error:
            self.close()
            why = f"weights of version {order.version} did not arrive: {_first_line(error)}"
            raise InfraFailure(f"{self._member}: {why}") from None

    def _meet(self, rendezvous: Rendezvous) -> Seat:
        store = self._connect(rendezvous)
        if self._seat is None or self._epoch != rendezvous.epoch:
            self._leave()
            (circle,) = [circle for circle in circles(rendezvous) if self._member in circle]
            room, rank = room_of(store, rendezvous, circle), 1 + circle.index(self._member)
            self._check_kind(room.get(_device_of(SENDER)).decode())
            room.set(_device_of(rank), _describe(self._device))
            patience = timedelta(seconds=rendezvous.timeout_s)
            self._seat = sit(room, rank, len(circle) + 1, self._device, _own_address(rendezvous.host), patience)
            self._epoch = rendezvous.epoch
        return self._seat

    def _check_kind(self, sender: str) -> None:
        """Both sides hash the buckets where they are, and a GPU hashes otherwise than a CPU does."""
        kind = sender.partition(" ")[0]
        if kind != self._device.type:
            raise InfraFailure(
                f"{self._member}: the trainer's weights are on {kind}, this engine is on {self._device.type}; set "
                "weights.transport=object_store"
            )

    def _connect(self, rendezvous: Rendezvous) -> TCPStore:
        address, patience = (rendezvous.host, rendezvous.port), timedelta(seconds=rendezvous.timeout_s)
        if self._store is None or self._address != address:
            self.close()
            self._store = TCPStore(*address, None, False, patience, wait_for_workers=False, multi_tenant=True)
            self._address = address
        self._store.set_timeout(patience)
        return self._store

    def _arrivals(self, order: SyncOrder, seat: Seat) -> Iterator[Tensor]:
        sizes = [bucket_bytes(bucket) for bucket in order.manifest.buckets()]
        if [flat.numel() for flat in self._staging] != sizes:
            self._staging = [torch.empty(size, dtype=torch.uint8, device=seat.device) for size in sizes]
        arriving = deque(seat.broadcast(flat) for flat in self._staging[:AHEAD])
        for index, flat in enumerate(self._staging):
            arriving.popleft().wait()
            if index + AHEAD < len(self._staging):
                arriving.append(seat.broadcast(self._staging[index + AHEAD]))
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)
            yield flat

    def close(self) -> None:
        """Leave the circle; the trainer learns it with its next bucket, at the latest."""
        self._leave()
        self._store = None

    def _leave(self) -> None:
        if self._seat is not None:
            self._seat.leave()
        self._seat, self._epoch = None, ""


_making_nccl = threading.Lock()


@contextmanager
def _blocking_waits() -> Iterator[None]:
    """NCCL groups made in here raise in `wait` when a deadline passes or a peer dies. The default, read from the
    environment when a group is made, is to let `wait` pass and to end the whole process later."""
    with _making_nccl:
        before = os.environ.get("TORCH_NCCL_BLOCKING_WAIT")
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
        try:
            yield
        finally:
            del os.environ["TORCH_NCCL_BLOCKING_WAIT"]
            if before is not None:
                os.environ["TORCH_NCCL_BLOCKING_WAIT"] = before


def _gloo_options(address: str, patience: timedelta) -> Any:
    """Gloo's own choice is the address of the host's name, which on many systems is a loopback address."""
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]: the stubs lack it
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = patience
    return options


def _device_of(rank: int) -> str:
    return f"device/{rank}"


def _describe(device: torch.device) -> str:
    """`cpu`, or `cuda` and which GPU of the world it is."""
    return device.type if device.type == "cpu" else f"{device.type} {torch.cuda.get_device_properties(device).uuid}"


def _own_address(towards: str = "192.0.2.1") -> str:
    """The address under which a host, or (by default) other nodes, reach this one; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # the default is a documentation address: only the route is looked up
            return str(probe.getsockname()[0])
        except OSError:  # no route but loopback: everything is on this machine
            return "127.0.0.1"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
