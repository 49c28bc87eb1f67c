"""Weights between two processes of one GPU, without a GPU: both sides are threads, and memory of the host is handed
over through a real store. tests/gpu has the same between processes, by CUDA IPC."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rollout.weights.buckets import Staged
from rollout.weights.collective import BUFFERS, CollectiveReceiver, CollectiveSender
from rollout.weights.links import Communicator, Connection, Downlinks, join, kind_of_link
from rollout.weights.meeting import CHILD, PARENT, Meeting
from rollout.weights.protocol import SENDER, Link, Manifest, Rendezvous, SyncOrder, TensorMeta, TransferFailed
from rollout.weights.same_gpu import Handover, SameGpu, describe_process, has_ended
from tests.broadcast_stage import ended_process

CPU = torch.device("cpu")
LONG = timedelta(seconds=30)
FAR = 20.0  # seconds; well below LONG: what ends sooner was not ended by the deadline
ROWS = 256
MANIFEST = Manifest(tuple(TensorMeta(f"w{i}", "float32", (ROWS,)) for i in range(3 * BUFFERS + 2)), 4 * ROWS)


class HeapMemory:
    """Hands over addresses of this process's memory: a buffer that is refilled too early is seen by the reader."""

    def __init__(self) -> None:
        self.forgotten = 0

    def offer(self, flat: Tensor) -> str:
        buffers[flat.data_ptr()] = flat
        return str(flat.data_ptr())

    def fetch(self, offer: str, into: Tensor) -> None:
        into.copy_(buffers[int(offer)])

    def forget(self) -> None:
        self.forgotten += 1

    def close(self) -> None:
        self.forget()


class NoMemory(HeapMemory):
    def offer(self, flat: Tensor) -> str:
        raise RuntimeError("invalid argument")

    def fetch(self, offer: str, into: Tensor) -> None:
        raise RuntimeError("invalid handle")


buffers: dict[int, Tensor] = {}


class Member(CollectiveReceiver):
    """Has joined already."""

    def __init__(self, communicator: SameGpu) -> None:
        super().__init__("a", CPU)
        self.joined = communicator

    def _join(self, order_id: str, rendezvous: Rendezvous, deadline: float) -> tuple[Meeting, Connection]:
        self._uplink = Meeting(self.joined._store, LINK), self.joined  # type: ignore[arg-type]: a part of the store
        return self._uplink

    def take(self, order: SyncOrder) -> tuple[Staged, str]:
        incoming = self.receive(order)
        return list(incoming), incoming.finish()


LINK = Link("1/a", SENDER, "a")


def downlinks(stage: Stage, name: str, connections: dict[str, Connection]) -> Downlinks:
    """That were joined already, each to the child that its id names last."""
    links = [Link(link, name, link.rpartition("/")[2]) for link in connections]
    return Downlinks(name, connections, _meetings={link.id: Meeting(stage.server, link) for link in links})


class Stage:
    def __init__(self) -> None:
        self.server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, multi_tenant=True)
        self.client = TCPStore("127.0.0.1", self.server.port, None, False, wait_for_workers=False, multi_tenant=True)
        self.stores = [PrefixStore("1/a", store) for store in (self.server, self.client)]

    def side(self, rank: int, timeout: timedelta = LONG, **options) -> SameGpu:
        own = {"peer": describe_process(), "memory": HeapMemory()}
        return SameGpu(self.stores[rank], rank, CPU, timeout, **(own | options))

    def sides(self, timeout: timedelta = LONG) -> tuple[SameGpu, SameGpu]:
        return self.side(0, timeout), self.side(1, timeout)

    def order(self, version: int) -> SyncOrder:
        rendezvous = Rendezvous("127.0.0.1", self.server.port, (LINK,), 3 * LONG.total_seconds())
        return SyncOrder(f"order {version}", version, "collective", MANIFEST, rendezvous)

    def sender(self, communicator: SameGpu) -> CollectiveSender:
        return CollectiveSender(self.server, downlinks(self, SENDER, {LINK.id: communicator}))


