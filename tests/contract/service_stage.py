"""A folder of runs that are over, and a client of the service over it."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.service_client import client, write_run

FINISHED = {"event": "finished", "time": 1010.0}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs that are over, one in progress is added by tests; beside their folder, one that is none of theirs."""
    runs = tmp_path / "runs"
    steps = [{"step": step, "loss": 1.0 / step, "reward": float("nan")} for step in (1, 2, 3)]
    write_run(runs, "t-1", events=[{"event": "checkpoint", "time": 1005.0, "step": 2}, FINISHED], metrics=steps)
    write_run(runs, "t-2", events=[{"event": "interrupted", "signal": "SIGTERM", "time": 2000.0}])
    write_run(tmp_path, "secret", events=[FINISHED])
    (runs / "link").symlink_to(tmp_path / "secret")
    (runs / "a").mkdir()
    return runs


@pytest.fixture
def http(runs: Path) -> TestClient:
    return client(runs)
