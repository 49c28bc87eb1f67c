"""Weights by broadcast: NCCL between GPUs, CUDA IPC within a GPU, gloo between CPUs, the same code.

    trainer rank 0                                   member
    OpenCollective: a TCPStore on a free port  ◄──── (host, port) travels in the order
    send: fill bucket k+2 │ k, k+1 in flight ══════► k+1, k+2 into staging │ hash bucket k
          a communicator per broadcast group         the communicator of its broadcast group

A broadcast group is the members of one broadcast; its communicator connects them and the trainer. By default
every member is a group by itself (`topology="each"`), so a member that dies fails its own transfer and delays no other;
`"all"` makes a single group, whose broadcast NCCL distributes over the members' links, and which fails as a whole.
Communicators belong to an epoch, that is to a set of members: both sides build them on the first order of an epoch and
close those of the epoch before. They are private: independent of any default process group.

Who ends a wait: a broadcast ends when the other side joins it, when the other side's process dies (its sockets close),
when the other side gives up (it aborts its groups), or at a deadline. The sender's is a third of the rendezvous', so
that a member that hangs is dropped before the other members' waits for the next bucket time out."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from actors.errors import InfraFailure, first_lines
from rollout.weights.buckets import Staged, bucket_bytes, fill, stage
from rollout.weights.fingerprint import Fingerprint
from rollout.weights.protocol import Rendezvous, SendReport, SyncOrder
from rollout.weights.same_gpu import Handover, SameGpu

SENDER = 0  # the trainer's rank in every communicator; members follow in their order
AHEAD = 2  # buckets in flight, so that filling or hashing one bucket overlaps with the transfer of the next
POLL_S = 0.002
Members = tuple[str, ...]  # of one broadcast group
Flight = dict[Members, dist.Work | Handover]  # the broadcasts of one bucket


def broadcast_groups(rendezvous: Rendezvous) -> list[Members]:
    """Which members share a broadcast."""
    return [(member,) for member in rendezvous.members] if rendezvous.topology == "each" else [rendezvous.members]


@dataclass(frozen=True)
class Communicator:
    """A process group, the device on which buckets are sent or received, and how long a broadcast may take."""

    group: dist.ProcessGroupGloo | dist.ProcessGroupNCCL
    device: torch.device
    timeout: timedelta  # the process group's own: it cannot be changed while a broadcast is under way

    @property
    def kind(self) -> str:
        return type(self.group).__name__

    def broadcast(self, flat: Tensor) -> dist.Work:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = SENDER, 0
        return self.group.broadcast([flat], options)  # pyright: ignore[reportAttributeAccessIssue]: the stubs lack it

    def leave(self) -> None:
        """Abort: a pending `wait` for a broadcast, in this process or at a peer, raises."""
        self.group.abort()


def communicator_kind(devices: list[str]) -> Literal["nccl", "same_gpu", "gloo"]:
    """For ranks on these devices, as `_describe` says them. NCCL where every rank has a GPU of its own: it refuses two
    ranks on one. CUDA IPC for two ranks, the trainer and one member, on one GPU. Else gloo, through the host."""
    if any(device.startswith("cpu") for device in devices):
        return "gloo"
    if len(set(devices)) == len(devices):
        return "nccl"
    return "same_gpu" if len(devices) == 2 else "gloo"


def join(
    store: PrefixStore, rank: int, size: int, device: torch.device, address: str, timeout: timedelta
) -> Communicator | SameGpu:
    """Join the process group that meets at `store`. Blocks until every rank has published its device and, except with
    CUDA IPC, has joined; or raises RuntimeError."""
    kind = communicator_kind([store.get(_device_of(other)).decode() for other in range(size)])
    if kind == "same_gpu":
        return SameGpu(store, rank, device, timeout)
    if kind == "gloo":
        return Communicator(dist.ProcessGroupGloo(store, rank, size, _gloo_options(address, timeout)), device, timeout)
    with _blocking_waits():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return Communicator(dist.ProcessGroupNCCL(store, rank, size, options), device, timeout)


def store_prefix(store: TCPStore, rendezvous: Rendezvous, members: Members) -> PrefixStore:
    """The part of the store in which a broadcast group sets up its communicator, in this epoch."""
    return PrefixStore(f"{rendezvous.epoch}/{'+'.join(members)}", store)


@dataclass
class CollectiveSender:
    """The trainer's side, for one pool of members. Store and groups outlive the orders that use them."""

    store: TCPStore | None = None
    epoch: str = ""
    communicators: dict[Members, Communicator | SameGpu] = field(default_factory=dict)

    def open(self) -> tuple[str, int]:
        """(host, port) of a new store in this process; the system chooses a free port. Called once when a run
        starts; closes what an earlier run in this process left open for the same pool."""
        self.close()
        self.store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, multi_tenant=True)
        return _own_address(), self.store.port  # it listens on every address of this host

    def send(self, order: SyncOrder, weights: Iterable[tuple[str, Tensor]]) -> SendReport:
        """Sends every bucket to every member that has not failed. If `weights` raises half-way, the communicators are
        aborted, so that the members' waits for the remaining buckets raise at once."""
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
                failed |= self._join_epoch(rendezvous, flat.device)
            fingerprint.update(flat)
            if len(flights) == AHEAD:
                failed |= self._land(flights.popleft())
            flights.append({members: each.broadcast(flat) for members, each in self.communicators.items()})
        for flight in flights:
            failed |= self._land(flight)
        delivered = tuple(member for member in rendezvous.members if member not in failed)
        return SendReport(order.version, fingerprint.digest(), delivered, failed, time.perf_counter() - began)

    def _join_epoch(self, rendezvous: Rendezvous, device: torch.device) -> dict[str, str]:
        """Joins a communicator with every broadcast group of the epoch. Returns the members without one, and why."""
        failed: dict[str, str] = {}
        if self.epoch != rendezvous.epoch:
            self._leave()
            self.epoch = rendezvous.epoch
            failed = self._join_groups(rendezvous, device, timedelta(seconds=rendezvous.timeout_s / 3))
        groups = broadcast_groups(rendezvous)
        lost = [member for members in groups if members not in self.communicators for member in members]
        return dict.fromkeys(lost, "failed earlier in this epoch") | failed

    def _join_groups(self, rendezvous: Rendezvous, device: torch.device, timeout: timedelta) -> dict[str, str]:
        """Joins each broadcast group as soon as all its members have published their devices, so that a member that
        never does so delays the others but does not fail them. All groups share one connection to the store, so it is
        polled instead of waited on; the deadline ends the polling."""
        assert self.store is not None
        self.store.set_timeout(timeout)
        failed: dict[str, str] = {}
        pending = {members: store_prefix(self.store, rendezvous, members) for members in broadcast_groups(rendezvous)}
        for store in pending.values():
            store.set(_device_of(SENDER), _describe(device))
        deadline = time.monotonic() + timeout.total_seconds()
        while pending and time.monotonic() < deadline:
            arrived = [
                m for m, store in pending.items() if store.check([_device_of(rank + 1) for rank in range(len(m))])
            ]
            for members in arrived:
                try:
                    store, size = pending.pop(members), len(members) + 1
                    self.communicators[members] = join(store, SENDER, size, device, _own_address(), timeout)
                except RuntimeError as error:
                    failed |= dict.fromkeys(members, f"could not join epoch {rendezvous.epoch}: {first_lines(error)}")
            if not arrived:
                time.sleep(POLL_S)
        absent = [member for members in pending for member in members]
        why = f"did not join epoch {rendezvous.epoch} within {timeout.total_seconds():g} s"
        return failed | dict.fromkeys(absent, why)

    def _land(self, flight: Flight) -> dict[str, str]:
        """Wait for a bucket. A broadcast group that did not receive it is dropped for the rest of the epoch."""
        failed: dict[str, str] = {}
        for members, work in flight.items():
            if members in self.communicators:
                try:
                    work.wait(self.communicators[members].timeout)
                except RuntimeError as error:
                    self.communicators.pop(members).leave()
                    failed |= dict.fromkeys(members, first_lines(error))
        return failed

    def _leave(self) -> None:
        for communicator in self.communicators.values():
            communicator.leave()
        self.communicators, self.epoch = {}, ""

    def close(self) -> None:
        self._leave()
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
    """An export consumer: broadcasts the weights to the members of the order, who are of that pool. Returns a
    SendReport."""

    order: SyncOrder
    pool: str = ""

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> SendReport:
        return _senders[self.pool].send(self.order, weights)


