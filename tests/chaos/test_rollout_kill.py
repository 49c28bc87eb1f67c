"""`kill -9` of a rollout worker in the middle of a batch: no sample is lost, none is doubled."""

import os
import signal
from collections import Counter

import pytest

from tests.runs import Run

pytestmark = pytest.mark.timeout(900)  # whole runs, several processes each; a busy machine is slow to start them


def test_a_run_survives_kill_9_of_its_rollout_workers_and_trains_each_sample_once(tmp_path):
    run = Run(
        tmp_path,
        {
            "train": {"steps": 14, "batch_size": 16},
            "sampling": {"max_tokens": 40},
            "roles": {"rollout": {"workers": 2}},
        },
    )
    killed = []
    for at_step in (2, 5):
        run.until(lambda at_step=at_step: run.steps() >= at_step, f"step {at_step}")
        alive = [e for e in run.events("joined") if e["role"] == "rollout" and e["worker"] not in killed]
        os.kill(alive[0]["pid"], signal.SIGKILL)
        killed.append(alive[0]["worker"])
    run.wait()

    trained = Counter(row["position"] for row in run.completions())
    assert trained == Counter(dict.fromkeys(range(14 * 16), 4)), "a sample was lost or doubled"
    assert {event["worker"] for event in run.events("evicted")} >= set(killed)
    joined = [event["worker"] for event in run.events("joined") if event["role"] == "rollout"]
    assert len(joined) == len(set(joined)) >= 3, "a replacement joined, under a name of its own"
    versions = [row["version"] for row in run.completions()]
    assert sorted(set(versions)) == list(range(14)), "every sample came from the weights that it trained"
