"""Processes of a run that compute nothing and answer at once, and a meter of what the driver sends them."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import cloudpickle
import numpy as np

from actors.batch import Batch
from actors.model_worker import UpdateReport
from actors.saved_state import Seal
from actors.worker import LocalObjects, Ref, WorkerInfo
from rewards.worker import ScoreResult
from rollout.sampling import Finish, GroupMeta
from rollout.weights.protocol import Ack, Manifest, SendReport, TensorMeta, receivers

TP = 8  # GPUs of an engine
SAMPLES, PROMPT = 16, 300  # completions of a prompt, tokens of a prompt
TENSORS = 723  # of a model of 70B parameters


@dataclass
class Count:
    """Of one part of a step."""

    calls: int = 0
    objects: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    pickling: float = 0.0  # seconds, beside the others


@dataclass
class Meter:
    parts: dict[str, Count] = field(default_factory=dict)
    now: Count = field(default_factory=Count)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.now = self.parts.setdefault(part, Count())
        began, pickled = time.process_time(), self.now.pickling
        try:
            yield
        finally:
            self.now.seconds += time.process_time() - began - (self.now.pickling - pickled)
            self.now = Count()

    def call(self, arguments: Any, result: Any) -> None:
        began = time.process_time()
        self.now.calls += 1
        self.now.nbytes += len(cloudpickle.dumps(arguments)) + len(cloudpickle.dumps(result))
        self.now.pickling += time.process_time() - began

    def put(self, value: Any) -> None:
        began = time.process_time()
        self.now.objects += 1
        self.now.nbytes += len(pickle.dumps(value, protocol=5))
        self.now.pickling += time.process_time() - began


class Stub:
    """A process that answers at once."""

    def __init__(self, name: str, meter: Meter) -> None:
        self.name, self.meter = name, meter
        self.where = name

    async def call(self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        result = getattr(self, method)(*args)
        self.meter.call([arg for arg in args if not isinstance(arg, Ref)], result)
        return result

    async def call_split(
        self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, refs: int = 1
    ) -> Any:
        result = await self.call(method, *args, timeout_s=timeout_s)
        return result, *([Ref(None)] * refs)

    async def kill(self) -> None: ...

    def ready(self) -> WorkerInfo:
        return WorkerInfo(self.name, 1, "node", "", {})

    def ping(self) -> dict[str, Any]:
        return {"verb": "update", "busy_s": 1.0, "steps_done": 3, "alive": True}


class StubEngine(Stub):
    version = -1

    def ready(self) -> WorkerInfo:
        return WorkerInfo(self.name, 1, self.name, "", {"receivers": receivers(self.name, TP)})  # a host of its own

    def generate(self, request: Any) -> GroupMeta:
        lengths = tuple(np.random.default_rng(request.seed % 2**32).integers(50, 4000, SAMPLES).tolist())
        return GroupMeta(request.id, self.name, lengths, (Finish.STOP,) * SAMPLES, self.version, self.version, 1.0)

    def receive(self, order: Any, payload: Any) -> Ack:
        self.version = order.version
        return Ack(self.name, order.version, "same")


class StubScorer(Stub):
    def score(self, *_: Any) -> ScoreResult:
        rewards = np.random.default_rng(0).random((1, SAMPLES)).astype(np.float32).T
        return ScoreResult(("mine",), rewards, rewards[:, 0], weights=np.ones(1, np.float32))

    def score_all(self, asked: Sequence[Any], *_: Any) -> list[ScoreResult]:
        return [self.score() for _ in asked]


class StubRank(Stub):
    rank = 0

    def hold(self, *_: Any) -> None: ...

    def infer(self, *_: Any) -> float:
        return 1.0

    def update(self, *_: Any) -> UpdateReport:
        return UpdateReport(dict.fromkeys(map(str, range(25)), 1.0), 1.0, 1e-6, 1000, {"forward": 1.0})

    def export(self, consumer: Any, bucket_bytes: int, form: str) -> Any:
        if self.rank:
            return None
        if type(consumer).__name__ == "ManifestOf":
            tensors = (TensorMeta(f"layer.{i}", "bfloat16", (8192, 8192)) for i in range(TENSORS))
            return Manifest(tuple(tensors), bucket_bytes)
        return SendReport(consumer.order.version, "same", ())

    def run(self, task: Any) -> tuple[str, int]:
        return "10.0.0.1", 12345

    def begin_save(self, folder: str, parts: Any) -> None: ...

    def finish_save(self, timeout_s: float) -> dict[str, Seal]:
        return {f"policy/{name}-rank{self.rank}.pt": Seal(bytes=1, sha256="0" * 64) for name in ("ds", "own", "model")}


class StubGroup:
    """The ranks of a role."""

    def __init__(self, name: str, ranks: int, meter: Meter) -> None:
        self.name = name
        self.workers = [StubRank(f"{name}/{rank}", meter) for rank in range(ranks)]
        for rank, worker in enumerate(self.workers):
            worker.rank = rank

    async def call(
        self,
        method: str,
        *shared: Any,
        per_rank: Sequence[Any] | None = None,
        blocks: Sequence[Sequence[Ref]] | None = None,
        timeout_s: float,
        task_name: str | None = None,
    ) -> list[Any]:
        return list(
            await asyncio.gather(
                *(
                    worker.call(
                        method,
                        *(() if per_rank is None else (per_rank[rank],)),
                        *shared,
                        *(() if blocks is None else blocks[rank]),
                        timeout_s=timeout_s,
                    )
                    for rank, worker in enumerate(self.workers)
                )
            )
        )

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[StubGroup]:
        yield self

    async def call_split(self, method: str, *shared: Any, **how: Any) -> list[tuple[Any, Ref]]:
        return [(value, Ref(None)) for value in await self.call(method, *shared, **how)]

    async def kill(self) -> None: ...


class Objects(LocalObjects):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    async def put(self, value: Any) -> Ref:
        self._meter.put(value)
        return Ref(value)


class Endless:
    order = SimpleNamespace(at=lambda position: (0, position))

    def item(self, index: int) -> Any:
        return SimpleNamespace(
            id=index, tokens=(7,) * PROMPT, prompt="x" * 4 * PROMPT, columns={}, row_values={}, teacher_prompt=None
        )

    def batch(self, positions: list[int]) -> Batch:
        return Batch.build([PROMPT] * len(positions), group=positions)
