"""Ranks of trainers as real Ray actors, in gangs that are started once for all tests that use them: a process of a rank
takes some ten seconds to import torch, transformers and DeepSpeed. A rank holds one `ModelWorker` after the other."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from actors.backends.parking import Parked, tensors_below
from actors.group import RayGroup, start_ranks
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.specs import BackendSpec
from actors.worker import WorkerInfo
from tests.own_ray import start_ray

START_S = 400.0  # imports of torch, and of DeepSpeed in `start`: a minute on two cores that do as much besides


class Rank:
    """One process of a gang: its place, and the `ModelWorker` of the moment."""

    def __init__(self, rank: int, world_size: int, master: tuple[str, int] | None) -> None:
        self.place: dict[str, Any] = {"rank": rank, "world_size": world_size, "master": master}
        self.worker: ModelWorker | None = None

    def ready(self) -> WorkerInfo:
        return WorkerInfo("rank", os.getpid(), socket.gethostname(), "", {})

    def ping(self) -> None: ...

    def start(self, model: ModelSpec, backend: BackendSpec) -> WorkerInfo:
        first = self.worker is None
        self.worker = ModelWorker("policy", model, backend, threads=1, **self.place)
        info = self.worker.ready()
        if first:
            gc.freeze()  # all that was imported: DeepSpeed collects garbage at each start in ZeRO stage 3
        return info

    def act(self, verb: str, *args: Any) -> Any:
        return getattr(self.worker, verb)(*args)

    def act_on(self, own: Any, verb: str, *args: Any) -> Any:
        return getattr(self.worker, verb)(own, *args)

    def hold(self, *blocks: Any) -> None:
        self.act("hold", *blocks)

    def infer(self, *args: Any) -> Any:
        return self.act("infer", *args)

    def credit(self, *args: Any) -> Any:
        return self.act("credit", *args)

    def update(self, *args: Any) -> Any:
        return self.act("update", *args)

    def export(self, *args: Any) -> Any:
        return self.act("export", *args)

    def shares(self, *args: Any) -> Any:
        return self.act("shares", *args)

    def mix(self, *args: Any) -> None:
        self.act("mix", *args)

    def park_and_take_back(self) -> int:
        """What `sleep` and `wake` do on a GPU, done to the memory that this rank has on the CPU; how many bytes."""
        assert self.worker is not None
        held = self.worker.backend.held  # type: ignore[attr-defined]
        for tensor in tensors_below(*held):
            if not tensor.untyped_storage().resizable():  # a file's memory, which no GPU computes from
                tensor.data = tensor.data.clone()
        parked = Parked(torch.device("cpu"), *held)
        nbytes = parked.nbytes
        parked.take_back()
        return nbytes

    def combine(self, values: list[float]) -> tuple[list[float], list[float]]:
        assert self.worker is not None
        world = self.worker.backend.world
        total = world.sum(torch.tensor([float(len(values)), sum(values)]))
        return total.tolist(), world.gather(torch.tensor(values)).tolist()


def whole(weights: Iterator[tuple[str, Tensor]]) -> dict[str, np.ndarray]:
    return {name: tensor.float().cpu().numpy().copy() for name, tensor in weights}


class Gangs:
    """Gangs by their number of ranks and, where several are needed at once, their place; each is started once, and Ray
    with the first one."""

    def __init__(self) -> None:
        self._started: dict[tuple[int, int], RayGroup] = {}
        self._ray = False  # whether it was started

    def __call__(self, ranks: int, place: int = 0) -> RayGroup:
        if (ranks, place) not in self._started:
            if not ray.is_initialized():
                start_ray(8)
                self._ray = True
            env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}
            group = start_ranks(f"troupe/backends/gang{place}-{ranks}", Rank, [{}] * ranks, env=env)
            asyncio.run(group.call("ready", timeout_s=START_S))
            self._started[ranks, place] = group
        return self._started[ranks, place]

    def given_away(self, ranks: int) -> RayGroup:
        """A gang that its test may end: the next one that wants it starts another."""
        gang = self(ranks)
        del self._started[ranks, 0]
        return gang

    def end(self) -> None:
        self._started = {}
        if self._ray:
            self._ray = False
            ray.shutdown()
