"""Buckets, fingerprints and the three transports in one process: receivers on threads, real gloo and real files."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.errors import InfraFailure
from rollout.weights import TRANSPORTS, CollectiveSend, DiskWrite, ManifestOf, OpenCollective, PackBuckets, receiver
from rollout.weights.buckets import Staged, fill, stage
from rollout.weights.collective import CollectiveReceiver, CollectiveSender, Communicator
from rollout.weights.fingerprint import Fingerprint, weighted_sum
from rollout.weights.protocol import Manifest, Rendezvous, SendReport, SyncOrder

KIB = 1024
CPU = torch.device("cpu")
SHAPES = [(16, 8), (8,), (33,), (), (40, 25), (2000,), (3, 1, 5)]


def weights(seed: int = 0) -> Staged:
    generator = torch.Generator().manual_seed(seed)
    return [(f"layer.{index}", torch.randn(shape, generator=generator)) for index, shape in enumerate(SHAPES)]


def same(staged: Staged, expected: Staged, dtype: torch.dtype) -> bool:
    names = [name for name, _ in staged] == [name for name, _ in expected]
    return names and all(torch.equal(a, b.to(dtype)) for (_, a), (_, b) in zip(staged, expected, strict=True))


class Stage:
    """A trainer's side and as many members as a test needs. Connections are kept from test to test, as in a run, where
    every test is another epoch."""

    def __init__(self) -> None:
        self.sender = CollectiveSender()
        self.address = self.sender.open()
        self.members: dict[str, CollectiveReceiver] = {}
        self._epochs = count(1)

    def order(self, manifest: Manifest, *members: str, timeout_s: float = 12.0, topology="each") -> SyncOrder:
        rendezvous = Rendezvous(*self.address, str(next(self._epochs)), members, timeout_s, topology)
        return SyncOrder(f"order {rendezvous.epoch}", 3, "collective", manifest, rendezvous)

    def member(self, name: str) -> CollectiveReceiver:
        return self.members.setdefault(name, CollectiveReceiver(name, CPU))

    def receive(self, order: SyncOrder, *members: CollectiveReceiver) -> list[Future[tuple[Staged, str]]]:
        """All members of the order at the same time, each on a thread."""
        assert order.rendezvous is not None
        members = members or tuple(map(self.member, order.rendezvous.members))
        threads = ThreadPoolExecutor(len(members))
        return [threads.submit(member.receive, order) for member in members]

    def sync(self, order: SyncOrder, sent: Staged) -> tuple[SendReport, list[tuple[Staged, str]]]:
        arriving = self.receive(order)
        report = self.sender.send(order, iter(sent))
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
    staged, _ = stage(manifest, flats, CPU)
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
    prints = {stage(manifest, fill(manifest, weights(), buffers=buffers), CPU)[1] for buffers in (None, 1, 2, None)}
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
    staged, _ = stage(manifest, fill(manifest, gathered()), CPU)
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
    return report, *receiver("object_store", "a", CPU).receive(SyncOrder("o", 3, "object_store", manifest), payload)


def by_disk(manifest: Manifest, folder: Path, trainer: Stage) -> tuple[SendReport, Staged, str]:
    order = SyncOrder("o", 3, "disk", manifest, folder=str(folder))
    return DiskWrite(order)(iter(weights())), *receiver("disk", "a", CPU).receive(order)


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
    expected = stage(manifest, fill(manifest, weights()), CPU)[1]
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
    with pytest.raises(InfraFailure, match="no weights of version 1"):
        receiver("disk", "a", CPU).receive(order)
    DiskWrite(order)(weights())
    file = tmp_path / "version-1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InfraFailure, match="no weights of version 1"):
        receiver("disk", "a", CPU).receive(order)


@pytest.mark.parametrize("payload", [None, [], [np.zeros(3, np.uint8)]])
def test_an_order_without_its_payload_is_an_infrastructure_failure(payload):
    order = SyncOrder("o", 1, "object_store", ManifestOf("float32", KIB)(weights()))
    with pytest.raises(InfraFailure, match="order o came with"):
        receiver("object_store", "a", CPU).receive(order, payload)


# Collective: members, epochs, deadlines.


@pytest.mark.parametrize("topology", ["each", "all"])
@pytest.mark.parametrize("names", ["a", "abc"])
def test_all_members_get_the_same_bytes(trainer: Stage, names: str, topology: str):
    manifest = ManifestOf("float32", KIB)(weights())
    report, arrived = trainer.sync(trainer.order(manifest, *names, topology=topology), weights())
    assert report.delivered == tuple(names) and not report.failed
    for staged, fingerprint in arrived:
        assert fingerprint == report.fingerprint and same(staged, weights(), torch.float32)


def test_groups_are_kept_within_an_epoch_and_rebuilt_when_members_join_or_leave(trainer: Stage):
    manifest = ManifestOf("float32", KIB)(weights())
    seen = []
    for members, syncs in [("a", 2), ("abc", 1), ("bc", 2)]:
        order = trainer.order(manifest, *members)
        for _ in range(syncs):
            report, arrived = trainer.sync(order, weights())
            assert [fingerprint for _, fingerprint in arrived] == [report.fingerprint] * len(members)
            seen.append(dict(trainer.sender.communicators))
    assert seen[0] == seen[1] and seen[3] == seen[4], "nothing is built where the members are the same"
    assert [set(held) for held in seen[1:4]] == [{("a",)}, {("a",), ("b",), ("c",)}, {("b",), ("c",)}]
    assert seen[2]["b",] is not seen[3]["b",]


def test_a_second_run_in_the_same_process_joins_no_member_of_the_first():
    manifest, sender = ManifestOf("float32", KIB)(weights()), CollectiveSender()
    for seed in (1, 2):  # both call their first epoch "1" and their member "a"
        order = SyncOrder("o", 0, "collective", manifest, Rendezvous(*sender.open(), "1", ("a",), 12.0))
        with ThreadPoolExecutor(1) as thread:
            arriving = thread.submit(CollectiveReceiver("a", CPU).receive, order)
            assert sender.send(order, weights(seed)).fingerprint == arriving.result(60)[1]
    sender.close()


def test_staging_memory_is_kept_between_syncs(trainer: Stage):
    order = trainer.order(ManifestOf("float32", KIB)(weights()), "a")
    places = []
    for seed in (1, 2):
        _, ((staged, _),) = trainer.sync(order, weights(seed))
        assert same(staged, weights(seed), torch.float32)
        places.append([tensor.data_ptr() for _, tensor in staged])
    assert places[0] == places[1]


def test_a_member_that_never_comes_is_reported_after_a_deadline_and_the_others_are_served(trainer: Stage):
    order = trainer.order(ManifestOf("float32", KIB)(weights()), "a", "absent", timeout_s=6.0)
    arriving = trainer.receive(order, trainer.member("a"))
    report = trainer.sender.send(order, weights())
    assert report.seconds < 6.0
    assert report.delivered == ("a",) and "did not join epoch" in report.failed["absent"]
    assert arriving[0].result(60)[1] == report.fingerprint


def test_a_trainer_that_never_comes_fails_the_receive_within_its_deadline(trainer: Stage):
    order = trainer.order(ManifestOf("float32", KIB)(weights()), "a", timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(InfraFailure, match="a: weights of version 3 did not arrive"):
        trainer.member("a").receive(order)
    assert time.monotonic() - began < 10.0, "0.3 s are the order's; others have 12"


class Leaves(CollectiveReceiver):
    """Gives up after its first bucket."""

    def _arrivals(self, order: SyncOrder, communicator: Communicator) -> Iterator[Tensor]:
        yield next(super()._arrivals(order, communicator))
        raise RuntimeError("out of memory")


class Hangs(CollectiveReceiver):
    """Takes one bucket and then neither moves nor leaves."""

    woken = threading.Event()

    def _arrivals(self, order: SyncOrder, communicator: Communicator) -> Iterator[Tensor]:
        yield next(super()._arrivals(order, communicator))
        self.woken.wait(60)
        raise RuntimeError("woken")


@pytest.mark.parametrize("kind", [Leaves, Hangs])
def test_a_member_that_fails_half_way_is_reported_and_the_others_get_everything(trainer: Stage, kind):
    large = [(f"w{index}", torch.full((500_000,), float(index))) for index in range(24)]  # more than sockets buffer
    order = trainer.order(ManifestOf("float32", 500_000)(large), "bad", "a", timeout_s=6.0)
    arriving = trainer.receive(order, kind("bad", CPU), trainer.member("a"))
    report = trainer.sender.send(order, large)
    Hangs.woken.set()
    assert report.seconds < 6.0
    assert report.delivered == ("a",) and set(report.failed) == {"bad"}
    assert arriving[1].result(60)[1] == report.fingerprint
    with pytest.raises(InfraFailure, match=r"out of memory|woken"):
        arriving[0].result(60)


def test_one_broadcast_to_all_fails_as_a_whole_and_is_reported_as_that(trainer: Stage):
    large = [(f"w{index}", torch.full((500_000,), float(index))) for index in range(24)]
    order = trainer.order(ManifestOf("float32", 500_000)(large), "bad", "a", timeout_s=6.0, topology="all")
    arriving = trainer.receive(order, Leaves("bad", CPU), trainer.member("a"))
    report = trainer.sender.send(order, large)
    assert report.delivered == () and set(report.failed) == {"bad", "a"}
    for future in arriving:
        with pytest.raises(InfraFailure):
            future.result(60)


def test_members_fail_at_once_if_a_transfer_ends_half_way(trainer: Stage):
    def ending() -> Iterator[tuple[str, Tensor]]:
        yield from weights()[:-1]
        raise RuntimeError("a rank died while it gathered")

    order = trainer.order(ManifestOf("float32", KIB)(weights()), "a", timeout_s=60.0)
    arriving = trainer.receive(order)
    with pytest.raises(RuntimeError, match="a rank died"):
        trainer.sender.send(order, ending())
    with pytest.raises(InfraFailure, match="did not arrive"):
        arriving[0].result(30)


def test_a_lost_member_is_not_waited_for_again_and_may_rejoin_in_the_next_epoch(trainer: Stage):
    manifest = ManifestOf("float32", KIB)(weights())
    order = trainer.order(manifest, "a", timeout_s=3.0)
    first = trainer.sender.send(order, weights())
    assert "did not join" in first.failed["a"] and first.seconds >= 1.0
    again = trainer.sender.send(order, weights())
    assert again.failed == {"a": "failed earlier in this epoch"} and again.seconds < first.seconds
    report, ((_, fingerprint),) = trainer.sync(trainer.order(manifest, "a"), weights())
    assert fingerprint == report.fingerprint


def test_an_engine_on_another_kind_of_device_than_the_trainer_is_refused_with_a_remedy(trainer: Stage):
    order = trainer.order(ManifestOf("float32", KIB)(weights()), "a", timeout_s=6.0)
    [arriving] = trainer.receive(order, CollectiveReceiver("a", torch.device("meta")))
    trainer.sender.send(order, iter(weights()))
    with pytest.raises(InfraFailure, match=r"are on cpu, this engine is on meta; set weights.transport=object_store"):
        arriving.result(60)


def test_one_process_sends_to_two_pools_in_turns_and_each_gets_its_own(trainer: Stage):
    """As a process does that holds two roles, or whose role two engine roles follow."""
    manifest, sent = ManifestOf("float32", KIB)(weights()), {"one": weights(1), "other": weights(2)}
    addresses = {pool: OpenCollective(pool)() for pool in sent}
    assert len(set(addresses.values())) == 2
    for version in (0, 1):
        for pool, own in sent.items():
            member = f"{pool}/0"
            rendezvous = Rendezvous(*addresses[pool], "1", (member,), 12.0)
            order = SyncOrder(f"{pool} {version}", version, "collective", manifest, rendezvous)
            arriving = trainer.receive(order)
            assert CollectiveSend(order, pool)(iter(own)).delivered == (member,)
            assert same(arriving[0].result(60)[0], own, torch.float32)
