"""Weights from a trainer to rollout workers, each in a process of its own: who has them, who does not, and for how long
anybody waits."""

from __future__ import annotations

import asyncio
import itertools
import os
import platform
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.errors import InfraFailure, WorkerDied
from actors.group import RayWorker, start_worker
from actors.model import ModelSpec
from actors.specs import BackendSpec
from orchestrator.publishing.tree import BroadcastTree, Place
from rollout.engine import EngineSpec
from rollout.sampling import Request, Sampling
from rollout.weights import CollectiveSend, DiskWrite, ManifestOf, OpenCollective, PackBuckets
from rollout.weights.meeting import report_losses
from rollout.weights.protocol import Ack, Manifest, Rendezvous, SendReport, SyncOrder
from rollout.worker import RolloutWorker
from tests.large_trainer import HalfWay, Large
from tests.own_ray import own_ray
from tests.shaken_worker import Shaken
from tests.unit.tiny import tiny_model_folder

READY_S = 300.0
CALL_S = 200.0
BUCKET = 16 * 1024
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
PROMPT = (5, 9, 14, 20, 33)
_numbers = itertools.count()


def as_arrays(weights: Iterable[tuple[str, Tensor]]) -> dict[str, np.ndarray]:
    """An export consumer that shares nothing with the transports."""
    return {name: tensor.detach().float().numpy().copy() for name, tensor in weights}


class Sync:
    """The driver's part: one order, both sides at the same time."""

    def __init__(self, trainer: RayWorker, bucket_bytes: int = BUCKET) -> None:
        self.trainer, self.bucket_bytes = trainer, bucket_bytes
        self.address: tuple[str, int] = asyncio.run(trainer.call("run", OpenCollective(), timeout_s=CALL_S))
        self.manifest: Manifest = asyncio.run(self.export(ManifestOf("float32", bucket_bytes)))
        self._last: tuple[list[RayWorker], float] = ([], 0.0)

    async def export(self, consumer: Any) -> Any:
        return await self.trainer.call("export", consumer, self.bucket_bytes, timeout_s=CALL_S)

    def order(self, version: int, members: list[RayWorker], timeout_s: float = 30.0) -> SyncOrder:
        """Links stay while members and deadline do; between two tests these may have got weights of another trainer."""
        if (members, timeout_s) != self._last:
            self._tree, self._last = BroadcastTree(), (members, timeout_s)
        here = platform.node()
        links = self._tree.follow(here, {worker.name: Place(here, (worker.name,)) for worker in members})
        rendezvous = Rendezvous(*self.address, links, timeout_s)
        return SyncOrder(f"order {next(_numbers)}", version, "collective", self.manifest, rendezvous)

    async def publish(self, version: int, *members: RayWorker, timeout_s: float = 30.0) -> tuple[SendReport, list[Ack]]:
        order = self.order(version, list(members), timeout_s)
        receiving = [worker.call("receive", order, timeout_s=CALL_S) for worker in members]
        report, *acks = await asyncio.gather(self.export(CollectiveSend(order)), *receiving)
        return report, acks


def start_trainer(kind: type, **kwargs: Any) -> RayWorker:
    worker = start_worker(f"troupe/sync/policy/{next(_numbers)}", kind, kwargs, env=ONE_THREAD)
    asyncio.run(worker.call("ready", timeout_s=READY_S))
    return worker


def start_rollout(folder: Path, engine: str = "scripted") -> RayWorker:
    name = f"troupe/sync/rollout/{next(_numbers)}"
    spec = EngineSpec(engine, str(folder), max_model_len=128, max_concurrency=4, kv_cache_gib=0.05)
    return start_worker(name, RolloutWorker, {"name": name, "spec": spec}, env=ONE_THREAD)


