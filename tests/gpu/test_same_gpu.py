"""Weights between two processes that share one GPU, by CUDA IPC. Needs neither vLLM nor Ray."""

from __future__ import annotations

import os
import queue
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from rollout.weights.buckets import ManifestOf
from rollout.weights.collective import BUFFERS, CollectiveReceiver, CollectiveSender
from rollout.weights.protocol import SENDER, Link, Manifest, Rendezvous, SyncOrder

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

CALL_S = 120.0  # a process has to import torch and to start CUDA
BUCKET = 2**20
SHAPES = [(512, 1024), (1024,), (333, 7), (1024, 1024), (), (2048, 512), *[(300, 1000)] * 8]
VERSIONS = (1, 2)


def weights(version: int) -> list[tuple[str, Tensor]]:
    """The same numbers in every process: they are drawn on a CPU."""
    generator = torch.Generator().manual_seed(version)
    return [(f"w{i}", torch.randn(shape, generator=generator).bfloat16()) for i, shape in enumerate(SHAPES)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.int16)


def order(version: int, manifest: Manifest, address: tuple[str, int], timeout_s: float) -> SyncOrder:
    rendezvous = Rendezvous(*address, (Link("1", SENDER, "a"),), timeout_s)
    return SyncOrder(f"order {version}", version, "collective", manifest, rendezvous)


@dataclass(frozen=True)
class Received:
    fingerprint: str
    kind: str
    staged: list[tuple[str, Any]]  # name, bits as an array


def receive(orders: Any, results: Any, ends: bool) -> None:
    """The engine's process: receives one order after another until there is None, then leaves and puts (what it
    received, the bytes that torch still holds). `ends`: at the first order it joins and ends without a word."""
    try:
        torch.cuda.init()
        before = torch.cuda.memory_allocated()
        receiver = CollectiveReceiver("a", torch.device("cuda"))
        received: list[Received] = []
        while (each := orders.get(timeout=CALL_S)) is not None:
            if ends:
                assert each.rendezvous is not None
                receiver._join(each.id, each.rendezvous)
                os._exit(1)
            incoming = receiver.receive(each)
            staged = list(incoming)
            assert receiver._uplink is not None and all(tensor.is_cuda for _, tensor in staged)
            arrays = [(name, bits(tensor).numpy()) for name, tensor in staged]
            received.append(Received(incoming.finish(), type(receiver._uplink[1]).__name__, arrays))
            del incoming, staged
        receiver.close()
        del receiver
        results.put((received, torch.cuda.memory_allocated() - before))
    except BaseException as error:
        results.put(repr(error))
        raise


class Engine:
    def __init__(self, *, ends: bool = False) -> None:
        context = mp.get_context("spawn")
        self.orders, self.results = context.Queue(), context.Queue()
        self.process = context.Process(target=receive, args=(self.orders, self.results, ends), daemon=True)
        self.process.start()

    def result(self) -> Any:
        try:
            result = self.results.get(timeout=CALL_S)
        except queue.Empty:
            pytest.fail(f"no result from the engine's process within {CALL_S:g} s; its exit code: {self.exit_code()}")
        assert not isinstance(result, str), result
        return result

    def exit_code(self) -> int | None:
        self.process.join(10)
        return self.process.exitcode

    def close(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)


def test_two_versions_reach_the_other_process_to_the_bit_and_the_memory_returns():
    engine, sender = Engine(), CollectiveSender()
    try:
        address = sender.open()
        manifest = ManifestOf(None, BUCKET)(weights(0))
        assert len(list(manifest.buckets())) > 2 * BUFFERS, "every buffer is used several times"
        prints, held = [], []
        for version in VERSIONS:
            on_gpu = [(name, tensor.cuda()) for name, tensor in weights(version)]
            before = torch.cuda.memory_allocated()
            engine.orders.put(each := order(version, manifest, address, CALL_S))
            report = sender.send(each, on_gpu)
            assert report.delivered == ("a",), report.failed
            prints.append(report.fingerprint)
            held.append(torch.cuda.memory_allocated() - before)
            assert {type(each).__name__ for each in sender.links.connections.values()} == {"SameGpu"}
            del on_gpu
        engine.orders.put(None)
        received, kept = engine.result()
        assert engine.exit_code() == 0
    finally:
        sender.close()
        engine.close()
    assert [each.fingerprint for each in received] == prints and len(set(prints)) == len(VERSIONS)
    assert all(fingerprint.startswith("sum64:") for fingerprint in prints), "computed on the GPU"
    assert {each.kind for each in received} == {"SameGpu"}
    for version, each in zip(VERSIONS, received, strict=True):
        assert [name for name, _ in each.staged] == [name for name, _ in weights(version)]
        for (_, got), (_, sent) in zip(each.staged, weights(version), strict=True):
            assert torch.equal(torch.from_numpy(got), bits(sent))
    assert (received[0].staged[0][1] != received[1].staged[0][1]).any()
    assert held == [0, 0], "the sender's buffers are freed after each order"
    assert kept == 0, "the receiver's memory is freed after it has left"


def test_an_engine_whose_process_ends_fails_its_transfer_and_keeps_no_memory_of_the_trainer():
    engine, sender = Engine(ends=True), CollectiveSender()
    try:
        address, manifest = sender.open(), ManifestOf(None, BUCKET)(weights(0))
        on_gpu = [(name, tensor.cuda()) for name, tensor in weights(1)]
        before = torch.cuda.memory_allocated()
        engine.orders.put(each := order(1, manifest, address, 3 * CALL_S))
        report = sender.send(each, on_gpu)
        assert report.delivered == () and "has ended" in report.failed["a"]
        assert report.seconds < CALL_S, "its end is noticed before the deadline"
        assert torch.cuda.memory_allocated() == before
    finally:
        sender.close()
        engine.close()
