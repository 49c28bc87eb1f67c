"""`troupe ls`, `logs`, `metrics`, `samples` and `serve`, over folders of runs that a test writes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actors.errors import ConfigError
from orchestrator.cli import main
from orchestrator.config.loading import SUBMITTED
from orchestrator.queueing.entry import Entry, Stage, write
from orchestrator.reporting.token_text import NEGATIVE, POSITIVE, coloured, strengths
from orchestrator.service.run_folders import RunFolders
from orchestrator.service.service_folder import announce, found_service, token_of
from tests.runs import TROUPE, plain_environment
from tests.service_client import write_run, write_samples, write_tokens


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    steps = [{"step": step, "loss": 1.0 / step, "reward": 0.5} for step in (1, 2)]
    folder = write_run(runs, "t-1", events=[{"event": "finished", "time": 1010.0}], metrics=steps)
    write_samples(folder, 2, [0.5, 1.0, 0.0])
    return runs


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code
    shown = capsys.readouterr()
    return shown.out if code == 0 else shown.err


def test_runs_are_listed_as_a_table_and_as_json(runs: Path, capsys: pytest.CaptureFixture[str]):
    table = said(capsys, "ls", "--runs", str(runs))
    assert [word for word in table.splitlines()[1].split() if word in ("t-1", "finished", "grpo", "2")] == [
        "t-1",
        "finished",
        "2",
        "grpo",
    ]
    [run] = json.loads(said(capsys, "ls", "--runs", str(runs), "--json"))
    assert (run["id"], run["state"], run["step"]) == ("t-1", "finished", 2)


def test_a_run_that_was_submitted_elsewhere_and_has_said_nothing_yet_is_starting(
    runs: Path, capsys: pytest.CaptureFixture[str]
):
    folder = runs / "new"
    folder.mkdir()
    (folder / SUBMITTED).write_text(json.dumps({"phases": {"sft": {"method": "sft"}}}))
    write(folder, Entry(3, time.time(), (), Stage.STARTED, started=time.time()))
    [new] = [run for run in RunFolders(runs).summaries() if run.id == "new"]
    assert (new.state, new.methods) == ("starting", ["sft"])
    assert "new: starting" in said(capsys, "status", str(folder))
    write(folder, Entry(3, time.time(), (), reason="waits for 3 CPU: 1 of 4 are free"))
    assert "new: queued: waits for 3 CPU" in said(capsys, "status", str(folder))
    listed = said(capsys, "ls", "--runs", str(runs))
    assert "waits for 3 CPU: 1 of 4 are free" in listed.splitlines()[1]
    [new, _] = json.loads(said(capsys, "ls", "--runs", str(runs), "--json"))
    assert (new["state"], new["priority"], new["failures"]) == ("queued", 3, 0)


def test_what_a_run_measured_and_sampled_is_printed(runs: Path, capsys: pytest.CaptureFixture[str]):
    run = str(runs / "t-1")
    assert said(capsys, "metrics", run, "--name", "loss", "--limit", "1") == "     2 grpo  loss 0.5\n"
    first, second = map(json.loads, said(capsys, "metrics", run, "--json").splitlines())
    assert (first["step"], second["reward"]) == (1, 0.5)
    assert said(capsys, "samples", run, "--best", "--limit", "1") == "1.0  '1+1=' '1'\n"
    worst = json.loads(said(capsys, "samples", run, "--worst", "--limit", "1", "--json"))
    assert (worst["reward"], worst["completion"]) == (0.0, "2")
    assert "is not a run's folder" in said(capsys, "metrics", str(runs), code=2)


def test_tokens_are_printed_with_colours_that_follow_their_values(runs: Path, capsys: pytest.CaptureFixture[str]):
    run = runs / "t-1"
    nan = float("nan")
    good = {"pieces": ["1+1=", "2\x1b[2J"], "mask": [False, True], "advantages": [nan, 1.0]}
    bad = {"pieces": ["1+1=", "", "漢"], "mask": [False, True, True], "advantages": [nan, -2.0, -1.0]}
    write_tokens(run, 2, {1: [good], 2: [bad]})
    plain = said(capsys, "samples", str(run), "--tokens", "advantages")
    assert "1+1=2·[2J" in plain and "\x1b" not in plain, "neither colours nor what a model wrote steer a pipe"
    assert "1+1=漢" in plain and "its tokens are not kept" in plain
    row = json.loads(said(capsys, "samples", str(run), "--best", "--limit", "1", "--tokens", "mask", "--json"))
    assert (row["reward"], row["tokens"][0]["values"]) == (1.0, {"advantages": [None, 1.0]})
    assert "there are mask, advantages" in said(capsys, "samples", str(run), "--tokens", "other", code=2)
    assert strengths([good | {"values": {"a": [None, 1.0]}}, bad | {"values": {"a": [None, -2.0, -1.0]}}], "a") == [
        [None, 0.5],
        [None, -1.0, -0.5],
    ]
    [(_, _, none), (_, _, most), (_, _, half)] = coloured(bad, [None, -1.0, -0.5], "advantages")
    assert none is None and most == NEGATIVE and half == tuple(part // 2 for part in NEGATIVE)
    assert [bg for _, _, bg in coloured(good, [None, 1.0], "advantages")] == [None, POSITIVE]


def test_a_log_that_is_followed_is_printed_to_its_end(runs: Path, capsys: pytest.CaptureFixture[str]):
    (runs / "t-1" / "console.log").write_text("one\ntwo\n")
    assert said(capsys, "logs", str(runs / "t-1")) == "one\ntwo\n"
    assert said(capsys, "logs", "-f", str(runs / "t-1")) == "one\ntwo\n"


def test_a_service_that_everybody_could_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    refused = said(capsys, "serve", "--runs", str(tmp_path), "--host", "0.0.0.0", "--no-token", code=2)
    assert "can be reached from other machines, and there is no token" in refused


def test_the_token_is_made_once_and_readable_by_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TROUPE_TOKEN", raising=False)
    monkeypatch.delenv("TROUPE_URL", raising=False)
    token = token_of(tmp_path, None)
    assert len(token) >= 32 and token_of(tmp_path, None) == token
    assert (tmp_path / ".service").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / ".service" / "token").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="no service is known"):
        found_service(tmp_path, None)
    announce(tmp_path, "http://127.0.0.1:1")
    assert found_service(tmp_path, None) == ("http://127.0.0.1:1", token)
    assert found_service(tmp_path, "http://elsewhere/") == ("http://elsewhere", token)
    monkeypatch.setenv("TROUPE_TOKEN", "another-token-0123456789")
    assert token_of(tmp_path, None) == "another-token-0123456789"
    monkeypatch.delenv("TROUPE_TOKEN")
    (tmp_path / ".service").chmod(0o755)
    with pytest.raises(ConfigError, match="others can open it"):
        token_of(tmp_path, None)


COPIED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from orchestrator.console_copy import copy_output
copy_output(Path({file!r}))
print("printed")
os.write(2, b"written by a library\\n")
for child in Path("/proc/self/task").glob("*/children"):
    for pid in child.read_text().split():
        os.kill(int(pid), signal.SIGTERM)  # as who stops a job does
print("after the signal")
raise ValueError("at the end")
"""