class Cast:
    """Processes take seconds to start, so tests share them, and the next test replaces what one has killed."""

    def __init__(self, folder: Path, half_way: HalfWay) -> None:
        self._folder, self._half_way = folder, half_way
        self._rollouts: list[RayWorker] = []
        self._large: Sync | None = None

    async def rollouts(self, count: int) -> list[RayWorker]:
        """Workers with a scripted engine."""
        fresh = [start_rollout(self._folder) for _ in range(count - len(self._rollouts))]
        await asyncio.gather(*(worker.call("ready", timeout_s=READY_S) for worker in fresh))
        self._rollouts += fresh
        return self._rollouts[:count]

    def large(self) -> Sync:
        if self._large is None:
            self._large = Sync(start_trainer(Large, half_way=self._half_way), 2**21)
        return self._large

    def kill_9(self, worker: RayWorker) -> None:
        assert worker.info is not None
        os.kill(worker.info.pid, signal.SIGKILL)
        if worker in self._rollouts:
            self._rollouts.remove(worker)
        else:
            self._large = None


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with own_ray(16, 200):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=128)  # vLLM's attention wants heads of 32


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> HalfWay:
    return HalfWay(tmp_path_factory.mktemp("half-way"))


@pytest.fixture(scope="module")
def cast(cluster: None, folder: Path, place: HalfWay) -> Cast:
    return Cast(folder, place)


@pytest.fixture(scope="module")
def sync(cluster: None, folder: Path) -> Sync:
    return Sync(start_trainer(Shaken, name="policy", model=ModelSpec(str(folder)), backend=BackendSpec(), threads=1))


@pytest.fixture
def large(cast: Cast) -> Sync:
    return cast.large()


@pytest.fixture
def half_way(large: Sync, place: HalfWay) -> Iterator[HalfWay]:
    """The next transfer of `large` stops half-way."""
    place.hold()
    yield place
    place.go_on()


async def version(worker: RayWorker) -> int:
    return (await worker.call("ping", timeout_s=CALL_S))["version"]


async def test_one_two_and_three_members_confirm_what_the_trainer_sent(sync: Sync, cast: Cast):
    workers = await cast.rollouts(3)
    for count in (1, 2, 3):
        await sync.trainer.call("shake", count, timeout_s=CALL_S)
        report, acks = await sync.publish(count, *workers[:count])
        assert report.delivered == tuple(worker.name for worker in workers[:2][:count]) and not report.failed
        assert {(ack.version, ack.fingerprint) for ack in acks} == {(count, report.fingerprint)}
        assert [await version(worker) for worker in workers[: count + 1]] == [count] * count + [-1] * (count < 3)


async def test_other_weights_have_another_fingerprint_and_the_same_ones_the_same(sync: Sync, cast: Cast):
    (worker,) = await cast.rollouts(1)
    prints = []
    for version, seed in [(1, None), (2, None), (3, 11)]:
        if seed is not None:
            await sync.trainer.call("shake", seed, timeout_s=CALL_S)
        report, (ack,) = await sync.publish(version, worker)
        assert ack.fingerprint == report.fingerprint
        prints.append(ack.fingerprint)
    assert prints[0] == prints[1] != prints[2]


async def test_members_join_and_leave_between_syncs(sync: Sync, cast: Cast):
    a, b, c = await cast.rollouts(3)
    for version, members in enumerate([(a,), (a, b), (b,), (c, b, a), (a, b, c)]):
        report, acks = await sync.publish(version, *members)
        assert [ack.fingerprint for ack in acks] == [report.fingerprint] * len(members)


async def test_an_order_that_was_carried_out_is_acknowledged_again_without_a_transfer(sync: Sync, cast: Cast):
    (worker,) = await cast.rollouts(1)
    order = sync.order(5, [worker], timeout_s=60.0)
    _, first = await asyncio.gather(sync.export(CollectiveSend(order)), worker.call("receive", order, timeout_s=CALL_S))
    began = time.monotonic()
    again = await worker.call("receive", order, timeout_s=CALL_S)  # nobody sends
    assert again == first and time.monotonic() - began < 30, "far from the deadline of a transfer"


