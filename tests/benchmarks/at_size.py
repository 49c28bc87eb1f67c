"""What the driver does in one step of grpo on up to 1,024 GPUs and more: calls, bytes and seconds, part by part.

    python tests/benchmarks/at_size.py [--gpus 64 256 1024 4096] [--ray]

Nothing computes: half of the GPUs are ranks of a policy and its reference in ZeRO stage 3, the other half engines of 8
GPUs each, and all of them answer at once. What is real is everything that runs in the driver: planner, collector with
its staleness contract, pools, row table, sharder, executor, publisher, manifest of a checkpoint. A step has one prompt
per GPU and 16 samples of each. Seconds are those of the driver's processor, and apart from them what it takes to pickle
the arguments and results; `--ray` adds what a small call and a small object cost there, measured on actors of this
machine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from actors.saved_state import Seal
from orchestrator.batches.batch_stages import PhaseSettings
from orchestrator.checkpoint import CheckpointStore, RunState
from orchestrator.cluster.background_tasks import PING_EVERY_S
from orchestrator.cluster.failures import Ledger, Watchdog
from orchestrator.cluster.pool import Pool, PoolPolicy
from orchestrator.collection.cursor import Cursor
from orchestrator.collection.group_collector import GroupCollector
from orchestrator.collection.staleness import Contract
from orchestrator.config.colocation import BUCKET_MIB
from orchestrator.config.schema import RunConfig, WeightsConfig
from orchestrator.executor import Executor
from orchestrator.methods import build
from orchestrator.planning.bundles import ClusterView, Node
from orchestrator.planning.machine import Machine
from orchestrator.planning.plan import draft_plan, problems
from orchestrator.publishing.publisher import Publisher
from rollout.sampling import Sampling
from tests.benchmarks.instant_processes import (
    SAMPLES,
    TP,
    Endless,
    Meter,
    Objects,
    Stub,
    StubEngine,
    StubGroup,
    StubScorer,
)

STEP_S = 60.0
PINGS_OF_RANKS = f"pings of ranks, every {PING_EVERY_S:g} s"
PINGS_OF_POOLS = f"pings of pools, every {PoolPolicy.ping_every_s:g} s"
PINGS = {PINGS_OF_RANKS: PING_EVERY_S, PINGS_OF_POOLS: PoolPolicy.ping_every_s}
POLICY = PoolPolicy(8, 3, 60.0, 60.0, 9, ping_every_s=1e6)


async def measured(gpus: int, folder: Path) -> Meter:
    """The second of two steps."""
    meter = Meter()
    ranks, engines = gpus // 2, max(1, gpus // 2 // TP)
    pipeline = build("grpo", {"num_generations": SAMPLES, "beta": 0.04})
    with meter("plan, once"):
        roles = {
            "policy": {"ranks": ranks, "gpus": 1, "zero_stage": 3, "backend": "deepspeed"},
            "reference": {"ranks": ranks, "gpus": 1, "zero_stage": 3, "backend": "deepspeed", "colocate": "policy"},
            "rollout": {"workers": engines, "gpus": TP, "tensor_parallel": TP},
            "reward": {"workers": engines},
        }
        config = RunConfig.model_validate({"phases": {"grpo": {"method": "grpo"}}, "roles": roles})
        plan = draft_plan(config, {"grpo": pipeline}, parameters=70_000_000_000, machine=Machine(128))
        problems(plan, ClusterView(tuple(Node(f"n{i}", {"CPU": 128.0, "GPU": 8.0}) for i in range(gpus // 8 + 1))))

    def pool(role: str, kind: type[Stub], count: int) -> Pool:
        async def start(index: int) -> Any:
            return kind(f"{role}/{index}", meter)

        return Pool(
            role, count, POLICY, start=start, stop=lambda w: w.kill(), event=lambda *_: None, watchdog=Watchdog()
        )

    rollout, reward = pool("rollout", StubEngine, engines), pool("reward", StubScorer, engines)
    groups: dict[str, Any] = {name: StubGroup(name, ranks, meter) for name in ("policy", "reference")}
    objects = Objects(meter)
    publisher = Publisher(
        groups["policy"],
        rollout,
        objects,
        WeightsConfig(),
        role="rollout",
        source="policy",
        dtype="bfloat16",
        folder=str(folder),
        event=lambda *_: None,
        transport="collective",
        bucket_bytes=int(BUCKET_MIB["gpu"] * 2**20),
    )
    rollout.admit = publisher.admit
    await asyncio.gather(rollout.open(), reward.open())

    async def start(role: str, model: str) -> None: ...

    executor = Executor(
        groups,
        objects,
        start=start,
        engines={"rollout": rollout},
        scorers={"reward": reward},
        model_rewards=(),
        publishers=[publisher],
        call_timeout_s=dict.fromkeys(groups, 60.0),
        stand_ins={},
        concurrent=False,
    )
    executor.enter(PhaseSettings(pipeline, 32768, 1.0, 0, Sampling(max_tokens=4096)))
    cursor = Cursor()
    collector = GroupCollector(
        Endless(),
        executor,
        pipeline,
        cursor,
        Contract(0, gpus),
        run="size",
        seed=0,
        version=0,
        ledger=Ledger(64),
        watchdog=Watchdog(),
    )
    with meter("publish"):
        async with executor.changing_weights():
            await executor.publish(0, begins=True)
    for step in range(2):
        if step:
            meter.parts = {"plan, once": meter.parts["plan, once"]}
        with meter("collect and reference"):
            collected = await collector.next(step)
        for stage in pipeline.learn:
            with meter(stage.name):
                collected_table, _ = await executor.run([stage], collected.table, step)
                collected = SimpleNamespace(table=collected_table, positions=collected.positions)
        await collector.expire(step + 1)
        with meter("publish"):
            async with executor.changing_weights():
                await executor.publish(step + 1)
        collector.advance(step + 1, collected)  # type: ignore[arg-type]
    await collector.close()  # the next batch is under way
    with meter(PINGS_OF_RANKS):
        await asyncio.gather(*(each.call("ping", timeout_s=1) for name in groups for each in groups[name].workers))
    with meter(PINGS_OF_POOLS):
        workers = [*rollout.workers.values(), *reward.workers.values()]
        await asyncio.gather(*(worker.call("ping", timeout_s=1) for worker in workers))
    with meter("checkpoint"):
        await groups["policy"].call("begin_save", str(folder), [], timeout_s=60.0)
        sealed = {
            name: seal
            for own in await groups["policy"].call("finish_save", 1.0, timeout_s=60.0)
            for name, seal in own.items()
        }

        async def fill(at: Path) -> dict[str, Seal]:
            (at / "policy").mkdir()
            for name in sealed:
                (at / name).write_bytes(b"0")
            return sealed

        await CheckpointStore(folder, keep=1).write(fill, RunState("p", 0, 1, 1, 1, {}, {}, ""))
    await asyncio.gather(rollout.close(), reward.close())
    return meter


def ray_costs() -> tuple[float, float]:
    """Seconds of the driver for one call, and for one small object that is put."""
    import ray

    from actors.group import RayObjects, start_worker

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:

        async def costs() -> tuple[float, float]:
            workers = [start_worker(f"troupe/size/stub/{i}", _Echo, {}, ray_options={"num_cpus": 0}) for i in range(2)]
            await asyncio.gather(*(worker.call("ready", timeout_s=120.0) for worker in workers))
            found = []
            for work in (
                lambda i: workers[i % 2].call("ready", timeout_s=60.0),
                lambda i: RayObjects().put(b"x" * 2000),
            ):
                await asyncio.gather(*map(work, range(200)))
                began = time.process_time()
                await asyncio.gather(*map(work, range(1000)))
                found.append((time.process_time() - began) / 1000)
            return found[0], found[1]

        return asyncio.run(costs())
    finally:
        ray.shutdown()


class _Echo:
    def ready(self) -> dict[str, Any]:
        return {"verb": "update", "busy_s": 1.0}

    def ping(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--ray", action="store_true", help="add what calls and objects cost in Ray")
    given = parser.parse_args()
    per_call, per_object = ray_costs() if given.ray else (0.0, 0.0)
    print(f"in the driver, a call costs {per_call * 1e3:.2f} ms, an object {per_object * 1e3:.2f} ms of its processor")
    for gpus in given.gpus:
        with tempfile.TemporaryDirectory() as folder:
            meter = asyncio.run(measured(gpus, Path(folder)))
        print(f"\n{gpus} GPUs, {gpus * SAMPLES} rows")
        print(" " * 36 + "calls  objects      MB   own s  pickling s  + Ray s")
        step = pinging = 0.0
        for part, count in meter.parts.items():
            whole = count.seconds + count.pickling + count.calls * per_call + count.objects * per_object
            step += whole if part not in ("plan, once", "checkpoint", *PINGS) else 0.0
            pinging += whole / PINGS.get(part, float("inf"))
            numbers = f"{count.calls:7d}  {count.objects:7d}  {count.nbytes / 1e6:6.1f}"
            print(f"  {part:32s} {numbers}  {count.seconds:6.2f}  {count.pickling:10.2f}  {whole:7.2f}")
        print(f"  a step: {step:.2f} s, {step / STEP_S:.0%} of a minute; pings: {pinging:.1%} of a core all the time")


if __name__ == "__main__":
    main()
