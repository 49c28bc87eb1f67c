"""Starting and ending the processes of runs: as Ray jobs, or as processes of this machine.

    submit(run, command) ──► RayJobs        a Ray job whose submission id is the run's id
                         └─► ProcessJobs    a process of its own, which outlives the service

Both are asked how a run's process stands only where its folder does not say: before its driver has written anything,
and after it has died without a word. Calls block; each has a deadline.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil

from orchestrator.cluster.ray_address import ray_token
from orchestrator.cluster.run_lock import Driver
from orchestrator.planning.bundles import Node, Resources
from orchestrator.service.errors import Problem
from orchestrator.service.service_folder import write_whole

TIMEOUT_S = 30.0  # of a call of the Job API
AGENT_TIMEOUT_S = 60.0  # a head that is young has no agent for jobs yet
AGENT_POLL_S = 1.0
MONITOR_S = 3.0  # after which Ray has noticed that a job's supervisor has ended
MOST_LISTED = 10_000  # of nodes, placement groups and actors: what the State API gives at most
JOB_FILE = "job.json"  # in a run's folder: of a process of this machine
NO_AGENT = "No available agent"
SHOWN = 500  # characters of an answer, in an error
NOT_ASKED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)  # nothing was sent


class AnswerLost(Problem):
    """Something was asked, and the answer was lost: it may have been done, or be done yet."""


class JobState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    ENDED = "ended"
    STOPPED = "stopped"  # it has ended, because the Job API was asked for that

    @property
    def over(self) -> bool:
        return self in (JobState.ENDED, JobState.STOPPED)


@dataclass(frozen=True)
class Held:
    """What a placement group has reserved on a node. `run`: that of the job that made it, if it is a run's."""

    run: str | None
    node: str
    resources: Resources


@dataclass(frozen=True)
class Reserved:
    """The nodes of a cluster, and what is reserved on them."""

    nodes: tuple[Node, ...]
    held: tuple[Held, ...]


class Jobs(Protocol):
    """`run`: a run's id. `folder`: its folder."""

    def clear(self, run: str, folder: Path) -> None:
        """Forget the process that a run had before, so that its end is not taken for that of the next one. Raises
        Problem 409 if the run has a process, 502 or 503 if that failed."""
        ...

    def submit(self, run: str, folder: Path, command: Sequence[str], *, stop_wait_s: float) -> None:
        """Start a command as the process of a run that was cleared. `stop_wait_s`: what `kill` leaves it. Raises
        AnswerLost if it may have been started all the same, else Problem 502 or 503 if that failed."""
        ...

    def states(self, folders: Mapping[str, Path]) -> dict[str, JobState]:
        """Run -> how its process stands; runs that have none are left out. Raises Problem."""
        ...

    def reserved(self) -> Reserved | None:
        """The machines that the runs share; None if each has its own. Raises Problem."""
        ...

    def kill(self, run: str, folder: Path) -> None:
        """Send its process SIGTERM, and SIGKILL if it is still there after what `submit` was told. Does not wait."""
        ...

    def ready(self) -> None:
        """Raises Problem 503 if no job could be started now."""
        ...


