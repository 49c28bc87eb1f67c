"""A trainer on one GPU, vLLM on another (or on the same): weights between them, and memory given back."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors.group import RayWorker, start_worker
from actors.model import ModelSpec
from actors.specs import BackendSpec
from rollout.engine import EngineSpec
from rollout.sampling import Request, Sampling
from rollout.weights import CollectiveSend, ManifestOf, OpenCollective, PackBuckets
from rollout.weights.links import Communicator
from rollout.weights.protocol import SENDER, Ack, Link, Manifest, Rendezvous, SendReport, SyncOrder
from rollout.worker import RolloutWorker
from tests.shaken_worker import Shaken
from tests.unit.tiny import tiny_model_folder

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs: NCCL refuses two ranks on one"
)

READY_S = 240.0
CALL_S = 120.0
BUCKET = 2**20
CACHE_GIB = 1.0
PROMPT = (5, 9, 14, 20, 33)
_numbers = itertools.count()


def kinds_of_groups() -> set[str]:
    """In the trainer's process: what it broadcasts with."""
    from rollout.weights import collective

    connections = collective._senders[""].links.connections.values()
    return {type(each.group if isinstance(each, Communicator) else each).__name__ for each in connections}


def as_arrays(weights: Iterable[tuple[str, Tensor]]) -> dict[str, np.ndarray]:
    """An export consumer that shares nothing with the transports."""
    return {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in weights}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=256)  # heads of 64


def start_trainer(folder: Path, gpus: float) -> RayWorker:
    kwargs = {"name": "policy", "model": ModelSpec(str(folder), dtype="bfloat16"), "backend": BackendSpec(gpus=1.0)}
    options = {"num_gpus": gpus}
    return start_worker(f"troupe/gpu/policy/{next(_numbers)}", Shaken, {**kwargs, "threads": 1}, ray_options=options)


def start_engine(folder: Path, gpus: float) -> RayWorker:
    name = f"troupe/gpu/rollout/{next(_numbers)}"
    spec = EngineSpec(
        "vllm",
        str(folder),
        dtype="bfloat16",
        max_model_len=128,
        max_concurrency=8,
        gpus=gpus,
        kv_cache_gib=CACHE_GIB,
        options={"enforce_eager": True},
    )
    return start_worker(name, RolloutWorker, {"name": name, "spec": spec}, ray_options={"num_gpus": gpus})


class Pair:
    """A trainer and an engine, driven as the driver does it."""

    def __init__(self, folder: Path, gpus: float) -> None:
        self.folder = folder
        self.trainer, self.engine = start_trainer(folder, gpus), start_engine(folder, gpus)

    async def ready(self) -> None:
        await asyncio.gather(*(each.call("ready", timeout_s=READY_S) for each in (self.trainer, self.engine)))
        self.address = await self.trainer.call("run", OpenCollective(), timeout_s=CALL_S)
        self.manifest: Manifest = await self.export(ManifestOf("bfloat16", BUCKET))

    async def export(self, consumer: Any) -> Any:
        return await self.trainer.call("export", consumer, BUCKET, timeout_s=CALL_S)

    async def publish(self, version: int) -> tuple[SendReport, Ack]:
        rendezvous = Rendezvous(*self.address, (Link("1", SENDER, self.engine.name),), 60.0)
        order = SyncOrder(f"order {version}", version, "collective", self.manifest, rendezvous)
        return await asyncio.gather(
            self.export(CollectiveSend(order)), self.engine.call("receive", order, timeout_s=CALL_S)
        )

    async def late(self, version: int) -> tuple[SendReport, Ack]:
        """Through the object store, as a worker that joins between two publishes."""
        packed = PackBuckets(self.manifest, version)
        report, payload = await self.trainer.call_split("export", packed, BUCKET, timeout_s=CALL_S)
        order = SyncOrder(f"late {version}", version, "object_store", self.manifest)
        return report, await self.engine.call("receive", order, payload, timeout_s=CALL_S)

    async def sample(self) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities."""
        sampling = Sampling(max_tokens=12, temperature=0.0)
        request = Request(id=f"r{next(_numbers)}", prompt=PROMPT, n=1, sampling=sampling, seed=0)
        _, batch = await self.engine.call("generate", request, timeout_s=CALL_S)
        start = len(PROMPT)
        return batch["tokens"][start:].tolist(), batch["sample_logps"][start:].tolist()

    async def expected_logps(self, tokens: list[int]) -> list[float]:
        """Of those tokens under the trainer's weights, by transformers on a CPU."""
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        weights = await self.export(as_arrays)
        model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()}, strict=False)
        ids = torch.tensor([[*PROMPT, *tokens]])
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)[0, len(PROMPT) - 1 : -1]
        return logps.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()

    async def close(self) -> None:
        await asyncio.gather(self.trainer.kill(), self.engine.kill())


async def follow(pair: Pair, kind: str) -> None:
    """Three versions reach the engine, under the trainer's fingerprints, and are what it samples from."""
    await pair.ready()
    prints: list[str] = []
    for version in range(3):
        await pair.trainer.call("shake", version, timeout_s=CALL_S)
        report, ack = await pair.publish(version)
        assert (ack.version, ack.fingerprint) == (version, report.fingerprint)
        assert report.fingerprint.startswith("sum64:"), "computed on the GPU"
        tokens, logps = await pair.sample()
        assert np.abs(np.subtract(logps, await pair.expected_logps(tokens))).mean() < 0.05
        prints.append(report.fingerprint)
    assert len(set(prints)) == 3
    assert await pair.trainer.call("run", kinds_of_groups, timeout_s=CALL_S) == {kind}
    report, ack = await pair.late(7)
    assert (ack.version, ack.fingerprint) == (7, report.fingerprint)


@two_gpus
async def test_weights_are_broadcast_by_nccl_between_two_gpus(folder: Path):
    pair = Pair(folder, gpus=1)
    try:
        await follow(pair, "ProcessGroupNCCL")
    finally:
        await pair.close()


async def test_weights_are_handed_over_by_cuda_ipc_if_both_share_a_gpu(folder: Path):
    pair = Pair(folder, gpus=0.4)
    try:
        await follow(pair, "SameGpu")
    finally:
        await pair.close()


def free_bytes() -> int:
    return torch.cuda.mem_get_info(0)[0]


async def test_a_sleeping_engine_releases_its_memory_and_samples_the_same_after_it_wakes(folder: Path):
    engine = Pair(folder, gpus=0.4)
    try:
        await engine.ready()
        before, awake = await engine.sample(), free_bytes()
        await engine.engine.call("sleep", timeout_s=CALL_S)
        assert free_bytes() - awake > 0.9 * CACHE_GIB * 2**30
        await engine.engine.call("wake", timeout_s=CALL_S)
        assert await engine.sample() == before
    finally:
        await engine.close()
