"""One run on a Ray of its own, followed and steered from Python, with a user's own method, loss, reward and engine in
files outside of the repository. The tests follow one another: each finds the run as the one before left it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow.parquet as pq
import pytest

import troupe
from actors.errors import ConfigError, Interrupted, RunError
from orchestrator.checkpoint import verify
from tests.plugin_files import online

pytestmark = pytest.mark.timeout(900)  # a busy machine is slow to start processes

RECIPE = """
name: t
output: {output}
model: {{path: example:arithmetic}}
method: reinforce.py:reinforce
options: {{weight: 0.5}}
data: {{path: example:arithmetic}}
rewards: [{{fn: reinforce.py:spread}}]
train: {{steps: 100000, batch_size: 8, learning_rate: 1.0e-3, scheduler: constant}}
sampling: {{max_tokens: 5}}
roles:
  policy: {{cpus: 0.5}}
  rollout: {{engine: "reinforce.py:Digits", cpus: 0.1, engine_options: {{vocab: 20}}}}
  reward: {{cpus: 0.1}}
weights: {{timeout_s: 30}}
cluster: {{num_cpus: 6, object_store_mib: 100, watchdog_s: 1}}
logging: {{completions_every: 100000, trackers: []}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[troupe.RunHandle]:
    where = tmp_path_factory.mktemp("user")
    mine = online(where / "code")
    (where / "recipe.yaml").write_text(RECIPE.format(output=where / "runs"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(mine.parent)
        handle = troupe.start(where / "recipe.yaml")
    try:
        yield handle
    finally:
        handle.stop()


def until(condition: Callable[[], Any], what: str, run: troupe.RunHandle) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert run.running, f"the run ended before {what}: {run.status().state}"
        assert time.monotonic() < deadline, f"no {what}: {run.status()}"
        time.sleep(0.1)


def serves(run: troupe.RunHandle, count: int) -> None:
    wanted = {"desired": count, "serving": count}
    until(lambda: run.status().workers["rollout"] == wanted, f"{count} rollout worker(s)", run)


def goes_on(run: troupe.RunHandle, steps: int) -> None:
    reached = run.status().step
    assert any(line["step"] >= reached + steps for line in run.metrics(timeout_s=300)), f"it ended before {steps} steps"


def events(run: troupe.RunHandle, kind: str) -> list[dict[str, Any]]:
    """What happened to rollout workers so far."""
    lines = map(json.loads, (run.folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == kind and line["role"] == "rollout"]


def trained_by(run: troupe.RunHandle) -> set[str]:
    """The workers whose samples were trained on."""
    files = (run.folder / "completions").glob("*.parquet")
    return {row for file in files for row in pq.read_table(file, columns=["worker"])["worker"].to_pylist()}


def test_a_users_own_code_trains_in_processes_that_never_saw_its_files(run: troupe.RunHandle):
    assert run.status().state == "starting"
    first = next(run.metrics())
    assert (first["step"], first["phase"]) == (1, "reinforce")
    assert first["grad_norm"] > 0 and first["rewards/spread/std"] > 0
    assert first["tenths"] == pytest.approx(10 * first["loss"], rel=1e-3), "with a module that lies beside the file"
    assert run.status().state == "running"
    for file in (run.folder.parents[1] / "code").iterdir():  # workers that join later have the text from the driver
        file.write_text("raise RuntimeError('a worker has read this file')")


def test_new_workers_take_part_and_surplus_ones_leave_without_being_killed(run: troupe.RunHandle):
    with pytest.raises(ConfigError, match=r"no role policy whose workers come and go; it can scale reward, rollout"):
        run.scale("policy", 2)
    run.scale("rollout", 3)
    serves(run, 3)
    goes_on(run, 10)
    run.scale("rollout", 1)
    serves(run, 1)
    goes_on(run, 3)
    joined = [event["worker"] for event in events(run, "joined")]
    assert sorted(joined) == [0, 1, 2]
    assert len(trained_by(run)) == 3, "every worker that joined was given prompts"
    assert not events(run, "evicted"), "scaling down drains, it does not kill"


def test_a_run_that_is_scaled_to_nothing_waits_says_so_once_and_goes_on_each_time(run: troupe.RunHandle):
    console = run.folder / "console.log"
    run.scale("rollout", 0)
    serves(run, 0)
    printed, stands = len(console.read_text()), run.status().step
    time.sleep(8)  # longer than the console needs to complain of a wait: it looks every 5 s for one of 1 s
    assert run.status().step <= stands + 1 and run.status().state == "running"
    assert "waiting" not in console.read_text()[printed:]
    assert console.read_text().count("paused=whatever needs a rollout worker") == 1
    again = troupe.attach(run.folder)  # as another notebook finds it
    for _ in range(2):  # a worker that comes late catches up each time
        again.scale("rollout", 1)
        goes_on(again, 3)
        again.scale("rollout", 0)
        serves(run, 0)
    assert not events(run, "evicted")
    again.scale("rollout", 2)
    serves(run, 2)


def test_a_paused_run_makes_no_step_and_can_be_saved(run: troupe.RunHandle):
    done = run.pause()
    assert run.status().state == "paused"
    saved = troupe.attach(run.folder).checkpoint()
    assert verify(saved) is None and saved.name == f"step-{done:08d}"
    assert (run.status().step, run.status().state) == (done, "paused")
    assert run.resume() == done
    goes_on(run, 1)


def test_a_run_that_another_client_stops_is_refused_further_requests_and_goes_on_later(run: troupe.RunHandle):
    last = troupe.attach(run.folder).stop()
    assert last is not None and verify(last) is None
    with pytest.raises(Interrupted) as ended:
        run.result()
    assert ended.value.exit_code == 143
    with pytest.raises(RunError, match="has ended: stopped by SIGTERM; `troupe resume"):
        run.scale("rollout", 2)
    stopped = int(last.name.removeprefix("step-"))
    code = run.folder.parents[1] / "code"
    online(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(code)
        longer = troupe.resume(run.folder, train__steps=stopped + 1)
    assert longer.result(timeout_s=300).model == run.folder / "checkpoints" / f"step-{stopped + 1:08d}" / "model"
    assert [line["step"] for line in longer.metrics()] == list(range(1, stopped + 2))
