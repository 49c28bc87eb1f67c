"""Weights between two processes of one GPU, without a GPU: both sides are threads, and memory of the host is handed
over through a real store. tests/gpu has the same between processes, by CUDA IPC."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rollout.weights.buckets import Staged
from rollout.weights.collective import BUFFERS, CollectiveReceiver, CollectiveSender
from rollout.weights.links import CHILD, PARENT, Communicator, Connection, Downlinks, device_of, join, kind_of_link
from rollout.weights.protocol import SENDER, Link, Manifest, Rendezvous, SyncOrder, TensorMeta, TransferFailed
from rollout.weights.same_gpu import Handover, SameGpu, describe_process, has_ended

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

    def _join(self, order_id: str, rendezvous: Rendezvous) -> SameGpu:
        self._uplink = LINK.id, self.joined
        return self.joined

    def take(self, order: SyncOrder) -> tuple[Staged, str]:
        incoming = self.receive(order)
        return list(incoming), incoming.finish()


LINK = Link("1/a", SENDER, "a")


class Stage:
    def __init__(self) -> None:
        self.server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False, multi_tenant=True)
        self.client = TCPStore("127.0.0.1", self.server.port, None, False, wait_for_workers=False, multi_tenant=True)
        self.stores = [PrefixStore("1/a", store) for store in (self.server, self.client)]

    def side(self, rank: int, timeout: timedelta = LONG, **options) -> SameGpu:
        return SameGpu(self.stores[rank], rank, CPU, timeout, **({"memory": HeapMemory()} | options))

    def sides(self, timeout: timedelta = LONG) -> tuple[SameGpu, SameGpu]:
        return self.side(0, timeout), self.side(1, timeout)

    def order(self, version: int) -> SyncOrder:
        rendezvous = Rendezvous("127.0.0.1", self.server.port, (LINK,), 3 * LONG.total_seconds())
        return SyncOrder(f"order {version}", version, "collective", MANIFEST, rendezvous)

    def sender(self, communicator: SameGpu) -> CollectiveSender:
        return CollectiveSender(self.server, Downlinks(SENDER, {LINK.id: communicator}))


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


def ended_process() -> str:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    described = describe_process(child.pid)
    assert not has_ended(described)
    child.communicate()
    return described


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
        leaving = SameGpu(stores[0], 0, CPU, LONG, memory=HeapMemory())
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
    stage.side(1 - rank, process=ended_process())
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=rf"the process of the {peer} \(pid \d+\) has ended"):
        stage.side(rank).broadcast(torch.ones(4)).wait()
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
        def _relayed(self, uplink: Connection, sizes: list[int]) -> Iterator[Tensor]:
            yield next(super()._relayed(uplink, sizes))
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
    hanging = {
        name: SameGpu(PrefixStore(name, stage.server), PARENT, CPU, limit, memory=HeapMemory()) for name in "abcdefgh"
    }
    downlinks = Downlinks("parent", hanging, _children={name: name for name in hanging})
    began = time.monotonic()
    downlinks.land(downlinks.send(torch.ones(4)))
    assert time.monotonic() - began < 4 * limit.total_seconds()
    why = "the receiver did not take bucket 0: waited for 1 s"
    assert downlinks.failed == dict.fromkeys("abcdefgh", why) and not downlinks.connections


class ClosedMeanwhile(SameGpu):
    """Its process is closed, by another thread, while a bucket is on its way."""

    downlinks: Downlinks

    def broadcast(self, flat: Tensor) -> Handover:
        def finish(*_: object) -> None:
            self.downlinks.leave()
            raise RuntimeError("this side has left")

        return Handover(finish, self.timeout)


def test_links_may_be_left_while_another_thread_sends(stage: Stage):
    connection = ClosedMeanwhile(stage.stores[0], PARENT, CPU, LONG, memory=HeapMemory())
    downlinks = connection.downlinks = Downlinks("parent", {"link": connection}, _children={"link": "a"})
    downlinks.land(downlinks.send(torch.ones(4)))
    assert downlinks.failed == {"a": "this side has left"} and not downlinks.connections


# Which connection.


@pytest.mark.parametrize(
    ("parent", "child", "kind"),
    [("cuda x", "cuda x", "same_gpu"), ("cuda x", "cuda y", "nccl"), ("cpu", "cpu", "gloo")],
)
def test_the_kind_of_a_link_follows_from_the_devices_of_its_ends(parent: str, child: str, kind: str):
    assert kind_of_link(parent, child) == kind


@pytest.mark.parametrize(("device", "connection"), [("cuda GPU-1", SameGpu), ("cpu", Communicator)])
def test_ends_that_say_their_devices_join(stage: Stage, thread, device: str, connection: type):
    stores = [PrefixStore("1/a", TCPStore("127.0.0.1", stage.server.port, None, False)) for _ in (PARENT, CHILD)]
    for rank, store in enumerate(stores):
        store.set(device_of(rank), device)
    joining = [
        thread.submit(join, store, rank, torch.device(device.split()[0]), "127.0.0.1", LONG)
        for rank, store in enumerate(stores)
    ]
    assert {type(each.result(60)) for each in joining} == {connection}
    for each in joining:
        each.result().leave()
