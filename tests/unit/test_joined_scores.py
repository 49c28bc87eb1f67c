"""Prompts that are scored at the same time by quick functions share calls of a reward worker, which is in this process
and writes down which calls it gets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import DataFailure, InfraFailure
from actors.worker import LocalWorker
from orchestrator.batches.row_table import RowTable
from orchestrator.cluster.failures import Watchdog
from orchestrator.cluster.pool import Pool, PoolPolicy
from orchestrator.collection.scoring import Scored, Scoring, ToScore
from rewards.loading import RewardSpec
from rewards.worker import Asked, RewardWorker
from tests.unit.reward_stage import samples
from tests.unit.tiny import tiny_tokenizer

POLICY = PoolPolicy(
    slots=1, max_attempts=2, call_timeout_s=60.0, start_timeout_s=60.0, max_restarts=9, ping_timeout_s=60.0
)
FUNCTION = """
import threading, time
running = threading.Semaphore(1)

def length(completions, extra):
    if "x" in completions[0]:
        raise ValueError("no x")
    if not running.acquire(blocking=False):
        raise ValueError("called while it runs")
    time.sleep(0.002)  # so that others come meanwhile, if they may
    running.release()
    return [float(len(completion) + extra[0]) for completion in completions]
"""
ALWAYS, NEVER = float("inf"), -1.0  # seconds below which a function is quick
TEXTS = (("a", "bc"), ("abc",), ("b", "c", "ab"), ("c",))


class Noting(LocalWorker):
    calls: list[str]

    async def call(self, method: str, *args: Any, timeout_s: float, task_name: str | None = None, **kwargs: Any) -> Any:
        if method.startswith("score"):
            self.calls.append(method)
        return await super().call(method, *args, timeout_s=timeout_s, task_name=task_name, **kwargs)


async def scored_at_once(
    folder: Path, *prompts: tuple[str, ...], quick_s: float
) -> tuple[list[Scored | BaseException], list[str]]:
    """(what each is given, calls), after one prompt that is scored first, which says how long the function takes."""
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "mine.py").write_text(FUNCTION)
    spec = RewardSpec(f"{folder / 'mine.py'}:length").located()
    worker = Noting("reward/0", RewardWorker("reward/0", (spec,), str(folder / "tokenizer")))
    worker.calls = []

    async def start(index: int) -> LocalWorker:
        return worker

    pool = Pool(
        "reward",
        1,
        POLICY,
        start=start,
        stop=lambda worker: worker.kill(),
        event=lambda kind, detail: None,
        watchdog=Watchdog(),
    )
    await pool.open()
    try:
        scoring = Scoring({"reward": pool}, {}, (), _nobody, quick_s=quick_s)
        await scoring.score("reward", asked(0, ("a",)))
        work = (scoring.score("reward", asked(number, texts)) for number, texts in enumerate(prompts, 1))
        return await asyncio.gather(*work, return_exceptions=True), worker.calls[1:]
    finally:
        await pool.close()


def asked(number: int, texts: tuple[str, ...]) -> ToScore:
    prompt = SimpleNamespace(id=number, prompt="q", columns={"extra": 100 * number})
    return ToScore(f"run/{number}", number, prompt, RowTable(samples(*texts).batch))


async def _nobody(*_: Any) -> Any:
    raise AssertionError("no judge is asked")


async def test_prompts_of_quick_functions_share_calls_which_call_them_one_at_a_time_and_each_gets_its_own_rewards(
    tmp_path: Path,
) -> None:
    together, calls = await scored_at_once(tmp_path, *TEXTS, quick_s=ALWAYS)
    alone, single_calls = await scored_at_once(tmp_path, *TEXTS, quick_s=NEVER)
    assert (calls, single_calls) == (["score_all"] * 2, ["score"] * 4)
    assert [each.result.total.tolist() for each in together if isinstance(each, Scored)] == [
        [101.0, 102.0],
        [203.0],
        [301.0, 301.0, 302.0],
        [401.0],
    ]
    for ours, theirs in zip(together, alone, strict=True):
        assert isinstance(ours, Scored) and isinstance(theirs, Scored)
        assert ours.result.total.tolist() == theirs.result.total.tolist()
        assert ours.texts[0].target == theirs.texts[0].target


async def test_a_function_that_raises_for_one_prompt_fails_that_one_alone(tmp_path: Path) -> None:
    found, calls = await scored_at_once(tmp_path, ("a",), ("x",), ("b",), ("c",), quick_s=ALWAYS)
    assert calls == ["score_all"] * 2
    assert [type(each) for each in found] == [Scored, DataFailure, Scored, Scored]
    with pytest.raises(DataFailure, match="no x"):
        raise next(each for each in found if isinstance(each, DataFailure))


async def test_prompts_do_not_wait_for_one_of_their_call_that_is_slow(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "mine.py").write_text(FUNCTION)
    worker = RewardWorker(
        "reward/0", (RewardSpec(f"{tmp_path / 'mine.py'}:length").located(),), str(tmp_path / "tokenizer")
    )
    worker.ready()
    given = [Asked(samples(*texts), "q", {"extra": 0}, 0) for texts in TEXTS]
    (first, *others), *texts = await worker.score_all(given, 0.0)
    assert not isinstance(first, Exception) and first.total.tolist() == [1.0, 2.0]
    assert [type(each) for each in others] == [InfraFailure] * 3
    assert [len(each.texts) for each in texts] == [2, 0, 0, 0]
    worker.close()
