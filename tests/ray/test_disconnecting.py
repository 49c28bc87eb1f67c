"""The end of a run's own Ray."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import asyncio

import ray

from orchestrator.cluster.ray_cluster import RayCluster
from orchestrator.config.schema import RunConfig


async def let_go(references):
    while True:
        references.pop()
        await asyncio.sleep(0)


async def main():
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20)
    cluster = RayCluster(RunConfig.model_validate({"phases": {"only": {"method": "sft"}}}), "run")
    letting_go = asyncio.ensure_future(let_go([ray.put(0)] * 10 + [ray.put(i) for i in range(50_000)]))
    await asyncio.sleep(0.01)
    await cluster.close()
    assert not ray.is_initialized() and not letting_go.done(), "some were left"
    print("closed")


asyncio.run(main())
"""


def test_references_that_are_let_go_while_ray_shuts_down_do_not_end_the_process() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=280)
    assert (ran.returncode, ran.stdout) == (0, "closed\n"), ran.stderr[-3000:]