@pytest.mark.parametrize("dies", [0, 2], ids=["with a child", "without"])
async def test_kill_9_during_a_transfer_fails_the_dead_member_and_those_below_it_at_once(
    large: Sync, cast: Cast, place: HalfWay, dies: int
):
    members = await cast.rollouts(3)  # the first one sends to the third one
    await large.publish(1, *members, timeout_s=120.0)  # so all have joined
    place.hold()
    order = large.order(2, members, timeout_s=120.0)
    sending = asyncio.ensure_future(large.export(CollectiveSend(order)))
    receiving = [asyncio.ensure_future(member.call("receive", order, timeout_s=CALL_S)) for member in members]
    await place.until_held(CALL_S)
    assert not sending.done()
    cast.kill_9(members[dies])
    place.go_on()
    began = time.monotonic()
    report, *results = await asyncio.gather(sending, *receiving, return_exceptions=True)
    assert time.monotonic() - began < 30, "far from the sender's deadline of 40 s: a dead process is seen at once"
    failed = [index for index, result in enumerate(results) if isinstance(result, InfraFailure)]
    assert failed == ([0, 2] if dies == 0 else [2])
    assert isinstance(report, SendReport) and set(report.failed) == ({members[0].name} if dies == 0 else set())
    assert {ack.fingerprint for ack in results if isinstance(ack, Ack)} == {report.fingerprint}
    living = [member for index, member in enumerate(members) if index != dies]
    report, acks = await large.publish(3, *living)
    assert {(ack.version, ack.fingerprint) for ack in acks} == {(3, report.fingerprint)}


async def test_kill_9_before_a_member_has_joined_holds_up_nobody_once_the_driver_has_noticed(sync: Sync, cast: Cast):
    members = await cast.rollouts(3)  # the first one sends to the third one
    order = sync.order(1, members, timeout_s=180.0)  # nothing is joined
    cast.kill_9(members[0])
    sending = asyncio.ensure_future(sync.export(CollectiveSend(order)))
    receiving = [asyncio.ensure_future(member.call("receive", order, timeout_s=CALL_S)) for member in members]
    with pytest.raises(WorkerDied):
        await receiving[0]
    assert not await asyncio.to_thread(report_losses, sync.address, order.id, (members[0].name,), 60.0)
    report, ack, cut_off = await asyncio.gather(sending, *receiving[1:], return_exceptions=True)
    assert report.failed == {members[0].name: "it is lost"} and ack.fingerprint == report.fingerprint
    assert f"{members[0].name}, which was to send them, is lost" in str(cut_off)


async def test_a_stopped_process_is_dropped_at_the_senders_deadline_before_the_others_reach_theirs(
    large: Sync, cast: Cast, half_way: HalfWay
):
    frozen, living = await cast.rollouts(2)
    assert frozen.info is not None
    before = await version(frozen)
    order = large.order(before + 1, [frozen, living], timeout_s=15.0)
    sending = asyncio.ensure_future(large.export(CollectiveSend(order)))
    receiving = [asyncio.ensure_future(w.call("receive", order, timeout_s=CALL_S)) for w in (frozen, living)]
    await half_way.until_held(CALL_S)
    os.kill(frozen.info.pid, signal.SIGSTOP)
    half_way.go_on()
    try:
        report, ack = await asyncio.gather(sending, receiving[1])
        assert set(report.failed) == {frozen.name} and ack.fingerprint == report.fingerprint
        assert report.seconds < 15.0
    finally:
        os.kill(frozen.info.pid, signal.SIGCONT)
    with pytest.raises(InfraFailure, match="did not arrive"):
        await receiving[0]
    assert await version(frozen) == before, "nothing of the transfer is in use"


