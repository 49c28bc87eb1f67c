"""PATCH of a run: all of a body is checked before any of it is done."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.control import RunFile, take_requests
from orchestrator.cluster.run_lock import LOCK, Driver
from orchestrator.queueing import entry as entries
from orchestrator.queueing.entry import Entry, Stage
from tests.service_client import add_events, client, write_run

ENGINE = {"address": "h:1", "token": "t" * 16}


def run_in_progress(runs: Path, *, queued: bool = True) -> Path:
    """This process is its driver."""
    folder = write_run(runs, "one")
    driver = Driver.here()
    (folder / LOCK).write_text(json.dumps(asdict(driver)))
    run = RunFile("one", "127.0.0.1:1", driver, ("rollout",), autoscaled=(), attachable=("rollout",))
    run.write(folder)
    if queued:
        entries.write(folder, Entry(0, time.time(), (), Stage.STARTED, started=time.time()))
    return folder


@contextmanager
def taking(folder: Path, most: int = 1000) -> Iterator[list[Any]]:
    """What a driver takes that takes the first requests and then no more. Engines that it is asked for join at once."""
    taken: list[Any] = []
    ended = threading.Event()

    def takes() -> None:
        while not ended.wait(0.01) and len(taken) < most:
            asked = list(take_requests(folder))
            taken.extend(asked)
            for method, *_, ticket in (each for each in asked if each[0] in ("attach", "detach")):
                worker = {"role": "rollout", "worker": 7}
                add_events(folder, {"event": f"{method}ed", **worker, "asked": [ticket]}, {"event": "joined", **worker})

    thread = threading.Thread(target=takes)
    thread.start()
    try:
        yield taken
    finally:
        ended.set()
        thread.join(60)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"scale": {"rollout": 2, "policy": 3}}, "no role policy"),
        ({"scale": {"rollout": "auto"}}, "roles.rollout.autoscale"),
        ({"scale": {"rollout": 2}, "attach": [ENGINE, {**ENGINE, "address": "nowhere"}]}, "no address of an engine"),
        ({"attach": [ENGINE, {**ENGINE, "role": "policy"}]}, "can be attached to policy"),
        ({"scale": {"rollout": 2}, "detach": ["h:1", "h"]}, "no address of an engine"),
    ],
)
def test_a_change_of_which_a_part_is_refused_changes_nothing(tmp_path: Path, body: dict[str, Any], part: str):
    folder = run_in_progress(tmp_path)
    with taking(folder) as taken:
        answer = client(tmp_path).patch("/v1/runs/one?wait_s=100", json={"priority": 7, **body})
    assert (answer.status_code, part in answer.json()["error"]["message"]) == (422, True), answer.text
    entry = entries.read(folder)
    assert entry is not None and entry.priority == 0 and taken == []


def test_a_run_that_is_in_no_queue_is_not_scaled_by_a_change_with_a_priority(tmp_path: Path):
    folder = run_in_progress(tmp_path, queued=False)
    with taking(folder) as taken:
        answer = client(tmp_path).patch("/v1/runs/one", json={"priority": 7, "scale": {"rollout": 2}})
    assert answer.status_code == 422 and "it is in no queue" in answer.json()["error"]["message"]
    assert taken == []


def test_a_run_that_waits_keeps_its_priority_if_it_cannot_be_paused(tmp_path: Path):
    folder = write_run(tmp_path, "one")
    later = time.time() + 1000
    entries.write(folder, Entry(0, time.time(), (), not_before=later, reason="waits for 3 CPU"))
    http = client(tmp_path, dashboard="http://127.0.0.1:9")
    answer = http.patch("/v1/runs/one", json={"paused": True, "priority": 7})
    assert answer.status_code == 409 and "it is queued" in answer.json()["error"]["message"]
    entry = entries.read(folder)
    assert entry is not None and entry.priority == 0
    assert http.patch("/v1/runs/one", json={"priority": 7}).json()["priority"] == 7


def test_what_a_run_has_not_been_asked_for_when_the_time_is_over_is_named(tmp_path: Path):
    folder = run_in_progress(tmp_path)
    http = client(tmp_path)
    with taking(folder) as taken:
        body = {"scale": {"rollout": 2}, "attach": [ENGINE], "detach": ["h:2"]}
        assert http.patch("/v1/runs/one?wait_s=100", json=body).status_code == 200
    address = "http://h:1", "http://h:2"
    tickets = [each.pop() for each in taken[1:]]
    assert taken == [
        ["scale", "rollout", 2],
        ["attach", "rollout", address[0], "t" * 16],
        ["detach", "rollout", address[1]],
    ]
    assert len(set(tickets)) == 2
    answer = http.patch("/v1/runs/one?wait_s=0.3", json={"scale": {"rollout": 1}, "paused": True})
    message = answer.json()["error"]["message"]
    assert answer.status_code == 504 and message.endswith("the run was not asked for the rest: paused")
    assert list(take_requests(folder)) == [["scale", "rollout", 1]]
