"""Weights by broadcast, down a tree of links (`links.py`) that the driver plans (`orchestrator/publishing/tree.py`).

    trainer rank 0                     receiver                            receiver
    OpenCollective: a TCPStore on a free port; (host, port) travels in the order
    fill bucket k+1 │ k in flight ═══► k+1 arrives │ k: hash, load ══════► k arrives │ k-1: hash, load

Every process has two buckets: one that it works on, and which its children get meanwhile, and the next one. So a
receiver that is slow, or hangs, holds up its parent, and all the others, until its parent drops it."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rollout.weights.buckets import Incoming, bucket_bytes, fill
from rollout.weights.fingerprint import Fingerprint
from rollout.weights.links import Connection, Downlinks, Flight, finish, join, own_address
from rollout.weights.meeting import CHILD, PARENT, Losses, Meeting, left
from rollout.weights.protocol import SENDER, Rendezvous, SendReport, SyncOrder, TransferFailed

BUFFERS = 2  # buckets of a process


@dataclass
class CollectiveSender:
    """The trainer's side, for one pool of members. Store and links outlive the orders that use them."""

    store: TCPStore | None = None
    links: Downlinks = field(default_factory=lambda: Downlinks(SENDER))

    def open(self) -> tuple[str, int]:
        """(host, port) of a new store in this process; the system chooses a free port. Called once when a run
        starts; closes what an earlier run in this process left open for the same pool."""
        self.close()
        self.store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, multi_tenant=True)
        return own_address(), self.store.port  # it listens on every address of this host

    def send(self, order: SyncOrder, weights: Iterable[tuple[str, Tensor]]) -> SendReport:
        """`send_buckets` of the weights. If they raise half-way, the links are left, so that the receivers' waits for
        the remaining buckets raise at once."""
        return self.send_buckets(order, fill(order.manifest, weights, buffers=BUFFERS))

    def send_buckets(self, order: SyncOrder, buckets: Iterable[Tensor]) -> SendReport:
        """Sends every bucket to the trainer's own children that have not failed. A bucket must not change until the
        next but one is asked for."""
        if order.rendezvous is None or self.store is None:
            raise ValueError(f"order {order.id} is collective: it needs a rendezvous, and `OpenCollective` before it")
        try:
            return self._send(order, order.rendezvous, buckets)
        except BaseException:
            self.links.leave()
            raise

    def _send(self, order: SyncOrder, rendezvous: Rendezvous, buckets: Iterable[Tensor]) -> SendReport:
        assert self.store is not None
        began, fingerprint, flights = time.monotonic(), Fingerprint(), deque[Flight]()
        deadline = began + rendezvous.timeout_s
        self.store.set_timeout(left(deadline))
        for index, flat in enumerate(buckets):
            if index == 0:
                self.links.join(self.store, order.id, rendezvous, flat.device, deadline)
            flights.append(self.links.send(flat))
            fingerprint.update(flat)
            if len(flights) == BUFFERS:
                self.links.land(flights.popleft())
        for flight in flights:
            self.links.land(flight)
        children = (link.child for link in rendezvous.links if link.parent == SENDER)
        delivered, failed = tuple(child for child in children if child not in self.links.failed), self.links.failed
        return SendReport(order.version, fingerprint.digest(), delivered, failed, time.monotonic() - began)

    def close(self) -> None:
        self.links.leave()
        self.store = None


_senders: defaultdict[str, CollectiveSender] = defaultdict(CollectiveSender)  # of this process, by pool


@dataclass(frozen=True)
class OpenCollective:
    """Runs in the trainer's process, once per run: binds the store. Returns (host, port).

    `pool`: whom it serves. A process may send to several pools, each with a store and members of its own."""

    pool: str = ""

    def __call__(self) -> tuple[str, int]:
        return _senders[self.pool].open()


@dataclass(frozen=True)
class CollectiveSend:
    """An export consumer: broadcasts the weights to the receivers of the order, who are of that pool. Returns a
    SendReport."""

    order: SyncOrder
    pool: str = ""

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> SendReport:
        return _senders[self.pool].send(self.order, weights)