async def test_kill_9_of_the_trainer_fails_every_receive_at_once_and_another_ones_weights_let_requests_go_on(
    large: Sync, cast: Cast, half_way: HalfWay
):
    workers = await cast.rollouts(2)
    before = await version(workers[0])
    order = large.order(before + 1, workers, timeout_s=60.0)
    sending = asyncio.ensure_future(large.export(CollectiveSend(order)))
    receiving = [asyncio.ensure_future(worker.call("receive", order, timeout_s=CALL_S)) for worker in workers]
    await half_way.until_held(CALL_S)
    cast.kill_9(large.trainer)
    began = time.monotonic()
    results = await asyncio.gather(sending, *receiving, return_exceptions=True)
    assert all(isinstance(result, InfraFailure) for result in results), results
    assert time.monotonic() - began < 30, "far from the deadline of 60 s"
    request = Request("r", PROMPT, 1, Sampling(max_tokens=4), seed=0)
    waiting = asyncio.ensure_future(workers[0].call("generate", request, timeout_s=CALL_S))
    assert await version(workers[0]) == before and (await workers[0].call("ping", timeout_s=CALL_S))["alive"]
    half_way.go_on()
    successor = await asyncio.to_thread(cast.large)
    await successor.publish(before + 2, *workers)
    meta, _ = await waiting
    assert meta.oldest_version == before + 2, "not a token came of a mixture of weights"


async def test_a_member_that_never_comes_fails_alone_after_the_senders_deadline(sync: Sync, cast: Cast):
    here, absent = await cast.rollouts(2)
    order = sync.order(1, [here, absent], timeout_s=12.0)
    report, ack = await asyncio.gather(
        sync.export(CollectiveSend(order)), here.call("receive", order, timeout_s=CALL_S)
    )
    assert ack.fingerprint == report.fingerprint and set(report.failed) == {absent.name}
    assert 4.0 <= report.seconds < 12.0


async def test_a_late_joiner_reads_the_same_weights_from_the_object_store_when_the_trainer_is_gone(
    large: Sync, cast: Cast
):
    early, late = await cast.rollouts(2)
    report, _ = await large.publish(4, early)
    packed, payload = await large.trainer.call_split(
        "export", PackBuckets(large.manifest, 4), large.bucket_bytes, timeout_s=CALL_S
    )
    cast.kill_9(large.trainer)
    order = SyncOrder("late", 4, "object_store", large.manifest)
    ack = await late.call("receive", order, payload, timeout_s=CALL_S)
    assert (ack.version, ack.fingerprint) == (4, report.fingerprint) == (packed.version, packed.fingerprint)


async def test_a_folder_carries_the_same_weights(sync: Sync, cast: Cast, tmp_path: Path):
    first, second = await cast.rollouts(2)
    collective, _ = await sync.publish(1, first)
    order = SyncOrder("by disk", 2, "disk", sync.manifest, folder=str(tmp_path))
    report = await sync.export(DiskWrite(order))
    ack = await second.call("receive", order, timeout_s=CALL_S)
    assert ack.fingerprint == report.fingerprint == collective.fingerprint


@torch.no_grad()
def greedy(folder: Path, weights: dict[str, np.ndarray], count: int) -> tuple[list[int], list[float]]:
    """Transformers' own choice under these weights, and its log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    missing, unexpected = model.load_state_dict({n: torch.tensor(a) for n, a in weights.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    tokens, logps = list(PROMPT), list[float]()
    for _ in range(count):
        distribution = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        tokens.append(int(distribution.argmax()))
        logps.append(float(distribution.max()))
    return tokens, logps


async def test_vllm_samples_from_the_weights_that_were_published(sync: Sync, folder: Path):
    worker = start_rollout(folder, "vllm")
    await worker.call("ready", timeout_s=READY_S)
    told = []
    for version in (1, 2):
        await sync.trainer.call("shake", 100 + version, timeout_s=CALL_S)
        report, (ack,) = await sync.publish(version, worker)
        assert ack.fingerprint == report.fingerprint
        sampling = Sampling(max_tokens=12, temperature=0.0)
        meta, batch = await worker.call(
            "generate", Request(f"greedy {version}", PROMPT, 1, sampling, seed=0), timeout_s=CALL_S
        )
        told.append(batch["tokens"].tolist())
        tokens, logps = greedy(folder, await sync.export(as_arrays), meta.lengths[0])
        assert told[-1] == tokens
        assert (meta.oldest_version, meta.newest_version) == (version, version)
        np.testing.assert_allclose(batch["sample_logps"][len(PROMPT) :], logps, atol=1e-4)
    assert told[0] != told[1], "the weights made a difference"
    await worker.kill()
