"""No route leads out of the folder of runs, whatever it is asked to do and however the path is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from orchestrator.queueing import entry as entries
from orchestrator.queueing.entry import Entry, Stage
from tests.runs import SFT
from tests.service_client import client, write_run

IDS = ("..", "../outside", "..%2Foutside", "%2e%2e%2foutside", "%252e%252e%252foutside", "link", ".service", "a%00b")
ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("PATCH", "/v1/runs/{id}", {"paused": True}),
    ("PATCH", "/v1/runs/{id}", {"priority": 3}),
    ("PATCH", "/v1/runs/{id}", {"scale": {"rollout": 2}}),
    ("POST", "/v1/runs/{id}/checkpoint", None),
    ("POST", "/v1/runs/{id}/stop", None),
    ("POST", "/v1/runs/{id}/stop?now=true", None),
    ("POST", "/v1/runs/{id}/resume", {"overrides": ["seed=1"]}),
)


@pytest.fixture
def http(tmp_path: Path) -> Iterator[TestClient]:
    """Of a folder of runs, beside which is a run that could be controlled, and in which there is a link to that."""
    (runs := tmp_path / "runs").mkdir()
    outside = write_run(tmp_path, "outside", events=[{"event": "finished", "time": 1.0}])
    entries.write(outside, Entry(0, 1.0, (), Stage.OVER))
    (runs / "link").symlink_to(outside)
    (runs / ".service").mkdir()
    (runs / ".service" / "config.json").write_text("{}")
    before = contents(tmp_path)
    yield client(runs, local=True)
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("run", IDS)
@pytest.mark.parametrize(("method", "route", "body"), ROUTES)
def test_a_run_outside_is_not_controlled(http: TestClient, run: str, method: str, route: str, body: Any):
    answer = http.request(method, route.format(id=run), json=body)
    assert answer.status_code in (404, 405, 422), answer.text
    assert "outside" not in answer.json()["error"]["message"] or run in answer.json()["error"]["message"]


@pytest.mark.parametrize("run", [*IDS, "/etc", "../outside/rollout", "link/rollout"])
def test_a_run_outside_is_not_chatted_with(http: TestClient, run: str):
    asked = {"model": run, "messages": [{"role": "user", "content": "1"}]}
    answer = http.post("/v1/chat/completions", json=asked)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found"), answer.text


@pytest.mark.parametrize("name", [*IDS, "/etc", "outside/../link"])
def test_no_run_is_submitted_outside(http: TestClient, name: str):
    answer = http.post("/v1/runs", json={"name": name, "recipe": SFT})
    assert answer.status_code == (409 if name == "link" else 422), answer.text


def test_the_run_outside_could_be_controlled_if_it_were_inside(tmp_path: Path):
    """What the other tests find refused is refused for its place."""
    inside = write_run(tmp_path, "inside", events=[{"event": "finished", "time": 1.0}])
    entries.write(inside, Entry(0, 1.0, (), Stage.OVER))
    assert client(tmp_path, local=True).patch("/v1/runs/inside", json={"priority": 3}).status_code == 200
    assert json.loads((inside / "queue.json").read_text())["priority"] == 3
