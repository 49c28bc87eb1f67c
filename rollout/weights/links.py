"""Links of the broadcast tree: NCCL between GPUs, CUDA IPC within a GPU, gloo between CPUs, the same code.

    parent (rank 0)                                      child (rank 1)
    where are my buckets?            ─► meeting.py ─►    mine are there, too
    join the process group of two    ◄─────────────►     join the process group of two
    broadcast(bucket)                ══════════════►     broadcast(memory for it)

A link connects two processes and no more, so one that breaks fails nobody but the child, and those that the child
sends to. It is private: independent of any default process group.

Who ends a wait: a broadcast ends when the other side joins it, when the other side's process dies (its sockets close),
when the other side leaves (it aborts the group), or at a deadline. Gloo may miss that sockets close while a bucket is
on its way; so both ends also look whether the other's process is there, if it is on their host. A parent is less
patient the further it is from the trainer: else its own parent would drop it, and not the child that hangs. All waits
end at the order's deadline, `timeout_s` after a process has got it, and a child that hangs costs its parent no more
than a third of what is left until then."""

from __future__ import annotations

import atexit
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from typing import Any, Literal
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from actors.errors import first_lines
from rollout.weights.meeting import CHILD, PARENT, POLL_S, Losses, Meeting, left
from rollout.weights.protocol import Link, Rendezvous
from rollout.weights.same_gpu import LOOK_S, Handover, SameGpu

LEVELS = 16  # of the tree, in which a parent's patience falls from a third of the deadline to nothing
LEAVES = "leaves a link"  # name of a thread


@dataclass(eq=False)
class Communicator:
    """A process group of two, and the device on which it sends or receives."""

    group: dist.ProcessGroupGloo | dist.ProcessGroupNCCL | None  # None: left
    device: torch.device
    timeout: timedelta  # the process group's own: it cannot be changed while a broadcast is under way

    def broadcast(self, flat: Tensor) -> dist.Work:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = PARENT, 0
        if self.group is None:
            raise RuntimeError("this side has left")
        return self.group.broadcast([flat], options)  # pyright: ignore[reportAttributeAccessIssue]: the stubs lack it

    def leave(self) -> None:
        """A pending `wait` for a broadcast, in this process or at the other end, raises: here because the group is
        aborted, there because its sockets close when nobody refers to it any more. A thread lets go of it, because
        that waits for sends under way, which an abort does not end but the group's timeout does. The end of this
        process waits for the thread: torch takes the interpreter's lock there, and would abort the process if there
        was no interpreter any more."""
        if self.group is not None:
            self.group.abort()
            last = [self.group]
            self.group = None
            threading.Thread(target=last.clear, name=LEAVES, daemon=False).start()

    def __post_init__(self) -> None:
        _open.add(self)


_open = WeakSet[Communicator]()  # of this process


@atexit.register
def _let_go() -> None:
    """Of links that nobody has left, while there is an interpreter: see `Communicator.leave`."""
    for each in list(_open):
        each.group = None


Connection = Communicator | SameGpu


def kind_of_link(parent: str, child: str) -> Literal["nccl", "same_gpu", "gloo"]:
    """For ends on these devices, as `describe` says them. NCCL refuses two ranks on one GPU."""
    if parent.startswith("cpu"):
        return "gloo"
    return "same_gpu" if parent == child else "nccl"


def join(
    meeting: Meeting, rank: int, device: torch.device, address: str, timeout: timedelta, deadline: float
) -> Connection:
    """Join the link of a meeting, to which both ends have come. `timeout`: of its broadcasts. Blocks until the other
    end has joined, or raises RuntimeError, at the deadline at the latest. Does not block with CUDA IPC, nor with NCCL,
    which joins with the first bucket and has no deadline for that once both ends have begun."""
    kind = kind_of_link(meeting.device_of(PARENT), meeting.device_of(CHILD))
    peer = meeting.process_of(1 - rank)  # also for `Meeting.check_process`: the store may not answer during a broadcast
    if kind == "same_gpu":
        return SameGpu(meeting.place, rank, device, timeout, peer=peer)
    if kind == "gloo":
        group = dist.ProcessGroupGloo(meeting.place, rank, 2, _gloo_options(address, left(deadline)))
        group._set_default_timeout(timeout)
        return Communicator(group, device, timeout)
    with _blocking_waits():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return Communicator(dist.ProcessGroupNCCL(meeting.place, rank, 2, options), device, timeout)


def patience_s(link: Link, left_s: float) -> float:
    """For how long a parent waits for its child, when so much is left of the order's time."""
    return left_s / 3 * max(1, LEVELS - link.depth) / LEVELS


@dataclass(frozen=True)
class Flight:
    """A bucket on its way, and the links that it travels by. Its memory must not change before it has landed."""

    flat: Tensor
    works: dict[str, dist.Work | Handover]


