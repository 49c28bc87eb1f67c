"""Buckets, fingerprints and the three transports in one process: real gloo and real files."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rollout.weights import (
    TRANSPORTS,
    DiskWrite,
    ManifestOf,
    PackBuckets,
    receiver,
)
from rollout.weights.buckets import Incoming, Staged, fill
from rollout.weights.fingerprint import Fingerprint, weighted_sum
from rollout.weights.protocol import Manifest, SendReport, SyncOrder, TransferFailed
from tests.broadcast_stage import CPU, KIB, Stage, same, taken, weights


def arrived(manifest: Manifest, flats: Iterable[Tensor]) -> tuple[Staged, str]:
    incoming = Incoming(manifest, flats, CPU, "the weights")
    return list(incoming), incoming.finish()


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


KILLED_WRITER = """
import resource, signal, sys
from rollout.weights import DiskWrite, ManifestOf
from rollout.weights.protocol import SyncOrder
from tests.broadcast_stage import KIB, weights

order = SyncOrder("o", 3, "disk", ManifestOf("float32", KIB)(weights()), folder=sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # a file that grows beyond the limit kills this process
resource.setrlimit(resource.RLIMIT_FSIZE, (KIB, KIB))
DiskWrite(order)(weights())
"""


def test_what_a_writer_that_was_killed_has_left_is_removed_by_the_next_one(tmp_path: Path):
    manifest = ManifestOf("float32", KIB)(weights())
    DiskWrite(SyncOrder("o", 2, "disk", manifest, folder=str(tmp_path)))(weights())
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], timeout=60).returncode == -signal.SIGXFSZ
    left = [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "version-2.safetensors"]
    assert len(left) == 1, "the file that was being written"
    DiskWrite(SyncOrder("o", 4, "disk", manifest, folder=str(tmp_path)))(weights())
    assert [file.name for file in tmp_path.rglob("*")] == ["version-4.safetensors"]


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
