"""Weights down a tree of links, in one process: who gets them, who does not, and for how long anybody waits."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from rollout.weights import CollectiveSend, ManifestOf, OpenCollective
from rollout.weights.collective import BUFFERS, CollectiveReceiver, CollectiveSender
from rollout.weights.links import Communicator
from rollout.weights.meeting import Meeting, report_losses
from rollout.weights.protocol import SENDER, Link, Rendezvous, SyncOrder, TransferFailed
from tests.broadcast_stage import CPU, KIB, STAR, Stage, ended_process, same, taken, weights


@pytest.fixture(scope="module")
def trainer() -> Iterator[Stage]:
    trainer = Stage()
    yield trainer
    trainer.sender.close()


CHAIN = {"b": "a", "c": "b"}


@pytest.mark.parametrize("parents", [STAR, CHAIN, {"b": "a", "c": "a"}], ids=["star", "chain", "tree"])
def test_all_receivers_get_the_same_bytes(trainer: Stage, parents: dict[str, str]):
    manifest = ManifestOf("float32", KIB)(weights())
    report, arrived = trainer.sync(trainer.order(manifest, *"abc", parents=parents), weights())
    assert report.delivered == tuple(name for name in "abc" if name not in parents) and not report.failed
    for staged, fingerprint in arrived:
        assert fingerprint == report.fingerprint and same(staged, weights(), torch.float32)


def test_links_stay_from_order_to_order_and_only_new_ones_are_joined(trainer: Stage):
    manifest = ManifestOf("float32", KIB)(weights())
    a, b, c = trainer.links("a", "b", "c", parents={"c": "a"})
    seen = []
    for links in [(a,), (a,), (a, b, c), (a, c)]:
        report, arrived = trainer.sync(trainer.along(manifest, links), weights())
        assert [fingerprint for _, fingerprint in arrived] == [report.fingerprint] * len(links)
        seen.append(dict(trainer.sender.links.connections))
    assert [set(held) for held in seen] == [{a.id}, {a.id}, {a.id, b.id}, {a.id}]
    assert len({id(held[a.id]) for held in seen}) == 1
    assert set(trainer.member("a")._downlinks.connections) == {c.id}


def test_a_second_run_in_the_same_process_joins_no_member_of_the_first():
    manifest, sender = ManifestOf("float32", KIB)(weights()), CollectiveSender()
    for seed in (1, 2):  # both call their first link "1" and their member "a"
        order = SyncOrder("o", 0, "collective", manifest, Rendezvous(*sender.open(), (Link("1", SENDER, "a"),), 12.0))
        with ThreadPoolExecutor(1) as thread:
            arriving = thread.submit(taken, CollectiveReceiver("a", CPU), order)
            assert sender.send(order, weights(seed)).fingerprint == arriving.result(60)[1]
    sender.close()


def test_a_receiver_that_keeps_nothing_has_memory_for_two_buckets(trainer: Stage, monkeypatch: pytest.MonkeyPatch):
    """Also one that sends on what it receives."""
    sent = [(f"w{index}", torch.full((64 * KIB,), float(index))) for index in range(10)]
    order = trainer.order(ManifestOf("float32", 256 * KIB)(sent), "a", "b", parents={"b": "a"})
    alive, most = WeakSet[Tensor](), 0
    empty = torch.empty

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal most
        made = empty(*args, **kwargs)
        if threading.current_thread().name == "a":
            deadline = time.monotonic() + 5.0  # gloo's thread lets go of a bucket a moment after it has arrived
            while len(alive) >= BUFFERS and time.monotonic() < deadline:
                time.sleep(0.001)
            alive.add(made)
            most = max(most, len(alive))
        return made

    monkeypatch.setattr(torch, "empty", counted)
    sums: list[float] = []

    def take() -> None:
        with trainer.member("a").receive(order.seen_by({"a"})) as incoming:
            for _, tensor in incoming:
                sums.append(float(tensor.mean()))
                del tensor

    thread = threading.Thread(target=take, name="a")
    thread.start()
    [arriving] = trainer.receive(order, trainer.member("b"))
    trainer.sender.send(order.seen_by({SENDER}), sent)
    thread.join(60)
    assert sums == [float(index) for index in range(10)] and same(arriving.result(60)[0], sent, torch.float32)
    assert most == BUFFERS


def test_a_receiver_that_never_comes_is_reported_after_a_deadline_and_the_others_are_served(trainer: Stage):
    order = trainer.order(ManifestOf("float32", KIB)(weights()), "a", "absent", timeout_s=6.0)
    arriving = trainer.receive(order, trainer.member("a"))
    report = trainer.sender.send(order, weights())
    assert report.seconds < 6.0
    assert report.delivered == ("a",) and "did not join within 2 s" in report.failed["absent"]
    assert arriving[0].result(60)[1] == report.fingerprint


def test_those_below_a_receiver_that_never_comes_are_told_and_do_not_wait_for_their_own_deadline(trainer: Stage):
    parents = {"b": "absent", "c": "b"}
    order = trainer.order(ManifestOf("float32", KIB)(weights()), "absent", "b", "c", timeout_s=6.0, parents=parents)
    arriving = trainer.receive(order, trainer.member("b"), trainer.member("c"))
    report = trainer.sender.send(order.seen_by({SENDER}), weights())
    assert set(report.failed) == {"absent"}
    for failing, parent in zip(arriving, ("absent", "b"), strict=True):
        with pytest.raises(TransferFailed, match=f"{parent}, which was to send them, is lost") as caught:
            failing.result(60)
        assert not caught.value.begun


def test_nobody_waits_for_a_receiver_of_which_somebody_else_says_that_it_is_lost(trainer: Stage):
    """The driver, for one that has died before it has joined its links."""
    order = trainer.order(
        ManifestOf("float32", KIB)(weights()), "absent", "a", "b", timeout_s=90.0, parents={"b": "absent"}
    )
    arriving = trainer.receive(order, trainer.member("a"), trainer.member("b"))
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(trainer.sender.send, order.seen_by({SENDER}), weights())
        assert report_losses(trainer.address, order.id, ("absent",), 60.0) == ""
        report = sending.result(60)
    assert report.failed == {"absent": "it is lost"}
    assert arriving[0].result(60)[1] == report.fingerprint
    with pytest.raises(TransferFailed, match="absent, which was to send them, is lost"):
        arriving[1].result(60)


def test_a_child_does_not_wait_for_a_parent_whose_process_has_ended_before_it_joined_the_link(trainer: Stage):
    order = trainer.order(ManifestOf("float32", KIB)(weights()), "b", timeout_s=90.0, parents={"b": "a"})
    assert order.rendezvous is not None and trainer.sender.store is not None
    place = Meeting(trainer.sender.store, order.rendezvous.links[0]).place
    place.set("process/0", ended_process())
    place.set("device/0", "cpu")
    (arriving,) = trainer.receive(order)
    with pytest.raises(TransferFailed, match="the process of a, which was to send them, has ended"):
        arriving.result(60)


class LosesTheEnd:
    """A parent's end of a link, on which its last bucket is said not to have landed, although it has."""

    def __init__(self, connection: Communicator, buckets: int) -> None:
        self.timeout, self._connection, self._left = connection.timeout, connection, buckets

    def broadcast(self, flat: Tensor) -> Any:
        self._left -= 1
        work = self._connection.broadcast(flat)
        return work if self._left else Refuted(work)

    def leave(self) -> None:
        self._connection.leave()