def test_what_a_process_prints_is_in_the_file_and_where_it_went_before_to_its_last_line(tmp_path: Path):
    file, root = tmp_path / "console.log", str(Path(__file__).parents[2])
    file.write_text("an earlier attempt\n")
    code = COPIED.format(root=root, file=str(file))
    with (tmp_path / "out").open("wb") as out:  # a file can seek, a pipe cannot
        done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=out, timeout=60)
    assert done.returncode == 1
    deadline = time.monotonic() + 30
    while not file.read_text().endswith("ValueError: at the end\n"):
        assert time.monotonic() < deadline, file.read_text()
        time.sleep(0.01)
    shown = (tmp_path / "out").read_text()
    assert file.read_text() == "an earlier attempt\n" + shown
    for part in ("printed\n", "written by a library\n", "after the signal\n"):
        assert part in shown


def test_a_machine_without_the_folder_of_a_services_run_is_named_with_what_to_do(tmp_path: Path):
    done = subprocess.run(
        [TROUPE, "run", "sft_arithmetic", "--log", str(tmp_path / "no" / "such.log")],
        capture_output=True, text=True, timeout=60, env=plain_environment(), cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and f"there is no folder {tmp_path / 'no'} on {platform.node()}" in done.stderr
    assert "a file system that they share" in done.stderr
    assert os.listdir(tmp_path) == []
