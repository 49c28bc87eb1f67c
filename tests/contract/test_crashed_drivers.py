"""Requests to a run whose driver has died: they are refused, and none is said to be done because its file is gone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.errors import RunError
from orchestrator.cluster.control import RunFile, forget_requests
from orchestrator.cluster.run_lock import LOCK, Driver
from orchestrator.queueing import entry as entries
from orchestrator.queueing.entry import Entry, Stage
from orchestrator.run_handle import RunHandle
from tests.service_client import client, write_run
from tests.waiting import until

pytestmark = pytest.mark.timeout(300)


@dataclass
class Driven:
    """A run that a service has started, and the process that seems to drive it, which does nothing."""

    folder: Path
    process: subprocess.Popen[bytes]

    def dies(self) -> None:
        self.process.kill()
        self.process.wait(60)

    def is_driven_by(self, driver: Driver) -> None:
        (self.folder / LOCK).write_text(json.dumps(asdict(driver)))
        RunFile("one", "127.0.0.1:6379", driver, elastic=("rollout",), attachable=("rollout",)).write(self.folder)


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[Driven]:
    folder = write_run(tmp_path, "one")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    run = Driven(folder, process)
    try:
        run.is_driven_by(Driver.of(process.pid))
        entries.write(folder, Entry(0, time.time(), (), Stage.STARTED, started=time.time()))
        yield run
    finally:
        run.dies()


ASKED: dict[str, Callable[[RunHandle], Any]] = {
    "scale": lambda run: run.scale("rollout", 3, timeout_s=200),
    "attach": lambda run: run.attach("h:1", "t" * 16, timeout_s=200),
    "pause": lambda run: run.pause(timeout_s=200),
    "checkpoint": lambda run: run.checkpoint(timeout_s=200),
}


def test_a_run_whose_driver_was_killed_cannot_be_asked_for_anything(driven: Driven):
    http = client(driven.folder.parent, dashboard="http://127.0.0.1:9")
    assert RunHandle(driven.folder, None).reachable
    driven.dies()
    assert not RunHandle(driven.folder, None).reachable
    for body in ({"scale": {"rollout": 3}}, {"paused": True}):
        answer = http.patch("/v1/runs/one?wait_s=100", json=body)
        assert answer.status_code == 409 and "cannot be asked for anything now" in answer.json()["error"]["message"]
    assert not list(driven.folder.glob("requests/*"))


@pytest.mark.parametrize("asked", ASKED)
def test_a_request_ends_with_the_driver_that_was_asked_and_holds_no_more(driven: Driven, asked: str):
    with ThreadPoolExecutor() as pool:
        call = pool.submit(ASKED[asked], RunHandle(driven.folder, None))
        until(lambda: list(driven.folder.glob("requests/*.json")), "request")
        driven.dies()
        with pytest.raises(RunError, match="ended before it did what was asked, which holds no more"):
            call.result(100)
    assert not list(driven.folder.glob("requests/*"))


@pytest.mark.parametrize("asked", ["scale", "attach"])
def test_a_request_that_the_next_driver_has_forgotten_is_not_taken_for_done(driven: Driven, asked: str):
    with ThreadPoolExecutor() as pool:
        call = pool.submit(ASKED[asked], RunHandle(driven.folder, None))
        until(lambda: list(driven.folder.glob("requests/*.json")), "request")
        driven.is_driven_by(Driver.of(psutil.Process().pid))
        forget_requests(driven.folder)
        with pytest.raises(RunError, match="ended before it did what was asked"):
            call.result(100)