@pytest.fixture
def stage() -> Iterator[Stage]:
    buffers.clear()
    yield Stage()


@pytest.fixture(scope="module")
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def weights(version: int) -> Staged:
    return [(meta.name, torch.arange(ROWS).float() + 1000 * version + i) for i, meta in enumerate(MANIFEST.tensors)]


def test_buckets_of_several_orders_arrive_each_with_its_own_bytes_and_leave_no_keys(stage: Stage, thread):
    ours, theirs = stage.sides()
    sender, member = stage.sender(ours), Member(theirs)
    assert len(list(MANIFEST.buckets())) > 2 * (BUFFERS), "every buffer is used several times"
    keys, prints = [], []
    for version in range(3):
        arriving = thread.submit(member.take, stage.order(version))
        report = sender.send(stage.order(version), weights(version))
        staged, fingerprint = arriving.result(60)
        assert report.delivered == ("a",) and fingerprint == report.fingerprint
        assert [name for name, _ in staged] == [meta.name for meta in MANIFEST.tensors]
        assert all(torch.equal(got, sent) for (_, got), (_, sent) in zip(staged, weights(version), strict=True))
        assert len(buffers) >= BUFFERS
        keys.append(stage.server.num_keys())
        prints.append(fingerprint)
    assert len(set(prints)) == 3
    assert len(set(keys)) == 1, "the store does not grow"
    for side in (ours, theirs):
        assert isinstance(side._memory, HeapMemory) and side._memory.forgotten == 3, "once after each order"


@pytest.mark.parametrize(
    ("waits", "why"),
    [
        (0, "the receiver did not take bucket 0: the receiver has left"),
        (1, "the sender did not send bucket 0: the sender has left"),
    ],
)
def test_a_side_that_leaves_ends_the_wait_of_the_other(stage: Stage, thread, waits: int, why: str):
    sides = stage.sides()
    began = time.monotonic()
    waiting = thread.submit(sides[waits].broadcast(torch.ones(4)).wait)
    sides[1 - waits].leave()
    with pytest.raises(RuntimeError, match=why):
        waiting.result(60)
    assert time.monotonic() - began < FAR


def test_what_a_receiver_took_before_it_left_has_landed(stage: Stage):
    ours, theirs = stage.sides()
    works, into = [ours.broadcast(torch.full((4,), 7.0)) for _ in range(2)], torch.zeros(4)
    theirs.broadcast(into).wait()
    theirs.leave()
    works[0].wait()
    assert into.tolist() == [7.0] * 4
    with pytest.raises(RuntimeError, match="did not take bucket 1: the receiver has left"):
        works[1].wait()


def test_a_bucket_of_a_sender_that_has_left_is_not_taken(stage: Stage):
    """Its memory may hold something else by now."""
    ours, theirs = stage.sides()
    flat, into = torch.ones(4), torch.zeros(4)
    ours.broadcast(flat)
    ours.leave()
    with pytest.raises(RuntimeError, match="the sender left before bucket 0 was taken"):
        theirs.broadcast(into).wait()
    assert into.tolist() == [0.0] * 4


def test_whoever_has_left_has_been_heard_by_the_store(stage: Stage):
    """`set` alone does not wait for that, and the other side looks by a connection of its own."""
    for number in range(10):
        stores = [PrefixStore(f"{number}", store) for store in (stage.server, stage.client)]
        leaving = SameGpu(stores[0], 0, CPU, LONG, peer=describe_process(), memory=HeapMemory())
        stores[0].set("more", "x" * 2**22)  # the store reads this first
        leaving.leave()
        assert stores[1].check(["left/0"]), f"round {number}"


class LeavesInBetween(HeapMemory):
    """The sender gives up while the receiver copies."""

    sender: SameGpu

    def fetch(self, offer: str, into: Tensor) -> None:
        super().fetch(offer, into)
        self.sender.leave()


