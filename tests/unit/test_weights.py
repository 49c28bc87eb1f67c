"""Buckets, fingerprints and the three transports in one process: receivers on threads, real gloo and real files."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import PrefixStore

from rollout.weights import (
    TRANSPORTS,
    CollectiveSend,
    DiskWrite,
    ManifestOf,
    OpenCollective,
    PackBuckets,
    Receiver,
    receiver,
)
from rollout.weights.buckets import Incoming, Staged, fill
from rollout.weights.collective import BUFFERS, CollectiveReceiver, CollectiveSender
from rollout.weights.fingerprint import Fingerprint, weighted_sum
from rollout.weights.links import Communicator, Connection, Downlinks, Flight
from rollout.weights.protocol import SENDER, Link, Manifest, Rendezvous, SendReport, SyncOrder, TransferFailed

KIB = 1024
CPU = torch.device("cpu")
SHAPES = [(16, 8), (8,), (33,), (), (40, 25), (2000,), (3, 1, 5)]


def weights(seed: int = 0) -> Staged:
    generator = torch.Generator().manual_seed(seed)
    return [(f"layer.{index}", torch.randn(shape, generator=generator)) for index, shape in enumerate(SHAPES)]


def same(staged: Staged, expected: Staged, dtype: torch.dtype) -> bool:
    names = [name for name, _ in staged] == [name for name, _ in expected]
    return names and all(torch.equal(a, b.to(dtype)) for (_, a), (_, b) in zip(staged, expected, strict=True))


def arrived(manifest: Manifest, flats: Iterable[Tensor]) -> tuple[Staged, str]:
    incoming = Incoming(manifest, flats, CPU, "the weights")
    return list(incoming), incoming.finish()


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
        self._links = count(1)

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
        return SyncOrder(f"to {links}", 3, "collective", manifest, Rendezvous(*self.address, links, timeout_s))

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


@pytest.fixture(scope="module")
def trainer() -> Iterator[Stage]:
    trainer = Stage()
    yield trainer
    trainer.sender.close()


# What travels.


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=12),
    dtypes=st.lists(st.sampled_from(["float32", "bfloat16", "int64", "bool", "uint8"]), min_size=12, max_size=12),
    bucket=st.integers(1, 300),
    buffers=st.sampled_from([None, 1, 2, 3]),
)
@settings(max_examples=150)
def test_weights_of_any_shapes_and_dtypes_come_out_of_the_buckets_as_they_went_in(shapes, dtypes, bucket, buffers):
    given_weights = [
        (f"w{index}", (torch.rand(shape) * 9 - 4).to(getattr(torch, dtype)))
        for index, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    ]
    manifest = ManifestOf("bfloat16", bucket)(iter(given_weights))
    flats = (flat.clone() for flat in fill(manifest, iter(given_weights), buffers=buffers))
    staged, _ = arrived(manifest, flats)
    assert [name for name, _ in staged] == [name for name, _ in given_weights]
    for (_, got), (_, was) in zip(staged, given_weights, strict=True):
        wanted = was.bfloat16() if was.is_floating_point() else was
        assert got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(got, wanted)


@given(bucket=st.integers(1, 20_000))
@settings(max_examples=50)
def test_a_bucket_is_within_its_limit_unless_one_tensor_alone_exceeds_it(bucket):
    manifest = ManifestOf("float32", bucket)(weights())
    for metas in manifest.buckets():
        assert len(metas) == 1 or sum(meta.nbytes for meta in metas) <= bucket


def test_the_same_weights_have_the_same_fingerprint_whatever_was_in_memory_before():
    manifest = ManifestOf("bfloat16", KIB)(weights())
    prints = {arrived(manifest, fill(manifest, weights(), buffers=buffers))[1] for buffers in (None, 1, 2, None)}
    assert len(prints) == 1


@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_the_allowed_number_of_buffers_is_used_in_turn(buffers: int):
    manifest = ManifestOf("float32", KIB)(weights())
    places = [flat.data_ptr() for flat in fill(manifest, weights(), buffers=buffers)]
    assert len(places) > buffers and len(set(places)) == buffers
    assert places[buffers:] == places[:-buffers], "the oldest is taken, which has landed by then"


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (weights()[:-1], "the trainer sends nothing more"),
        ([*weights(), ("extra", torch.ones(1))], "sends extra, which the manifest does not have"),
        ([("other", weights()[0][1]), *weights()[1:]], r"expected layer.0 \(16, 8\), the trainer sends other"),
        ([("layer.0", torch.ones(8, 16)), *weights()[1:]], r"expected layer.0 \(16, 8\).*\(8, 16\)"),
    ],
)
def test_weights_that_differ_from_the_manifest_are_refused(sent: Staged, complaint: str):
    manifest = ManifestOf("float32", KIB)(weights())
    with pytest.raises(ValueError, match=complaint):
        list(fill(manifest, iter(sent)))


def test_a_tensor_is_copied_before_the_next_is_drawn():
    """As with gathered weights: what was drawn is taken back as soon as more is asked for."""

    def gathered() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights():
            lent = tensor.clone()
            yield name, lent
            lent.fill_(float("nan"))

    manifest = ManifestOf("float32", 10_000)(weights())
    staged, _ = arrived(manifest, fill(manifest, gathered()))
    assert same(staged, weights(), torch.float32)


@given(data=st.binary(min_size=1, max_size=200), bit=st.integers(0))
def test_a_flipped_bit_changes_the_fingerprint(data: bytes, bit: int):
    flipped = bytearray(data)
    flipped[bit // 8 % len(data)] ^= 1 << bit % 8
    digests = []
    for content in (bytearray(data), flipped):
        fingerprint = Fingerprint()
        fingerprint.update(torch.frombuffer(content, dtype=torch.uint8))
        digests.append(fingerprint.digest())
    assert digests[0] != digests[1] and digests[0].startswith("xxh3:")


@pytest.mark.parametrize("size", [1, 3, 4, 39, 40, 41, 4096, 4099])
def test_the_checksum_of_an_accelerator_is_the_weighted_sum_of_its_words_however_it_is_sliced(size: int):
    content = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    words = np.pad(content, (0, -size % 4)).view("<i4").astype(object)  # exact integers
    expected = sum(words * np.arange(1, len(words) + 1).astype(object))
    bucket = torch.from_numpy(content)
    for slice_words in (1, 7, 10, 2**22):
        assert (weighted_sum(bucket, slice_words) - expected) % 2**64 == 0
    bucket[size // 2] ^= 1
    assert (weighted_sum(bucket) - expected) % 2**64 != 0


# The three transports.


def by_collective(manifest: Manifest, folder: Path, trainer: Stage) -> tuple[SendReport, Staged, str]:
    report, ((staged, fingerprint),) = trainer.sync(trainer.order(manifest, "a"), weights())
    return report, staged, fingerprint


def by_object_store(manifest: Manifest, folder: Path, trainer: Stage) -> tuple[SendReport, Staged, str]:
    report, payload = PackBuckets(manifest, 3)(iter(weights()))
    for array in payload:
        array.flags.writeable = False  # as it comes out of shared memory
    return report, *taken(receiver("object_store", "a", CPU), SyncOrder("o", 3, "object_store", manifest), payload)


def by_disk(manifest: Manifest, folder: Path, trainer: Stage) -> tuple[SendReport, Staged, str]:
    order = SyncOrder("o", 3, "disk", manifest, folder=str(folder))
    return DiskWrite(order)(iter(weights())), *taken(receiver("disk", "a", CPU), order)


BY = {"collective": by_collective, "object_store": by_object_store, "disk": by_disk}


def test_every_transport_is_under_test():
    assert BY.keys() == TRANSPORTS.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("transport", BY)
def test_every_transport_delivers_the_weights_with_the_same_fingerprint(
    transport: str, dtype: str, tmp_path: Path, trainer: Stage
):
    manifest = ManifestOf(dtype, 2 * KIB)(weights())
    report, staged, fingerprint = BY[transport](manifest, tmp_path, trainer)
    assert same(staged, weights(), getattr(torch, dtype))
    expected = arrived(manifest, fill(manifest, weights()))[1]
    assert (report.version, report.fingerprint, fingerprint) == (3, expected, expected)


def test_a_folder_keeps_the_newest_version_and_no_half_written_file(tmp_path: Path):
    manifest = ManifestOf("float32", KIB)(weights())
    for version in (1, 2, 3):
        DiskWrite(SyncOrder("o", version, "disk", manifest, folder=str(tmp_path)))(weights())
    with pytest.raises(ValueError, match="the trainer sends nothing more"):
        DiskWrite(SyncOrder("o", 4, "disk", manifest, folder=str(tmp_path)))(weights()[:2])
    assert [file.name for file in tmp_path.iterdir()] == ["version-3.safetensors"]


def test_a_missing_or_cut_off_file_is_an_infrastructure_failure(tmp_path: Path):
    manifest = ManifestOf("float32", KIB)(weights())
    order = SyncOrder("o", 1, "disk", manifest, folder=str(tmp_path))
    with pytest.raises(TransferFailed, match="no weights of version 1"):
        taken(receiver("disk", "a", CPU), order)
    DiskWrite(order)(weights())
    file = tmp_path / "version-1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TransferFailed, match="no weights of version 1"):
        taken(receiver("disk", "a", CPU), order)


@pytest.mark.parametrize("payload", [None, [], [np.zeros(3, np.uint8)]])
def test_an_order_without_its_payload_is_an_infrastructure_failure(payload):
    order = SyncOrder("o", 1, "object_store", ManifestOf("float32", KIB)(weights()))
    with pytest.raises(TransferFailed, match="order o came with"):
        taken(receiver("object_store", "a", CPU), order, payload)


# Collective: links, deadlines.

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


def test_a_trainer_that_never_comes_fails_the_receive_within_its_deadline(trainer: Stage):
    order = trainer.order(ManifestOf("float32", KIB)(weights()), "a", timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(TransferFailed, match="a: weights of version 3 did not arrive") as caught:
        taken(trainer.member("a"), order)
    assert not caught.value.begun
    assert time.monotonic() - began < 10.0, "0.3 s are the order's; others have 12"


class Leaves(CollectiveReceiver):
    """Gives up after its first bucket."""

    def _relayed(self, uplink: Connection, sizes: list[int]) -> Iterator[Tensor]:
        yield next(super()._relayed(uplink, sizes))
        raise RuntimeError("out of memory")


class Hangs(CollectiveReceiver):
    """Takes one bucket and then neither moves nor leaves."""

    woken = threading.Event()

    def _relayed(self, uplink: Connection, sizes: list[int]) -> Iterator[Tensor]:
        relayed = super()._relayed(uplink, sizes)
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


LEFT_AT_THE_END = """
import atexit, threading
atexit.register(lambda: print("at the end:", sum(each.name == LEAVES for each in threading.enumerate()), child.group))
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
import torch
from torch.distributed import PrefixStore, TCPStore
from rollout.weights.links import LEAVES, device_of, join

