"""What workers of a run log is JSON lines in Ray's files, unless the run says otherwise; the run's console is not."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.runs import Run

pytestmark = pytest.mark.timeout(600)

REWARD = """
import logging, warnings

def longer(completions, **columns):
    logging.getLogger("mine").warning("a record\\nof two lines")
    logging.getLogger("mine").info("not heard")
    warnings.warn("a warning of Python's")
    print("printed by the reward")
    return [float(len(text)) for text in completions]
"""
SMALL: dict[str, Any] = {
    "rewards": [{"fn": "reward.py:longer"}],
    "train": {"steps": 1},
    "roles": {"policy": {"cpus": 0.5}, "rollout": {"engine": "hf", "cpus": 0.1}},
}


def ran(where: Path, **logging: str) -> tuple[str, list[str], list[str]]:
    """(console, lines of the workers' files of errors, of their other output) of a run with a Ray of its own."""
    (where / "reward.py").write_text(REWARD)
    with tempfile.TemporaryDirectory(prefix="tr-", dir="/tmp") as ray:  # a short path, for sockets
        run = Run(where, {**SMALL, "logging": logging}, environment={"RAY_TMPDIR": ray})
        run.wait()
        files = [*Path(ray).glob("troupe-*/ray/session_2*/logs/worker-*")]
        lines = {
            kind: [line for file in files if file.suffix == kind for line in file.read_text().splitlines()]
            for kind in (".err", ".out")
        }
    assert "printed by the reward" in lines[".out"]
    assert "a record" not in run.output.read_text() and "run        " in run.output.read_text()
    return run.output.read_text(), lines[".err"], lines[".out"]


def test_records_of_workers_are_json_lines_with_the_ids_of_job_and_actor_and_the_console_is_for_people(tmp_path: Path):
    console, errors, _ = ran(tmp_path)
    records = [json.loads(line) for line in errors if line.startswith("{")]
    [mine, *_] = [record for record in records if record["message"] == "a record\nof two lines"]
    assert mine["levelname"] == "WARNING" and mine["filename"] == "reward.py"
    assert len(mine["job_id"]) == 8 and len(mine["actor_id"]) == 32
    assert mine["actor_name"].startswith("troupe/t-")
    assert any("UserWarning: a warning of Python's" in record["message"] for record in records)
    assert not any("not heard" in line for line in errors), "libraries are not heard more than before"
    loose = [line for line in errors if not line.startswith("{") and not line.startswith((":job_id:", ":actor_name:"))]
    assert not any("record" in line or "warning of Python" in line for line in loose)
    assert not any(line.startswith("{") for line in console.splitlines())


def test_records_of_workers_are_text_where_the_run_says_so(tmp_path: Path):
    _, errors, _ = ran(tmp_path, ray_logs="text")
    assert "a record" in errors and "of two lines" in errors
    assert not any(line.startswith("{") for line in errors)
