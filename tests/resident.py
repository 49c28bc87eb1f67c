"""What stands in for a trainer, an engine or a reward where only its place counts. In a module of its own, because an
actor's process imports the module of its class, and that of a test imports torch and transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray

import actors
from actors.worker import WorkerInfo


class Resident:
    """It says where it is."""

    def __init__(
        self, name: str = "", rank: int = 0, world_size: int = 1, master: Any = None, packages: str = ""
    ) -> None:
        self.name, self.rank = name, rank
        self.packages = packages or str(Path(actors.__file__).parent)

    def ready(self) -> WorkerInfo:
        return WorkerInfo(self.name, os.getpid(), ray.get_runtime_context().get_node_id(), self.packages, {})

    def ping(self) -> dict[str, Any]:
        return {"alive": True}

    def gpus(self) -> list[int]:
        return [int(index) for index in ray.get_gpu_ids()]

    def environment(self, name: str) -> str | None:
        return os.environ.get(name)