class CollectiveReceiver:
    """A receiver's side. The connection to the trainer's store is kept between orders: to open one, torch resolves the
    names of both ends, which takes seconds without a name server."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self._device = name, device
        self._store: TCPStore | None = None
        self._address: tuple[str, int] | None = None  # of the store
        self._uplink: tuple[Meeting, Connection] | None = None
        self._downlinks = Downlinks(name)

    def receive(self, order: SyncOrder, payload: object = None) -> Incoming:
        if order.rendezvous is None:
            raise ValueError(f"order {order.id} is collective and has no rendezvous")
        what = f"{self.name}: weights of version {order.version} did not arrive"
        return Incoming(order.manifest, self._arrivals(order, order.rendezvous), self._device, what)

    def _arrivals(self, order: SyncOrder, rendezvous: Rendezvous) -> Iterator[Tensor]:
        """The buckets. If they end early, whoever ends them, the links are left: the other ends are told at once."""
        deadline = time.monotonic() + rendezvous.timeout_s - rendezvous.waited_s
        try:
            sizes = [bucket_bytes(bucket) for bucket in order.manifest.buckets()]
            yield from self._relayed(*self._join(order.id, rendezvous, deadline), sizes, deadline)
        except BaseException:
            self._leave()
            if self._store is not None:
                Losses(self._store, order.id).tell(self.name)
            raise

    def _relayed(self, meeting: Meeting, uplink: Connection, sizes: list[int], deadline: float) -> Iterator[Tensor]:
        """Buckets of those sizes, each with memory of its own; the children get them, too."""
        look = partial(meeting.check_process, PARENT)
        coming = (torch.empty(size, dtype=torch.uint8, device=uplink.device) for size in sizes)
        arriving = deque((flat, uplink.broadcast(flat)) for flat in islice(coming, 1))
        flight: Flight | None = None
        while arriving:
            if flight is not None:
                self._downlinks.land(flight)
                flight = None  # and with it the memory that comes next
            arriving.extend((flat, uplink.broadcast(flat)) for flat in islice(coming, 1))
            flat, work = arriving.popleft()
            began = time.monotonic()
            finish(work, uplink, began, max(0.001, deadline - began), look)
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)
            flight = self._downlinks.send(flat)
            yield flat
            del flat, work  # which holds it, too
        if flight is not None:
            self._downlinks.land(flight)

    def _join(self, order_id: str, rendezvous: Rendezvous, deadline: float) -> tuple[Meeting, Connection]:
        """Joins the link to its parent, and those to its children: where this one has buckets, they have them."""
        store = self._connect(rendezvous, deadline)
        (link,) = (link for link in rendezvous.links if link.child == self.name)
        if self._uplink is None or self._uplink[0].link.id != link.id or self._uplink[0].is_over:
            self._leave_uplink()
            meeting = Meeting(store, link)
            self._uplink = meeting, self._meet(meeting, Losses(store, order_id), rendezvous, deadline)
        self._downlinks.join(store, order_id, rendezvous, self._uplink[1].device, deadline)
        return self._uplink

    def _meet(self, meeting: Meeting, losses: Losses, rendezvous: Rendezvous, deadline: float) -> Connection:
        meeting.await_parent(losses, deadline)
        device = self._device_of_buckets(meeting.device_of(PARENT))
        meeting.announce(CHILD, device)
        meeting.await_parent(losses, deadline, joins=True)
        losses.store.set_timeout(left(deadline))  # for which NCCL waits when it joins, with the first bucket
        timeout = timedelta(seconds=rendezvous.timeout_s)
        return join(meeting, CHILD, device, own_address(rendezvous.host), timeout, deadline)

    def _device_of_buckets(self, parent: str) -> torch.device:
        """Where the parent has them: all hash them on their device, and the hash of a GPU differs from a CPU's."""
        kind = parent.partition(" ")[0]
        if kind == "cpu":
            return torch.device("cpu")
        if kind != self._device.type:
            raise TransferFailed(
                f"{self.name}: the trainer's weights are on {kind}, this engine is on {self._device.type}; set "
                "weights.transport=object_store"
            )
        return self._device

    def _connect(self, rendezvous: Rendezvous, deadline: float) -> TCPStore:
        address = rendezvous.host, rendezvous.port
        if self._store is None or self._address != address or not _answers(self._store):
            self.close()
            self._store = TCPStore(*address, None, False, left(deadline), wait_for_workers=False, multi_tenant=True)
            self._address = address
        self._store.set_timeout(left(deadline))
        return self._store

    def close(self) -> None:
        self._leave()
        self._store = None

    def _leave(self) -> None:
        """Leave all links, so that the next broadcast fails at both ends at the latest."""
        self._leave_uplink()
        self._downlinks.leave()

    def _leave_uplink(self) -> None:
        if self._uplink is not None:
            self._uplink[1].leave()
        self._uplink = None


def _answers(store: TCPStore) -> bool:
    try:
        store.check(["?"])
    except RuntimeError:
        return False
    return True
