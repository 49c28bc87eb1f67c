"""Two Rays of `troupe up` on one machine: each job runs on the one that it was submitted to."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestrator.cluster.ray_address import TOKEN_PATH
from orchestrator.service.jobs import JobState, RayJobs
from orchestrator.service.private_ray import StartedRay, end, environment_of, start_ray
from tests.waiting import until

pytestmark = pytest.mark.timeout(600)


def test_a_job_is_given_the_address_of_the_ray_that_it_was_submitted_to_whichever_was_started_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A driver with another Ray's address would be refused by its token, and its run given up."""
    heads: dict[str, StartedRay] = {}
    with ExitStack() as stack:
        for name in ("one", "two"):
            (home := tmp_path / name).mkdir()
            heads[name] = start_ray(home, environment_of(home), cpus=1, object_store_mib=80)
            stack.callback(end, heads[name].process.pid)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        for name, head in heads.items():
            monkeypatch.setenv(TOKEN_PATH, str(tmp_path / name / "ray-token"))
            jobs, said, folder = RayJobs(head.dashboard), tmp_path / f"{name}.txt", {"job": tmp_path / name}
            stack.callback(jobs.close)
            jobs.submit("job", tmp_path / name, ["sh", "-c", f'echo "$RAY_ADDRESS" > {said}'], stop_wait_s=1)
            until(lambda jobs=jobs, folder=folder: jobs.states(folder)["job"] is JobState.ENDED, "end of the job")
            assert said.read_text().strip().rpartition(":")[2] == str(head.ports["port"])
    assert heads["one"].ports["port"] != heads["two"].ports["port"]
