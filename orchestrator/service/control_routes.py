"""Routes that start runs and control them. Each ends within its deadline: a run acts between two steps, and one that
takes longer does it nevertheless."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from actors.errors import RunError
from orchestrator.run_handle import NoAnswerInTime, RunHandle
from orchestrator.service import run_contents
from orchestrator.service.errors import Problem, documented
from orchestrator.service.reading_routes import Runs
from orchestrator.service.recipes import config_of, refuse_overrides
from orchestrator.service.run_folders import RunFolders
from orchestrator.service.schemas import (
    Changes,
    CheckpointEntry,
    Resumed,
    Resumption,
    RunDetail,
    RunId,
    RunSummary,
    Submission,
    Submitted,
)
from orchestrator.service.submissions import Submissions
from orchestrator.service.waiting import waits

router = APIRouter(prefix="/v1/runs", tags=["control"], responses=documented(400, 401, 409, 413, 422, 429))
OF_A_RUN = documented(404, 504)
OF_JOBS = documented(502, 503)

Wait = Annotated[float, Query(ge=0, le=300, description="How long to wait for it, in seconds.")]


async def submissions(request: Request) -> Submissions:
    return request.app.state.submissions


Submitting = Annotated[Submissions, Depends(submissions)]


@router.post("", status_code=201, responses={200: {"model": Submitted}, **documented(403), **OF_JOBS})
@waits
def submit(sent: Submission, runs: Runs, jobs: Submitting, request: Request, response: Response) -> Submitted:
    """Start a run, or let it wait for room: `state`, and `detail` with the reason. The same recipe under the same name
    again is the same run (200). Its id is that of its Ray job."""
    settings = request.app.state.settings
    config = config_of(sent, runs=runs.root, allow_code=settings.allow_code)
    run, new = jobs.submit(sent.name, config, sent.priority)
    response.status_code = 201 if new else 200
    return Submitted(**runs.summary(run).model_dump(), created_now=new)


@router.patch("/{run}", responses=OF_A_RUN)
@waits
def change(run: RunId, changes: Changes, runs: Runs, jobs: Submitting, wait_s: Wait = 60.0) -> RunDetail:
    """Scale elastic roles; let engines from elsewhere join and leave; pause or let go on; change its priority. A run
    that is paused keeps its processes. If any of it is refused, nothing of it is done."""
    if changes == Changes():
        raise Problem(422, "nothing is asked for: give `scale`, `attach`, `detach`, `paused`, `priority`, or several")
    asks_the_run = bool(changes.scale or changes.attach or changes.detach) or changes.paused is not None
    handle = _reachable(runs, run) if asks_the_run else runs.handle(run)
    engines = [(engine.address, engine.token, engine.role) for engine in changes.attach]
    handle.refuse(changes.scale, engines, changes.detach)
    if changes.priority is not None:
        jobs.prioritise(run, changes.priority)  # refused for a run without a queue, before anything else is done
    _ask_one_after_the_other(_parts(handle, changes), wait_s)
    return runs.detail(run)


Part = tuple[str, Callable[[float], Any]]  # key of the body, and what asks the run for it within so many seconds


def _parts(handle: RunHandle, changes: Changes) -> list[Part]:
    parts: list[Part] = []
    for role, count in changes.scale.items():
        parts.append((f"scale.{role}", lambda s, role=role, count=count: handle.scale(role, count, timeout_s=s)))
    for each in changes.attach:
        parts.append(("attach", lambda s, e=each: handle.attach(e.address, e.token, role=e.role, timeout_s=s)))
    for address in changes.detach:
        parts.append(("detach", lambda s, address=address: handle.detach(address, timeout_s=s)))
    if changes.paused is not None:
        paused = handle.pause if changes.paused else handle.resume
        parts.append(("paused", lambda s: paused(timeout_s=s)))
    return parts


def _ask_one_after_the_other(parts: Sequence[Part], wait_s: float) -> None:
    """Raises Problem 504 or 409 if the run does not answer in time or ends, with what it was not asked for any more."""
    deadline = time.monotonic() + wait_s
    for number, (_, ask) in enumerate(parts, 1):
        try:
            ask(max(0.0, deadline - time.monotonic()))
        except RunError as error:
            late = isinstance(error, NoAnswerInTime)
            left = ", ".join(key for key, _ in parts[number:])
            more = f"; the run was not asked for the rest: {left}" if left else ""
            holds = "; what was asked still holds" if late else ""
            raise Problem(504 if late else 409, f"{error}{holds}{more}") from None


@router.post("/{run}/checkpoint", responses=OF_A_RUN)
@waits
def checkpoint(run: RunId, runs: Runs, wait_s: Wait = 60.0) -> CheckpointEntry:
    """Write a checkpoint between two steps."""
    written = _reachable(runs, run).checkpoint(timeout_s=wait_s)
    found = {entry.name: entry for entry in run_contents.checkpoints(runs.folder(run))}
    if written.name not in found:
        raise Problem(409, f"the checkpoint {written.name} was written, and newer ones have replaced it since")
    return found[written.name]


@router.post("/{run}/stop", responses={**OF_A_RUN, **OF_JOBS})
@waits
def stop(
    run: RunId,
    runs: Runs,
    jobs: Submitting,
    now: Annotated[bool, Query(description="By a signal: within the run's checkpoint.grace_s.")] = False,
    wait_s: Wait = 60.0,
) -> RunSummary:
    """End a run after its step and a checkpoint. The answer is how it stands when it has ended, or after `wait_s`."""
    jobs.stop(run, now=now, wait_s=wait_s)
    return runs.summary(run)


@router.post("/{run}/resume", responses={**documented(403, 404), **OF_JOBS})
@waits
def resume(run: RunId, runs: Runs, jobs: Submitting, request: Request, sent: Resumption | None = None) -> Resumed:
    """Continue a run that has ended from its newest checkpoint, under the same id. One that never saved a checkpoint
    begins again from the start: `from_step` is 0."""
    overrides = sent.overrides if sent is not None else []
    refuse_overrides(overrides, allow_code=request.app.state.settings.allow_code)
    step = jobs.resume(run, overrides)
    return Resumed(**runs.summary(run).model_dump(), from_step=step)


def _reachable(runs: RunFolders, run: str) -> RunHandle:
    handle = runs.handle(run)
    if not handle.reachable:
        summary = runs.summary(run)
        raise Problem(409, f"run {run} cannot be asked for anything now: it is {summary.state} ({summary.detail})")
    return handle
