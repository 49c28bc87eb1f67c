"""What the service says of runs is what their folders hold."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from pathlib import Path
from typing import Any

import httpx
from fastapi.testclient import TestClient

from orchestrator.activity import drawn
from orchestrator.checkpoint import CheckpointStore, RunState
from orchestrator.cluster.control import RunFile, put_status
from orchestrator.cluster.run_lock import Driver, driving
from orchestrator.methods import build
from orchestrator.service.app import create_app
from orchestrator.service.settings import Settings
from tests.contract.service_stage import http, runs
from tests.service_client import AUTHORIZED, TOKEN, add_events, listening, write_run, write_samples, write_tokens

__all__ = ["http", "runs"]  # fixtures


AT_WORK = {"stage": "rollout.generate", "writes": [], "calls": 3, "share": 0.5}
NAN = float("nan")


def test_runs_are_listed_with_their_states_the_newest_first(http: TestClient, runs: Path):
    second = json.loads((runs / "t-2" / "events.jsonl").read_text().splitlines()[0])
    (runs / "t-2" / "events.jsonl").write_text(json.dumps({**second, "time": 1500.0}) + "\n")
    add_events(runs / "t-2", {"event": "interrupted", "signal": "SIGTERM", "time": 2000.0})
    listed = http.get("/v1/runs").json()["runs"]
    seen = [(run["id"], run["state"], run["step"], run["methods"], run["created"]) for run in listed]
    assert seen == [("t-2", "stopped", 0, ["grpo"], 1500.0), ("t-1", "finished", 3, ["grpo"], 1000.0)]
    assert str(runs.parent) not in json.dumps(listed), "where the runs lie is not the client's business"


def test_a_run_that_goes_on_is_not_told_from_memory(http: TestClient, runs: Path):
    assert http.get("/v1/runs/t-1").json()["state"] == "finished"
    pipelines = drawn({"grpo": build("grpo", {"beta": 0.0})})
    add_events(runs / "t-1", {"event": "prepared", "time": 3000.0, "pipelines": pipelines})
    assert http.get("/v1/runs/t-1").json()["pipelines"] == pipelines
    member = {"index": 0, "state": "serving", "calls": 1}
    with driving(runs / "t-1"):
        RunFile("t-1", "10.0.0.1:6379", Driver.here(), ("rollout",)).write(runs / "t-1")
        told = {"rollout": {"desired": 2, "serving": 1, "members": [member]}}
        put_status(runs / "t-1", told, phase="grpo", at_work=[AT_WORK], waits=[{"what": "groups", "seconds": 2.5}])
        listed = {run["id"]: run["state"] for run in http.get("/v1/runs").json()["runs"]}
        detail = http.get("/v1/runs/t-1").json()
    assert listed == {"t-1": "running", "t-2": "stopped"}
    assert detail["workers"] == {"rollout": {"desired": 2, "serving": 1}}
    assert detail["members"] == {"rollout": [member]}
    assert (detail["phase"], detail["at_work"]) == ("grpo", [AT_WORK])
    assert detail["waits"] == [{"what": "groups", "seconds": 2.5}]
    assert (detail["metrics"]["step"], detail["metrics"]["reward"]) == (3, None)
    assert http.get("/v1/runs").json()["runs"][0]["state"] in ("failed", "stopped"), "its driver has ended"


def test_events_are_given_from_any_one_on(http: TestClient):
    events = http.get("/v1/runs/t-1/events").json()["events"]
    assert [(event["id"], event["event"]) for event in events] == [(1, "prepared"), (2, "checkpoint"), (3, "finished")]
    assert events[1]["data"] == {"time": 1005.0, "step": 2}
    assert http.get("/v1/runs/t-1/events", params={"after": 2}).json()["events"] == events[2:]


def test_a_stream_of_events_follows_the_run_to_its_end_and_goes_on_after_the_last_id(runs: Path):
    folder = write_run(runs, "t-3")
    path = "/v1/runs/t-3/events?follow=true"
    with (
        listening(create_app(Settings(runs, token=TOKEN))) as url,
        driving(folder),
        httpx.stream("GET", url + path, headers=AUTHORIZED, timeout=200) as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert field(lines, "event") == "prepared", "it is sent while the run is in progress"
        add_events(folder, {"event": "checkpoint", "step": 7})
        assert field(lines, "id") == "2"
        assert field(lines, "data") == '{"step": 7}'
    with listening(create_app(Settings(runs, token=TOKEN))) as url:
        headers = {**AUTHORIZED, "Last-Event-ID": "1"}
        text = httpx.get(url + path, headers=headers, timeout=200).text
    kinds = [line for line in text.splitlines() if line.startswith(("id", "event", "data"))]
    assert kinds == ["id: 2", "event: checkpoint", 'data: {"step": 7}', "event: end", 'data: {"state": "failed"}']


def field(lines: Any, name: str) -> str:
    """The next value of a field in a stream."""
    return next(line for line in lines if line.startswith(f"{name}:")).partition(": ")[2]


def test_metrics_are_filtered_by_step_and_name_and_what_is_not_finite_is_null(http: TestClient):
    lines = http.get("/v1/runs/t-1/metrics").json()["lines"]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[0]["reward"] is None
    assert [line["step"] for line in http.get("/v1/runs/t-1/metrics?after_step=1&limit=1").json()["lines"]] == [3]
    [last] = http.get("/v1/runs/t-1/metrics?after_step=2&name=loss").json()["lines"]
    assert last.keys() == {"step", "phase", "time", "loss"}
    assert http.get("/v1/runs/t-1/metrics?name=nothing").json()["lines"] == []
    assert http.get("/v1/runs/t-1/metrics?phase=sft").json()["lines"] == []


def test_samples_are_sorted_and_filtered_by_reward_and_those_without_one_come_last(http: TestClient, runs: Path):
    nothing = {"steps": [], "step": None, "total": 0, "rows": [], "tokens": None}
    assert http.get("/v1/runs/t-1/samples").json() == nothing
    assert http.get("/v1/runs/t-1/samples?tokens=true").json() == {**nothing, "tokens": []}
    write_samples(runs / "t-1", 2, [0.5, 1.0, None, 0.0])
    write_samples(runs / "t-1", 10, [1.0])

    def rewards(query: str) -> list[float | None]:
        return [row["reward"] for row in http.get(f"/v1/runs/t-1/samples?{query}").json()["rows"]]

    newest = http.get("/v1/runs/t-1/samples").json()
    assert (newest["steps"], newest["step"], newest["total"]) == ([2, 10], 10, 1)
    assert rewards("step=2") == [0.5, 1.0, None, 0.0]
    assert rewards("step=2&order=reward") == [0.0, 0.5, 1.0, None]
    assert rewards("step=2&order=-reward") == [1.0, 0.5, 0.0, None]
    assert rewards("step=2&min_reward=0.5") == [0.5, 1.0]
    assert rewards("step=2&max_reward=0") == [0.0]
    assert rewards("step=2&offset=1&limit=2") == [1.0, None]
    missing = http.get("/v1/runs/t-1/samples?step=3")
    assert missing.status_code == 404
    assert missing.json()["error"]["message"].startswith("run t-1 has no samples of step 3; it has those of 2 steps")


def test_samples_come_with_their_tokens_if_these_are_asked_for_and_kept(http: TestClient, runs: Path):
    write_samples(runs / "t-1", 2, [0.5, 1.0, None, 0.0])
    turns = [
        {"pieces": ["1+1=", "<img>"], "mask": [False, True], "sample_logps": [NAN, -0.25], "advantages": [NAN, 1.5]},
        {"pieces": ["1+1=", "", "漢"], "mask": [False, True, True], "sample_logps": [NAN, -1.0, -float("inf")]},
    ]
    path = "/v1/runs/t-1/samples?order=-reward"
    assert http.get(f"{path}&tokens=true").json()["tokens"] == [[], [], [], []], "none are kept"
    write_tokens(runs / "t-1", 2, {0: turns, 3: turns[:1]})
    assert http.get(path).json()["tokens"] is None
    found = http.get(f"{path}&tokens=true").json()
    assert [row["reward"] for row in found["rows"]] == [1.0, 0.5, 0.0, None]
    first, second = found["tokens"][1]
    assert [len(each) for each in found["tokens"]] == [0, 2, 1, 0], "each has its own, in any order"
    assert first == {
        "start": 0,
        "total": 2,
        "pieces": ["1+1=", "<img>"],
        "mask": [False, True],
        "values": {"sample_logps": [None, -0.25], "advantages": [None, 1.5]},
    }
    assert second["pieces"] == ["1+1=", "", "漢"]
    assert second["values"] == {"sample_logps": [None, -1.0, None]}, "what is not finite is null"
    shown = http.get(f"{path}&tokens=true&offset=2&limit=1").json()["tokens"]
    assert shown == [[first]]


def test_checkpoints_that_are_complete_are_listed_with_their_size(http: TestClient, runs: Path):
    store = CheckpointStore(runs / "t-1" / "checkpoints", keep=5)

    async def fill(folder: Path) -> dict[str, Any]:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(b"x" * 100)
        return {}

    state = RunState("grpo", 0, 4, 4, 4, {}, {}, "")
    asyncio.run(store.write(fill, state))
    (runs / "t-1" / "checkpoints" / ".tmp-5-abc").mkdir()
    (runs / "t-1" / "checkpoints" / "step-00000006").mkdir()  # damaged: it has no manifest
    [entry] = http.get("/v1/runs/t-1/checkpoints").json()["checkpoints"]
    assert (entry["name"], entry["step"], entry["phase"], entry["averaged"]) == ("step-00000004", 4, "grpo", False)
    assert entry["bytes"] > 100 and entry["files"] == 2


def test_a_log_is_read_in_parts_that_end_with_whole_lines_and_join_to_the_whole(http: TestClient, runs: Path):
    text = "".join(f"step {n} π\n" for n in range(20_000))
    (runs / "t-1" / "console.log").write_text(text)
    read, offset = "", 0
    for _ in itertools.count():
        part = http.get("/v1/runs/t-1/logs", params={"offset": offset}).json()
        assert part["offset"] == offset and part["text"].endswith("\n")
        read, offset = read + part["text"], part["next_offset"]
        if part["ended"]:
            break
    assert read == text
    end = http.get("/v1/runs/t-1/logs").json()
    assert text.endswith(end["text"]) and end["text"].startswith("step ") and end["ended"]
    assert http.get("/v1/runs/t-2/logs").json() == {"text": "", "offset": 0, "next_offset": 0, "ended": True}


def test_a_line_of_the_log_that_is_being_written_is_given_once_it_is_whole(http: TestClient, runs: Path):
    console = runs / "t-1" / "console.log"
    with driving(runs / "t-1"):
        console.write_text("one\ntw")
        first = http.get("/v1/runs/t-1/logs?offset=0").json()
        assert (first["text"], first["ended"]) == ("one\n", False)
        assert http.get(f"/v1/runs/t-1/logs?offset={first['next_offset']}").json()["text"] == ""
    last = http.get(f"/v1/runs/t-1/logs?offset={first['next_offset']}").json()
    assert (last["text"], last["ended"]) == ("tw", True), "its writer has ended"


def test_prometheus_gets_the_runs_by_state_and_the_numbers_of_those_in_progress(http: TestClient, runs: Path):
    with driving(runs / "t-1"):
        RunFile("t-1", None, Driver.here()).write(runs / "t-1")
        scaled = {"min": 0, "max": 8, "held": False, "said": ""}
        put_status(runs / "t-1", {"rollout": {"desired": 2, "serving": 1, "members": [], "autoscale": scaled}})
        text = http.get("/metrics").text
        assert http.get("/v1/runs/t-1").json()["autoscale"] == {"rollout": scaled}
    assert 'troupe_runs{state="running"} 1.0' in text and 'troupe_runs{state="stopped"} 1.0' in text
    assert 'troupe_run_step{run="t-1"} 3.0' in text
    assert 'troupe_run_workers{count="desired",role="rollout",run="t-1"} 2.0' in text
    assert 'troupe_run_workers{count="max",role="rollout",run="t-1"} 8.0' in text
    assert 'troupe_run_metric{name="loss",run="t-1"} 0.3333333' in text
    assert 'run="t-2"' not in text
    assert TOKEN not in text and str(runs) not in text


def test_readers_at_the_same_time_get_what_one_alone_gets(http: TestClient):
    alone, seen = http.get("/v1/runs").json(), []
    threads = [threading.Thread(target=lambda: seen.append(http.get("/v1/runs").json())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert seen == [alone] * 8