def test_a_bucket_that_was_copied_while_the_sender_left_is_not_accepted(stage: Stage):
    memory, ours = LeavesInBetween(), stage.side(0)
    memory.sender = ours
    theirs, into = stage.side(1, memory=memory), torch.zeros(4)
    ours.broadcast(torch.ones(4))
    with pytest.raises(RuntimeError, match="the sender left before bucket 0 was taken"):
        theirs.broadcast(into).wait()
    assert into.tolist() == [1.0] * 4 and not stage.server.check(["1/a/taken/0"])


def test_a_side_that_has_left_waits_no_longer_itself(stage: Stage):
    ours, _ = stage.sides()
    work = ours.broadcast(torch.ones(4))
    ours.leave()
    with pytest.raises(RuntimeError, match="this side has left"):
        work.wait()


def test_a_deadline_ends_the_wait_of_either_side(stage: Stage):
    ours, theirs = stage.sides()
    with pytest.raises(RuntimeError, match=r"the receiver did not take bucket 0: waited for 0.05 s"):
        ours.broadcast(torch.ones(4)).wait(timedelta(seconds=0.05))
    theirs.broadcast(torch.ones(4)).wait()
    with pytest.raises(RuntimeError, match=r"the sender did not send bucket 1: waited for 0.05 s"):
        theirs.broadcast(torch.ones(4)).wait(timedelta(seconds=0.05))


@pytest.mark.parametrize(("rank", "peer"), [(0, "receiver"), (1, "sender")])
def test_the_end_of_the_other_sides_process_ends_the_wait(stage: Stage, rank: int, peer: str):
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"the process of the {peer} \(pid \d+\) has ended"):
        stage.side(rank, peer=ended_process()).broadcast(torch.ones(4)).wait()
    assert time.monotonic() - began < FAR


def test_a_zombie_has_ended_and_a_process_of_another_host_or_pid_namespace_is_not_judged():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    described = describe_process(child.pid)
    assert not has_ended(described)
    assert child.stdin is not None
    child.stdin.close()
    deadline = time.monotonic() + 30
    while not has_ended(described) and time.monotonic() < deadline:  # nobody has waited for it yet
        time.sleep(0.01)
    assert has_ended(described)
    child.wait()
    assert has_ended(described)
    _, namespace, host = described.split()
    assert not has_ended(f"{child.pid} pid:[1] {host}")
    assert not has_ended(f"{child.pid} {namespace} another-host"), "the first namespace has one number on all hosts"


def test_the_end_of_the_store_ends_the_receivers_wait_and_does_not_prevent_its_leaving(stage: Stage, thread):
    theirs = stage.side(1)
    waiting = thread.submit(theirs.broadcast(torch.zeros(4)).wait)
    stage.stores[0] = stage.stores[1]
    del stage.server
    with pytest.raises(RuntimeError):
        waiting.result(FAR)
    theirs.leave()
    assert isinstance(theirs._memory, HeapMemory) and theirs._memory.forgotten == 1


def test_memory_that_cannot_be_offered_fails_that_member_and_its_receive_at_once(stage: Stage, thread):
    ours, theirs = stage.side(0, memory=NoMemory()), stage.side(1)
    began = time.monotonic()
    arriving = thread.submit(Member(theirs).take, stage.order(0))
    report = stage.sender(ours).send(stage.order(0), weights(0))
    why = "bucket 0 could not be offered to the receiver on the same GPU: invalid argument; if this is not a passing"
    assert report.failed["a"].startswith(why) and "weights.transport=object_store" in report.failed["a"]
    with pytest.raises(TransferFailed, match=r"a: weights of version 0 did not arrive.*the sender has left"):
        arriving.result(60)
    assert time.monotonic() - began < FAR


