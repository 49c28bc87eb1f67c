"""A rollout worker as a Ray actor with real vLLM: it answers, generates and takes weights at the same time."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.errors import DataFailure, InfraFailure
from actors.group import RayWorker, start_worker
from rollout.engine import EngineSpec
from rollout.sampling import Request, Sampling
from rollout.weights import DiskWrite
from rollout.weights.protocol import Manifest, SyncOrder, TensorMeta
from rollout.worker import RolloutWorker
from tests.own_ray import own_ray
from tests.unit.tiny import tiny_model_folder

READY_S = 300.0
CALL_S = 200.0
ENV = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
PROMPT = (5, 9, 14, 20)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with own_ray(4):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"), hidden=128)


@pytest.fixture(scope="module")
def worker(cluster: None, folder: Path) -> RayWorker:
    return start(folder, 0)


def start(folder: Path, index: int) -> RayWorker:
    spec = EngineSpec("vllm", str(folder), max_model_len=512, kv_cache_gib=0.1, max_concurrency=32)
    kwargs = {"name": f"rollout/{index}", "spec": spec, "initial_version": 0}
    worker = start_worker(f"troupe/test/rollout/{index}", RolloutWorker, kwargs, env=ENV)
    asyncio.run(worker.call("ready", timeout_s=READY_S))
    return worker


def request(name: str, max_tokens: int, n: int = 4) -> Request:
    return Request(name, PROMPT, n, Sampling(max_tokens), seed=len(name))


def reference(folder: Path, seed: int) -> Any:
    """The model with other weights; `seed` says which."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def sync(model: Any, version: int, folder: Path) -> SyncOrder:
    weights = [(name, parameter.detach()) for name, parameter in model.named_parameters()]
    manifest = Manifest(tuple(TensorMeta(name, "float32", tuple(tensor.shape)) for name, tensor in weights), 2**20)
    order = SyncOrder(f"publish-{version}", version, "disk", manifest, folder=str(folder / f"version-{version}"))
    DiskWrite(order)(iter(weights))
    return order


async def ping(worker: RayWorker) -> dict[str, Any]:
    return await worker.call("ping", timeout_s=CALL_S)


async def until_generating(worker: RayWorker) -> None:
    deadline = time.monotonic() + CALL_S
    while not (await ping(worker))["requests"]:
        assert time.monotonic() < deadline, "no request arrived"
        await asyncio.sleep(0.01)


async def test_a_worker_answers_pings_while_it_generates(worker: RayWorker) -> None:
    running = [asyncio.ensure_future(generate(worker, request(f"long-{i}", 400))) for i in range(4)]
    await until_generating(worker)
    waits: list[float] = []
    while not all(call.done() for call in running):
        began = time.monotonic()
        health = await ping(worker)
        waits.append(time.monotonic() - began)
        assert health["alive"]
        await asyncio.sleep(0.02)
    assert len(waits) > 5
    assert max(waits) < 30, "far from the minutes that a call may take"
    assert (await ping(worker))["tokens"] >= sum(sum(meta.lengths) for meta, _ in [await call for call in running])


async def test_weights_arrive_in_flight_and_later_tokens_are_the_new_models(
    worker: RayWorker, folder: Path, tmp_path: Path
) -> None:
    model = reference(folder, seed=1)
    order = sync(model, 7, tmp_path)
    running = asyncio.ensure_future(generate(worker, request("in flight", 480, n=8)))
    await until_generating(worker)
    ack = await worker.call("receive", order, timeout_s=CALL_S)
    meta, batch = await running
    assert (ack.member, ack.version) == ("rollout/0", 7)
    assert (meta.oldest_version, meta.newest_version) == (0, 7)
    new = [(row, batch.row("version", row) == 7) for row in range(len(batch))]
    errors = [
        np.abs(logps(model, batch.row("tokens", row)) - batch.row("sample_logps", row))[mask] for row, mask in new
    ]
    assert max(error.max() for error in errors if error.size) < 1e-4


@torch.no_grad()
def logps(model: Any, tokens: np.ndarray) -> np.ndarray:
    """[T] of a row, 0 for its first token."""
    ids = torch.tensor(tokens.astype(np.int64))
    predicted = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return np.concatenate([[0.0], predicted.numpy()])


async def test_an_abandoned_call_leaves_nothing_running(worker: RayWorker) -> None:
    with pytest.raises(InfraFailure, match=r"no answer within 0\.2 s"):
        await worker.call("generate", request("given up", 480), timeout_s=0.2)
    deadline = time.monotonic() + CALL_S
    while (await ping(worker))["requests"]:
        assert time.monotonic() < deadline, "the request is still running"
        await asyncio.sleep(0.02)


async def test_the_kind_of_a_failure_is_preserved_up_to_the_driver(worker: RayWorker) -> None:
    with pytest.raises(DataFailure, match="max_model_len"):
        await worker.call("generate", Request("long", (7,) * 600, 1, Sampling(4), seed=0), timeout_s=CALL_S)
    running = asyncio.ensure_future(generate(worker, request("doomed", 480)))
    await until_generating(worker)
    assert await worker.call("abort", ["doomed"], timeout_s=CALL_S) == 1
    with pytest.raises(InfraFailure, match="doomed was aborted"):
        await running


async def test_another_worker_draws_the_same_samples(worker: RayWorker, folder: Path, tmp_path: Path) -> None:
    other = await asyncio.to_thread(start, folder, 1)
    order = sync(reference(folder, seed=2), 8, tmp_path)
    for member in (worker, other):
        await member.call("receive", order, timeout_s=CALL_S)
    (_, here), (_, there) = await asyncio.gather(*(generate(member, request("same", 64)) for member in (worker, other)))
    assert here["tokens"].tolist() == there["tokens"].tolist()
    os.kill((await other.call("ready", timeout_s=CALL_S)).pid, signal.SIGKILL)
    with pytest.raises(InfraFailure, match="died"):
        await generate(other, request("after death", 8))


async def generate(worker: RayWorker, wanted: Request) -> Any:
    return await worker.call("generate", wanted, timeout_s=CALL_S)
