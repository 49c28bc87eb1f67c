"""Rewards by an actor that another process started, in a namespace of its own, with none of our packages in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.errors import ConfigError, DataFailure, InfraFailure
from actors.group import start_worker
from actors.worker import LocalWorker
from orchestrator.config.schema import RewardConfig
from rewards.specs import check_reward, with_deadlines
from rewards.worker import RewardWorker, ScoreResult
from tests.own_ray import own_ray
from tests.ray.test_reward_actor import samples
from tests.unit.tiny import tiny_tokenizer

READY_S = 300.0

JOB = """
import asyncio, os, sys
import ray

@ray.remote(num_cpus=0, max_concurrency=8)
class Judge:
    def __init__(self):
        self.calls = 0

    async def score(self, prompts, completions, answer, factor=1.0, **columns):
        assert "actors" not in sys.modules and os.environ["JUDGE"] == "mine"
        return [None if text.startswith("x") else factor * len(p + text + a)
                for p, text, a in zip(prompts, completions, answer)]

    async def raises(self, prompts, completions, **columns):
        raise KeyError("no such rubric")

    async def short(self, prompts, completions, **columns):
        return [1.0]

    async def nan(self, prompts, completions, **columns):
        return [float("nan")] * len(completions)

    async def waits(self, prompts, completions, **columns):
        await asyncio.sleep(60)

    async def recovers(self, prompts, completions, **columns):
        self.calls += 1
        if self.calls == 1:
            raise ConnectionError("the index is being loaded")
        return [float(self.calls)] * len(completions)

    async def strict(self, prompts, completions):
        return [1.0] * len(completions)

    async def dies(self, prompts, completions, **columns):
        os._exit(1)

ray.init(address=sys.argv[1], namespace="judges", log_to_driver=False)
judge = Judge.options(name="math", runtime_env={"env_vars": {"JUDGE": "mine"}}).remote()
ray.get(judge.__ray_ready__.remote(), timeout=120)
print("started", flush=True)
sys.stdin.read()  # the actor is this job's, and ends with it
"""


class OtherJob:
    """The process that owns the actor."""

    def __init__(self, file: Path, address: str) -> None:
        file.write_text(JOB)
        command = [sys.executable, str(file), address]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd="/", **pipes)
        assert self.process.stdout is not None
        assert "started\n" in iter(self.process.stdout.readline, "")

    def end(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def other_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtherJob]:
    with own_ray(4, log_to_driver=False):
        job = OtherJob(tmp_path_factory.mktemp("other") / "judges.py", ray.get_runtime_context().gcs_address)
        yield job
        job.end()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def arguments(tokenizer: str, **keys: Any) -> dict[str, Any]:
    """Of a worker with that actor as its reward."""
    settings = {"actor": "ray://judges/math", "name": "judge", "retries": 0, **keys}
    specs = with_deadlines([check_reward(RewardConfig.model_validate(settings))], 30.0)
    return {"name": "reward/0", "rewards": specs, "tokenizer": tokenizer}


async def score(worker: Any, *texts: str, **columns: Any) -> ScoreResult:
    return (await worker.call("score", samples(*texts), "q", columns, timeout_s=READY_S))[0]


async def scored(tokenizer: str, **keys: Any) -> ScoreResult:
    """By a worker in this process, which is a job of its own."""
    worker = LocalWorker("reward/0", RewardWorker(**arguments(tokenizer, **keys)))
    await worker.call("ready", timeout_s=READY_S)
    return await score(worker, "abc", "xy", answer=np.array(["1", "23"])[0], other=Path("/tmp"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "raises"}, "reward judge: math.raises raised KeyError: 'no such rubric'"),
        ({"method": "short"}, "reward judge: returned 1 rewards for 2 completions"),
        ({"method": "nan"}, "returned NaN for completion 0"),
        ({"method": "strict"}, r"cannot be called as strict\(.*columns=\[\.\.\.\]"),
        ({"method": "no_such"}, "has no method 'no_such'"),
    ],
)
async def test_a_method_that_gives_no_rewards_is_a_data_failure(
    other_job: OtherJob, tokenizer: str, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataFailure, match=said):
        await scored(tokenizer, **keys)


async def test_the_columns_that_are_named_are_all_that_an_actor_is_given(other_job: OtherJob, tokenizer: str) -> None:
    assert (await scored(tokenizer, method="strict", columns=[])).total.tolist() == [1.0, 1.0]
    result = await scored(tokenizer, columns=["answer"])
    np.testing.assert_array_equal(result.total, [5.0, np.nan])


def test_what_is_no_name_of_an_actor_and_what_is_passed_anyway_are_refused(tokenizer: str) -> None:
    for actor in ("math", "ray://math", "http://judges/math"):
        with pytest.raises(ConfigError, match="write ray://NAMESPACE/NAME"):
            arguments(tokenizer, actor=actor)
    with pytest.raises(ConfigError, match="'prompts' is passed with every call"):
        arguments(tokenizer, options={"prompts": 1})


async def test_a_reward_worker_is_told_by_an_actor_of_another_job_what_completions_are_worth(
    other_job: OtherJob, tokenizer: str
) -> None:
    options = {"num_cpus": 0.5}
    keys = arguments(tokenizer, options={"factor": 2.0}, weight=0.5)
    worker = start_worker(
        "troupe/named/reward/0", RewardWorker, keys, ray_options=options, env={"OMP_NUM_THREADS": "1"}
    )
    await worker.call("ready", timeout_s=READY_S)
    result = await score(worker, "abc", "xy", answer="123")
    assert result.names == ("judge",)
    np.testing.assert_array_equal(result.rewards, [[14.0], [np.nan]])
    np.testing.assert_array_equal(result.total, [7.0, np.nan])
    await worker.kill()


# The last test: it ends the actor.
async def test_an_actor_that_is_slow_absent_or_dead_is_an_infra_failure_and_one_that_recovers_is_tried_again(
    other_job: OtherJob, tokenizer: str
) -> None:
    with pytest.raises(InfraFailure, match=r"reward judge: no answer within 0\.3 s"):
        await scored(tokenizer, method="waits", timeout_s=0.3)
    with pytest.raises(InfraFailure, match="there is no actor 'history' in the namespace 'judges'"):
        await scored(tokenizer, actor="ray://judges/history")
    assert (await scored(tokenizer, method="recovers", retries=1)).total.tolist() == [2.0, 2.0]
    worker = LocalWorker("reward/0", RewardWorker(**arguments(tokenizer, method="dies")))
    await worker.call("ready", timeout_s=READY_S)
    with pytest.raises(InfraFailure, match=r"reward judge: math: \w*Actor\w*Error"):
        await score(worker, "a", answer="1")
    with pytest.raises(InfraFailure, match="reward judge: "):
        await scored(tokenizer)
