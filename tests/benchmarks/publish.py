"""How fast weights reach rollout workers, beside a raw gloo broadcast of the same bytes in the same run.

    python tests/benchmarks/publish.py --engine vllm --engines 1 2 --million-parameters 26

A publish casts, packs, hashes on both sides, stages, and is verified; the raw broadcast moves one flat tensor between
processes that do nothing else. The two take turns, and medians are compared. `stall` is for how long decoding stood
still, `more` how much memory a member's process held more at its peak than before. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from actors.group import RayGroup, RayWorker, start_ranks, start_worker
from actors.model import ModelSpec
from actors.model_worker import ModelWorker
from actors.specs import BackendSpec
from actors.worker import WorkerInfo
from orchestrator.publishing.tree import BroadcastTree, Place
from rollout.engine import EngineSpec
from rollout.weights import CollectiveSend, ManifestOf, OpenCollective
from rollout.weights.protocol import SENDER, Rendezvous, SyncOrder
from rollout.worker import RolloutWorker
from tests.unit.tiny import tiny_tokenizer

DEADLINE_S = 300.0
SHAPES = {26: (512, 8, 1408), 100: (1024, 8, 2688)}  # million parameters: hidden size, layers, feed-forward size
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Result:
    """One line of the table. Seconds are medians; `ratio` is the publish's speed over the raw broadcast's."""

    million_parameters: float
    engines: int
    mib: float
    seconds: float
    gb_per_s: float
    raw_seconds: float
    raw_gb_per_s: float
    ratio: float
    stall_seconds: float
    more_mib: float


class RawRank:
    """One end of a plain gloo broadcast: one group, one flat tensor."""

    def __init__(self, rank: int, world_size: int, master: tuple[str, int]) -> None:
        self._rank, self._size, self._master = rank, world_size, master

    def ready(self) -> WorkerInfo:
        store = dist.TCPStore(*self._master, is_master=False, wait_for_workers=False)
        self._group = dist.ProcessGroupGloo(store, self._rank, self._size, timedelta(seconds=DEADLINE_S))
        return WorkerInfo(f"raw {self._rank}", os.getpid(), "", "", {})

    def ping(self) -> None: ...

    def allocate(self, nbytes: int) -> None:
        self._flat = torch.zeros(nbytes, dtype=torch.uint8)

    def broadcast(self) -> float:
        began = time.perf_counter()
        self._group.broadcast(self._flat, 0).wait()
        return time.perf_counter() - began


class Memory:
    """Of a process on Linux, from now on. MiB."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")
        (self._folder / "clear_refs").write_text("5")  # the peak is what there is now
        self._before = self._read("VmRSS")

    def taken(self) -> float:
        return self._read("VmHWM") - self._before

    def _read(self, name: str) -> float:
        lines = (self._folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


class Published:
    """A trainer and rollout workers with the same model, in processes of their own."""

    def __init__(self, trainer: RayWorker, members: list[RayWorker], options: argparse.Namespace) -> None:
        self.trainer, self.members, self.options = trainer, members, options
        self.bucket_bytes = int(options.bucket_mib * 2**20)
        self.version, self.tree = 0, BroadcastTree()

    async def open(self) -> None:
        self.address = await self.trainer.call("run", OpenCollective(), timeout_s=DEADLINE_S)
        self.manifest = await self._export(ManifestOf(self.options.dtype, self.bucket_bytes))

    async def publish(self) -> tuple[float, float, float]:
        """Seconds until the last member had all bytes, the longest stall, and the most memory that a member took."""
        memories = [Memory(member.info.pid) for member in self.members if member.info is not None]
        self.version += 1
        here = platform.node()
        links = self.tree.follow(here, {member.name: Place(here, (member.name,)) for member in self.members})
        rendezvous = Rendezvous(*self.address, links, DEADLINE_S)
        order = SyncOrder(f"order {self.version}", self.version, "collective", self.manifest, rendezvous)
        receiving = [m.call("receive", order.seen_by({m.name}), timeout_s=DEADLINE_S) for m in self.members]
        report, *acks = await asyncio.gather(self._export(CollectiveSend(order.seen_by({SENDER}))), *receiving)
        assert {ack.fingerprint for ack in acks} == {report.fingerprint}
        taken = max(memory.taken() for memory in memories)
        return max(ack.receive_seconds for ack in acks), max(ack.stall_seconds for ack in acks), taken

    async def _export(self, consumer: Any) -> Any:
        return await self.trainer.call("export", consumer, self.bucket_bytes, timeout_s=DEADLINE_S)


def model_folder(folder: Path, million: int) -> Path:
    hidden, layers, feed_forward = SHAPES[million]
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=1,
    )
    path = folder / f"{million}m"
    Qwen2ForCausalLM(config).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


