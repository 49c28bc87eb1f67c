"""Rewards in actor processes of their own: hangs, files from elsewhere, async functions, functions written for TRL."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batch import Batch
from actors.errors import DataFailure, InfraFailure
from actors.group import RayWorker, start_worker
from actors.sharding import Shard
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.pool import Pool, PoolPolicy
from rewards.loading import RewardSpec
from rewards.worker import RewardWorker, ScoreResult
from tests.own_ray import own_ray
from tests.unit.tiny import tiny_tokenizer

READY_S = 300.0

FUNCTIONS = '''
import asyncio, os, time

HERE = os.getpid()

def hangs_in(marker, completions, **kwargs):
    """The first process that is asked hangs; whoever comes after answers."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return [1.0] * len(completions)
    while True:
        time.sleep(1)

async def slowly(completions, closed):
    while os.path.exists(closed):
        await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]

def trl_style(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, answer, **kwargs):
    log_extra("answer", answer)
    log_metric("step", trainer_state.global_step)
    return [float(prompt + text == "q" + expected) for prompt, text, expected in zip(prompts, completions, answer)]

class Unpicklable(Exception):
    def __init__(self, *, detail): super().__init__(detail)

def breaks(completions):
    raise Unpicklable(detail="the parser gave up")
'''


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with own_ray(8, log_to_driver=False):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "rewards.py").write_text(FUNCTIONS)  # our own package's name, on purpose
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def samples(*texts: str) -> Shard:
    """Completions of the prompt `q`, sampled by weights of version 3."""
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.encode("q" + text) for text in texts]
    lengths = [len(row) for row in ids]
    mask = np.concatenate([np.arange(length) > 0 for length in lengths])
    version = np.where(mask, 3, -1).astype(np.int32)
    batch = Batch.build(lengths, tokens=np.concatenate(ids).astype(np.int32), mask=mask, version=version)
    return Shard(batch, (tuple(range(len(ids))),))


def started(folder: Path, *specs: RewardSpec, index: int = 0) -> RayWorker:
    name = f"troupe/rewards-{time.monotonic_ns()}/reward/{index}"
    kwargs = {"name": f"reward/{index}", "rewards": list(specs), "tokenizer": str(folder / "tokenizer")}
    return start_worker(name, RewardWorker, kwargs, ray_options={"num_cpus": 0.5}, env={"OMP_NUM_THREADS": "1"})


async def score(worker: RayWorker, *texts: str, timeout_s: float = READY_S, **columns: Any) -> ScoreResult:
    return (await worker.call("score", samples(*texts), "q", columns, timeout_s=timeout_s))[0]


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file: while it is there, calls of one reward of `worker` wait."""
    return tmp_path_factory.mktemp("gate") / "closed"


@pytest.fixture(scope="module")
def worker(folder: Path, closed: Path) -> RayWorker:
    """One worker with four rewards: from a file (sync, async), and of ours."""
    specs = [
        RewardSpec(f"{folder}/rewards.py:trl_style", weight=2.0),
        RewardSpec(f"{folder}/rewards.py:slowly", weight=0.1, options={"closed": str(closed)}),
    ]
    worker = started(
        folder, *(spec.located() for spec in specs), RewardSpec("completion_length", options={"per_token": -1})
    )
    asyncio.run(worker.call("ready", timeout_s=READY_S))
    return worker


async def test_functions_of_a_file_score_in_a_process_that_never_saw_its_folder(worker: RayWorker) -> None:
    result = await score(worker, "abc", "xy", answer="abc")
    assert result.names == ("trl_style", "slowly", "completion_length")
    np.testing.assert_allclose(result.rewards, [[1.0, 3.0, -3.0], [0.0, 2.0, -2.0]])
    np.testing.assert_allclose(result.total, [2.0 + 0.3 - 3.0, 0.2 - 2.0], rtol=1e-6)
    assert result.metrics == {"step": 3.0}


async def test_prompts_are_scored_at_the_same_time_and_ping_answers_meanwhile(worker: RayWorker, closed: Path) -> None:
    closed.touch()
    calls = [asyncio.ensure_future(score(worker, "a", answer="a")) for _ in range(8)]
    async with asyncio.timeout(READY_S):
        while (await worker.call("ping", timeout_s=READY_S))["running"] < 8:
            await asyncio.sleep(0.02)
    assert not any(call.done() for call in calls)
    closed.unlink()
    totals = [float(result.total[0]) for result in await asyncio.gather(*calls)]
    assert totals == pytest.approx([2.0 + 0.1 - 1.0] * 8)


async def test_an_error_of_a_function_arrives_with_its_name_whatever_its_class(folder: Path) -> None:
    worker = started(folder, RewardSpec(f"{folder}/rewards.py:breaks").located())
    with pytest.raises(DataFailure, match="reward breaks raised Unpicklable: the parser gave up"):
        await worker.call("ready", timeout_s=READY_S)
        await score(worker, "a")
    await worker.kill()


async def test_a_reward_that_hangs_is_killed_at_its_deadline_and_a_replacement_scores(
    folder: Path, tmp_path: Path
) -> None:
    spec = RewardSpec(f"{folder}/rewards.py:hangs_in", options={"marker": str(tmp_path / "hung")}).located()
    events: list[tuple[str, dict[str, Any]]] = []
    started_workers: list[RayWorker] = []

    async def start(index: int) -> RayWorker:
        started_workers.append(started(folder, spec, index=index))
        return started_workers[-1]

    async def stop(worker: Any) -> None:
        await worker.kill()

    policy = PoolPolicy(
        slots=2,
        max_attempts=2,
        call_timeout_s=READY_S,
        start_timeout_s=READY_S,
        max_restarts=3,
        kill_on_timeout=True,
    )
    pool = Pool(
        "reward", 1, policy, start=start, stop=stop, event=lambda *event: events.append(event), watchdog=Watchdog()
    )
    await pool.open()
    try:

        def scored(worker: Any) -> Any:
            """With a deadline that only the worker misses that hangs."""
            deadline_s = 2.0 if worker is started_workers[0] else READY_S
            return worker.call("score", samples("a"), "q", {}, timeout_s=deadline_s)

        result, _ = await pool.call("prompt 0", scored)
        assert result.total.tolist() == [1.0]
        assert [kind for kind, _ in events if kind in ("retry", "evicted")] == ["evicted", "retry"]
        assert len(started_workers) == 2
        with pytest.raises(InfraFailure):
            await started_workers[0].call("ping", timeout_s=READY_S)
    finally:
        await pool.close()