@dataclass
class Downlinks:
    """A process's links to the receivers that it sends to. They outlive the orders that use them."""

    name: str
    connections: dict[str, Connection] = field(default_factory=dict)  # by the link's id
    failed: dict[str, str] = field(default_factory=dict)  # by the child, since `join`: why
    _meetings: dict[str, Meeting] = field(default_factory=dict)  # by the link's id, also of links that have failed
    _losses: Losses | None = None  # of the order
    _deadline: float = math.inf  # of the order, on the monotonic clock

    def join(
        self, store: TCPStore, order_id: str, rendezvous: Rendezvous, device: torch.device, deadline: float
    ) -> None:
        """Join new links, leave those that are no more. Each is joined as soon as its child is there, so a child that
        never comes delays the others but does not fail them. Those below it are told that it is lost."""
        own = {link.id: link for link in rendezvous.links if link.parent == self.name}
        for gone in self.connections.keys() - own.keys():
            self.connections.pop(gone).leave()
        self.failed, self._losses, self._deadline = {}, Losses(store, order_id), deadline
        pending = [Meeting(store, link) for link in own.values() if link.id not in self.connections]
        kept = {link: self._meetings[link] for link in self.connections}
        self._meetings = kept | {meeting.link.id: meeting for meeting in pending}
        self._join(pending, self._losses, device, rendezvous.timeout_s)

    def _join(self, pending: list[Meeting], losses: Losses, device: torch.device, timeout_s: float) -> None:
        """They share one connection to the store, so it is polled instead of waited on."""
        began = time.monotonic()
        for meeting in pending:
            meeting.announce(PARENT, device)
        while pending:
            waiting: list[Meeting] = []
            for meeting in pending:
                limit_s = self._patience_s(meeting.link, began)
                if losses.include(meeting.link.child):
                    self._fails(meeting.link.child, "it is lost")
                elif meeting.has_come(CHILD):
                    self._join_one(meeting, device, timedelta(seconds=patience_s(meeting.link, timeout_s)))
                elif time.monotonic() > began + limit_s:
                    self._fails(meeting.link.child, f"did not join within {round(limit_s, 1):g} s")
                else:
                    waiting.append(meeting)
            if len(waiting) == len(pending):
                time.sleep(POLL_S)
            pending = waiting

    def _join_one(self, meeting: Meeting, device: torch.device, timeout: timedelta) -> None:
        began = time.monotonic()
        deadline = began + self._patience_s(meeting.link, began)
        meeting.begin()
        try:
            self.connections[meeting.link.id] = join(meeting, PARENT, device, own_address(), timeout, deadline)
        except RuntimeError as error:
            self._fails(meeting.link.child, f"could not join: {first_lines(error)}")

    def _patience_s(self, link: Link, began: float) -> float:
        return patience_s(link, max(0.0, self._deadline - began))

    def send(self, flat: Tensor) -> Flight:
        flight = Flight(flat, {})
        for link, connection in list(self.connections.items()):
            with self._dropped_if_it_fails(link):
                flight.works[link] = connection.broadcast(flat)
        return flight

    def land(self, flight: Flight) -> None:
        """Wait for a bucket. A link that did not carry it is left. The patience with all children begins now: with one
        after the other, several that hang would take longer than the parent of this process waits for it."""
        began = time.monotonic()
        for link, work in flight.works.items():
            if (connection := self.connections.get(link)) is not None:  # else it was lost with an earlier bucket
                with self._dropped_if_it_fails(link):
                    meeting = self._meetings[link]
                    limit_s = min(connection.timeout.total_seconds(), self._patience_s(meeting.link, began))
                    finish(work, connection, began, limit_s, partial(meeting.check_process, CHILD))

    @contextmanager
    def _dropped_if_it_fails(self, link: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if (connection := self.connections.pop(link, None)) is not None:  # else it was closed meanwhile
                connection.leave()
            self._meetings[link].drop()
            self._fails(self._meetings[link].link.child, first_lines(error))

    def _fails(self, child: str, why: str) -> None:
        self.failed[child] = why
        if self._losses is not None:
            self._losses.tell(child)

    def leave(self) -> None:
        """From any thread, also while another one sends."""
        held, self.connections = self.connections, {}
        for connection in list(held.values()):
            connection.leave()


def finish(
    work: dist.Work | Handover, connection: Connection, began: float, limit_s: float, look: Callable[[], None]
) -> None:
    """Wait for a broadcast until so long after `began`. Gloo may miss that the other end's process has ended, so
    `look` looks there meanwhile, and raises RuntimeError if it has."""
    deadline = began + limit_s
    while isinstance(connection, Communicator) and isinstance(connection.group, dist.ProcessGroupGloo):
        rest = deadline - time.monotonic()
        try:
            work.wait(timedelta(seconds=max(0.001, min(LOOK_S, rest))))
            return
        except RuntimeError:
            if work.is_completed():  # type: ignore[union-attr]: gloo's
                work.wait()  # it ended after that look, or this raises why it failed
                return
            if rest <= LOOK_S:
                raise
        look()
    if isinstance(work, Handover):
        work.wait(timedelta(seconds=limit_s), began)
    else:
        work.wait(left(deadline))


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
    options._devices = [_gloo_device(address)]
    options._timeout = timeout
    return options


@cache
def _gloo_device(address: str) -> Any:
    """One for all links of this process: each has a thread that wakes up again and again, also when nothing is sent."""
    return dist.ProcessGroupGloo.create_device(hostname=address)


def own_address(towards: str = "192.0.2.1") -> str:
    """The address under which a host, or (by default) other nodes, reach this one; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # the default is a documentation address: only the route is looked up
            return str(probe.getsockname()[0])
        except OSError:  # no route but loopback: everything is on this machine
            return "127.0.0.1"
