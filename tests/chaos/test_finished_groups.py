"""A killed asynchronous run goes on with the groups that had ended: none is lost, none is trained on twice. In a
process without Ray, which is killed while the run is paused: what has ended by then depends on nothing's speed."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from pyarrow import parquet

import troupe
from actors.columns import Head
from orchestrator.cluster.run_lock import driver_of
from orchestrator.run_handle import RunHandle
from tests.contract.test_model_reward_runs import scoring_folder
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


def recipe(where: Path, **changes: Any) -> dict[str, Any]:
    (where / "reward.py").write_text(REWARD.format(scored=str(where / "scored.txt")))
    rows = ({"prompt": f"a{number}", "number": number} for number in range(STEPS * BATCH))
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "method": "grpo",
        "options": {"num_generations": 4, "correction": "token_truncate"},
        "model": {"path": str(tiny_model_folder(where, hidden=32))},
        "roles": {"rollout": {"engine": "hf"}},
        "rewards": [{"fn": f"{where}/reward.py:counted"}],
        "data": {"path": str(where / "rows.jsonl"), "shuffle": False},
        "sampling": {"max_tokens": 4},
        "train": {"steps": STEPS, "batch_size": BATCH, "max_staleness": AHEAD, "learning_rate": 1e-3},
        "output": str(where / "runs"),
        "logging": {"trackers": [], "curves": False, "completions_every": 1},
    }
    return tree | changes


def killed_in_a_pause(where: Path, tree: dict[str, Any]) -> tuple[RunHandle, int, Path]:
    """A run that was killed when all groups had ended that may be ahead; the step, and its checkpoint."""
    (where / "recipe.json").write_text(json.dumps(tree))
    handle = troupe.start(where / "recipe.json", local=True)
    try:
        next(handle.metrics())
        step = handle.pause()
        admitted = min(STEPS, step + AHEAD + 1) * BATCH
        until(lambda: len(lines(where / "scored.txt")) >= admitted, "groups that were admitted")
        checkpoint = handle.checkpoint()
    finally:
        driver = driver_of(handle.folder)
        if driver is not None and handle.running:
            os.kill(driver.pid, signal.SIGKILL)
    until(lambda: not handle.running, "end of the killed process")
    assert (checkpoint / "finished_groups.npz").is_file()
    return handle, step, checkpoint


def scored(where: Path) -> Counter[int]:
    """How often each prompt's group was scored."""
    return Counter(map(int, lines(where / "scored.txt")))


def restored(run: Path) -> list[int]:
    """Groups that resumes went on with."""
    events = map(json.loads, lines(run / "events.jsonl"))
    return [event["groups"] for event in events if "groups_restored" in event["event"]]


def test_groups_that_had_ended_before_a_kill_are_trained_on_once_and_not_sampled_again(tmp_path: Path):
    handle, step, _ = killed_in_a_pause(tmp_path, recipe(tmp_path))
    admitted = min(STEPS, step + AHEAD + 1) * BATCH
    before = scored(tmp_path)
    result = troupe.resume(handle.folder, local=True).result(timeout_s=120)
    (kept,) = restored(handle.folder)
    tables = sorted((handle.folder / "completions").glob("*.parquet"))
    trained = {file.stem: set(parquet.read_table(file)["number"].to_pylist()) for file in tables}
    every = [number for numbers in trained.values() for number in numbers]
    assert len(every) == len(set(every)) == STEPS * BATCH
    earlier = {number for name, numbers in trained.items() if int(name[-6:]) <= step for number in numbers}
    assert kept >= 1
    after = scored(tmp_path)
    again = [number for number in before.keys() - earlier if after[number] > 1]
    assert len(before.keys() - earlier) - len(again) == kept == admitted - step * BATCH
    assert set(before) <= set(every), "what had ended is trained on"
    metrics = [json.loads(line) for line in lines(handle.folder / "metrics.jsonl")]
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert max(line["staleness/max"] for line in metrics) <= AHEAD
    assert any(line["staleness/max"] > 0 for line in metrics)
    assert result.model is not None


def test_groups_that_a_reward_model_scored_are_sampled_again_when_another_one_takes_its_place(tmp_path: Path):
    """Each prompt is in one batch alone: those of the checkpoint are scored twice, and a warning says why."""
    first, second = (scoring_folder(tmp_path, Head.ROW_SCALAR, seed) for seed in (1, 2))
    tree = recipe(tmp_path)
    tree["roles"] |= {"rm": {"kind": "frozen", "model": first}}
    tree["rewards"] += [{"role": "rm"}]
    handle, step, _ = killed_in_a_pause(tmp_path, tree)
    ahead = set(scored(tmp_path)) - set(range(step * BATCH))
    assert len(ahead) >= BATCH, "nothing had ended that the next step would train on"
    troupe.resume(handle.folder, [f"roles.rm.model={second}"], local=True).result(timeout_s=120)
    assert restored(handle.folder) == []
    assert {number for number, times in scored(tmp_path).items() if times > 1} >= ahead
    said = " ".join((handle.folder / "console.log").read_text().split())
    assert "the finished prompt groups of the checkpoint are sampled again: roles.rm.model changed since" in said
