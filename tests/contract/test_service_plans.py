"""What the service says of methods and of recipes that nobody has submitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.contract.service_stage import http, runs
from tests.service_client import client

__all__ = ["http", "runs"]  # fixtures


def test_the_methods_are_those_of_the_command_line_with_their_options(http: TestClient):
    methods = {method["name"]: method for method in http.get("/v1/methods").json()["methods"]}
    assert methods["dpo"]["data"] == "pairs" and methods["dpo"]["roles"] == ["policy", "reference"]
    [beta] = [option for option in methods["dpo"]["options"] if option["name"] == "beta"]
    assert beta == {"name": "beta", "type": "float > 0", "default": "0.1"}
    assert "grpo" in methods and "policy.update" in methods["grpo"]["stages"]


def test_a_plan_says_what_would_be_launched_and_what_would_be_refused(http: TestClient):
    body = {"recipe": "grpo_arithmetic", "overrides": ["roles.rollout.engine=hf"]}
    plan = http.post("/v1/plan", json=body).json()
    assert plan["accepted"] and plan["problems"] == []
    assert {role["name"] for role in plan["roles"]} >= {"policy", "rollout", "reward"}
    assert "nothing would be refused" in plan["report"]
    refused = http.post(
        "/v1/plan", json={"recipe": {"method": "dpo", "train": {"steps": 1}, "data": {"path": "no.jsonl"}}}
    )
    assert refused.status_code == 422
    assert "no.jsonl" in refused.json()["error"]["message"] and "/tmp" not in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("recipe", "part"),
    [
        ("grpo_arithmetik", "did you mean"),
        ("/etc/passwd", "recipe"),
        ("../../etc/passwd", "recipe"),
        ({"methodd": "dpo"}, "methodd"),
        ({"method": "dpo", "options": {"beta": -1}, "train": {"steps": 1}}, "beta"),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_with_the_key(http: TestClient, recipe: Any, part: str):
    answer = http.post("/v1/plan", json={"recipe": recipe})
    assert answer.status_code == 422
    assert part in answer.json()["error"]["message"] and "root:" not in answer.text


BASE: dict[str, Any] = {"method": "grpo", "rewards": [{"fn": "exact_match"}], "train": {"steps": 1}}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "mine.py:method"},
        {"rewards": [{"fn": "mine.py:reward"}]},
        {"rewards": [{"fn": "os:system"}]},
        {"rewards": [{"fn": "subprocess:getoutput", "weight": 0.0}]},
        {"model": {"trust_remote_code": True}},
        {"episode": {"tools": ["shutil:rmtree"]}},
        {"episode": {"environment": " os : system"}},
        {"roles": {"rollout": {"engine": "package.module:Class"}}},
        {"roles": {"rollout": {"engine_options": {"worker_cls": "package.module.Class"}}}},
        {"roles": {"rollout": {"engine_options": {"trust_remote_code": True}}}},
        {"roles": {"rollout": {"engine_options": {"a": {"b": ["text"]}}}}},
        {"rewards": [{"url": "http://1.1.1.1/", "headers_from_env": {"X": "TROUPE_TOKEN"}}]},
    ],
)
def test_a_recipe_that_runs_code_is_refused_before_anything_of_it_is_loaded(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    http = client(runs)
    for recipe, overrides in (
        ({**BASE, **changes}, []),
        (BASE, [f"{key}={json.dumps(value)}" for key, value in changes.items()]),
    ):
        answer = http.post("/v1/plan", json={"recipe": recipe, "overrides": overrides})
        assert answer.status_code == 403, answer.text
        assert "--allow-code" in answer.json()["error"]["message"]
    assert not (tmp_path / "ran").exists()


def test_a_recipe_that_grows_without_end_is_refused(http: TestClient):
    names = "abcdefghi"
    lists = [f"&{name} [{','.join([f'*{names[n - 1]}' if n else 'x'] * 9)}]" for n, name in enumerate(names)]
    bomb = f"rewards=[{', '.join(lists)}]"  # 9^9 values in 300 characters
    answer = http.post("/v1/plan", json={"recipe": BASE, "overrides": [bomb]})
    assert answer.status_code == 422 and "more than" in answer.json()["error"]["message"]
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    assert http.post("/v1/plan", json={"recipe": {"rewards": deep}}).status_code == 422
