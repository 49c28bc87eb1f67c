"""A killed asynchronous run goes on with the groups that had ended: none is lost, none is trained on twice. In a
process without Ray, which is killed while the run is paused: what has ended by then depends on nothing's speed."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

from pyarrow import parquet

import troupe
from orchestrator.cluster.run_lock import driver_of
from tests.unit.tiny import tiny_model_folder
from tests.waiting import until

STEPS, BATCH, AHEAD = 20, 4, 2
REWARD = """
def counted(completions, number, **columns):
    with open({scored!r}, "a") as file:
        file.write(f"{{number[0]}}\\n")
    return [float(sum(map(ord, text)) % 5) for text in completions]
"""


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def test_groups_that_had_ended_before_a_kill_are_trained_on_once_and_not_sampled_again(tmp_path: Path):
    scored = tmp_path / "scored.txt"
    (tmp_path / "reward.py").write_text(REWARD.format(scored=str(scored)))
    rows = ({"prompt": f"a{number}", "number": number} for number in range(STEPS * BATCH))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "method": "grpo",
        "options": {"num_generations": 4, "correction": "token_truncate"},
        "model": {"path": str(tiny_model_folder(tmp_path, hidden=32))},
        "roles": {"rollout": {"engine": "hf"}},
        "rewards": [{"fn": f"{tmp_path}/reward.py:counted"}],
        "data": {"path": str(tmp_path / "rows.jsonl"), "shuffle": False},
        "sampling": {"max_tokens": 4},
        "train": {"steps": STEPS, "batch_size": BATCH, "max_staleness": AHEAD, "learning_rate": 1e-3},
        "output": str(tmp_path / "runs"),
        "logging": {"trackers": [], "curves": False, "completions_every": 1},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(tree))
    handle = troupe.start(tmp_path / "recipe.json", local=True)
    try:
        next(handle.metrics())
        step = handle.pause()
        admitted = min(STEPS, step + AHEAD + 1) * BATCH
        until(lambda: len(lines(scored)) >= admitted, "groups that were admitted")
        checkpoint = handle.checkpoint()
    finally:
        driver = driver_of(handle.folder)
        if driver is not None and handle.running:
            os.kill(driver.pid, signal.SIGKILL)
    until(lambda: not handle.running, "end of the killed process")

    before = Counter(map(int, lines(scored)))
    result = troupe.resume(handle.folder, local=True).result(timeout_s=120)
    (restored,) = (
        event for event in map(json.loads, lines(handle.folder / "events.jsonl")) if "groups_restored" in event["event"]
    )
    tables = sorted((handle.folder / "completions").glob("*.parquet"))
    trained = {file.stem: set(parquet.read_table(file)["number"].to_pylist()) for file in tables}
    every = [number for numbers in trained.values() for number in numbers]
    assert len(every) == len(set(every)) == STEPS * BATCH
    earlier = {number for name, numbers in trained.items() if int(name[-6:]) <= step for number in numbers}
    assert restored["groups"] >= 1 and (checkpoint / "finished_groups.npz").is_file()
    after = Counter(map(int, lines(scored)))
    again = [number for number in before.keys() - earlier if after[number] > 1]
    assert len(before.keys() - earlier) - len(again) == restored["groups"] == admitted - step * BATCH
    assert set(before) <= set(every), "what had ended is trained on"
    metrics = [json.loads(line) for line in lines(handle.folder / "metrics.jsonl")]
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert max(line["staleness/max"] for line in metrics) <= AHEAD
    assert any(line["staleness/max"] > 0 for line in metrics)
    assert result.model is not None
