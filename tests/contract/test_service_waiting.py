"""Requests that wait for a run that is between two steps for long take nothing from those who only read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from orchestrator.cluster.control import RunFile, put_status
from orchestrator.cluster.run_lock import Driver, driving
from orchestrator.service import waiting
from orchestrator.service.app import create_app
from orchestrator.service.settings import Settings
from tests.service_client import AUTHORIZED, TOKEN, listening, write_run

READS = ("/v1/runs", "/v1/runs/t", "/v1/runs/t/events", "/v1/runs/t/metrics", "/v1/models", "/readyz")


def test_reads_are_answered_while_more_requests_wait_for_a_run_than_the_server_has_threads(tmp_path: Path):
    """The run is this process', and answers nothing; when it ends, all who wait for it are told."""
    folder = write_run(tmp_path, "t", metrics=[{"step": 1, "loss": 1.0}])
    waiters = waiting.WAITING + 10
    with ExitStack() as ends:
        url = ends.enter_context(listening(create_app(Settings(tmp_path, token=TOKEN))))
        pool = ends.enter_context(ThreadPoolExecutor(waiters))
        run = ends.enter_context(ExitStack())
        run.enter_context(driving(folder))
        RunFile("t", None, Driver.here(), ()).write(folder)
        put_status(folder, {})

        def ask(number: int) -> tuple[int, Any]:
            body = {"json": {"paused": True}} if number % 2 else {}
            path = f"/v1/runs/t{'' if number % 2 else '/checkpoint'}?wait_s=250"
            method = "PATCH" if number % 2 else "POST"
            answer = httpx.request(method, url + path, headers=AUTHORIZED, timeout=260, **body)
            return answer.status_code, answer.json()["error"]["message"]

        asked = [pool.submit(ask, number) for number in range(waiters)]
        while len(list((folder / "requests").glob("*.json"))) < waiting.WAITING:  # ended by the test's timeout
            assert not wait(asked, timeout=0.1, return_when="FIRST_COMPLETED").done
        for path in READS:
            assert httpx.get(url + path, headers=AUTHORIZED, timeout=200).status_code == 200, path
        assert not any(answer.done() for answer in asked), "all of them wait"
        run.close()  # the run has ended
        answers = [answer.result(250) for answer in asked]
    assert {status for status, _ in answers} == {409}
    assert all("has ended" in said or "cannot be asked" in said for _, said in answers), answers