class CollectiveReceiver:
    """A member's side. Staging buffers are kept between syncs, so that no sync waits for memory: the result of
    `receive` is valid until the next one. The connection to the trainer's store is kept, too: to open one, torch
    resolves the names of both ends, which takes seconds without a name server."""

    def __init__(self, member: str, device: torch.device) -> None:
        self._member, self._device = member, device
        self._store: TCPStore | None = None
        self._address: tuple[str, int] | None = None  # of the store
        self._communicator: Communicator | SameGpu | None = None
        self._epoch = ""
        self._staging: list[Tensor] = []

    def receive(self, order: SyncOrder, payload: object = None) -> tuple[Staged, str]:
        if order.rendezvous is None:
            raise ValueError(f"order {order.id} is collective and has no rendezvous")
        try:
            return stage(order.manifest, self._arrivals(order, self._join_epoch(order.rendezvous)), self._device)
        except RuntimeError as error:
            self.close()
            why = f"weights of version {order.version} did not arrive: {first_lines(error)}"
            raise InfraFailure(f"{self._member}: {why}") from None

    def _join_epoch(self, rendezvous: Rendezvous) -> Communicator | SameGpu:
        store = self._connect(rendezvous)
        if self._communicator is None or self._epoch != rendezvous.epoch:
            self._leave()
            (members,) = [members for members in broadcast_groups(rendezvous) if self._member in members]
            prefix, rank = store_prefix(store, rendezvous, members), 1 + members.index(self._member)
            self._check_kind(prefix.get(_device_of(SENDER)).decode())
            prefix.set(_device_of(rank), _describe(self._device))
            timeout, own = timedelta(seconds=rendezvous.timeout_s), _own_address(rendezvous.host)
            self._communicator = join(prefix, rank, len(members) + 1, self._device, own, timeout)
            self._epoch = rendezvous.epoch
        return self._communicator

    def _check_kind(self, sender: str) -> None:
        """Both sides hash the buckets on their device, and the hash of a GPU differs from that of a CPU."""
        kind = sender.partition(" ")[0]
        if kind != self._device.type:
            raise InfraFailure(
                f"{self._member}: the trainer's weights are on {kind}, this engine is on {self._device.type}; set "
                "weights.transport=object_store"
            )

    def _connect(self, rendezvous: Rendezvous) -> TCPStore:
        address, timeout = (rendezvous.host, rendezvous.port), timedelta(seconds=rendezvous.timeout_s)
        if self._store is None or self._address != address:
            self.close()
            self._store = TCPStore(*address, None, False, timeout, wait_for_workers=False, multi_tenant=True)
            self._address = address
        self._store.set_timeout(timeout)
        return self._store

    def _arrivals(self, order: SyncOrder, communicator: Communicator | SameGpu) -> Iterator[Tensor]:
        sizes = [bucket_bytes(bucket) for bucket in order.manifest.buckets()]
        if [flat.numel() for flat in self._staging] != sizes:
            self._staging = [torch.empty(size, dtype=torch.uint8, device=communicator.device) for size in sizes]
        arriving = deque(communicator.broadcast(flat) for flat in self._staging[:AHEAD])
        for index, flat in enumerate(self._staging):
            arriving.popleft().wait()
            if index + AHEAD < len(self._staging):
                arriving.append(communicator.broadcast(self._staging[index + AHEAD]))
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)
            yield flat

    def close(self) -> None:
        """Leave the communicator, so that the trainer's next broadcast fails at the latest."""
        self._leave()
        self._store = None

    def _leave(self) -> None:
        if self._communicator is not None:
            self._communicator.leave()
        self._communicator, self._epoch = None, ""


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


def _gloo_options(address: str, timeout: timedelta) -> Any:
    """Gloo's own choice is the address of the host's name, which on many systems is a loopback address."""
    options = dist.ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]: the stubs lack it
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
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