async def measure(model: Path, count: int, options: argparse.Namespace) -> Result:
    run = f"troupe/publish-{model.name}-{count}"
    trained = {"name": "policy", "model": ModelSpec(str(model)), "backend": BackendSpec(), "threads": 1}
    trainer = start_worker(f"{run}/policy/0", ModelWorker, trained, env=ONE_THREAD)
    spec = EngineSpec(options.engine, str(model), dtype=options.dtype, max_model_len=128, max_concurrency=8)
    names = [f"{run}/rollout/{index}" for index in range(count)]
    members = [start_worker(n, RolloutWorker, {"name": n, "spec": spec}, env=ONE_THREAD) for n in names]
    raw = start_ranks(f"{run}/raw", RawRank, [{}] * (count + 1), env=ONE_THREAD)
    await asyncio.gather(
        raw.call("ready", timeout_s=DEADLINE_S),
        *(worker.call("ready", timeout_s=DEADLINE_S) for worker in (trainer, *members)),
    )
    published = Published(trainer, members, options)
    await published.open()
    result = await take_turns(published, raw, options)
    await asyncio.gather(raw.kill(), *(worker.kill() for worker in (trainer, *members)))
    return result


async def take_turns(published: Published, raw: RayGroup, options: argparse.Namespace) -> Result:
    nbytes = published.manifest.nbytes
    await raw.call("allocate", nbytes, timeout_s=DEADLINE_S)
    moved, stalled, plain, taken = [], [], [], []
    for _ in range(options.repeats + 1):  # the first builds groups and touches memory
        plain.append(max(await raw.call("broadcast", timeout_s=DEADLINE_S)))
        seconds, stall, more = await published.publish()
        moved.append(seconds)
        stalled.append(stall)
        taken.append(more)
    seconds, raw_seconds = median(moved[1:]), median(plain[1:])
    parameters = sum(meta.nbytes // getattr(torch, meta.dtype).itemsize for meta in published.manifest.tensors)
    return Result(
        million_parameters=round(parameters / 1e6, 1),
        engines=len(published.members),
        mib=round(nbytes / 2**20, 1),
        seconds=round(seconds, 4),
        gb_per_s=round(nbytes / seconds / 1e9, 3),
        raw_seconds=round(raw_seconds, 4),
        raw_gb_per_s=round(nbytes / raw_seconds / 1e9, 3),
        ratio=round(raw_seconds / seconds, 3),
        stall_seconds=round(median(stalled[1:]), 4),
        more_mib=round(median(taken[1:]), 1),
    )


def show(results: list[Result], options: argparse.Namespace) -> None:
    table = Table(title=f"publish to {options.engine} engines, {options.dtype}, {options.bucket_mib:g} MiB buckets")
    for name in ("parameters", "engines", "MiB", "s", "GB/s", "raw GB/s", "of raw", "stall ms", "more MiB"):
        table.add_column(name, justify="right")
    for r in results:
        cells = (f"{r.million_parameters:g} M", r.engines, r.mib, f"{r.seconds:.3f}", f"{r.gb_per_s:.2f}")
        rest = (f"{r.raw_gb_per_s:.2f}", f"{r.ratio:.0%}", f"{r.stall_seconds * 1e3:.0f}", f"{r.more_mib:.0f}")
        table.add_row(*map(str, (*cells, *rest)))
    Console().print(table)
    print(json.dumps({"benchmark": "publish", **vars(options), "results": [asdict(result) for result in results]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("scripted", "hf", "vllm"), default="vllm")
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2, 4], help="how many")
    parser.add_argument("--million-parameters", type=int, nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--bucket-mib", type=float, default=16.0)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=32, include_dashboard=False, object_store_memory=100 * 2**20)
    with tempfile.TemporaryDirectory() as folder:
        models = [model_folder(Path(folder), million) for million in options.million_parameters]
        results = [asyncio.run(measure(model, count, options)) for model in models for count in options.engines]
    ray.shutdown()
    show(results, options)


if __name__ == "__main__":
    main()
