"""Links of the broadcast tree: NCCL between GPUs, CUDA IPC within a GPU, gloo between CPUs, the same code.

    parent (rank 0)                                      child (rank 1)
    on which device are my buckets?  ─► the store ─►     mine are there, too
    join the process group of two    ◄─────────────►     join the process group of two
    broadcast(bucket)                ══════════════►     broadcast(memory for it)

A link connects two processes and no more, so one that breaks fails nobody but the child, and those that the child
sends to. It is private: independent of any default process group.

Who ends a wait: a broadcast ends when the other side joins it, when the other side's process dies (its sockets close),
when the other side leaves (it aborts the group), or at a deadline. Gloo may miss that sockets close while a bucket is
on its way; so a parent also looks whether its children's processes are there, if they are on its host. A parent is less
patient the further it is from the trainer: else its own parent would drop it, and not the child that hangs."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any, Literal
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from actors.errors import first_lines
from rollout.weights.protocol import Link, Rendezvous
from rollout.weights.same_gpu import LOOK_S, Handover, SameGpu, has_ended

PARENT, CHILD = 0, 1  # ranks of a link
LEVELS = 16  # of the tree, in which a parent's patience falls from a third of the deadline to nothing
POLL_S = 0.002
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


def join(store: PrefixStore, rank: int, device: torch.device, address: str, timeout: timedelta) -> Connection:
    """Join the link that meets at `store`, where both ends say their devices. Blocks until the other end has done that
    and, except with CUDA IPC, has joined; or raises RuntimeError."""
    kind = kind_of_link(*(store.get(device_of(each)).decode() for each in (PARENT, CHILD)))
    if kind == "same_gpu":
        return SameGpu(store, rank, device, timeout)
    if kind == "gloo":
        return Communicator(dist.ProcessGroupGloo(store, rank, 2, _gloo_options(address, timeout)), device, timeout)
    with _blocking_waits():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return Communicator(dist.ProcessGroupNCCL(store, rank, 2, options), device, timeout)


def store_of(store: TCPStore, link: Link) -> PrefixStore:
    """The part of the store in which the ends of a link meet."""
    return PrefixStore(link.id, store)


def tell_lost(store: TCPStore, order_id: str, receiver: str) -> None:
    """This receiver will not get all of an order's weights, so nobody needs to wait for it."""
    with suppress(RuntimeError):  # the store is gone with the trainer: all are told
        store.set(f"lost/{order_id}/{receiver}", "")


def await_parent(store: TCPStore, order_id: str, link: Link, timeout: timedelta) -> str:
    """The parent's device, as it says it at their link. Raises RuntimeError if it is lost, and at the deadline."""
    deadline = time.monotonic() + timeout.total_seconds()
    while not store_of(store, link).check([device_of(PARENT)]):
        if store.check([f"lost/{order_id}/{link.parent}"]):
            raise RuntimeError(f"{link.parent}, which was to send them, is lost")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{link.parent or 'the trainer'} did not come within {timeout.total_seconds():g} s")
        time.sleep(POLL_S)
    return store_of(store, link).get(device_of(PARENT)).decode()


def patience(link: Link, timeout_s: float) -> timedelta:
    """For how long a parent waits for its child."""
    return timedelta(seconds=timeout_s / 3 * max(1, LEVELS - link.depth) / LEVELS)


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
    _children: dict[str, str] = field(default_factory=dict)  # by the link's id
    _processes: dict[str, str] = field(default_factory=dict)  # of the children, as `describe_process` says them
    _tell: Callable[[str], None] = field(default=lambda _: None)  # those below a child that it is lost

    def join(self, store: TCPStore, order_id: str, rendezvous: Rendezvous, device: torch.device) -> None:
        """Join new links, leave those that are no more. Each is joined as soon as its child is there, so a child that
        never comes delays the others but does not fail them. Those below it are told that it is lost."""
        own = {link.id: link for link in rendezvous.links if link.parent == self.name}
        for gone in self.connections.keys() - own.keys():
            self.connections.pop(gone).leave()
        self._children = {link.id: link.child for link in own.values()}
        self.failed, self._tell = {}, lambda child: tell_lost(store, order_id, child)
        pending = [link for link in own.values() if link.id not in self.connections]
        if pending:
            self._join(store, pending, device, rendezvous.timeout_s)

    def _join(self, store: TCPStore, pending: list[Link], device: torch.device, timeout_s: float) -> None:
        """They share one connection to the store, so it is polled instead of waited on."""
        began, limits = time.monotonic(), {link: patience(link, timeout_s) for link in pending}
        for link in pending:
            store_of(store, link).set(device_of(PARENT), describe(device))
        while pending:
            waited = time.monotonic() - began
            arrived = [link for link in pending if store_of(store, link).check([device_of(CHILD)])]
            late = [link for link in pending if link not in arrived and waited > limits[link].total_seconds()]
            for link in arrived:
                try:
                    place = store_of(store, link)
                    self._processes[link.id] = place.get(process_of(CHILD)).decode()
                    self.connections[link.id] = join(place, PARENT, device, own_address(), limits[link])
                except RuntimeError as error:
                    self._fails(link.child, f"could not join: {first_lines(error)}")
            for link in late:
                self._fails(link.child, f"did not join within {limits[link].total_seconds():g} s")
            pending = [link for link in pending if link not in arrived and link not in late]
            if pending and not arrived:
                time.sleep(POLL_S)

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
                    _finish(work, connection, began, self._processes.get(link, ""))

    @contextmanager
    def _dropped_if_it_fails(self, link: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if (connection := self.connections.pop(link, None)) is not None:  # else it was closed meanwhile
                connection.leave()
            self._fails(self._children[link], first_lines(error))

    def _fails(self, child: str, why: str) -> None:
        self.failed[child] = why
        self._tell(child)

    def leave(self) -> None:
        """From any thread, also while another one sends."""
        left, self.connections = self.connections, {}
        for connection in list(left.values()):
            connection.leave()


def _finish(work: dist.Work | Handover, connection: Connection, began: float, child: str) -> None:
    """Wait for a broadcast to a process, until the connection's timeout after `began`. Gloo may miss that the other end
    has gone, so that is looked at meanwhile."""
    deadline = began + connection.timeout.total_seconds()
    while isinstance(connection, Communicator) and isinstance(connection.group, dist.ProcessGroupGloo):
        left = deadline - time.monotonic()
        try:
            work.wait(timedelta(seconds=max(0.001, min(LOOK_S, left))))
            return
        except RuntimeError:
            if work.is_completed():  # type: ignore[union-attr]: gloo's
                work.wait()  # it ended after that look, or this raises why it failed
                return
            if left <= LOOK_S:
                raise
            if has_ended(child):
                raise RuntimeError("its process has ended") from None
    if isinstance(work, Handover):
        work.wait(connection.timeout, began)
    else:
        work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))


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


def device_of(rank: int) -> str:
    return f"device/{rank}"


def process_of(rank: int) -> str:
    return f"process/{rank}"


def describe(device: torch.device) -> str:
    """`cpu`, or `cuda` and which GPU of the world it is."""
    return device.type if device.type == "cpu" else f"{device.type} {torch.cuda.get_device_properties(device).uuid}"


def own_address(towards: str = "192.0.2.1") -> str:
    """The address under which a host, or (by default) other nodes, reach this one; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # the default is a documentation address: only the route is looked up
            return str(probe.getsockname()[0])
        except OSError:  # no route but loopback: everything is on this machine
            return "127.0.0.1"
