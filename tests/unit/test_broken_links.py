"""Links that break, or stall, while weights are on their way: who gets these, and who waits for how long."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import PrefixStore

from rollout.weights import ManifestOf
from rollout.weights.collective import CollectiveReceiver
from rollout.weights.links import Communicator, Downlinks, Flight
from rollout.weights.meeting import PARENT, Meeting
from rollout.weights.protocol import SENDER, Link, TransferFailed
from tests.broadcast_stage import CPU, KIB, STAR, Stage, ended_process, weights


@pytest.fixture(scope="module")
def trainer() -> Iterator[Stage]:
    trainer = Stage()
    yield trainer
    trainer.sender.close()


class Leaves(CollectiveReceiver):
    """Gives up after its first bucket."""

    def _relayed(self, *args: Any) -> Iterator[Tensor]:
        yield next(super()._relayed(*args))
        raise RuntimeError("out of memory")


class Hangs(CollectiveReceiver):
    """Takes one bucket and then neither moves nor leaves."""

    woken = threading.Event()

    def _relayed(self, *args: Any) -> Iterator[Tensor]:
        relayed = super()._relayed(*args)
        yield next(relayed)
        self.woken.wait(60)
        raise RuntimeError("woken")


LARGE = [(f"w{index}", torch.full((500_000,), float(index))) for index in range(24)]  # more than sockets buffer


@pytest.mark.parametrize("kind", [Leaves, Hangs])
@pytest.mark.parametrize("parents", [STAR, {"bad": "a", "b": "a"}], ids=["of the sender", "of a receiver"])
def test_a_child_that_fails_half_way_is_dropped_and_the_others_get_everything(trainer: Stage, kind, parents):
    Hangs.woken.clear()
    order = trainer.order(ManifestOf("float32", 500_000)(LARGE), "bad", "a", "b", timeout_s=6.0, parents=parents)
    arriving = trainer.receive(order, kind("bad", CPU), trainer.member("a"), trainer.member("b"))
    report = trainer.sender.send(order.seen_by({SENDER}), LARGE)
    assert report.seconds < 6.0
    fingerprints = [each.result(60)[1] for each in arriving[1:]]
    Hangs.woken.set()
    assert fingerprints == [report.fingerprint] * 2
    assert set(report.failed) == (set() if parents else {"bad"}) and "a" in report.delivered
    with pytest.raises(TransferFailed, match=r"out of memory|woken") as caught:
        arriving[0].result(60)
    assert caught.value.begun


def test_a_receiver_gives_up_at_the_deadline_of_the_order_however_late_its_parent_stalls(trainer: Stage):
    """As if the parent's host had vanished: no socket is closed. The links have a longer patience."""
    stalled = threading.Event()

    def stalling() -> Iterator[tuple[str, Tensor]]:
        yield from LARGE[:12]
        stalled.wait(60)
        yield from LARGE[12:]

    order = trainer.order(ManifestOf("float32", 500_000)(LARGE), "a", timeout_s=300.0)
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(trainer.sender.send, order.seen_by({SENDER}), stalling())
        (arriving,) = trainer.receive(order.after(295.0))
        with pytest.raises(TransferFailed, match="did not arrive") as caught:
            arriving.result(50)
        stalled.set()
        sending.result(60)
    assert caught.value.begun


def test_a_child_notices_that_its_parents_process_has_ended_although_no_socket_of_it_is_closed(trainer: Stage):
    """Gloo misses it now and then, as it does here, where the process is only said to have ended."""
    stalled, ended = threading.Event(), ended_process()

    def stalling() -> Iterator[tuple[str, Tensor]]:
        yield from LARGE[:12]
        assert child._uplink is not None
        child._uplink[0]._processes[PARENT] = ended
        stalled.wait(60)
        yield from LARGE[12:]

    order, child = trainer.order(ManifestOf("float32", 500_000)(LARGE), "a", timeout_s=300.0), trainer.member("a")
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(trainer.sender.send, order.seen_by({SENDER}), stalling())
        (arriving,) = trainer.receive(order, child)
        with pytest.raises(TransferFailed, match=r"the process of the trainer, .*, has ended") as caught:
            arriving.result(50)
        stalled.set()
        sending.result(60)
    assert caught.value.begun