class Refuted:
    def __init__(self, work: torch.distributed.Work) -> None:
        self._work = work

    def wait(self, timeout: timedelta) -> None:
        self._work.wait(timeout)
        raise RuntimeError("timed out")


def test_a_child_that_was_dropped_after_it_had_everything_gets_the_next_weights_along_the_same_link(trainer: Stage):
    manifest, links = ManifestOf("float32", KIB)(weights()), trainer.links("a", "b")
    trainer.sync(trainer.along(manifest, links), weights())
    held = trainer.sender.links.connections
    held[links[0].id] = LosesTheEnd(held[links[0].id], len(list(manifest.buckets())))  # type: ignore[arg-type, assignment]
    report, arrived = trainer.sync(trainer.along(manifest, links), weights(1))
    assert report.failed == {"a": "timed out"} and {print for _, print in arrived} == {report.fingerprint}
    for seed in (2, 3):
        report, arrived = trainer.sync(trainer.along(manifest, links), weights(seed))
        assert not report.failed and report.delivered == ("a", "b")
        assert all(same(staged, weights(seed), torch.float32) for staged, _ in arrived)


def test_a_trainer_that_never_comes_fails_the_receive_within_its_deadline(trainer: Stage):
    order = trainer.order(ManifestOf("float32", KIB)(weights()), "a", timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(TransferFailed, match="a: weights of version 3 did not arrive") as caught:
        taken(trainer.member("a"), order)
    assert not caught.value.begun
    assert time.monotonic() - began < 10.0, "0.3 s are the order's; others have 12"


LEFT_AT_THE_END = """
import atexit, threading, time
atexit.register(lambda: print("at the end:", sum(each.name == LEAVES for each in threading.enumerate()), child.group))
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
import torch
from torch.distributed import TCPStore
from rollout.weights.links import LEAVES, join
from rollout.weights.meeting import Meeting
from rollout.weights.protocol import Link

server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
client = TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False)
cpu, meetings = torch.device("cpu"), [Meeting(each, Link("link", "", "child")) for each in (server, client)]
with ThreadPoolExecutor(2) as threads:
    for rank, meeting in enumerate(meetings):
        meeting.announce(rank, cpu)
    until = time.monotonic() + 60
    ends = threads.map(lambda rank: join(meetings[rank], rank, cpu, "127.0.0.1", LIMIT, until), (0, 1))
    parent, child = ends
parent.broadcast(torch.zeros(2**26, dtype=torch.uint8))  # which the child does not take, and does not leave
parent.leave()
print("leaves:", sum(each.name == LEAVES for each in threading.enumerate()))
""".replace("LIMIT", "timedelta(seconds=1.5)")


def test_a_process_that_ends_lets_go_of_its_links_first():
    """It was aborted else, as torch takes the interpreter's lock when it has let go."""
    ended = subprocess.run([sys.executable, "-c", LEFT_AT_THE_END], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.split("\n")) == (0, ["leaves: 1", "at the end: 0 None", ""]), ended.stderr


def test_buckets_are_where_the_parent_has_them_and_a_gpu_does_not_send_to_a_cpu():
    on_cpu, on_gpu = CollectiveReceiver("a", CPU), CollectiveReceiver("a", torch.device("cuda"))
    assert on_gpu._device_of_buckets("cpu") == CPU, "an engine on a GPU copies them there"
    assert on_gpu._device_of_buckets("cuda GPU-7") == torch.device("cuda")
    with pytest.raises(TransferFailed, match=r"are on cuda, this engine is on cpu; set weights.transport=object_store"):
        on_cpu._device_of_buckets("cuda GPU-7")


def test_one_process_sends_to_two_pools_in_turns_and_each_gets_its_own(trainer: Stage):
    """As a process does that holds two roles, or whose role two engine roles follow."""
    manifest, sent = ManifestOf("float32", KIB)(weights()), {"one": weights(1), "other": weights(2)}
    addresses = {pool: OpenCollective(pool)() for pool in sent}
    assert len(set(addresses.values())) == 2
    for version in (0, 1):
        for pool, own in sent.items():
            member = f"{pool}/0"
            rendezvous = Rendezvous(*addresses[pool], (Link("1", SENDER, member),), 12.0)
            order = SyncOrder(f"{pool} {version}", version, "collective", manifest, rendezvous)
            arriving = trainer.receive(order)
            assert CollectiveSend(order, pool)(iter(own)).delivered == (member,)
            assert same(arriving[0].result(60)[0], own, torch.float32)
