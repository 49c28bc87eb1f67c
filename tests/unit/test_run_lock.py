"""One driver to a run's folder: who is refused, and whose lock is taken over."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors.errors import ConfigError
from orchestrator.imports import ROOT
from orchestrator.run_lock import LOCK, driving

HOLDER = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from orchestrator.run_lock import driving
with driving(Path(sys.argv[1])):
    print('driving', flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that drives the run."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "driving\n"
        yield process
        process.kill()


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught, driving(folder):
        pass
    return str(caught.value)


def sign(folder: Path, **driver: object) -> None:
    (folder / LOCK).write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "started": 0.0} | driver))


def assert_free(folder: Path) -> None:
    with driving(folder):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert (folder / LOCK).read_text() == ""


def test_a_run_that_another_process_drives_is_refused_and_the_process_named(
    tmp_path: Path, holder: subprocess.Popen[str]
):
    said = refusal(tmp_path)
    assert f"driven by process {holder.pid} on {platform.node()}" in said and "stop it first" in said
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid, "the refused one left the lock alone"
    holder.communicate()
    assert_free(tmp_path)


def test_the_lock_of_a_process_that_was_killed_is_taken_over(tmp_path: Path, holder: subprocess.Popen[str]):
    holder.kill()
    holder.wait()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == holder.pid
    assert_free(tmp_path)


def test_one_process_drives_a_run_once(tmp_path: Path):
    with driving(tmp_path):
        assert f"process {os.getpid()}" in refusal(tmp_path)
    assert_free(tmp_path)


def test_a_process_that_has_the_pid_by_chance_does_not_hold_the_lock(tmp_path: Path):
    """Where the file system has no `flock`, what is written decides: a pid comes back, its start does not."""
    alive = psutil.Process(os.getppid())
    sign(tmp_path, pid=alive.pid, started=alive.create_time() - 1000)
    assert_free(tmp_path)
    sign(tmp_path, pid=alive.pid, started=alive.create_time())
    assert f"process {alive.pid}" in refusal(tmp_path)


def test_a_process_of_another_host_may_live_and_the_file_to_delete_is_named(tmp_path: Path):
    sign(tmp_path, host="elsewhere")
    said = refusal(tmp_path)
    assert "on elsewhere" in said and f"if it is gone, delete {tmp_path / LOCK}" in said


@pytest.mark.parametrize("left", ["", "{", "[]", '{"pid": 1}'])
def test_a_lock_that_nobody_signed_is_taken_over(tmp_path: Path, left: str):
    (tmp_path / LOCK).write_text(left)
    assert_free(tmp_path)