def test_memory_that_cannot_be_read_fails_the_receive_and_the_sender_is_told(stage: Stage, thread):
    ours, theirs = stage.side(0), stage.side(1, memory=NoMemory())
    arriving = thread.submit(Member(theirs).take, stage.order(0))
    report = stage.sender(ours).send(stage.order(0), weights(0))
    assert "the receiver has left" in report.failed["a"]
    with pytest.raises(TransferFailed, match=r"not be read: invalid handle; .* set weights.transport=object_store"):
        arriving.result(60)


def test_a_receiver_that_fails_half_way_is_reported_and_not_waited_for(stage: Stage, thread):
    ours, theirs = stage.sides()

    class Leaves(Member):
        def _relayed(self, *args: Any) -> Iterator[Tensor]:
            yield next(super()._relayed(*args))
            raise RuntimeError("out of memory")

    began = time.monotonic()
    arriving = thread.submit(Leaves(theirs).take, stage.order(0))
    report = stage.sender(ours).send(stage.order(0), weights(0))
    assert report.delivered == () and "the receiver has left" in report.failed["a"]
    with pytest.raises(TransferFailed, match="out of memory"):
        arriving.result(60)
    assert time.monotonic() - began < FAR


def test_children_that_hang_at_the_same_time_are_waited_for_together(stage: Stage):
    """One after the other they would take longer than the parent's own parent waits for it."""
    limit = timedelta(seconds=1)
    own: dict[str, Any] = {"peer": describe_process(), "memory": HeapMemory()}
    hanging = {name: SameGpu(PrefixStore(name, stage.server), PARENT, CPU, limit, **own) for name in "abcdefgh"}
    links = downlinks(stage, "parent", hanging)
    began = time.monotonic()
    links.land(links.send(torch.ones(4)))
    assert time.monotonic() - began < 4 * limit.total_seconds()
    why = "the receiver did not take bucket 0: waited for 1 s"
    assert links.failed == dict.fromkeys("abcdefgh", why) and not links.connections


class ClosedMeanwhile(SameGpu):
    """Its process is closed, by another thread, while a bucket is on its way."""

    downlinks: Downlinks

    def broadcast(self, flat: Tensor) -> Handover:
        def finish(*_: object) -> None:
            self.downlinks.leave()
            raise RuntimeError("this side has left")

        return Handover(finish, self.timeout)


def test_links_may_be_left_while_another_thread_sends(stage: Stage):
    connection = ClosedMeanwhile(stage.stores[0], PARENT, CPU, LONG, peer=describe_process(), memory=HeapMemory())
    links = connection.downlinks = downlinks(stage, "parent", {"1/a": connection})
    links.land(links.send(torch.ones(4)))
    assert links.failed == {"a": "this side has left"} and not links.connections


# Which connection.


@pytest.mark.parametrize(
    ("parent", "child", "kind"),
    [("cuda x", "cuda x", "same_gpu"), ("cuda x", "cuda y", "nccl"), ("cpu", "cpu", "gloo")],
)
def test_the_kind_of_a_link_follows_from_the_devices_of_its_ends(parent: str, child: str, kind: str):
    assert kind_of_link(parent, child) == kind


@pytest.mark.parametrize(("device", "connection"), [("cuda GPU-1", SameGpu), ("cpu", Communicator)])
def test_ends_that_say_their_devices_join(stage: Stage, thread, device: str, connection: type):
    stores = [TCPStore("127.0.0.1", stage.server.port, None, False) for _ in (PARENT, CHILD)]
    meetings = [Meeting(store, LINK) for store in stores]
    for rank, meeting in enumerate(meetings):
        meeting.announce(rank, CPU)
        meeting.place.set(f"device/{rank}", device)
    until, own = time.monotonic() + 60, torch.device(device.split()[0])
    joining = [
        thread.submit(join, meeting, rank, own, "127.0.0.1", LONG, until) for rank, meeting in enumerate(meetings)
    ]
    assert {type(each.result(60)) for each in joining} == {connection}
    for each in joining:
        each.result().leave()
