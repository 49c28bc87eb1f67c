"""Ids of runs are ASCII: what is none is refused before a folder is made, wherever one is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.errors import ConfigError
from orchestrator.config.loading import config_of
from orchestrator.run import run
from tests.runs import SFT
from tests.service_client import AUTHORIZED, client, write_run

GIVEN = ("漢" * 140, "größe", "x" * 141, "e\u0301", "٣", "-x", "a\n")


@pytest.mark.parametrize("given", GIVEN)
def test_a_name_that_is_no_id_is_refused_with_what_is_allowed(tmp_path: Path, given: str):
    answer = client(tmp_path, local=True).post("/v1/runs", json={"name": given, "recipe": SFT})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (422, "invalid_request", "body.name")
    assert "at most 140 of the letters a to z and A to Z, digits and _ . + -" in error["message"]
    assert repr(given)[:-1] in error["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", GIVEN)
def test_the_command_refuses_the_same_ids(tmp_path: Path, given: str):
    config = config_of(SFT, [f"output={tmp_path / 'runs'}"], "the recipe")
    with pytest.raises(ConfigError, match="--id: a run's id is the name of its folder"):
        run(config, local=True, run_id=given)


@pytest.mark.parametrize("given", ["größe", "漢" * 40, "x" * 101])
def test_a_name_of_a_run_of_which_ids_are_made_is_held_to_the_same(given: str):
    with pytest.raises(ConfigError, match="it must be a valid folder name"):
        config_of(SFT, [f"name={given}"], "the recipe")


def test_the_longest_id_is_one_and_a_folder_with_another_name_is_no_run(tmp_path: Path):
    http = client(tmp_path, local=True)
    write_run(tmp_path, "x" * 140)
    write_run(tmp_path, "größe")
    assert [run["id"] for run in http.get("/v1/runs").json()["runs"]] == ["x" * 140]
    assert http.get(f"/v1/runs/{'x' * 140}").status_code == 200
    refused = http.get("/v1/runs/größe")
    assert refused.status_code == 422 and "a run's id is the name" in refused.json()["error"]["message"]
    schema = http.get("/openapi.json", headers=AUTHORIZED).json()
    assert r"A-Za-z0-9_][A-Za-z0-9_.+-]{0,139}$" in str(schema["components"]["schemas"]["Submission"])