server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
client = TCPStore("127.0.0.1", server.port, None, False, wait_for_workers=False)
stores = [PrefixStore("link", each) for each in (server, client)]
with ThreadPoolExecutor(2) as threads:
    for rank, store in enumerate(stores):
        store.set(device_of(rank), "cpu")
    ends = threads.map(lambda rank: join(stores[rank], rank, torch.device("cpu"), "127.0.0.1", LIMIT), (0, 1))
    parent, child = ends
parent.broadcast(torch.zeros(2**26, dtype=torch.uint8))  # which the child does not take, and does not leave
parent.leave()
print("leaves:", sum(each.name == LEAVES for each in threading.enumerate()))
""".replace("LIMIT", "timedelta(seconds=1.5)")


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
    group = torch.distributed.ProcessGroupGloo(PrefixStore("alone", trainer.sender.store), 0, 1, timedelta(seconds=9))
    alone = Communicator(group, CPU, timedelta(seconds=9))
    downlinks = Downlinks("a", {"1": alone}, _children={"1": "b"})
    downlinks.land(Flight(torch.zeros(1), {"1": EndsInBetween()}))  # type: ignore[dict-item]
    assert downlinks.failed == {} and "1" in downlinks.connections
    downlinks.land(Flight(torch.zeros(1), {"1": EndsInBetween("closed by peer")}))  # type: ignore[dict-item]
    assert downlinks.failed == {"b": "closed by peer"} and not downlinks.connections


def test_a_process_that_ends_lets_go_of_its_links_first():
    """It was aborted else, as torch takes the interpreter's lock when it has let go."""
    ended = subprocess.run([sys.executable, "-c", LEFT_AT_THE_END], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout.split("\n")) == (0, ["leaves: 1", "at the end: 0 None", ""]), ended.stderr


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
