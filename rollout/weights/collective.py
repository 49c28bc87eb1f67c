"""Weights by broadcast: NCCL between GPUs, gloo between CPUs, the same code.

    trainer rank 0                                   member
    OpenCollective: a TCPStore on a free port  ◄──── (host, port) travels in the order
    send: fill bucket k+1 │ bucket k in flight ════► receive into staging, hash, next
          one process group per member               one process group with the trainer

Every member has a two-rank group with the trainer, so one that dies fails its own transfer and holds up nobody. Groups
belong to an epoch, that is to a set of members: both sides build them on the first order of an epoch and drop those of
the epoch before. They are private: independent of any default group of the process.

Who ends a wait: a broadcast ends when the other side joins it, when the other side's process dies (its sockets close),
or at a deadline. The sender's is a third of the rendezvous', so that a member that hangs is dropped before the others,
who wait for their next bucket, run into theirs.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from actors.errors import InfraFailure
from rollout.weights.buckets import fill, unfold
from rollout.weights.fingerprint import Fingerprint
from rollout.weights.protocol import Rendezvous, SendReport, SyncOrder

SENDER, MEMBER = 0, 1  # ranks in a group
KEEP_ALIVE_S = 3600.0


def make_group(order: Rendezvous, member: str, rank: int, device: torch.device, patience: timedelta) -> dist.Backend:
    """The two-rank group of the trainer and one member in one epoch. Blocks until the other side comes, or raises. Each
    has a connection to the store of its own: a connection serves one wait at a time."""
    store = dist.TCPStore(order.host, order.port, None, False, patience, wait_for_workers=False, multi_tenant=True)
    scoped = dist.PrefixStore(f"{order.epoch}/{member}", store)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = patience
        return dist.ProcessGroupNCCL(scoped, rank, 2, options)
    return dist.ProcessGroupGloo(scoped, rank, 2, patience)


def broadcast(group: dist.Backend, flat: Tensor) -> dist.Work:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = SENDER, 0
    return group.broadcast([flat], options)


@dataclass
class CollectiveSender:
    """The trainer's side. One per process (`_sender`): stores and groups outlive the orders that use them."""

    store: dist.TCPStore | None = None
    epoch: str = ""
    groups: dict[str, dist.Backend] = field(default_factory=dict)

    def open(self) -> tuple[str, int]:
        """(host, port) of this process' store, bound once and for all: no port is guessed, none is raced for."""
        host = _own_address()
        if self.store is None:
            self.store = dist.TCPStore(
                host, 0, None, True, timedelta(seconds=KEEP_ALIVE_S), wait_for_workers=False, multi_tenant=True
            )
        return host, self.store.port

    def send(self, order: SyncOrder, weights: Iterable[tuple[str, Tensor]]) -> SendReport:
        """Every bucket to every member that has not failed; the next is filled while the last one is in flight."""
        rendezvous = order.rendezvous
        assert rendezvous is not None and self.store is not None
        began, failed = time.perf_counter(), dict[str, str]()
        fingerprint, flying = Fingerprint(), dict[str, dist.Work]()
        patience = timedelta(seconds=rendezvous.timeout_s / 3)
        for index, flat in enumerate(fill(order.manifest, weights)):
            if index == 0:
                failed |= self._meet(rendezvous, flat.device, patience)
            fingerprint.update(flat)
            failed |= self._land(flying, patience)
            flying = {member: broadcast(group, flat) for member, group in self.groups.items()}
        failed |= self._land(flying, patience)
        delivered = tuple(member for member in rendezvous.members if member not in failed)
        return SendReport(order.version, fingerprint.digest(), delivered, failed, time.perf_counter() - began)

    def _meet(self, rendezvous: Rendezvous, device: torch.device, patience: timedelta) -> dict[str, str]:
        """A group with every member, built at the same time: one that does not come costs the others nothing. Returns
        who has none, and why."""
        failed: dict[str, str] = {}
        if self.epoch != rendezvous.epoch:
            self.epoch, self.groups = rendezvous.epoch, {}
            meet = partial(make_group, rendezvous, rank=SENDER, device=device, patience=patience)
            with ThreadPoolExecutor(len(rendezvous.members)) as threads:
                meeting = {member: threads.submit(meet, member) for member in rendezvous.members}
            for member, future in meeting.items():
                if (error := future.exception()) is None:
                    self.groups[member] = future.result()
                else:
                    failed[member] = f"did not come to epoch {rendezvous.epoch}: {_first_line(error)}"
        lost = {member: "was lost in this epoch" for member in rendezvous.members if member not in self.groups}
        return lost | failed

    def _land(self, flying: dict[str, dist.Work], patience: timedelta) -> dict[str, str]:
        """Wait for the bucket in flight; whoever did not take it is dropped for the rest of the epoch."""
        failed = {}
        for member, work in flying.items():
            try:
                work.wait(patience)
            except RuntimeError as error:
                del self.groups[member]
                failed[member] = _first_line(error)
        return failed

    def close(self) -> None:
        self.groups.clear()
        self.store = None


_sender = CollectiveSender()  # of this process, if it is a trainer's rank 0


@dataclass(frozen=True)
class OpenCollective:
    """To be run in the trainer's process: binds the store. Returns (host, port)."""

    def __call__(self) -> tuple[str, int]:
        return _sender.open()


@dataclass(frozen=True)
class CollectiveSend:
    """An export consumer: broadcasts the weights to the members of the order. Returns a SendReport."""

    order: SyncOrder

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> SendReport:
        return _sender.send(self.order, weights)


class CollectiveReceiver:
    """A member's side. Staging buffers are kept between syncs, so that no sync waits for memory."""

    def __init__(self, member: str, device: torch.device | str = "cpu") -> None:
        self._member, self._device = member, torch.device(device)
        self._group: dist.Backend | None = None
        self._epoch = ""
        self._staging: list[Tensor] = []

    def receive(self, order: SyncOrder, payload: object = None) -> tuple[list[tuple[str, Tensor]], str]:
        assert order.rendezvous is not None
        try:
            group = self._meet(order.rendezvous)
            return self._receive(group, order)
        except RuntimeError as error:
            self.close()
            why = f"weights of version {order.version} did not arrive: {_first_line(error)}"
            raise InfraFailure(f"{self._member}: {why}") from None

    def _meet(self, rendezvous: Rendezvous) -> dist.Backend:
        if self._group is None or self._epoch != rendezvous.epoch:
            self.close()
            patience = timedelta(seconds=rendezvous.timeout_s)
            self._group = make_group(rendezvous, self._member, MEMBER, self._device, patience)
            self._epoch = rendezvous.epoch
        return self._group

    def _receive(self, group: dist.Backend, order: SyncOrder) -> tuple[list[tuple[str, Tensor]], str]:
        buckets = list(order.manifest.buckets())
        sizes = [sum(meta.nbytes for meta in bucket) for bucket in buckets]
        if [flat.numel() for flat in self._staging] != sizes:
            self._staging = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
        fingerprint, staged = Fingerprint(), list[tuple[str, Tensor]]()
        for bucket, flat in zip(buckets, self._staging, strict=True):
            broadcast(group, flat).wait()
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)
            fingerprint.update(flat)
            staged += unfold(bucket, flat)
        return staged, fingerprint.digest()

    def close(self) -> None:
        self._group = None
        self._epoch = ""


def _own_address() -> str:
    """The address under which other nodes reach this one; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: only the route is looked up
            return str(probe.getsockname()[0])
        except OSError:  # no route but loopback: everything is on this machine
            return "127.0.0.1"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200]