class RayJobs:
    """Ray's Job API, as its dashboard serves it (https://docs.ray.io/en/latest/cluster/running-applications/
    job-submission/rest.html). Over HTTP and not through Ray's client, which imports Ray and has no deadlines."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        # One for all calls, which may come from several threads: a new one reads the certificates of the machine.
        self._http = httpx.Client(timeout=TIMEOUT_S, trust_env=False)

    def close(self) -> None:
        """Connections; those of a service end with its process."""
        self._http.close()

    def clear(self, run: str, folder: Path) -> None:
        state = self.states({run: folder}).get(run)
        if state is not None and state.over:  # the id of a run is that of its job, and a job is submitted once
            self._until_ray_has_looked(run)
            self._call("DELETE", f"/api/jobs/{run}")
        elif state is not None:
            raise Problem(409, f"run {run} has a job, which is {state}")

    def submit(self, run: str, folder: Path, command: Sequence[str], *, stop_wait_s: float) -> None:
        job = {
            "entrypoint": shlex.join(command),
            "submission_id": run,
            "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(round(stop_wait_s))}},
            "metadata": {"troupe_run": run},
        }
        deadline = time.monotonic() + AGENT_TIMEOUT_S
        while True:
            try:
                self._call("POST", "/api/jobs/", job)
                return
            except Problem as problem:
                if NO_AGENT not in str(problem) or time.monotonic() > deadline:
                    raise
            time.sleep(AGENT_POLL_S)

    def _until_ray_has_looked(self, run: str) -> None:
        """Ray looks at a job every second, also at one that has ended, until it has found that its supervisor is gone.
        Should it find that of another job of the same id, it takes this one for failed, and its supervisor keeps the
        name that every later one needs."""
        ended_ms = self._call("GET", f"/api/jobs/{run}").get("end_time")
        waited = MONITOR_S if ended_ms is None else time.time() - ended_ms / 1000
        time.sleep(min(MONITOR_S, max(0.0, MONITOR_S - waited)))  # clocks may differ

    def states(self, folders: Mapping[str, Path]) -> dict[str, JobState]:
        jobs: list[dict[str, Any]] = self._call("GET", "/api/jobs/")
        named = {job["submission_id"]: job["status"] for job in jobs if job.get("submission_id") in folders}
        known = {"PENDING": JobState.PENDING, "RUNNING": JobState.RUNNING, "STOPPED": JobState.STOPPED}
        return {run: known.get(status, JobState.ENDED) for run, status in named.items()}

    def reserved(self) -> Reserved:
        """What actors without a placement group use is counted, too; tasks are not."""
        jobs: list[dict[str, Any]] = self._call("GET", "/api/jobs/")
        run_of = {job["job_id"]: job["submission_id"] for job in jobs if job.get("submission_id")}
        nodes = [node for node in self._listed("nodes") if node["state"] == "ALIVE"]
        names = {node["node_id"]: f"{node['node_name']}/{node['node_id'][:6]}" for node in nodes}
        held = [*_of_groups(self._listed("placement_groups")), *_of_actors(self._listed("actors"))]
        return Reserved(
            tuple(Node(names[node["node_id"]], node["resources_total"], node["labels"] or {}) for node in nodes),
            tuple(Held(run_of.get(job), names[node], needs) for job, node, needs in held if node in names),
        )

    def _listed(self, kind: str) -> list[dict[str, Any]]:
        """Ray's State API (https://docs.ray.io/en/latest/ray-observability/reference/api.html)."""
        answer = self._call("GET", f"/api/v0/{kind}?detail=1&limit={MOST_LISTED}&timeout={TIMEOUT_S:g}")
        try:
            return answer["data"]["result"]["result"]
        except (KeyError, TypeError):
            raise Problem(502, f"Ray's State API has no {kind} in its answer: {str(answer)[:SHOWN]}") from None

    def kill(self, run: str, folder: Path) -> None:
        self._call("POST", f"/api/jobs/{run}/stop")

    def ready(self) -> None:
        self._call("GET", "/api/version")

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        """Raises Problem 503 if nothing can be asked, AnswerLost if no answer comes, 502 with what it said if that is
        an error."""
        token = ray_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            answer = self._http.request(method, self._url + path, json=body, headers=headers)
        except httpx.HTTPError as error:
            kind = Problem if isinstance(error, NOT_ASKED) else AnswerLost
            raise kind(503, f"Ray's Job API at {self._url} does not answer: {type(error).__name__}") from None
        if answer.status_code != 200:
            said = answer.text.strip().splitlines()[-1:] or [""]
            raise Problem(502, f"Ray's Job API answered {answer.status_code}: {said[0][:SHOWN]}")
        try:
            return answer.json()
        except ValueError:
            raise Problem(502, f"Ray's Job API at {self._url} answered no JSON: {answer.text[:SHOWN]}") from None


def _of_groups(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, Resources]]:
    """(job, node, resources) of each reserved bundle."""
    for group in groups:
        if group["state"] == "CREATED":
            for bundle in group["bundles"] or ():
                yield group["creator_job_id"], bundle["node_id"], bundle["unit_resources"]


def _of_actors(actors: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str, Resources]]:
    for actor in actors:
        if actor["state"] == "ALIVE" and not actor["placement_group_id"] and actor["required_resources"]:
            yield actor["job_id"], actor["node_id"], actor["required_resources"]


class ProcessJobs:
    """Processes of this machine. What is known of one is in its run's folder, so that it is known after the service was
    started again, too."""

    def __init__(self) -> None:
        self._children: dict[str, subprocess.Popen[bytes]] = {}  # to be reaped: one that is not seems to live

    def clear(self, run: str, folder: Path) -> None:
        if self.states({run: folder}).get(run) is JobState.RUNNING:
            raise Problem(409, f"run {run} has a process")
        (folder / JOB_FILE).unlink(missing_ok=True)

    def submit(self, run: str, folder: Path, command: Sequence[str], *, stop_wait_s: float) -> None:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            start_new_session=True,
        )
        self._children[run] = process
        write_whole(folder / JOB_FILE, {"driver": asdict(Driver.of(process.pid)), "stop_wait_s": stop_wait_s})

    def states(self, folders: Mapping[str, Path]) -> dict[str, JobState]:
        found: dict[str, JobState] = {}
        for run, folder in folders.items():
            if run in self._children and self._children[run].poll() is not None:
                del self._children[run]
            driver = _driver(folder)
            if driver is not None:
                found[run] = JobState.RUNNING if driver.may_live else JobState.ENDED
        return found

    def reserved(self) -> None:
        return

    def kill(self, run: str, folder: Path) -> None:
        """A process of this service is killed in the end by a thread of it; if that ends before, it gets SIGTERM."""
        driver = _driver(folder)
        if driver is None or not driver.may_live:
            return
        process = psutil.Process(driver.pid)
        process.send_signal(signal.SIGTERM)
        wait = json.loads((folder / JOB_FILE).read_text())["stop_wait_s"]
        _later(wait, lambda: process.kill() if process.is_running() else None)

    def ready(self) -> None:
        return


def _later(seconds: float, call: Callable[[], Any]) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


def _driver(folder: Path) -> Driver | None:
    try:
        return Driver(**json.loads((folder / JOB_FILE).read_text())["driver"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
