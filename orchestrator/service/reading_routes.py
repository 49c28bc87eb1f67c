"""Routes that read runs. Each is a look at the run's folder."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from pydantic import BaseModel
from sse_starlette import EventSourceResponse

from orchestrator.service import run_contents
from orchestrator.service.errors import documented
from orchestrator.service.event_stream import EVENT_STREAM, PING_S, EventReader, event_stream
from orchestrator.service.metric_lines import MetricFiles
from orchestrator.service.run_folders import RunFolders
from orchestrator.service.schemas import (
    CheckpointList,
    EventList,
    LogText,
    MetricLines,
    RunDetail,
    RunId,
    RunList,
    Samples,
)

LARGEST = 2**53  # integers that JSON clients can hold exactly; JavaScript's are floats

Position = Annotated[int, Query(ge=0, le=LARGEST)]
router = APIRouter(prefix="/v1/runs", tags=["runs"], responses=documented(401, 404, 422))


# Coroutines, because FastAPI would call a plain function in a thread.
async def run_folders(request: Request) -> RunFolders:
    return request.app.state.runs


async def metric_files(request: Request) -> MetricFiles:
    return request.app.state.metric_files


Runs = Annotated[RunFolders, Depends(run_folders)]
Metrics = Annotated[MetricFiles, Depends(metric_files)]


def as_json(answer: BaseModel) -> Response:
    """As it is: FastAPI would validate it once more, in yet another thread."""
    return Response(answer.model_dump_json(by_alias=True), media_type="application/json")


@router.get("", response_model=RunList)
def list_runs(runs: Runs) -> Any:
    """All runs, the newest first."""
    return as_json(RunList(runs=runs.summaries()))


@router.get("/{run}", response_model=RunDetail)
def get_run(run: RunId, runs: Runs) -> Any:
    """How a run stands."""
    return as_json(runs.detail(run))


@router.get(
    "/{run}/events",
    response_model=EventList,
    responses={200: {"content": EVENT_STREAM}},
)
def get_events(
    run: RunId,
    runs: Runs,
    follow: Annotated[bool, Query(description="A stream of server-sent events, until the run is over.")] = False,
    after: Annotated[int, Query(ge=0, le=LARGEST, description="Only events after the one with this id.")] = 0,
    last_event_id: Annotated[
        int | None, Header(ge=0, le=LARGEST, description="In the place of `after`: what a client sends to go on.")
    ] = None,
) -> Any:
    """What happened in a run: parts of the start, joins, deaths, retries, resizes, checkpoints."""
    folder = runs.folder(run)
    last = after if last_event_id is None else last_event_id
    if follow:
        return EventSourceResponse(event_stream(runs, run, last), ping=int(PING_S))
    return as_json(EventList(events=EventReader(folder, last).new()))


@router.get("/{run}/metrics", response_model=MetricLines)
def get_metrics(
    run: RunId,
    runs: Runs,
    files: Metrics,
    after_step: Annotated[int | None, Query(ge=0, le=LARGEST, description="Only lines of later steps.")] = None,
    phase: str | None = None,
    name: Annotated[list[str] | None, Query(description="Only this metric; may be given several times.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="The last so many lines.")] = 1000,
) -> Any:
    """What a run measured, one entry for each logged step and evaluation."""
    after = -1 if after_step is None else after_step  # the first line may be the evaluation before step 1
    lines = files.of(runs.folder(run)).answer(after=after, phase=phase, names=name or (), limit=limit)
    return Response(b'{"lines":' + lines + b"}", media_type="application/json")  # as written: nothing is parsed again


@router.get("/{run}/samples", response_model=Samples)
def get_samples(
    run: RunId,
    runs: Runs,
    step: Annotated[int | None, Query(ge=0, le=LARGEST, description="Default: the newest that has samples.")] = None,
    order: Annotated[run_contents.Order, Query(description="By reward, the lowest or the highest first.")] = "position",
    min_reward: float | None = None,
    max_reward: float | None = None,
    offset: Position = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    tokens: Annotated[bool, Query(description="Their tokens, too, with mask, log-probabilities, advantages.")] = False,
) -> Any:
    """Completions of a step with their rewards."""
    found = run_contents.samples(
        runs.folder(run),
        step=step,
        order=order,
        min_reward=min_reward,
        max_reward=max_reward,
        offset=offset,
        limit=limit,
        tokens=tokens,
    )
    return as_json(found)


@router.get("/{run}/checkpoints", response_model=CheckpointList)
def get_checkpoints(run: RunId, runs: Runs) -> Any:
    """The complete checkpoints of a run."""
    return as_json(CheckpointList(checkpoints=run_contents.checkpoints(runs.folder(run))))


@router.get("/{run}/logs", response_model=LogText)
def get_logs(
    run: RunId,
    runs: Runs,
    offset: Annotated[int | None, Query(ge=0, le=LARGEST, description="In bytes. Default: near the end.")] = None,
) -> Any:
    """What a run printed: at most 64 KiB. `next_offset` reads on."""
    running = not runs.summary(run).state.over  # before reading: what it printed last must be read
    return as_json(run_contents.log(runs.folder(run), offset=offset, running=running))
