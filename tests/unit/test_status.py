"""`troupe status` and `troupe scale` of a run that is gone, or does not answer: told at once, from what it left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError, RunError
from orchestrator.api import attach
from orchestrator.cli import main
from orchestrator.cluster.control import Desired, RunFile, ask, events, parse_scale, put_status, take_requests
from orchestrator.cluster.run_lock import Driver, driving
from orchestrator.service.run_folders import RunFolders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run on Ray, after an evaluation in step 2."""
    folder = tmp_path / "t-1"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    RunFile("t-1", "10.0.0.1:6379", Driver.here()).write(folder)
    steps = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_reward": 0.5}]
    write(folder / "metrics.jsonl", [{"phase": "sft", **step} for step in steps])
    return folder


def write(file: Path, lines: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def said(folder: Path, *events: dict[str, Any], run: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """The first line of the answer, and the metrics that a program is given."""
    write(folder / "events.jsonl", [{"event": "prepared"}, *events])
    with pytest.raises(SystemExit) as ended:
        main(["status", str(folder)])
    assert not ended.value.code
    first, *_, last = run.readouterr().out.splitlines()
    with pytest.raises(SystemExit):
        main(["status", str(folder), "--json"])
    metrics = json.loads(run.readouterr().out)["metrics"]
    assert last.startswith(f"  step {metrics['step']} {metrics['phase']}  loss {metrics['loss']:g}")
    return first, metrics


def test_the_status_of_a_finished_run_has_all_metrics_of_its_last_step(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    first, metrics = said(folder, {"event": "finished"}, run=capsys)
    assert first == "t-1: finished"
    assert metrics == {"step": 2, "phase": "sft", "loss": 2.0, "eval_reward": 0.5}


def test_the_status_of_a_run_stopped_by_a_signal_names_the_signal_and_how_to_continue(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    first, _ = said(folder, {"event": "interrupted", "signal": "SIGTERM"}, run=capsys)
    assert first.startswith("t-1: stopped by SIGTERM; `troupe resume ")


def test_a_run_that_was_killed_after_it_was_resumed_is_not_called_finished(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    first, metrics = said(folder, {"event": "finished"}, {"event": "prepared"}, run=capsys)
    assert first == "t-1: failed: was killed, or its machine was lost"
    assert metrics["loss"] == 2.0


def test_a_run_whose_driver_puts_up_no_status_any_more_is_not_called_running(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    with driving(folder):
        put_status(folder, {})
        assert said(folder, run=capsys)[0] == "t-1: running"
        put_up = json.loads((folder / "status.json").read_text())
        (folder / "status.json").write_text(json.dumps({**put_up, "time": put_up["time"] - 100}))
        first, _ = said(folder, run=capsys)
    assert first.startswith("t-1: silent: not answering: its driver has written nothing to ")


def test_a_running_job_says_how_many_workers_it_has_and_where_they_are(
    folder: Path, capsys: pytest.CaptureFixture[str]
):
    member = {"index": 0, "state": "serving", "calls": 3, "node": "a", "pid": 7, "version": 4}
    put_status(folder, {"rollout": {"desired": 2, "serving": 1, "members": [member]}})
    write(folder / "events.jsonl", [{"event": "prepared"}])
    with driving(folder):
        seen = attach(folder).status()
    assert (seen.kind, seen.workers) == ("running", {"rollout": {"desired": 2, "serving": 1}})
    assert (seen.members, seen.autoscale) == ({"rollout": [member]}, {})


def test_a_running_job_says_where_its_ranks_are_and_what_they_do(folder: Path, capsys: pytest.CaptureFixture[str]):
    ranks = [
        {"index": 0, "node": "a", "pid": 7, "state": "working", "verb": "update", "seconds": 2.5},
        {"index": 1, "node": "b", "pid": 8, "state": "idle"},
    ]
    put_status(folder, {}, ranks={"policy": ranks})
    write(folder / "events.jsonl", [{"event": "prepared"}])
    with driving(folder):
        assert attach(folder).status().ranks == {"policy": ranks}
        assert RunFolders(folder.parent).detail("t-1").ranks == {"policy": ranks}
        with pytest.raises(SystemExit):
            main(["status", str(folder)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "policy" in line]
    assert lines == [
        "  policy: 2 rank(s)",
        "    policy/0 working: node a, pid 7, verb update, seconds 2.5",
        "    policy/1 idle: node b, pid 8",
    ]
    assert attach(folder).status().ranks == {}, "of a run that nobody drives any more"


@pytest.mark.parametrize("held", [False, True])
def test_a_role_that_scales_by_itself_says_between_what_and_why_and_whether_it_is_held(
    folder: Path, capsys: pytest.CaptureFixture[str], held: bool
):
    scaled = {"min": 0, "max": 8, "held": held, "said": "3 -> 4: training waited"}
    put_status(folder, {"rollout": {"desired": 4, "serving": 3, "members": [], "autoscale": scaled}})
    write(folder / "events.jsonl", [{"event": "prepared"}])
    with driving(folder):
        assert attach(folder).status().autoscale == {"rollout": scaled}
        with pytest.raises(SystemExit):
            main(["status", str(folder)])
    line = next(line for line in capsys.readouterr().out.splitlines() if "by load" in line)
    assert line.startswith("  rollout: 3 of 4 worker(s) serve; 0 to 8 by load")
    assert line.endswith("; last decision 3 -> 4: training waited")
    assert (f", held until `troupe scale {folder} rollout=auto`" in line) is held


def test_a_number_that_was_asked_for_is_withdrawn_by_auto_and_only_where_the_run_scales_by_itself(folder: Path):
    RunFile("t-1", "10.0.0.1:6379", Driver.here(), ("rollout", "reward"), autoscaled=("rollout",)).write(folder)
    assert [parse_scale(text) for text in ("rollout=auto", "rollout=3")] == [("rollout", "auto"), ("rollout", 3)]
    with pytest.raises(ConfigError, match="or ROLE=auto"):
        parse_scale("rollout=all")
    desired = Desired(("rollout", "reward"), ("rollout",))
    for role, count in (("rollout", 3), ("reward", 2), ("rollout", "auto")):
        ask(folder, "scale", role, count)
    for request in take_requests(folder):
        desired.add(request)
    assert desired.workers == {"reward": 2}
    for refuses in (lambda: desired.add(["scale", "reward", "auto"]), lambda: ask(folder, "scale", "reward", "auto")):
        with pytest.raises(ConfigError, match=r"reward=auto: this run was started without roles\.reward\.autoscale"):
            refuses()


def test_requests_are_taken_once_in_their_order_and_what_is_none_is_refused(folder: Path):
    RunFile("t-1", "10.0.0.1:6379", Driver.here(), ("rollout",)).write(folder)
    for count in (3, 1):
        ask(folder, "scale", "rollout", count)
    ask(folder, "pause", True, "a")
    (folder / "requests" / "9.json").write_text("{")
    (folder / "requests" / "9z.json").write_text('["__init__"]')
    taken, desired = list(take_requests(folder)), Desired(("rollout",))
    assert taken == [["scale", "rollout", 3], ["scale", "rollout", 1], ["pause", True, "a"], "{", ["__init__"]]
    assert list(take_requests(folder)) == []
    for request in taken[:3]:
        desired.add(request)
    assert (desired.workers, desired.pauses) == ({"rollout": 1}, {"a": True})
    for foreign in (*taken[3:], ["scale", "rollout", -1], ["stop", 1]):
        with pytest.raises(ConfigError, match="is no request to a run"):
            desired.add(foreign)
    for refuses in (lambda: desired.add(["scale", "policy", 2]), lambda: ask(folder, "scale", "policy", 2)):
        with pytest.raises(ConfigError, match=r"no role policy whose workers come and go; it can scale rollout"):
            refuses()


def test_an_engine_is_attached_only_where_it_can_join_at_an_address_with_a_token(folder: Path):
    RunFile("t-1", None, Driver.here(), ("rollout",), attachable=("rollout",)).write(folder)
    ask(folder, "attach", "rollout", "http://h:1", "t" * 16, "first")
    ask(folder, "detach", "rollout", "http://h:1", "second")
    desired = Desired(("rollout",), attachable=("rollout",))
    for request in take_requests(folder):
        desired.add(request)
    assert [(each.role, each.address, each.token, each.ticket) for each in desired.engines] == [
        ("rollout", "http://h:1", "t" * 16, "first"),
        ("rollout", "http://h:1", None, "second"),
    ]
    assert "tttt" not in repr(desired)
    for asked, why in (
        (("reward", "http://h:1", "t" * 16), "can be attached to reward"),
        (("rollout", "h:1", "t" * 16), "write http://h:1"),
        (("rollout", "file:///etc", "t" * 16), "is no address"),
        (("rollout", "http://h:1", "t\n" * 16), "16 to 200 letters"),
    ):
        for refuses in (
            lambda asked=asked: ask(folder, "attach", *asked, "third"),
            lambda asked=asked: desired.add(["attach", *asked, "third"]),
        ):
            with pytest.raises(ConfigError, match=why):
                refuses()


def test_an_incomplete_last_line_is_skipped(folder: Path):
    (folder / "events.jsonl").write_text('{"event": "prepa\n{"event": "finished"}\n{"ev')
    assert events(folder) == [{"event": "finished"}]


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ((), "running"),
        (("paused",), "paused"),
        (("paused", "unpaused"), "running"),
        (("paused", "prepared"), "running"),
    ],
)
def test_a_run_in_one_process_shows_how_it_stands_and_its_metrics(
    folder: Path, capsys: pytest.CaptureFixture[str], events: tuple[str, ...], state: str
):
    RunFile("t-1", None, Driver.here()).write(folder)
    with driving(folder):
        first, metrics = said(folder, *({"event": event, "step": 2} for event in events), run=capsys)
    assert first == f"t-1: {state}"
    assert metrics["step"] == 2


def test_a_run_whose_driver_has_not_started_its_roles_yet_is_starting(folder: Path, capsys: pytest.CaptureFixture[str]):
    earlier = replace(Driver.here(), started=0.0)  # the same process id, in a container that was started again
    RunFile("t-1", "10.0.0.1:6379", earlier).write(folder)
    with driving(folder):
        first, _ = said(folder, run=capsys)
    assert first == "t-1: starting"


def test_a_run_that_never_started_its_roles_has_a_status(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "run.json").unlink()
    first, _ = said(folder, run=capsys)
    assert first == "t-1: failed: ended before its roles were started"


def test_a_run_that_failed_says_why_in_the_words_of_its_driver(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "console.log").write_text("a warning\ntroupe: refused: no room within 30:\n  policy: 3 CPU\n  2 free\n\n")
    first, _ = said(folder, run=capsys)
    assert first == "t-1: failed: no room within 30: policy: 3 CPU; 2 free"
    first, _ = said(folder, {"event": "failed", "error": "policy rank 0 is gone"}, run=capsys)
    assert first == "t-1: failed: policy rank 0 is gone", "also if nobody kept what it printed"
    first, _ = said(folder, {"event": "failed", "error": "gone"}, {"event": "prepared"}, run=capsys)
    assert "gone" not in first, "that was before it was resumed"


def test_scaling_a_run_that_is_gone_fails_at_once_with_the_reason(folder: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["scale", str(folder), "rollout=2"])
    assert ended.value.code == 1
    assert "troupe: failed: run t-1 has ended: was killed, or its machine was lost" in capsys.readouterr().err


def test_a_folder_that_is_no_runs_is_refused_by_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for command in (["status"], ["pause"], ["checkpoint"], ["stop"]):
        with pytest.raises(SystemExit) as ended:
            main([*command, str(tmp_path)])
        assert ended.value.code == 2
        assert f"{tmp_path} is not a run's folder" in capsys.readouterr().err


def test_a_checkpoint_of_a_run_that_is_paused_before_its_first_step_is_refused(folder: Path):
    RunFile("t-1", None, Driver.here()).write(folder)
    write(folder / "events.jsonl", [{"event": "prepared"}, {"event": "paused", "step": 0, "asked": ["other"]}])
    with driving(folder), pytest.raises(RunError, match="is paused before its first step: there is nothing to save"):
        attach(folder).checkpoint(timeout_s=20)
