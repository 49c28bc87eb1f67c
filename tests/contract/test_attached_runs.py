"""An engine in a process of its own joins a run, leaves it, joins again and is killed, while the run goes on."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from actors.errors import ConfigError, NotDone
from orchestrator.api import start
from orchestrator.cluster import control
from orchestrator.config.loading import config_of
from orchestrator.reporting.metrics import METRICS_FILE, read
from orchestrator.run import run
from orchestrator.run_handle import RunHandle
from tests.contract.test_autoscaled_runs import recipe
from tests.runs import TROUPE, end_with_the_tests, plain_environment

pytestmark = pytest.mark.timeout(600)

TOKEN = "a-token-for-the-tests"
STEPS = 3  # in each part of the run


@contextmanager
def engine() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(its address, its process) of an engine that waits."""
    process = subprocess.Popen(
        [TROUPE, "engine", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env={**plain_environment(), "TROUPE_ENGINE_TOKEN": TOKEN},
        preexec_fn=end_with_the_tests,
    )
    try:
        assert process.stdout is not None
        waits = re.fullmatch(r"an engine waits at (\S+)\n", process.stdout.readline())
        assert waits is not None
        yield waits[1], process
    finally:
        process.terminate()
        process.wait(300)


class Followed:
    """A run, with what happens in it in order."""

    def __init__(self, handle: RunHandle) -> None:
        self.handle, self._events, self._lines = handle, handle.events(), handle.metrics()

    def event(self, kind: str, **said: Any) -> dict[str, Any]:
        """The next event of that kind that says so."""
        return next(it for it in self._events if it["event"] == kind and said.items() <= it.items())

    def steps(self) -> None:
        """Until it has done so many more steps."""
        done = self.handle.resume()
        next(line for line in self._lines if line["step"] >= done + STEPS)
        self.handle.pause()

    def member(self, index: int) -> dict[str, Any]:
        """A member of the fleet that serves, once the run's status shows it as that."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            for it in self.handle.status().members.get("rollout", ()):
                if it["index"] == index and it["state"] == "serving":
                    return dict(it)
            time.sleep(0.05)
        raise AssertionError(f"the status does not show member {index}")


def longer(tree: dict[str, Any], steps: int) -> dict[str, Any]:
    phase = {**tree["phases"]["many"], "train": {"steps": steps, "batch_size": 8, "scheduler": "constant"}}
    return {
        **tree,
        "phases": {"many": phase},
        "logging": {"trackers": [], "curves": False, "completions_every": 1_000_000},
    }


def test_an_engine_from_elsewhere_joins_leaves_and_dies_and_the_run_learns_the_same(tmp_path: Path) -> None:
    tree = recipe(tmp_path, {})
    with engine() as (address, process):
        handle = start(config_of(longer(tree, 100_000), [], "test"), local=True)
        try:
            run_ = Followed(handle)
            handle.pause()
            with pytest.raises(ConfigError, match="no engine from elsewhere can be attached to reward"):
                handle.attach(address, TOKEN, role="reward")
            with pytest.raises(NotDone, match=r"did not join rollout: start failed: .*answered 401"):
                handle.attach(address, "x" * 20)
            run_.event("evicted", worker=1)
            with pytest.raises(NotDone, match=r"no engine at .* is attached to rollout; there is none"):
                handle.detach(address)
            assert handle.attach(address, TOKEN) == "rollout"
            run_.event("joined", worker=2)
            assert handle.attach(address, TOKEN) == "rollout", "it is attached, and stays as it is"
            with pytest.raises(NotDone, match=rf"no engine at http://127.0.0.1:1 .* there is http://{address}"):
                handle.detach("127.0.0.1:1")
            run_.steps()
            assert run_.member(2)["address"] == f"http://{address}"
            handle.detach(address)
            run_.event("stopped", worker=2, why="drained")
            run_.steps()
            handle.attach(address, TOKEN)
            run_.event("joined", worker=3)
            run_.steps()
            with socket.socket() as closed:
                closed.bind(("127.0.0.1", 0))
                dead = f"127.0.0.1:{closed.getsockname()[1]}"
            with pytest.raises(NotDone, match=rf"the engine at {dead} did not join rollout: .*{dead}"):
                handle.attach(dead, TOKEN)
            handle.resume()
            process.kill()
            run_.event("evicted", worker=3)
            run_.steps()
        finally:
            handle.stop()
    retried = [it["why"] for it in control.events(handle.folder) if it["event"] == "retry"]
    assert not any("does not know" in why for why in retried), retried
    up = [it["worker"] for it in control.events(handle.folder) if it["event"] == "up" and it["role"] == "rollout"]
    assert up == [0, 2, 3], "nothing takes the place of one that died"
    lines = {line["step"]: line for line in read(handle.folder / METRICS_FILE) if "loss" in line}
    alone = run(config_of(longer(tree, max(lines)), [], "test"), local=True)
    others = {line["step"]: line for line in read(alone.folder / METRICS_FILE) if "loss" in line}
    assert [lines[step]["loss"] for step in lines] == [others[step]["loss"] for step in lines]
    assert len({line["loss"] for line in lines.values()}) > 1
    tables = [pq.read_table(file) for file in sorted(handle.folder.glob("completions/*.parquet"))]
    rows = [row for table in tables for row in table.select(["worker", "version"]).to_pylist()]
    assert {row["worker"] for row in rows} == {"rollout/0", "rollout/2", "rollout/3"}
    versions = {row["version"] for row in rows if row["worker"] == "rollout/2"}
    assert len(versions) > 1, "it gets every publish"
    assert not any(TOKEN in file.read_text() for file in handle.folder.glob("*.json*") if os.access(file, os.R_OK))
