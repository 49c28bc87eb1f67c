"""`troupe status` and `troupe scale` of a run that is not there any more: an answer at once, from what it left."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.cluster.control_actor import RunFile, board_name, events


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def folder(tmp_path: Path, nowhere: str) -> Path:
    """Of a run whose Ray is gone, after an evaluation in step 2."""
    folder = tmp_path / "t-1"
    folder.mkdir()
    RunFile("t-1", nowhere, board_name("t-1"), 1).write(folder)
    steps = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_reward": 0.5}]
    write(folder / "metrics.jsonl", [{"phase": "sft", **step} for step in steps])
    return folder


def write(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def said(folder: Path, *events: dict[str, str], run: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """The first line of the answer, and the metrics in its last one."""
    write(folder / "events.jsonl", [{"event": "prepared"}, *events])
    with pytest.raises(SystemExit) as ended:
        main(["status", str(folder)])
    assert not ended.value.code
    first, *_, last = run.readouterr().out.splitlines()
    return first, json.loads(last)


def test_a_finished_run_says_so_with_all_that_its_last_step_measured(folder: Path, capsys: pytest.CaptureFixture[str]):
    first, metrics = said(folder, {"event": "finished"}, run=capsys)
    assert first == "t-1: finished"
    assert metrics == {"step": 2, "phase": "sft", "loss": 2.0, "eval_reward": 0.5}


def test_a_run_that_a_signal_stopped_says_which_and_how_it_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]):
    first, _ = said(folder, {"event": "interrupted", "signal": "SIGTERM"}, run=capsys)
    assert first.startswith("t-1: stopped by SIGTERM; `troupe resume ")


def test_a_run_that_was_killed_after_it_was_resumed_is_not_called_finished(
    folder: Path, nowhere: str, capsys: pytest.CaptureFixture[str]
):
    first, metrics = said(folder, {"event": "finished"}, {"event": "prepared"}, run=capsys)
    assert first.startswith("t-1: not running: it ended or was killed")
    assert nowhere in first
    assert metrics["loss"] == 2.0


def test_a_line_that_a_kill_cut_off_is_passed_over(folder: Path):
    (folder / "events.jsonl").write_text('{"event": "prepa\n{"event": "finished"}\n{"ev')
    assert events(folder) == [{"event": "finished"}]


def test_a_run_in_one_process_shows_its_metrics_too(folder: Path, capsys: pytest.CaptureFixture[str]):
    RunFile("t-1", None, board_name("t-1"), 77).write(folder)
    first, metrics = said(folder, run=capsys)
    assert "in one process (--local), 77" in first
    assert metrics["step"] == 2


def test_a_run_that_never_started_its_roles_is_a_run_nevertheless(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "run.json").unlink()
    (folder / "config.json").write_text("{}")
    first, _ = said(folder, run=capsys)
    assert "its roles were never started" in first


def test_scaling_a_run_that_is_gone_fails_at_once_with_the_reason(folder: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["scale", str(folder), "rollout=2"])
    assert ended.value.code == 1
    assert "run t-1 is not running: it ended or was killed" in capsys.readouterr().err
