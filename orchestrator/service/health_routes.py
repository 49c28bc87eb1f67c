"""Whether the service lives, whether it can do its work, and what it can count."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from orchestrator.service.errors import Problem, documented
from orchestrator.service.jobs import Jobs
from orchestrator.service.reading_routes import Runs, run_folders
from orchestrator.service.run_folders import RunFolders
from orchestrator.service.schemas import Health
from orchestrator.service.waiting import Places, in_thread
from orchestrator.status import State

READY_S = 5.0
# Anybody may ask, and a call of Ray's dashboard may take long: neither may cost the threads that reads need.
_ready_checks = Places("looks whether the service is ready", 2)
open_router = APIRouter(tags=["health"])  # without a token: see `gate.PUBLIC`
router = APIRouter(tags=["health"])


@open_router.get("/healthz")
async def healthz() -> Health:
    """The process lives and answers."""
    return Health(status="ok")


@open_router.get("/readyz", responses=documented(502, 503))
async def readyz(runs: Runs, request: Request) -> Health:
    """The folder of the runs can be read and written, and jobs could be started."""
    looking = asyncio.create_task(_looked(runs, request.app.state.jobs))
    looking.add_done_callback(lambda task: task.cancelled() or task.exception())  # also if nobody waits for it any more
    await asyncio.wait((looking,), timeout=READY_S)
    if not looking.done():  # it goes on, and keeps its place until its thread is free again
        raise _late()
    looking.result()
    return Health(status="ready")


async def _looked(runs: RunFolders, jobs: Jobs) -> None:
    async with _ready_checks.place(READY_S, _late()):
        await in_thread(lambda: _look(runs, jobs))


def _late() -> Problem:
    return Problem(503, f"whether jobs could be started was not found out in {READY_S:g} s")


def _look(runs: RunFolders, jobs: Jobs) -> None:
    if not (runs.root.is_dir() and os.access(runs.root, os.R_OK | os.W_OK | os.X_OK)):
        raise Problem(503, "the folder of the runs cannot be read and written")
    jobs.ready()


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented(401)},
)
def metrics(runs: Annotated[RunFolders, Depends(run_folders)]) -> Any:
    """For Prometheus: the runs by state; step, workers and last metrics of those that are not over."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Runs(runs))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Runs:
    """A collector: asked at each scrape, so a run that is gone leaves no number behind."""

    def __init__(self, runs: RunFolders) -> None:
        self._runs = runs

    def collect(self) -> Iterator[GaugeMetricFamily]:
        summaries = self._runs.summaries()
        by_state = GaugeMetricFamily("troupe_runs", "Runs by state.", labels=["state"])
        for state in State:
            by_state.add_metric([state], sum(summary.state is state for summary in summaries))
        step = GaugeMetricFamily("troupe_run_step", "Optimizer steps that are done.", labels=["run"])
        workers = GaugeMetricFamily("troupe_run_workers", "Elastic workers.", labels=["run", "role", "count"])
        last = GaugeMetricFamily("troupe_run_metric", "What was logged last.", labels=["run", "name"])
        for summary in summaries:
            if not summary.state.over:
                detail = self._runs.detail(summary.id)
                step.add_metric([summary.id], detail.step)
                for role, count in detail.workers.items():
                    workers.add_metric([summary.id, role, "desired"], count.desired)
                    workers.add_metric([summary.id, role, "serving"], count.serving)
                for role, scaled in detail.autoscale.items():
                    for bound in ("min", "max"):
                        workers.add_metric([summary.id, role, bound], scaled[bound])
                for name, value in detail.metrics.items():
                    if isinstance(value, int | float) and name not in ("step", "time"):
                        last.add_metric([summary.id, name], value)
        yield from (by_state, step, workers, last)
