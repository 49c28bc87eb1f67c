"""An engine of two processes, each of which receives weights for itself, by every transport."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.errors import InfraFailure
from rollout.engine import Ability
from rollout.sampling import Request, Sampling
from rollout.vllm_engine import VllmEngine
from rollout.weights import DiskWrite, ManifestOf, PackBuckets
from rollout.weights.collective import CollectiveSender
from rollout.weights.protocol import SENDER, Link, Manifest, Rendezvous, SyncOrder, TensorMeta, TransferFailed
from tests.contract.engine_stage import PROMPT, Weights, build

BUCKET = 24 * 1024  # a layer is in several buckets
NAMES = ("rollout/0/0", "rollout/0/1")
LINKS = (Link("first", SENDER, NAMES[0]), Link("second", NAMES[0], NAMES[1], 1))
GREEDY = Request("greedy", PROMPT, 1, Sampling(24, temperature=0), seed=1)
_numbers = itertools.count()


class Sharded:
    def __init__(self, root: Path) -> None:
        self.subject, self.folder = build("vllm-two-ranks", root), root / "weights"
        self.sender = CollectiveSender()
        self.address = self.sender.open()
        self.engine: VllmEngine = self.subject.engine  # type: ignore[assignment]

    def other_weights(self, version: int) -> Weights:
        """The reference has them, too."""
        weights = self.subject.other_weights(version)
        self.subject.reference.load_state_dict(dict(weights), strict=False)
        return weights

    def order(self, version: int, transport: str, manifest: Manifest, **more: Any) -> SyncOrder:
        return SyncOrder(f"order {next(_numbers)}", version, transport, manifest, **more)

    def collective(self, version: int, weights: Weights, links: tuple[Link, ...] = LINKS) -> tuple[str, str]:
        """Fingerprints: what was sent, and what arrived."""
        rendezvous = Rendezvous(*self.address, links, 30.0)
        order = self.order(version, "collective", ManifestOf("float32", BUCKET)(weights), rendezvous=rendezvous)
        with ThreadPoolExecutor(1) as thread:
            sending = thread.submit(self.sender.send, order.seen_by({SENDER}), weights)
            arrived = self.engine.receive(NAMES, order.seen_by(NAMES), None)
            return sending.result(60).fingerprint, arrived

    def disk(self, version: int, weights: Weights) -> tuple[str, str]:
        order = self.order(version, "disk", ManifestOf("float32", BUCKET)(weights), folder=str(self.folder))
        return DiskWrite(order)(weights).fingerprint, self.engine.receive(NAMES, order, None)

    def object_store(self, version: int, weights: Weights) -> tuple[str, str]:
        order = self.order(version, "object_store", ManifestOf("float32", BUCKET)(weights))
        report, payload = PackBuckets(order.manifest, version)(weights)
        for array in payload:
            array.flags.writeable = False  # as it comes out of shared memory
        return report.fingerprint, self.engine.receive(NAMES, order, payload)

    def check(self, version: int) -> list[int]:
        """What the engine says is what the reference says. Returns it."""
        completion = self.subject.one(GREEDY)
        assert set(completion.versions) == {version}
        assert completion.tokens.tolist() == self.subject.logits(PROMPT, completion).argmax(-1).tolist()
        assert self.subject.error(PROMPT, completion).max() < 1e-4
        return completion.tokens.tolist()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharded]:
    sharded = Sharded(tmp_path_factory.mktemp("sharded"))
    yield sharded
    sharded.engine.close()
    sharded.sender.close()


def test_the_engine_says_that_its_processes_receive_for_themselves() -> None:
    assert Ability.SHARDED in VllmEngine.abilities


@pytest.mark.parametrize("way", ["collective", "disk", "object_store"])
def test_every_process_gets_the_weights_by_every_transport(sharded: Sharded, way: str) -> None:
    send: Callable[[int, Weights], tuple[str, str]] = getattr(sharded, way)
    said = []
    for version in (1, 2, 3):  # connections stay
        sent, arrived = send(version, sharded.other_weights(version))
        assert sent == arrived
        said.append(sharded.check(version))
    assert len({tuple(tokens) for tokens in said}) > 1, "the weights made a difference"


def test_the_links_of_the_tree_outlive_weights_that_come_by_another_way(sharded: Sharded) -> None:
    """As of a member that catches up between two publishes."""
    sharded.collective(3, sharded.other_weights(3))
    before = dict(sharded.sender.links.connections)
    sharded.object_store(4, sharded.other_weights(4))
    sharded.collective(5, sharded.other_weights(5))
    assert sharded.sender.links.connections == before and before
    sharded.check(5)


def test_weights_that_end_half_way_leave_a_mixture_that_a_whole_set_makes_good(sharded: Sharded) -> None:
    weights = sharded.other_weights(6)
    order = sharded.order(6, "disk", ManifestOf("float32", BUCKET)(weights), folder=str(sharded.folder))
    DiskWrite(order)(weights)
    longer = Manifest((*order.manifest.tensors, TensorMeta("more", "float32", (9_000,))), BUCKET)
    with pytest.raises(TransferFailed, match=r"rollout/0/0: .*; rollout/0/1: ") as caught:
        sharded.engine.receive(NAMES, replace(order, manifest=longer), None)
    assert caught.value.begun and sharded.engine.version != 6
    sharded.disk(7, sharded.other_weights(7))
    sharded.check(7)


def test_a_process_that_is_not_reached_fails_the_transfer(sharded: Sharded) -> None:
    nowhere = (LINKS[0], Link("third", "nobody", NAMES[1], 1))
    rendezvous = Rendezvous(*sharded.address, nowhere, 4.0)
    weights = sharded.other_weights(8)
    order = sharded.order(8, "collective", ManifestOf("float32", BUCKET)(weights), rendezvous=rendezvous)
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(sharded.sender.send, order.seen_by({SENDER}), weights)
        with pytest.raises(TransferFailed, match=r"rollout/0/1: weights of version 8 did not arrive") as caught:
            sharded.engine.receive(NAMES, order, None)
        sending.result(60)
    assert caught.value.begun, "the other process has them"
    sent, arrived = sharded.collective(9, sharded.other_weights(9), (LINKS[0], replace(LINKS[1], id="fourth")))
    assert sent == arrived
    sharded.check(9)


def test_weights_are_not_loaded_past_the_processes_that_receive_them(sharded: Sharded) -> None:
    weights = sharded.other_weights(10)
    with pytest.raises(InfraFailure, match=r"an engine of 2 processes takes no weights by `load`"):
        sharded.engine.load(weights, 10)
    sharded.disk(11, sharded.other_weights(11))
    sharded.check(11)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_is_named(tmp_path: Path, rank: int) -> None:
    """By the call that it fails, and by each one after that."""
    engine: Any = build("vllm-two-ranks", tmp_path).engine
    victim = engine._llm.model_executor.workers[rank].proc
    why = rf"process {rank} of the engine's 2 \(pid {victim.pid}\) ended with signal SIGKILL"
    engine.add(GREEDY)
    engine.step()
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(InfraFailure, match=why):
        while True:
            engine.step()
    order = SyncOrder("after that", 1, "disk", Manifest((), BUCKET), folder=str(tmp_path))
    with pytest.raises(InfraFailure, match=why):
        engine.receive(NAMES, order, None)
    engine.close()
