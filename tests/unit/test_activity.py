"""Which stages are at work: what the driver says, and what `troupe status` makes of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from orchestrator.activity import PUBLISH, Activity, drawn
from orchestrator.batches.row_table import RowTable
from orchestrator.cli import main
from orchestrator.cluster.control import RunFile, put_status
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.run_lock import Driver, driving
from orchestrator.methods import build
from orchestrator.pipeline import Verb
from tests.local_executor import local_executor


def test_a_stage_is_at_work_for_the_share_of_the_time_in_which_a_call_of_it_was_under_way():
    seconds = [0.0]
    activity = Activity(lambda: seconds[0])
    policy = next(stage for stage in build("grpo", {}) if stage.verb is Verb.UPDATE)
    with activity.working(policy), activity.working(PUBLISH):
        seconds[0] = 1.0
        with activity.working(policy):
            seconds[0] = 2.0
    seconds[0] = 8.0
    both = [{"stage": name, "writes": [], "calls": 0, "share": 0.25} for name in ("policy.update", PUBLISH)]
    assert activity.observed() == both, "calls at the same time count once"
    with activity.working(policy):
        seconds[0] = 9.0
        assert activity.observed() == [{"stage": "policy.update", "writes": [], "calls": 1, "share": 1.0}]
    seconds[0] = 10.0
    assert activity.observed() == [], "what has ended before the last look is told no more"


def test_the_pipeline_is_drawn_as_its_options_make_it_with_what_may_run_ahead():
    found = drawn({"a": build("grpo", {"beta": 0.1, "updates_per_batch": 2}), "b": build("sft", {})})
    names = [(node["stage"], *node["writes"], node["per"], node["ahead"]) for node in found["a"]]
    assert names[:2] == [("rollout.generate", "group", True), ("reward.score", "group", True)]
    assert ("reference.infer", "ref_logps", "batch", True) in names
    assert ("policy.infer", "old_logps", "batch", False) in names
    assert names[-2:] == [("policy.update", "batch", False), ("publish", "batch", False)]
    assert "reference.infer" not in [node["stage"] for node in drawn({"a": build("grpo", {"beta": 0.0})})["a"]]
    assert found["b"][-1]["stage"] == "policy.update", "nothing samples from the weights"


def test_the_executor_names_the_stages_that_it_carries_out_while_it_does():
    pipeline, seen = build("grpo", {"beta": 0.0}), list[str]()
    executor = local_executor(pipeline, {}, token_budget=8)

    def watching(rows: RowTable, **options: Any) -> dict[str, Any]:
        seen.extend(each["stage"] for each in executor.activity.observed() if each["calls"])
        return {"advantages": rows["reward"]}

    stages = [replace(stage, call=watching) for stage in pipeline.learn if stage.verb is Verb.CREDIT]
    rows = Batch.build([2, 2], group=np.zeros(2, np.int64), reward=np.array([0.0, 1.0], np.float32))
    asyncio.run(executor.run(stages, RowTable(rows)))
    assert seen == ["driver.credit"]
    assert [each for each in executor.activity.observed() if each["calls"]] == []


def test_the_status_says_what_is_at_work_and_what_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "events.jsonl").write_text('{"event": "prepared"}\n')
    RunFile("t", None, Driver.here()).write(tmp_path)
    seconds = [0.0]
    watchdog = Watchdog(lambda: seconds[0])
    with driving(tmp_path), watchdog.waiting("4 prompt groups"), watchdog.waiting(lambda: None):
        seconds[0] = 7.0
        at_work = [{"stage": "reference.infer", "writes": ["ref_logps"], "calls": 2, "share": 0.4}]
        put_status(tmp_path, {}, phase="grpo", at_work=at_work, waits=watchdog.waits())
        with pytest.raises(SystemExit):
            main(["status", str(tmp_path)])
    said = capsys.readouterr().out
    assert "at work: reference.infer ref_logps, 2 call(s), 40% of the last second" in said
    assert "waits 7 s for 4 prompt groups" in said and said.count("waits") == 1, "a pause is intended"
    assert watchdog.waits() == []
