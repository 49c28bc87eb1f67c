"""A Ray of a test's own, without a dashboard. Its start is tried again where a busy machine makes it miss Ray's own
time limit, as that of a run's Ray is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from orchestrator.cluster.ray_connection import end_half_started, started
from orchestrator.import_pin import worker_setup


def start_ray(num_cpus: int, object_store_mib: int = 100, **options: Any) -> None:
    """`options`: other arguments of `ray.init`. Its workers are set up as those of a run are."""
    memory = object_store_mib * 2**20
    options = {"runtime_env": {"worker_process_setup_hook": worker_setup()}, **options}

    def start() -> None:
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, object_store_memory=memory, **options)

    started(start, end_half_started, warnings.warn)


@contextmanager
def own_ray(num_cpus: int, object_store_mib: int = 100, **options: Any) -> Iterator[None]:
    start_ray(num_cpus, object_store_mib, **options)
    yield
    ray.shutdown()
