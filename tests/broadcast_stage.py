"""A trainer's side of a broadcast and its receivers, on threads of one process, over real gloo."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any

import torch

from rollout.weights import (
    Receiver,
)
from rollout.weights.buckets import Staged
from rollout.weights.collective import CollectiveReceiver, CollectiveSender
from rollout.weights.protocol import SENDER, Link, Manifest, Rendezvous, SendReport, SyncOrder
from rollout.weights.same_gpu import describe_process, has_ended

KIB = 1024
CPU = torch.device("cpu")
SHAPES = [(16, 8), (8,), (33,), (), (40, 25), (2000,), (3, 1, 5)]


def weights(seed: int = 0) -> Staged:
    generator = torch.Generator().manual_seed(seed)
    return [(f"layer.{index}", torch.randn(shape, generator=generator)) for index, shape in enumerate(SHAPES)]


def same(staged: Staged, expected: Staged, dtype: torch.dtype) -> bool:
    names = [name for name, _ in staged] == [name for name, _ in expected]
    return names and all(torch.equal(a, b.to(dtype)) for (_, a), (_, b) in zip(staged, expected, strict=True))


def ended_process() -> str:
    """As `describe_process` says it."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    described = describe_process(child.pid)
    assert not has_ended(described)
    child.communicate()
    return described


def taken(by: Receiver, order: SyncOrder, payload: Any = None) -> tuple[Staged, str]:
    with by.receive(order, payload) as incoming:
        return list(incoming), incoming.finish()


STAR: dict[str, str] = {}  # child -> parent; all others are the sender's


class Stage:
    """A trainer's side and as many receivers as a test needs. Connections to the store are kept from test to test."""

    def __init__(self) -> None:
        self.sender = CollectiveSender()
        self.address = self.sender.open()
        self.members: dict[str, CollectiveReceiver] = {}
        self._links, self._orders = count(1), count(1)

    def links(self, *members: str, parents: dict[str, str] = STAR) -> tuple[Link, ...]:
        return tuple(
            Link(f"link {next(self._links)}", parents.get(name, SENDER), name, depth=int(name in parents))
            for name in members
        )

    def order(
        self, manifest: Manifest, *members: str, timeout_s: float = 12.0, parents: dict[str, str] = STAR
    ) -> SyncOrder:
        return self.along(manifest, self.links(*members, parents=parents), timeout_s)

    def along(self, manifest: Manifest, links: tuple[Link, ...], timeout_s: float = 12.0) -> SyncOrder:
        return SyncOrder(
            f"order {next(self._orders)}", 3, "collective", manifest, Rendezvous(*self.address, links, timeout_s)
        )

    def member(self, name: str) -> CollectiveReceiver:
        return self.members.setdefault(name, CollectiveReceiver(name, CPU))

    def receive(self, order: SyncOrder, *members: CollectiveReceiver) -> list[Future[tuple[Staged, str]]]:
        """All receivers of the order at the same time, each on a thread."""
        assert order.rendezvous is not None
        members = members or tuple(self.member(link.child) for link in order.rendezvous.links)
        threads = ThreadPoolExecutor(len(members))
        return [threads.submit(taken, member, order.seen_by({member.name})) for member in members]

    def sync(self, order: SyncOrder, sent: Staged) -> tuple[SendReport, list[tuple[Staged, str]]]:
        arriving = self.receive(order)
        report = self.sender.send(order.seen_by({SENDER}), iter(sent))
        return report, [future.result(60) for future in arriving]