def test_a_child_that_hangs_late_costs_its_parent_a_third_of_what_is_left_of_the_deadline(trainer: Stage):
    Hangs.woken.clear()
    parents = {"bad": "a"}
    order = trainer.order(ManifestOf("float32", 500_000)(LARGE), "bad", "a", timeout_s=300.0, parents=parents)
    bad, parent = Hangs("bad", CPU), trainer.member("a")
    (hanging,) = trainer.receive(order, bad)
    (arriving,) = trainer.receive(order.after(270.0), parent)
    report = trainer.sender.send(order.seen_by({SENDER}), LARGE)
    assert arriving.result(50)[1] == report.fingerprint, "it waits for the child for a third of 30 s, not of 300"
    assert set(parent._downlinks.failed) == {"bad"}
    Hangs.woken.set()
    with pytest.raises(TransferFailed):
        hanging.result(60)


def test_a_parent_that_fails_takes_its_children_with_it_and_nobody_else(trainer: Stage):
    order = trainer.order(ManifestOf("float32", 500_000)(LARGE), "bad", "a", "b", timeout_s=60.0, parents={"b": "bad"})
    arriving = trainer.receive(order, Leaves("bad", CPU), trainer.member("a"), trainer.member("b"))
    began = time.monotonic()
    report = trainer.sender.send(order.seen_by({SENDER}), LARGE)
    assert report.delivered == ("a",) and arriving[1].result(60)[1] == report.fingerprint, report
    for failing in (arriving[0], arriving[2]):
        with pytest.raises(TransferFailed):
            failing.result(60)
    assert time.monotonic() - began < 20.0, "it leaves, so nobody waits for a deadline"
    again = trainer.order(ManifestOf("float32", 500_000)(LARGE), "a", "b", parents={"b": "a"})
    report, arrived = trainer.sync(again, LARGE)
    assert [fingerprint for _, fingerprint in arrived] == [report.fingerprint] * 2


class EndsInBetween:
    """A broadcast that ends after somebody has looked in vain. `why`: it failed."""

    def __init__(self, why: str = "") -> None:
        self._why, self._looks = why, 0

    def wait(self, timeout: Any = None) -> None:
        self._looks += 1
        if self._looks == 1:
            raise RuntimeError("Operation timed out!")
        if self._why:
            raise RuntimeError(self._why)

    def is_completed(self) -> bool:
        return self._looks > 0


def test_a_bucket_that_lands_just_after_a_look_has_landed(trainer: Stage):
    assert trainer.sender.store is not None
    group = torch.distributed.ProcessGroupGloo(PrefixStore("alone", trainer.sender.store), 0, 1, timedelta(seconds=9))
    alone = Communicator(group, CPU, timedelta(seconds=9))
    downlinks = Downlinks("a", {"1": alone}, _meetings={"1": Meeting(trainer.sender.store, Link("1", "a", "b"))})
    downlinks.land(Flight(torch.zeros(1), {"1": EndsInBetween()}))  # type: ignore[dict-item]
    assert downlinks.failed == {} and "1" in downlinks.connections
    downlinks.land(Flight(torch.zeros(1), {"1": EndsInBetween("closed by peer")}))  # type: ignore[dict-item]
    assert downlinks.failed == {"b": "closed by peer"} and not downlinks.connections


def test_weights_that_came_in_part_have_no_fingerprint(trainer: Stage):
    order = trainer.order(ManifestOf("float32", 500_000)(LARGE), "bad", timeout_s=6.0)
    incoming = Leaves("bad", CPU).receive(order)
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(trainer.sender.send, order, LARGE)
        with pytest.raises(TransferFailed, match="out of memory"):
            list(incoming)
        with pytest.raises(TransferFailed, match="not all of them did"):
            incoming.finish()
        assert set(sending.result(60).failed) == {"bad"}


def test_members_fail_at_once_if_a_transfer_ends_half_way(trainer: Stage):
    def ending() -> Iterator[tuple[str, Tensor]]:
        yield from weights()[:-1]
        raise RuntimeError("a rank died while it gathered")

    order = trainer.order(ManifestOf("float32", KIB)(weights()), "a", timeout_s=60.0)
    arriving = trainer.receive(order)
    with pytest.raises(RuntimeError, match="a rank died"):
        trainer.sender.send(order, ending())
    with pytest.raises(TransferFailed, match="did not arrive"):
        arriving[0].result(30)
