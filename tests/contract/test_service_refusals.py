"""What a client sends that the service cannot do as it stands is refused, by name, before anything is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.loading import config_of
from orchestrator.service.app import create_app
from orchestrator.service.client import Client
from orchestrator.service.settings import Settings
from tests.runs import SFT
from tests.service_client import TOKEN, client, listening, write_run


def refusal(answer: Any) -> str:
    assert answer.status_code == 422, answer.text
    return answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [({"output": "/etc/x"}, []), ({}, ["output=/etc/x"])],
    ids=["in the recipe", "in an override"],
)
def test_the_folder_of_a_run_is_the_services_to_say(tmp_path: Path, recipe: dict[str, Any], overrides: list[str]):
    http = client(tmp_path / "runs", local=True)
    for route in ("/v1/runs", "/v1/plan"):
        said = refusal(http.post(route, json={"recipe": {**SFT, **recipe}, "overrides": overrides}))
        assert said.startswith("output=/etc/x is given: in which folder a run lies is the service's to say")
    assert http.get("/v1/runs").json() == {"runs": []}


@pytest.mark.parametrize("override", ["output=/etc/x", "cluster.address=h:1", "cluster={address: h:1}"])
def test_a_resumption_cannot_move_a_run_either(tmp_path: Path, override: str):
    write_run(tmp_path, "over", events=[{"event": "finished", "time": 1010.0}])
    said = refusal(client(tmp_path, local=True).post("/v1/runs/over/resume", json={"overrides": [override]}))
    assert said.startswith(f"override {override!r}: ") and "is the service's to say" in said


def test_a_configuration_in_python_is_sent_without_what_the_service_says(tmp_path: Path):
    config = config_of({**SFT, "output": str(tmp_path / "mine")}, [], "test")
    with listening(create_app(Settings(tmp_path / "runs", token=TOKEN, at_once=0))) as url:
        submitted = Client(url, TOKEN).submit(config, [], "sent")
    assert submitted["id"] == "sent" and (tmp_path / "runs" / "sent").is_dir()
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scale": {"rollout": True}}, "body.scale.rollout"),
        ({"scale": {"rollout": "3"}}, "body.scale.rollout"),
        ({"scale": {"rollout": 3.5}}, "body.scale.rollout"),
        ({"paused": "yes"}, "body.paused"),
        ({"paused": 1}, "body.paused"),
        ({"priority": "5"}, "body.priority"),
        ({"priority": True}, "body.priority"),
    ],
)
def test_a_change_has_the_types_of_the_schema_and_nothing_is_made_of_others(
    tmp_path: Path, changes: dict[str, Any], named: str
):
    """`true` workers were 1, and "yes" was a pause."""
    write_run(tmp_path, "over", events=[{"event": "finished", "time": 1010.0}])
    assert refusal(client(tmp_path).patch("/v1/runs/over", json=changes)).startswith(named)


@pytest.mark.parametrize(
    "recipe", [{}, {"phases": {"first": {"method": "sft", "data": SFT["data"]}, "second": {"method": "sft"}}}]
)
def test_a_recipe_without_data_is_refused_with_what_is_missing(tmp_path: Path, recipe: dict[str, Any]):
    http = client(tmp_path / "runs", local=True)
    for route in ("/v1/runs", "/v1/plan"):
        said = refusal(http.post(route, json={"recipe": recipe}))
        assert said == (
            f"phases.{'second' if recipe else 'grpo'}: no data: set data.path to a file, a folder, a hub name or "
            "example:NAME, or set data.mixture"
        )
    assert http.get("/v1/runs").json() == {"runs": []}
